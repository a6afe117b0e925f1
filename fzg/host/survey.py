"""What everybody on a host may read about its network, as plain values, for support archives."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pyroute2.netlink.rtnl import RTM_GETADDR, RTM_GETLINK, RTM_GETROUTE, RTM_GETRULE
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from fzg.host.netlink_socket import NetlinkSocket

if TYPE_CHECKING:
    from collections.abc import Callable

# A router may hold a million routes; what concerns us stands among those that Linux lists first.
MAX_OBJECTS: Final = 2000
MAX_FILE: Final = 64 * 1024  # bytes of each file
FILES: Final = (
    "/etc/os-release", "/proc/version", "/proc/uptime", "/proc/loadavg", "/proc/meminfo", "/proc/self/status",
    "/proc/self/limits", "/proc/net/dev", "/proc/net/snmp", "/proc/net/snmp6", "/proc/net/netstat",
    "/proc/net/softnet_stat", "/proc/net/sockstat", "/proc/net/sockstat6", "/proc/modules", "/etc/resolv.conf",
)  # fmt: skip
SYSCTLS: Final = (
    "net.core.rmem_max", "net.core.wmem_max", "net.core.rmem_default", "net.core.netdev_max_backlog",
    "net.core.default_qdisc", "net.ipv4.ip_forward", "net.ipv4.ip_local_port_range", "net.ipv4.conf.all.rp_filter",
    "net.ipv4.conf.default.rp_filter", "net.ipv4.conf.all.src_valid_mark", "net.ipv4.conf.all.forwarding",
    "net.ipv4.tcp_congestion_control", "net.ipv6.conf.all.disable_ipv6", "net.ipv6.conf.default.disable_ipv6",
    "net.ipv6.conf.all.forwarding", "net.ipv6.conf.default.forwarding", "net.ipv6.conf.all.accept_ra",
    "net.netfilter.nf_conntrack_max", "net.netfilter.nf_conntrack_count", "net.bridge.bridge-nf-call-iptables",
)  # fmt: skip

_FAMILIES: Final = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
_LINK: Final = ("IFLA_IFNAME", "IFLA_MTU", "IFLA_OPERSTATE", "IFLA_TXQLEN", "IFLA_QDISC", "IFLA_MASTER")
_ADDRESS: Final = ("IFA_ADDRESS", "IFA_LOCAL", "IFA_LABEL")
_ROUTE: Final = ("RTA_DST", "RTA_GATEWAY", "RTA_OIF", "RTA_PREFSRC", "RTA_PRIORITY", "RTA_TABLE")
_RULE: Final = (
    "FRA_PRIORITY",
    "FRA_SRC",
    "FRA_DST",
    "FRA_FWMARK",
    "FRA_FWMASK",
    "FRA_TABLE",
    "FRA_IIFNAME",
    "FRA_OIFNAME",
)


def files() -> dict[str, str]:
    """The files that exist, by path, or why one cannot be read."""
    return {name: text for name in FILES if (text := _read(Path(name))) is not None}


def sysctls() -> dict[str, str]:
    """Kernel parameters by dotted name; those that this kernel does not have are missing."""
    found = {}
    for name in SYSCTLS:
        text = _read(Path("/proc/sys", *name.split(".")))
        if text is not None:
            found[name] = text.strip()
    return found


def machine() -> dict[str, Any]:
    """Kernel, architecture, C library, processors."""
    name = platform.uname()
    return {
        "kernel": f"{name.system} {name.release} {name.version}",
        "machine": name.machine,
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "uid": os.getuid(),
    }


def network() -> dict[str, Any]:
    """Links, addresses, routes of all tables and policy rules; in place of a list, why it cannot be had."""
    return {
        "links": _dump(ifinfmsg, RTM_GETLINK, _link),
        "addresses": _dump(ifaddrmsg, RTM_GETADDR, _address),
        "routes": {name: _dump(rtmsg, RTM_GETROUTE, _route, number) for name, number in _FAMILIES.items()},
        "rules": {name: _dump(fibmsg, RTM_GETRULE, _rule, number) for name, number in _FAMILIES.items()},
    }


def _read(path: Path) -> str | None:
    """The beginning of a file, None where there is none; what is refused reads as the reason."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE).decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _dump(kind: Any, request: int, show: Callable[[Any], dict[str, Any]], family: int | None = None) -> Any:
    query = kind()
    if family is not None:
        query["family"] = family
    try:
        with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
            found = netlink.dump(query, request)
    except OSError as error:
        return error.strerror or str(error)
    shown: list[Any] = [show(each) for each in found[:MAX_OBJECTS]]
    if len(found) > MAX_OBJECTS:
        shown.append(f"and {len(found) - MAX_OBJECTS} more")
    return shown


def _attributes(message: Any, names: tuple[str, ...]) -> dict[str, Any]:
    values = ((name.partition("_")[2].lower(), message.get_attr(name)) for name in names)
    return {name: value for name, value in values if value is not None}


def _link(message: Any) -> dict[str, Any]:
    information = message.get_attr("IFLA_LINKINFO")
    kind = information.get_attr("IFLA_INFO_KIND") if information is not None else None
    return {"index": message["index"], "flags": message["flags"], "kind": kind} | _attributes(message, _LINK)


def _address(message: Any) -> dict[str, Any]:
    return {"index": message["index"], "prefix": message["prefixlen"]} | _attributes(message, _ADDRESS)


def _route(message: Any) -> dict[str, Any]:
    return {"type": message["type"], "scope": message["scope"], "prefix": message["dst_len"]} | _attributes(
        message, _ROUTE
    )


def _rule(message: Any) -> dict[str, Any]:
    return {"action": message["action"], "flags": message["flags"]} | _attributes(message, _RULE)
