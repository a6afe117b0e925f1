"""What clients' packets need of the host: addresses, forwarding, the firewall, DNS, buffers."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from fzg.host import sysctl
from fzg.host.dns_server import PORT as DNS_PORT
from fzg.host.facts import Unreadable
from fzg.ops.doctor.check import Check, State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fzg.host.facts import HostFacts
    from fzg.ops.doctor.check import Seen

# 1280 inside, WireGuard 32, channel 4, UDP 8, IPv6 40 (IPv4 20): what a full packet measures outside.
_FULL_PACKET: Final = {socket.AF_INET: 1344, socket.AF_INET6: 1364}
_NAMED: Final = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}
_STRICT: Final = "1"  # rp_filter


def checks(seen: Seen) -> Iterator[Check]:
    """From the links upwards."""
    yield ipv4(seen.host)
    yield ipv6(seen.host)
    yield mtu(seen.host)
    yield forwarding(seen)
    yield reverse_path(seen.host)
    yield from firewall(seen)
    yield overlap(seen.host)
    yield nameservers(seen.host)
    yield buffers(seen)


def ipv4(host: HostFacts) -> Check:
    """A way to the internet."""
    return _family(host, socket.AF_INET)


def ipv6(host: HostFacts) -> Check:
    """A host without is served over IPv4 only."""
    if not host.has_ipv6:
        what = "the kernel runs without IPv6: clients reach IPv4 resources only"
        return Check("ipv6", State.WARN, what, "remove ipv6.disable=1 from the kernel's command line if you need it")
    if _ipv6_is_off(host):
        what = "IPv6 is disabled on this host: clients reach IPv4 resources only"
        return Check("ipv6", State.WARN, what, f"if you need it: sudo sysctl -w {sysctl.DISABLE_IPV6}=0")
    return _family(host, socket.AF_INET6)


def _family(host: HostFacts, family: socket.AddressFamily) -> Check:
    name = _NAMED[family]
    way = host.ways.get(family)
    if way is not None:
        return Check(name.lower(), State.OK, f"{name} leaves from {way.source}")
    if family == socket.AF_INET6:
        return Check(name.lower(), State.OK, "no IPv6 route to the internet, which is no fault where IPv4 has one")
    if socket.AF_INET6 in host.ways:
        return Check(name.lower(), State.OK, "no IPv4 route to the internet; portal and relays are reached over IPv6")
    what = "there is no route to the internet"
    return Check(name.lower(), State.FAIL, what, "ip route show default; sudo ip route add default via ROUTER")


def mtu(host: HostFacts) -> Check:
    """A full packet of a client must leave in one piece."""
    for number, way in host.ways.items():
        family = socket.AddressFamily(number)
        least = _FULL_PACKET[family]
        if way.mtu < least:
            interface = next(iter(host.default_interfaces), "INTERFACE")
            what = (
                f"packets of more than {way.mtu} bytes cannot leave over {_NAMED[family]}, clients' take up to {least}"
            )
            advice = f"sudo ip link set {interface} mtu {least} (or more, if the line carries it)"
            return Check("mtu", State.WARN, what, advice)
    sizes = ", ".join(f"{_NAMED[socket.AddressFamily(family)]} {way.mtu}" for family, way in host.ways.items())
    return Check("mtu", State.OK if sizes else State.UNKNOWN, sizes or "no way out to measure")


def forwarding(seen: Seen) -> Check:
    """The sysctls that the gateway sets at its start; from then on they must stand."""
    host, name = seen.host, "forwarding"
    wanted = [
        setting
        for setting in sysctl.FORWARDING
        if setting.name in host.sysctls and not (setting.name.startswith("net.ipv6") and _ipv6_is_off(host))
    ]
    wrong = [setting for setting in wanted if host.sysctls[setting.name] != setting.value]
    if not wrong:
        return Check(name, State.OK, "this host forwards packets")
    shown = " ".join(str(setting) for setting in wrong)
    advice = f"sudo {seen.plan.command} host-setup (or: sudo sysctl -w {shown})"
    if host.container in ("docker", "podman"):
        advice = "start the container with " + " ".join(f"--sysctl {setting}" for setting in wrong)
    if seen.serves_here:
        what = f"clients reach nothing behind this host, since something undid {shown}"
        return Check(name, State.FAIL, what, advice)
    fixed = [setting for setting in wrong if setting.name in host.fixed_sysctls]
    if not fixed:
        return Check(name, State.OK, f"the gateway turns it on when it starts: {shown}")
    what = f"this host does not forward packets, and uid {host.uid} may not change that: {shown}"
    return Check(name, State.FAIL if host.uid == 0 else State.WARN, what, advice)


def _ipv6_is_off(host: HostFacts) -> bool:
    return host.sysctls.get(sysctl.DISABLE_IPV6) == "1"


def reverse_path(host: HostFacts) -> Check:
    """Strict checking drops answers that come by another way than we would take."""
    values = {name: value for name, value in host.sysctls.items() if name.endswith(".rp_filter")}
    strict = [name for name, value in values.items() if value == _STRICT]
    loose = values.get("net.ipv4.conf.all.rp_filter") == "2"
    if strict and not loose and len(host.default_interfaces) > 1:
        ways = " and ".join(host.default_interfaces)
        what = (
            f"packets that come in by another of {ways} than answers would leave by are dropped (rp_filter is strict)"
        )
        return Check("reverse-path", State.WARN, what, "sudo sysctl -w net.ipv4.conf.all.rp_filter=2")
    return Check("reverse-path", State.OK, "strict, with one way out" if strict and not loose else "not in the way")


def firewall(seen: Seen) -> Iterator[Check]:
    """Foreign chains that drop, and our own masquerading."""
    host = seen.host
    names = ("firewall-forward", "firewall-dns", "masquerade")
    if isinstance(host.firewall, Unreadable):
        remedy = "ask as root" if host.uid else ""
        for name in names:
            yield Check(name, State.UNKNOWN, f"the firewall cannot be read: {host.firewall.reason}", remedy)
        return
    yield _forward(seen)
    blocked = host.firewall.input
    if blocked:
        chains = ", ".join(f"{each.chain}{_owner(host, each.chain)}" for each in blocked)
        advice = "as root: " + "; ".join(dict.fromkeys(each.command for each in blocked))
        what = f"{chains} drops what comes in, also clients' DNS queries for SRV and TXT records to port {DNS_PORT}"
        yield Check("firewall-dns", State.WARN, what, advice)
    else:
        yield Check("firewall-dns", State.OK, f"port {DNS_PORT} of {host.interface} is open to clients")
    if not seen.plan.masquerade:
        yield Check("masquerade", State.OK, "not wanted (--masquerade off); resources need a route back to clients")
    elif not seen.serves_here:
        yield Check("masquerade", State.OK, "the gateway sets it up when it starts")
    elif "ip" in host.firewall.masqueraded:
        yield Check("masquerade", State.OK, "clients' packets leave with this host's address")
    else:
        what = "the gateway's nftables table is gone, so resources do not know where to answer"
        yield Check("masquerade", State.FAIL, what, "wait a minute, it repairs that; else restart the gateway")


def _forward(seen: Seen) -> Check:
    host, name = seen.host, "firewall-forward"
    assert not isinstance(host.firewall, Unreadable)
    blocked = host.firewall.forward
    if not blocked:
        if host.legacy_firewall:
            return Check(
                name, State.WARN, "rules of the legacy iptables are in force, which cannot be inspected", _legacy(host)
            )
        return Check(name, State.OK, "no chain drops what clients send through this host")
    chains = ", ".join(f"{each.chain}{_owner(host, each.chain)}" for each in blocked)
    advice = "; ".join(
        f"sudo nft insert rule {each.chain} {match} {host.interface} accept"
        for each in blocked
        for match in each.missing
    )
    if seen.serves_here:
        what = f"the firewall chain {chains} drops what clients send through this host"
        return Check(name, State.FAIL, what, f"{advice} (the gateway does so itself within a minute, if it may)")
    what = f"the firewall chain {chains} drops forwarded packets; the gateway has its own accepted there when it starts"
    return Check(name, State.WARN, what, f"nothing, or by hand: {advice}")


def _owner(host: HostFacts, chain: str) -> str:
    """Whose chain it is, as far as its name and the host's programs tell."""
    family, table, *_ = chain.split()
    if table == "firewalld":
        return " (firewalld)"
    if family in ("ip", "ip6") and table == "filter":
        tools = [tool for tool in host.firewall_tools if tool != "firewalld"]
        return f" ({', '.join(tools or ['iptables, as Docker and ufw use it'])})"
    return ""


def _legacy(host: HostFacts) -> str:
    return "; ".join(f"sudo iptables-legacy -I FORWARD {way} {host.interface} -j ACCEPT" for way in ("-i", "-o"))


def overlap(host: HostFacts) -> Check:
    """Networks of the host that the tunnel would swallow."""
    name = "address-overlap"
    advice = "renumber that network, or run the gateway on a host that need not reach it"
    if host.overlaps:
        return Check(name, State.WARN, _clause(host.overlaps[0]), advice)
    if host.tunnel_addresses:
        what = f"this host's address {', '.join(host.tunnel_addresses)} lies in the range of clients' addresses"
        return Check(name, State.WARN, what, advice)
    return Check(name, State.OK, "no network of this host lies in the ranges of clients' addresses")


def _clause(sentences: str) -> str:
    """The finding of a warning of the host's; its remedy is said apart."""
    return sentences.partition(". ")[0]


def nameservers(host: HostFacts) -> Check:
    """Who resolves DNS resources."""
    if host.nameservers:
        return Check("nameservers", State.OK, ", ".join(host.nameservers))
    what = _clause(host.dns_problem) or "/etc/resolv.conf names no nameserver, so DNS resources cannot be resolved"
    return Check("nameservers", State.WARN, what, "add a line such as nameserver 192.0.2.53 to /etc/resolv.conf")


def buffers(seen: Seen) -> Check:
    """The ceilings; CAP_NET_ADMIN may exceed them for its own sockets."""
    host, name = seen.host, "buffers"
    low = {
        key: value
        for key, least in sysctl.CEILINGS
        if (value := host.sysctls.get(key, "")).isdigit() and int(value) < least
    }
    if not low:
        return Check(name, State.OK, "socket buffers may be as large as the gateway wants them")
    shown = ", ".join(f"{key}={value}" for key, value in low.items())
    note = f"{shown} is small, which costs throughput only where a gateway without CAP_NET_ADMIN opens the sockets"
    return Check(name, State.OK, note, f"sudo {seen.plan.command} host-setup")
