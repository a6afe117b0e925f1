"""The TUN device's link settings, addresses, policy rules and routes (spec tunnel 9.1, operations 1.13)."""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pyroute2.netlink.rtnl import (
    RTM_DELADDR,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_GETADDR,
    RTM_GETROUTE,
    RTM_GETRULE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWROUTE,
    RTM_NEWRULE,
)
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from fzg.host.errors import HostError
from fzg.host.netlink_socket import NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NetlinkError, NetlinkSocket
from fzg.mark import SOCKET_MARK
from fzg.tunnel.ranges import PEER_V4, PEER_V6
from fzg.wire.ip import MTU

if TYPE_CHECKING:
    from collections.abc import Sequence

# Values of the specification (tunnel 1.4, 9.1; operations 1.13).
ROUTING_TABLE: Final = 0x2021FD00
RULE_PRIORITY: Final = 100
TX_QUEUE_PACKETS: Final = 10_000

# Rules and tables that other gateways of this kind leave behind when they stop (operations 1.13).
_FOREIGN_TABLES: Final = (ROUTING_TABLE + 1, ROUTING_TABLE + 2)

_IFF_UP: Final = 0x1
_ADDR_GEN_MODE_NONE: Final = 1
_FR_ACT_TO_TBL: Final = 1
_FIB_RULE_INVERT: Final = 0x2
_RTPROT_KERNEL: Final = 2
_RTPROT_STATIC: Final = 4
_RTN_UNICAST: Final = 1
_RTN_LOCAL: Final = 2
_RT_TABLE_UNSPEC: Final = 0
_RT_TABLE_LOCAL: Final = 255

_NAMED_OVERLAPS: Final = 3  # enough to recognise the network; an overlay may have one route per host


class _Family(NamedTuple):
    number: int
    name: str
    bits: int
    peers: IPv4Network | IPv6Network
    widest_overlap: int  # a wider route leads to everywhere; it is no network of the host that ours would shadow


_IPV4: Final = _Family(socket.AF_INET, "IPv4", 32, PEER_V4, 8)
_IPV6: Final = _Family(socket.AF_INET6, "IPv6", 128, PEER_V6, 48)
_FAMILIES: Final = (_IPV4, _IPV6)


@dataclass(frozen=True, slots=True)
class Configured:
    """Which address families the device serves, and sentences for the log."""

    ipv4: bool
    ipv6: bool
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def configure_device(interface: str, ipv4: IPv4Address | None, ipv6: IPv6Address | None) -> Configured:
    """Give the device these addresses and nothing else, bring it up and route the peer ranges to it; idempotent.

    One family may fail (a host without IPv6). Raises HostError when the device is missing or neither family works.
    """
    index = _index(interface)
    wanted: dict[_Family, IPv4Address | IPv6Address | None] = {_IPV4: ipv4, _IPV6: ipv6}
    failures: dict[_Family, str] = {}
    warnings: list[str] = []
    with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
        _set_link(netlink, interface, index)
        for family, address in wanted.items():
            failures[family] = _set_address(netlink, index, family, address)
        if any(not failure for failure in failures.values()):
            _bring_up(netlink, interface, index)
        for family in _FAMILIES:
            failures[family] = failures[family] or _set_route(netlink, index, family)
            if failures[family]:
                _delete_rules(netlink, family, (ROUTING_TABLE,))
            else:
                warnings.extend(_set_rule(netlink, family))
            _delete_rules(netlink, family, _FOREIGN_TABLES)
    if all(failures.values()):
        raise HostError(
            f"{interface} has neither an IPv4 nor an IPv6 address, so no client can be served: "
            f"{'; '.join(failures.values())}. Enable IPv4 or IPv6 on this host and start the gateway again."
        )
    notes = [
        f"Clients are served without {family.name}: {failure}."
        for family, failure in failures.items()
        if failure and wanted[family] is not None
    ]
    return Configured(not failures[_IPV4], not failures[_IPV6], notes, warnings)


def remove_rules_and_routes() -> None:
    """Delete our policy rules and the routes of our table; idempotent."""
    with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
        for family in _FAMILIES:
            _delete_rules(netlink, family, (ROUTING_TABLE,))
            for route in _routes(netlink, family, ROUTING_TABLE):
                _delete_route(netlink, route)


def overlap_warnings(interface: str) -> list[str]:
    """At most a sentence per family: what of the host's networks is inside a range that is taken for the tunnel."""
    sentences: list[str] = []
    with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
        for family in _FAMILIES:
            routes, addresses = _overlaps(netlink, family, interface)
            if routes:
                sentences.append(
                    f"This host has a route to {_some(routes)}, which overlaps {family.peers}, "
                    f"the range of clients' tunnel addresses: what this host sends there goes to {interface} instead. "
                    "Renumber that network, or run the gateway on a host that need not reach it."
                )
            elif addresses:
                sentences.append(
                    f"This host has the address {_some(addresses)}, which is inside {family.peers}, "
                    "the range of clients' tunnel addresses: a client that gets it from the portal cannot be served. "
                    "Remove that address, or run the gateway on a host without it."
                )
    return sentences


def _some(listed: list[str]) -> str:
    more = f" and {len(listed) - _NAMED_OVERLAPS} more" if len(listed) > _NAMED_OVERLAPS else ""
    return ", ".join(listed[:_NAMED_OVERLAPS]) + more


def _index(interface: str) -> int:
    try:
        return socket.if_nametoindex(interface)
    except OSError as error:
        raise HostError(
            f"The interface {interface} does not exist ({error.strerror}): it was removed while the gateway ran. "
            "Start the gateway again."
        ) from error


def _set_link(netlink: NetlinkSocket, interface: str, index: int) -> None:
    quiet = ifinfmsg()
    quiet["index"] = index
    quiet["attrs"] = [
        ("IFLA_AF_SPEC", {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _ADDR_GEN_MODE_NONE)]})]})
    ]
    _forgive(netlink, quiet, RTM_NEWLINK)  # best effort: it only keeps a link-local address away
    queue = ifinfmsg()
    queue["index"] = index
    queue["attrs"] = [("IFLA_TXQLEN", TX_QUEUE_PACKETS)]
    _forgive(netlink, queue, RTM_NEWLINK)  # best effort: a short queue costs throughput only
    size = ifinfmsg()
    size["index"] = index
    size["attrs"] = [("IFLA_MTU", MTU)]
    try:
        netlink.request(size, RTM_NEWLINK)
    except NetlinkError as error:
        raise _refused(f"The MTU of {interface} cannot be set to {MTU}", error) from error


def _bring_up(netlink: NetlinkSocket, interface: str, index: int) -> None:
    up = ifinfmsg()
    up["index"], up["flags"], up["change"] = index, _IFF_UP, _IFF_UP
    try:
        netlink.request(up, RTM_NEWLINK)
    except NetlinkError as error:
        raise _refused(f"{interface} cannot be brought up", error) from error


def _set_address(netlink: NetlinkSocket, index: int, family: _Family, address: IPv4Address | IPv6Address | None) -> str:
    """Add the address, then delete all others of the family; why that failed, or nothing."""
    failure = "" if address is not None else f"the portal assigned no {family.name} address"
    if address is not None:
        new = ifaddrmsg()
        new["family"], new["index"], new["prefixlen"] = family.number, index, family.bits
        new["attrs"] = [("IFA_LOCAL", str(address)), ("IFA_ADDRESS", str(address))]
        try:
            netlink.request(new, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE)
        except NetlinkError as error:
            failure = f"{address} could not be assigned ({_why(family, error)})"
    for old in _addresses(netlink, index, family):
        if failure or old.get_attr("IFA_ADDRESS") != str(address) or old["prefixlen"] != family.bits:
            _forgive(netlink, old, RTM_DELADDR)
    return failure


def _addresses(netlink: NetlinkSocket, index: int, family: _Family) -> list[Any]:
    query = ifaddrmsg()
    query["family"], query["index"] = family.number, index
    try:
        found = netlink.dump(query, RTM_GETADDR)
    except NetlinkError:  # a kernel without the family
        return []
    return [address for address in found if address["index"] == index and address["family"] == family.number]


def _set_route(netlink: NetlinkSocket, index: int, family: _Family) -> str:
    """Make our table hold exactly the route to the peer range; why that failed, or nothing."""
    target = family.peers
    for route in _routes(netlink, family, ROUTING_TABLE):
        if _destination(route) != target or route.get_attr("RTA_OIF") != index:
            _delete_route(netlink, route)
    new = rtmsg()
    new["family"], new["dst_len"], new["table"] = family.number, target.prefixlen, _RT_TABLE_UNSPEC
    new["proto"], new["scope"], new["type"] = _RTPROT_STATIC, 0, _RTN_UNICAST
    new["attrs"] = [("RTA_DST", str(target.network_address)), ("RTA_OIF", index), ("RTA_TABLE", ROUTING_TABLE)]
    try:
        netlink.request(new, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE)
    except NetlinkError as error:
        return f"the route to {target} could not be added ({_why(family, error)})"
    return ""


def _delete_route(netlink: NetlinkSocket, route: Any) -> None:
    old = rtmsg()
    old["family"], old["dst_len"], old["table"], old["scope"] = route["family"], route["dst_len"], 0, route["scope"]
    old["attrs"] = [("RTA_TABLE", route.get_attr("RTA_TABLE")), ("RTA_DST", str(_destination(route).network_address))]
    if route.get_attr("RTA_OIF"):
        old["attrs"].append(("RTA_OIF", route.get_attr("RTA_OIF")))
    _forgive(netlink, old, RTM_DELROUTE)


def _routes(
    netlink: NetlinkSocket, family: _Family, table: int | None, *, containing: Sequence[bytes] = ()
) -> list[Any]:
    query = rtmsg()
    query["family"] = family.number
    if table is not None:
        query["attrs"] = [("RTA_TABLE", table)]
    try:
        found = netlink.dump(query, RTM_GETROUTE, containing=containing)
    except NetlinkError:  # a table that was never used, or a kernel without the family
        return []
    return [
        route
        for route in found
        if route["family"] == family.number and (table is None or route.get_attr("RTA_TABLE") == table)
    ]


def _destination(route: Any) -> IPv4Network | IPv6Network:
    default = "0.0.0.0" if route["family"] == socket.AF_INET else "::"  # noqa: S104 - a destination, nothing is bound
    return ip_network((route.get_attr("RTA_DST") or default, route["dst_len"]), strict=False)


def _overlaps(netlink: NetlinkSocket, family: _Family, interface: str) -> tuple[list[str], list[str]]:
    """Routes to networks and own addresses, each with its interface; what is of the gateway itself left out."""
    target = family.peers
    # A destination that overlaps and is not too wide begins with the range's first bytes; 1 is RTA_DST.
    length = 4 + family.bits // 8
    pattern = struct.pack("=HH", length, 1) + target.network_address.packed[: family.widest_overlap // 8]
    routes: dict[str, None] = {}
    addresses: dict[str, None] = {}
    for route in _routes(netlink, family, None, containing=(pattern,)):
        if route["dst_len"] < family.widest_overlap or route["type"] not in (_RTN_UNICAST, _RTN_LOCAL):
            continue
        table = route.get_attr("RTA_TABLE")
        is_address = table == _RT_TABLE_LOCAL
        if is_address != (route["type"] == _RTN_LOCAL) or ROUTING_TABLE <= table <= max(_FOREIGN_TABLES):
            continue
        destination = _destination(route)
        output = _interface_name(route.get_attr("RTA_OIF"))
        if output != interface and destination.overlaps(target):
            text = str(destination.network_address if is_address else destination)
            (addresses if is_address else routes)[f"{text} by {output}" if output else text] = None
    return list(routes), [each.replace(" by ", " on ") for each in addresses]


def _interface_name(index: int | None) -> str:
    try:
        return socket.if_indextoname(index) if index else ""
    except OSError:
        return ""


def _set_rule(netlink: NetlinkSocket, family: _Family) -> list[str]:
    """Route all but marked sockets by our table; warnings when the kernel has no policy routing."""
    present = False
    for rule in _rules(netlink, family, (ROUTING_TABLE,)):
        if present or not _is_wanted(rule):
            _forgive(netlink, rule, RTM_DELRULE)
        else:
            present = True
    if present:
        return []
    rule = fibmsg()
    rule["family"], rule["table"] = family.number, _RT_TABLE_UNSPEC
    rule["action"], rule["flags"] = _FR_ACT_TO_TBL, _FIB_RULE_INVERT
    rule["attrs"] = [
        ("FRA_PRIORITY", RULE_PRIORITY),
        ("FRA_FWMARK", SOCKET_MARK),
        ("FRA_FWMASK", 0xFFFFFFFF),
        ("FRA_TABLE", ROUTING_TABLE),
        ("FRA_PROTOCOL", _RTPROT_KERNEL),
    ]
    try:
        netlink.request(rule, RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL)
    except NetlinkError as error:
        if error.errno == errno.EEXIST:
            return []
        sentence = (
            f"The {family.name} routing rule of priority {RULE_PRIORITY} could not be added ({error.strerror}), "
            "so answers do not find their way to clients. Use a kernel with policy routing (CONFIG_IP_MULTIPLE_TABLES)."
        )
        return [sentence]
    return []


def _is_wanted(rule: Any) -> bool:
    return (
        rule.get_attr("FRA_PRIORITY") == RULE_PRIORITY
        and bool(rule["flags"] & _FIB_RULE_INVERT)
        and rule.get_attr("FRA_FWMASK") == 0xFFFFFFFF
    )


def _rules(netlink: NetlinkSocket, family: _Family, tables: tuple[int, ...]) -> list[Any]:
    query = fibmsg()
    query["family"] = family.number
    try:
        found = netlink.dump(query, RTM_GETRULE)
    except NetlinkError:  # a kernel without the family or without policy routing
        return []
    return [
        rule
        for rule in found
        if rule["family"] == family.number
        and rule.get_attr("FRA_TABLE") in tables
        and rule.get_attr("FRA_FWMARK") == SOCKET_MARK
    ]


def _delete_rules(netlink: NetlinkSocket, family: _Family, tables: tuple[int, ...]) -> None:
    for rule in _rules(netlink, family, tables):
        _forgive(netlink, rule, RTM_DELRULE)


def _forgive(netlink: NetlinkSocket, message: Any, message_type: int) -> None:
    """A step whose failure changes nothing that matters; what matters is checked where it is used."""
    try:
        netlink.request(message, message_type)
    except NetlinkError:
        return


def _why(family: _Family, error: NetlinkError) -> str:
    if family is _IPV6 and error.errno in (errno.EACCES, errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
        return "IPv6 is disabled on this host"
    return error.strerror or str(error)


def _refused(what: str, error: NetlinkError) -> HostError:
    if error.errno == errno.EPERM:
        return HostError(f"{what} ({error.strerror}). Run the gateway as root or with CAP_NET_ADMIN.")
    return HostError(f"{what} ({error.strerror}). Remove what holds the interface and start the gateway again.")
