"""Everything the gateway changes on its host's network: one object for the application.

All methods are synchronous and take a few milliseconds, most of it in the kernel's commit of nftables. They must not
run at the same time; a pool of one native thread keeps them in order and out of the event loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fzg.host import input_chains, netlink, sysctl, tun
from fzg.host.errors import HostError, Report
from fzg.host.masquerade import Masquerade
from fzg.host.netlink import Configured
from fzg.host.nftables import Firewall, legacy_tables_note

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

    from fzg.host.input_chains import Obstacle

__all__ = ["INTERFACE", "Configured", "HostError", "HostNetwork", "Report"]

INTERFACE: Final = tun.DEVICE_NAME


class HostNetwork:
    """Prepares the host once, configures the TUN device on each `init`, and takes back what can be taken back."""

    def __init__(self, interface: str = INTERFACE) -> None:
        self._interface = interface
        self._firewall = Firewall(interface)
        self._mode = Masquerade.OFF
        self._addresses: tuple[IPv4Address | None, IPv6Address | None] | None = None
        self._obstacles: list[Obstacle] = []

    def prepare(self, masquerade: Masquerade, *, raise_buffers: bool = True) -> Report:
        """Buffer ceilings, forwarding, masquerading, accepts in foreign chains; replaces what a killed process left.

        Raises HostError when masquerading is required (`on`) and impossible.
        """
        self._mode = masquerade
        report = sysctl.raise_buffer_ceilings() if raise_buffers else Report()
        report.add(sysctl.enable_forwarding(enable_ipv6=masquerade is Masquerade.ON))
        report.add(self._firewall.apply(masquerade))
        if note := legacy_tables_note(self._interface):
            report.notes.append(note)
        report.warnings.extend(netlink.overlap_warnings(self._interface))
        self._look_at_input(report)
        return report

    def configure(self, ipv4: IPv4Address | None, ipv6: IPv6Address | None) -> Configured:
        """Addresses, link, rules and routes for these tunnel addresses; on every `init`.

        Raises HostError when neither family works or the device is gone.
        """
        configured = netlink.configure_device(self._interface, ipv4, ipv6)
        self._addresses = (ipv4, ipv6)
        return configured

    def repair(self) -> Report:
        """Put back what other tools flushed, and accept in chains that began to drop since; every minute or so.

        A restart of systemd-networkd deletes rules it did not make, one of Docker sets the policy of FORWARD to drop.
        """
        report = Report() if self._firewall.is_intact() else self._firewall.apply(self._mode)
        self._look_at_input(report)
        if self._addresses is not None:
            try:
                report.warnings.extend(netlink.configure_device(self._interface, *self._addresses).warnings)
            except (HostError, OSError) as error:
                report.warnings.append(str(error))
        return report

    def _look_at_input(self, report: Report) -> None:
        """Warn of chains that keep clients from our DNS server, once while they do; to open them is for their owner."""
        found = self._firewall.obstacles(self._addresses)
        if found and found != self._obstacles:
            report.warnings.append(input_chains.warning(found, self._interface))
        self._obstacles = found

    def remove(self) -> Report:
        """Delete rules, routes and nftables objects; the sysctls stay, since others may rely on them by now."""
        self._addresses = None
        report = self._firewall.remove()
        try:
            netlink.remove_rules_and_routes()
        except OSError as error:
            report.warnings.append(
                f"The routing rules may be left behind ({error.strerror or error}). Run as root: "
                f"ip rule del priority {netlink.RULE_PRIORITY}; ip -6 rule del priority {netlink.RULE_PRIORITY}"
            )
        return report
