"""The host's own addresses, where clients may find the gateway (spec connectivity D3), and when they change."""

from __future__ import annotations

import errno
import logging
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pyroute2.netlink.rtnl import RTM_GETADDR, RTM_GETLINK
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from fzg.host.netlink_socket import NetlinkSocket

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_LOG = logging.getLogger(__name__)

MAX_PER_FAMILY: Final = 8
"""Each one is paired with every address of a client, and a connection has 100 pairs (connectivity 3.11): twelve of a
client's fit. Hosts with more are routers and container hosts, whose later addresses clients do not reach anyway."""

# The tunnel's own ranges (tunnel 1.2): what is sent there would go into the tunnel that it is to carry.
_TUNNEL_IPV4: Final = IPv4Network("100.64.0.0/10")
_TUNNEL_IPV6: Final = IPv6Network("fd00:2021:1111::/48")

_IFF_UP: Final = 0x1
_IFF_LOOPBACK: Final = 0x8
_IFF_RUNNING: Final = 0x40  # it also has a carrier: a bridge without members does not
# <linux/if_addr.h>. A temporary address is not the one we send from (connectivity 1.4) and is gone in a day.
_IFA_F_TEMPORARY: Final = 0x01
_UNUSABLE_IPV6: Final = _IFA_F_TEMPORARY | 0x08 | 0x20 | 0x40  # duplicate, deprecated, tentative
_NOTIFIED_GROUPS: Final = 0x1 | 0x10 | 0x100  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_NOTICE_BYTES: Final = 1 << 16


class Link(NamedTuple):
    """An interface."""

    name: str
    flags: int


class Assigned(NamedTuple):
    """An address of an interface; `flags` are those of <linux/if_addr.h>."""

    interface: int
    address: IPv4Address | IPv6Address
    flags: int


def local_addresses(tunnel: str) -> list[IPv4Address | IPv6Address]:
    """Where the host can be reached, `tunnel` aside, in the kernel's order. Raises OSError."""
    with NetlinkSocket(socket.NETLINK_ROUTE) as netlink:
        links = {
            link["index"]: Link(link.get_attr("IFLA_IFNAME"), link["flags"])
            for link in netlink.dump(ifinfmsg(), RTM_GETLINK)
        }
        assigned = [_assigned(each) for each in netlink.dump(ifaddrmsg(), RTM_GETADDR)]
    return usable(links, assigned, tunnel)


def usable(links: Mapping[int, Link], assigned: Iterable[Assigned], tunnel: str) -> list[IPv4Address | IPv6Address]:
    """Those of interfaces that are up, without loopback, link-local and tunnel ones; at most 8 of each family."""
    found: dict[int, list[IPv4Address | IPv6Address]] = {4: [], 6: []}
    for each in assigned:
        link = links.get(each.interface)
        if link is None or link.name == tunnel or link.flags & _IFF_LOOPBACK:
            continue
        if link.flags & _IFF_UP and link.flags & _IFF_RUNNING and _is_reachable(each):
            found[each.address.version].append(each.address)
    for version, addresses in found.items():
        if len(addresses) > MAX_PER_FAMILY:
            _LOG.debug("%d of %d IPv%d addresses are offered", MAX_PER_FAMILY, len(addresses), version)
    return [address for addresses in found.values() for address in addresses[:MAX_PER_FAMILY]]


class AddressWatch:
    """A descriptor that is readable when links or addresses have changed since the last `drain`."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            self._socket.settimeout(0)
            self._socket.bind((0, _NOTIFIED_GROUPS))
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """The descriptor."""
        return self._socket.fileno()

    def drain(self) -> None:
        """Take all notices."""
        while True:
            try:
                self._socket.recv(_NOTICE_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # so much changed that the kernel lost count
                    raise

    def close(self) -> None:
        """Release the socket."""
        self._socket.close()


def _is_reachable(assigned: Assigned) -> bool:
    address = assigned.address
    if address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified:
        return False
    if isinstance(address, IPv4Address):
        return address not in _TUNNEL_IPV4
    return address not in _TUNNEL_IPV6 and not assigned.flags & _UNUSABLE_IPV6


def _assigned(message: Any) -> Assigned:
    flags = message.get_attr("IFA_FLAGS")
    own = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")  # the latter is the peer's on some links
    return Assigned(message["index"], ip_address(own), message["flags"] if flags is None else flags)
