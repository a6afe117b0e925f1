"""Which authorization admits a packet: longest prefix among those that permit it (spec tunnel 5.4).

One table per prefix length in use, so a lookup costs one dict access per length however many networks there are.
"""

from __future__ import annotations

from bisect import insort
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING

from fzg.tunnel.filters import Filters

if TYPE_CHECKING:
    from fzg.tunnel.resources import Authorization

Network = IPv4Network | IPv6Network | bytes
"""A network, or a packed IP that stands for a /32 or /128."""


class Routes:
    """Networks of one client and who answers for them."""

    __slots__ = ("_ipv4", "_ipv6")

    def __init__(self) -> None:
        # Shift that leaves the prefix, and the prefixes of that length; longest prefix first.
        self._ipv4: list[tuple[int, dict[int, _Node]]] = []
        self._ipv6: list[tuple[int, dict[int, _Node]]] = []

    def add(self, network: Network, authorization: Authorization) -> None:
        """A network is added once per authorization."""
        levels, shift, prefix = self._place(network)
        table = next((table for known, table in levels if known == shift), None)
        if table is None:
            table = {}
            insort(levels, (shift, table), key=lambda level: level[0])
        node = table.get(prefix)
        if node is None:
            node = table[prefix] = _Node()
        node.add(authorization)

    def remove(self, network: Network, authorization: Authorization) -> None:
        """Undo `add`."""
        levels, shift, prefix = self._place(network)
        table = dict(levels)[shift]
        node = table[prefix]
        node.remove(authorization)
        if not node.authorizations:
            del table[prefix]
            if not table:
                levels.remove((shift, table))

    def touch(self, network: Network) -> None:
        """The filters of an authorization for this network changed."""
        levels, shift, prefix = self._place(network)
        dict(levels)[shift][prefix].union = None

    def lookup(self, ip: bytes, protocol: int, value: int | None, now: float) -> Authorization | None:
        """The authorization that admits a packet with this remote IP and protocol value."""
        number = int.from_bytes(ip, "big")
        for shift, table in self._ipv4 if len(ip) == 4 else self._ipv6:
            node = table.get(number >> shift)
            if node is not None:
                found = node.find(protocol, value, now)
                if found is not None:
                    return found
        return None

    def _place(self, network: Network) -> tuple[list[tuple[int, dict[int, _Node]]], int, int]:
        if isinstance(network, bytes):
            return (self._ipv4 if len(network) == 4 else self._ipv6), 0, int.from_bytes(network, "big")
        levels = self._ipv4 if network.version == 4 else self._ipv6
        shift = network.max_prefixlen - network.prefixlen
        return levels, shift, int(network.network_address) >> shift


class _Node:
    """All authorizations for one network, by ascending id; larger ids win."""

    __slots__ = ("authorizations", "union")

    def __init__(self) -> None:
        self.authorizations: list[Authorization] = []
        # Lets thousands of resources for one network refuse a packet with one test; None: to be made.
        self.union: Filters | None = None

    def add(self, authorization: Authorization) -> None:
        insort(self.authorizations, authorization, key=_by_id)
        self.union = None

    def remove(self, authorization: Authorization) -> None:
        self.authorizations.remove(authorization)
        self.union = None

    def find(self, protocol: int, value: int | None, now: float) -> Authorization | None:
        union = self.union
        if union is None:
            only = len(self.authorizations) == 1
            union = self.union = (
                self.authorizations[0].filters
                if only
                else Filters.union(authorization.filters for authorization in self.authorizations)
            )
        if not union.permits(protocol, value):
            return None
        for authorization in reversed(self.authorizations):
            if authorization.expires > now and authorization.filters.permits(protocol, value):
                return authorization
        return None


def _by_id(authorization: Authorization) -> str:
    # Canonical UUID strings sort like their 16 bytes.
    return authorization.resource.id
