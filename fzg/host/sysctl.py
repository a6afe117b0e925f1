"""Kernel parameters: forwarding, and the ceilings of socket buffers (spec operations 1.6, 2.2)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from fzg.host.errors import Report

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Spec operations 1.6: what each UDP socket asks for.
RECEIVE_BUFFER_BYTES: Final = 16 * 1024 * 1024
SEND_BUFFER_BYTES: Final = 2 * 1024 * 1024
CEILINGS: Final = (("net.core.rmem_max", RECEIVE_BUFFER_BYTES), ("net.core.wmem_max", SEND_BUFFER_BYTES))

PROC_SYS: Final = Path("/proc/sys")
_IPV6: Final = "net.ipv6."
DISABLE_IPV6: Final = "net.ipv6.conf.all.disable_ipv6"


class Setting(NamedTuple):
    """A sysctl by its dotted name, and the value it must have."""

    name: str
    value: str

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


# Spec operations 2.2, in its order.
FORWARDING: Final = (
    Setting("net.ipv4.ip_forward", "1"),
    Setting("net.ipv4.conf.all.src_valid_mark", "1"),
    Setting(DISABLE_IPV6, "0"),
    Setting("net.ipv6.conf.all.forwarding", "1"),
    Setting("net.ipv6.conf.default.forwarding", "1"),
)


def enable_forwarding(*, enable_ipv6: bool, root: Path = PROC_SYS) -> Report:
    """Turn forwarding on; one warning names the command for what this process may not change.

    A host without IPv6 is left without. Where it is there but switched off, `enable_ipv6` decides: switching it on
    reaches every interface of the host.
    """
    report = Report()
    wanted = [setting for setting in FORWARDING if not setting.name.startswith(_IPV6) or _is_there(root, setting)]
    if is_ipv6_disabled(root) and not enable_ipv6:
        wanted = [setting for setting in wanted if setting.name != DISABLE_IPV6]
        report.notes.append(
            f"IPv6 is disabled on this host and stays so. To serve IPv6 too, run as root: sysctl -w {DISABLE_IPV6}=0"
        )
    for setting in router_advertisements(root):
        write(setting, root)
    refused = [(setting, reason) for setting in wanted if (reason := write(setting, root))]
    if refused:
        names = " ".join(str(setting) for setting, _ in refused)
        report.warnings.append(
            f"Forwarding is not fully enabled, so clients may reach nothing behind this host: {refused[0][1]}. "
            "Run: sudo firezone-gateway host-setup (as root it does: "
            f"sysctl -w {names}; in a container, pass each to its run command with --sysctl)"
        )
    return report


def raise_buffer_ceilings(*, root: Path = PROC_SYS) -> Report:
    """Raise `rmem_max` and `wmem_max`, never lower them; a refusal is a note, privileged sockets exceed the ceiling."""
    report = Report()
    for name, wanted in CEILINGS:
        present = read(name, root)
        if not present.isdigit() or int(present) >= wanted:
            continue  # a network namespace of an older kernel has no such parameter
        reason = write(Setting(name, str(wanted)), root)
        if reason:
            report.notes.append(f"{name} stays at {present} bytes: {reason}.")
        else:
            report.notes.append(f"Raised {name} from {present} to {wanted} bytes.")
    return report


def router_advertisements(root: Path = PROC_SYS) -> list[Setting]:
    """For interfaces that learn routes from routers: they would forget them when forwarding begins, unless it is 2."""
    if read("net.ipv6.conf.all.forwarding", root) != "0":
        return []
    return [
        Setting(parameter, "2")
        for parameter in _interfaces_with(root, "accept_ra", "1")
        if read(parameter.replace(".accept_ra", ".forwarding"), root) == "0"
    ]


def is_ipv6_disabled(root: Path = PROC_SYS) -> bool:
    """Whether the kernel has IPv6 but was told not to use it."""
    return read(DISABLE_IPV6, root) == "1"


def _interfaces_with(root: Path, parameter: str, value: str) -> Iterator[str]:
    try:
        interfaces: Iterable[Path] = sorted((root / "net/ipv6/conf").iterdir())
    except OSError:
        return
    for interface in interfaces:
        if interface.name in ("all", "default", "lo"):
            continue
        try:
            present = (interface / parameter).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if present == value:
            # A slash stands for the dots in the names of VLAN interfaces, as in sysctl(8).
            yield f"net.ipv6.conf.{interface.name.replace('.', '/')}.{parameter}"


def _is_there(root: Path, setting: Setting) -> bool:
    return _path(root, setting.name).exists()


def read(name: str, root: Path = PROC_SYS) -> str:
    """The value, or an empty string where there is no such parameter."""
    try:
        return _path(root, name).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def is_writable(name: str, root: Path = PROC_SYS) -> bool:
    """Whether this process may change it: opening asks the kernel, and changes nothing."""
    try:
        os.close(os.open(_path(root, name), os.O_WRONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def write(setting: Setting, root: Path = PROC_SYS) -> str:
    """Set it unless it is set; why that failed, or nothing."""
    if read(setting.name, root) == setting.value:
        return ""
    try:
        _path(root, setting.name).write_text(setting.value, encoding="utf-8")
    except OSError as error:
        return f"{setting} could not be set ({error.strerror})"
    return ""


def _path(root: Path, name: str) -> Path:
    return root.joinpath(*(part.replace("/", ".") for part in name.split(".")))
