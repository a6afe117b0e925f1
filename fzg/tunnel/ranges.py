"""Address ranges with a meaning of their own, tested on packed IPs (spec tunnel 1.1 and 5.6).

Packed IPs of one family compare like the numbers they are.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

# Spec tunnel 1.1: tunnel IPs given by the portal, and IPs that clients invent for DNS resources.
PEER_V4 = IPv4Network("100.64.0.0/11")
PEER_V6 = IPv6Network("fd00:2021:1111::/107")
PROXY_V4 = IPv4Network("100.96.0.0/11")
PROXY_V6 = IPv6Network("fd00:2021:1111:8000::/107")
# Only meaningful on clients and never assigned. The v6 block lies outside of PROXY_V6.
DNS_SENTINELS_V4 = IPv4Network("100.100.111.0/24")

_Network = IPv4Network | IPv6Network


def _bounds(network: _Network) -> tuple[bytes, bytes]:
    return network.network_address.packed, network.broadcast_address.packed


_PEER_V4_FIRST, _PEER_V4_LAST = _bounds(PEER_V4)
_PEER_V6_FIRST, _PEER_V6_LAST = _bounds(PEER_V6)
_PROXY_V4_FIRST, _PROXY_V4_LAST = _bounds(PROXY_V4)
_PROXY_V6_FIRST, _PROXY_V6_LAST = _bounds(PROXY_V6)
_SENTINELS_FIRST, _SENTINELS_LAST = _bounds(DNS_SENTINELS_V4)

# Spec tunnel 5.6. 100.64.0.0/10 is PEER and PROXY together.
_NO_INTERNET_V4 = [
    _bounds(IPv4Network(text))
    for text in (
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
]
_NO_INTERNET_V6 = [
    _bounds(IPv6Network(text)) for text in ("::1/128", "::ffff:0:0/96", "fc00::/7", "fe80::/10", "ff00::/8")
]


def is_multicast(ip: bytes) -> bool:
    """224.0.0.0/4 or ff00::/8."""
    return ip[0] & 0xF0 == 0xE0 if len(ip) == 4 else ip[0] == 0xFF


def is_peer(ip: bytes) -> bool:
    """A tunnel IP of some client or gateway."""
    return _PEER_V4_FIRST <= ip <= _PEER_V4_LAST if len(ip) == 4 else _PEER_V6_FIRST <= ip <= _PEER_V6_LAST


def is_proxy(ip: bytes) -> bool:
    """An IP that stands for a name."""
    return _PROXY_V4_FIRST <= ip <= _PROXY_V4_LAST if len(ip) == 4 else _PROXY_V6_FIRST <= ip <= _PROXY_V6_LAST


def is_assignable_proxy(ip: bytes) -> bool:
    """A proxy IP that a client may assign: no DNS sentinel."""
    return is_proxy(ip) and not (len(ip) == 4 and _SENTINELS_FIRST <= ip <= _SENTINELS_LAST)


def is_excluded_from_internet(ip: bytes) -> bool:
    """What the internet resource does not cover."""
    return any(first <= ip <= last for first, last in (_NO_INTERNET_V4 if len(ip) == 4 else _NO_INTERNET_V6))
