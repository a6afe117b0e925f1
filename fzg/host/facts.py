"""What the host is like, read without changing it: for `firezone-gateway doctor`.

What this user may not read is `Unreadable`, with the kernel's reason.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import sys
import time
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from pyroute2.netlink.rtnl import RTM_GETADDR, RTM_GETLINK
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from fzg.host import capabilities, sysctl
from fzg.host.addresses import local_addresses
from fzg.host.holders import TABLE_BYTES, Listener, Process, tcp_listeners, tun_holder, udp_listeners
from fzg.host.netlink import overlap_warnings
from fzg.host.netlink_socket import NetlinkSocket
from fzg.host.nftables import Firewall, Survey, legacy_tables_note
from fzg.host.resolver import Resolver
from fzg.host.tun import NODE, has_driver
from fzg.tunnel.ranges import is_peer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# Documentation networks (RFC 5737, 3849): asking the kernel for the way to the internet sends nothing there.
_ELSEWHERE: Final = ((socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8::1"))
_IP_MTU: Final = 14  # <linux/in.h>
_IPV6_MTU: Final = 24  # <linux/in6.h>
_IFF_UP: Final = 0x1
_RTF_UP: Final = 0x1  # <linux/route.h>


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Something that this user may not know."""

    reason: str


class TunNode(NamedTuple):
    """What opening /dev/net/tun came to: an errno, 0 if it works; whether the kernel has the driver."""

    error: int
    driver: bool
    can_make: bool
    """Whether this process could make the node, as the gateway does at its start."""


class Way(NamedTuple):
    """How packets leave for the internet in one family."""

    source: str
    mtu: int


class Disk(NamedTuple):
    """The file system of a directory, or of the nearest one above it that exists."""

    path: str
    free: int
    """Bytes that an ordinary user may still write."""
    inodes: int | None
    """None where the file system makes them as needed."""
    read_only: bool
    no_exec: bool
    writable: bool
    """By this user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostFacts:
    """A moment's view of the host."""

    interface: str
    kernel: str
    uid: int
    capabilities: int
    executable: str
    nosuid: bool = False
    no_new_privileges: bool = False
    container: str = ""
    """`docker`, `lxc` and the like; empty on a host of its own."""
    tun: TunNode
    link: str | None = None
    """The kind of the interface of our name, None when there is none."""
    tun_holder: Process | None = None
    udp: tuple[Listener, ...] = ()
    health: tuple[Listener, ...] = ()
    addresses: tuple[IPv4Address | IPv6Address, ...] = ()
    tunnel_addresses: tuple[str, ...] = ()
    """Addresses of other interfaces inside the ranges of clients."""
    ways: Mapping[int, Way] = field(default_factory=dict)
    default_interfaces: tuple[str, ...] = ()
    has_ipv6: bool = True
    sysctls: Mapping[str, str] = field(default_factory=dict)
    """By dotted name; parameters that do not exist are missing."""
    fixed_sysctls: frozenset[str] = frozenset()
    """Those that this process may not write."""
    firewall: Survey | Unreadable
    legacy_firewall: str = ""
    firewall_tools: tuple[str, ...] = ()
    overlaps: tuple[str, ...] = ()
    nameservers: tuple[str, ...] = ()
    dns_problem: str = ""
    disks: Mapping[str, Disk] = field(default_factory=dict)
    """By purpose: `state`, `temporary`."""
    frozen: bool = False
    wall: float = 0.0
    machine_id_age: float | None = None
    """By how many seconds the machine id is older than the host's SSH keys: clones get new keys."""
    token_file: int | Unreadable | None = None
    """Size of the file from which the packaged unit takes its token; None when there is none."""


TOKEN_FILE: Final = Path("/etc/firezone/gateway-token")
STATE_DIRECTORY: Final = Path("/var/lib/firezone")
MACHINE_ID: Final = Path("/etc/machine-id")
_SSH: Final = Path("/etc/ssh")

SYSCTLS: Final = (
    *(setting.name for setting in sysctl.FORWARDING),
    *(name for name, _ in sysctl.CEILINGS),
    "net.ipv4.conf.all.rp_filter",
)


def observe(interface: str, udp_port: int, health_port: int) -> HostFacts:
    """Look at everything once; some ten milliseconds, more on hosts with many processes."""
    defaults = _default_interfaces()
    names = (*SYSCTLS, *(f"net.ipv4.conf.{name.replace('.', '/')}.rp_filter" for name in defaults))
    values = {name: value for name in names if (value := sysctl.read(name))}
    resolver = Resolver()
    executable = str(Path(sys.executable).resolve())
    return HostFacts(
        interface=interface,
        kernel=os.uname().release,
        uid=os.getuid(),
        capabilities=capabilities.effective_capabilities(),
        executable=executable,
        nosuid=_flags(executable, os.ST_NOSUID),
        no_new_privileges=capabilities.status_field("NoNewPrivs") == "1",
        container=_container(),
        tun=_tun_node(),
        link=_link_kind(interface),
        tun_holder=tun_holder(interface),
        udp=tuple(udp_listeners(udp_port)),
        health=tuple(tcp_listeners(health_port)),
        addresses=tuple(_addresses(interface)),
        tunnel_addresses=tuple(_tunnel_addresses(interface)),
        ways=_ways(),
        default_interfaces=defaults,
        has_ipv6=_exists("/proc/net/if_inet6"),
        sysctls=values,
        fixed_sysctls=frozenset(name for name in values if not sysctl.is_writable(name)),
        firewall=_survey(interface),
        legacy_firewall=legacy_tables_note(interface),
        firewall_tools=tuple(_firewall_tools()),
        overlaps=tuple(_overlaps(interface)),
        nameservers=tuple(resolver.nameservers),
        dns_problem=resolver.problem,
        disks={"state": _disk(STATE_DIRECTORY), "temporary": _disk(_temporary())},
        frozen=bool(getattr(sys, "frozen", False)),
        wall=time.time(),
        machine_id_age=_machine_id_age(),
        token_file=_token_file(),
    )


# -- processes


def _container() -> str:
    with contextlib.suppress(OSError):
        return Path("/run/systemd/container").read_text(encoding="utf-8", errors="replace").strip()
    if _exists("/.dockerenv"):
        return "docker"
    if _exists("/run/.containerenv"):
        return "podman"
    with contextlib.suppress(OSError):
        found = re.search(rb"(?:^|\0)container=([a-z-]+)", Path("/proc/1/environ").read_bytes())
        if found:
            return found[1].decode()
    return ""


# -- devices and sockets


def _tun_node() -> TunNode:
    driver = has_driver()
    try:
        os.close(os.open(NODE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        parent = NODE.parent if _exists(NODE.parent) else NODE.parent.parent
        mknod = bool(capabilities.effective_capabilities() >> capabilities.CAP_MKNOD & 1)
        can_make = error.errno == errno.ENOENT and driver and mknod and os.access(parent, os.W_OK)
        return TunNode(error.errno or errno.EIO, driver, can_make)
    return TunNode(0, driver=True, can_make=False)


def _link_kind(interface: str) -> str | None:
    """The kind of the interface, empty for one without; None when there is no such interface."""
    with contextlib.suppress(OSError), NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
        for link in netlink.dump(ifinfmsg(), RTM_GETLINK, containing=(interface.encode() + b"\0",)):
            if link.get_attr("IFLA_IFNAME") == interface:
                about = link.get_attr("IFLA_LINKINFO")
                kind: str | None = about.get_attr("IFLA_INFO_KIND") if about is not None else None
                return kind or ""
    return None


def _addresses(interface: str) -> list[IPv4Address | IPv6Address]:
    try:
        return local_addresses(interface)
    except OSError:
        return []


def _tunnel_addresses(interface: str) -> Iterable[str]:
    """Addresses of other interfaces that clients have too."""
    with contextlib.suppress(OSError), NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
        for each in netlink.dump(ifaddrmsg(), RTM_GETADDR):
            with contextlib.suppress(ValueError, OSError):
                own = ip_address(each.get_attr("IFA_LOCAL") or each.get_attr("IFA_ADDRESS"))
                name = socket.if_indextoname(each["index"])
                if name != interface and is_peer(own.packed):
                    yield f"{own} on {name}"


def _ways() -> dict[int, Way]:
    """A connected UDP socket knows its source address and the MTU of its route, and has sent nothing."""
    found: dict[int, Way] = {}
    for family, elsewhere in _ELSEWHERE:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))
            level, option = (
                (socket.IPPROTO_IP, _IP_MTU) if family == socket.AF_INET else (socket.IPPROTO_IPV6, _IPV6_MTU)
            )
            found[family] = Way(str(probe.getsockname()[0]), probe.getsockopt(level, option))
    return found


def _default_interfaces() -> tuple[str, ...]:
    with contextlib.suppress(OSError), Path("/proc/net/route").open(encoding="ascii", errors="replace") as table:
        rows = [line.split() for line in table.read(TABLE_BYTES).splitlines()[1:]]
        found = [
            row[0] for row in rows if len(row) > 7 and row[1] == row[7] == "00000000" and int(row[3], 16) & _RTF_UP
        ]
        return tuple(dict.fromkeys(found))
    return ()


def _survey(interface: str) -> Survey | Unreadable:
    try:
        return Firewall(interface).survey()
    except OSError as error:
        if error.errno in (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT):
            return Unreadable("the kernel has no nftables")
        return Unreadable(error.strerror or str(error))


def _firewall_tools() -> list[str]:
    """Programs of this host that rewrite its rules, as they are known to people."""
    signs = {"Docker": "/run/docker.pid", "firewalld": "/run/firewalld", "ufw": "/etc/ufw/ufw.conf"}
    return [name for name, sign in signs.items() if _exists(sign)]


def _overlaps(interface: str) -> list[str]:
    try:
        return overlap_warnings(interface)
    except OSError:
        return []


# -- files


def _flags(path: str, flag: int) -> bool:
    with contextlib.suppress(OSError):
        return bool(os.statvfs(path).f_flag & flag)
    return False


def _temporary() -> Path:
    """Where the one-file form unpacks itself: beside what is unpacked now, else where it would be."""
    unpacked = getattr(sys, "_MEIPASS", None)
    if unpacked:
        return Path(unpacked).parent
    named = (os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return Path(next(filter(None, named), "/tmp"))  # noqa: S108 - only looked at


def _exists(path: str | Path) -> bool:
    """False also where this user may not look."""
    try:
        Path(path).stat()
    except OSError:
        return False
    return True


def _disk(wanted: Path) -> Disk:
    path = wanted
    while not _exists(path) and path != path.parent:
        path = path.parent
    about = os.statvfs(path)
    return Disk(
        path=str(wanted),
        free=about.f_bavail * about.f_frsize,
        inodes=about.f_favail if about.f_files else None,
        read_only=bool(about.f_flag & os.ST_RDONLY),
        no_exec=bool(about.f_flag & os.ST_NOEXEC),
        writable=os.access(path, os.W_OK | os.X_OK),
    )


def _machine_id_age() -> float | None:
    with contextlib.suppress(OSError, ValueError):
        keys = min(key.stat().st_mtime for key in _SSH.glob("ssh_host_*_key.pub"))
        return keys - MACHINE_ID.stat().st_mtime
    return None


def _token_file() -> int | Unreadable | None:
    try:
        return TOKEN_FILE.stat().st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        return Unreadable(error.strerror or str(error))


def command_path() -> str:
    """How to call this program in a remedy: its name where the shell finds it, else its path."""
    if not getattr(sys, "frozen", False):
        return "firezone-gateway"
    found = shutil.which("firezone-gateway")
    own = Path(sys.executable).resolve()
    return "firezone-gateway" if found and Path(found).resolve() == own else str(own)
