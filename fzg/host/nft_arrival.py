"""A client's first packet to the gateway's DNS server as rules of nftables see it: what they load, what they match."""

from __future__ import annotations

import socket
import struct
import sys
from typing import Any, Final, NamedTuple

from pyroute2.netlink.nfnetlink.nftsocket import NFPROTO_IPV4, NFPROTO_IPV6

from fzg.host import nft_ruleset as ruleset
from fzg.host.dns_server import PORT as DNS_PORT
from fzg.tunnel.ranges import PEER_V4, PEER_V6

_CLIENT_PORT: Final = 50_000  # any: clients choose from 49152 on
_CLIENTS: Final = {NFPROTO_IPV4: PEER_V4[9].packed, NFPROTO_IPV6: PEER_V6[9].packed}  # any of them
_TTL: Final = 64
_NETWORK_HEADER: Final = "NFT_PAYLOAD_NETWORK_HEADER"
_TRANSPORT_HEADER: Final = "NFT_PAYLOAD_TRANSPORT_HEADER"
_CT_NEW: Final = 8  # bit of ct state
_RTN_LOCAL: Final = 2
_ARPHRD_NONE: Final = 65534  # what a TUN device is
_IFNAMSIZ: Final = 16
_ETHERTYPE: Final = {NFPROTO_IPV4: 0x0800, NFPROTO_IPV6: 0x86DD}

Registers = dict[str, bytes | None]
"""What a rule has loaded; None where that is not known."""


class Arrival(NamedTuple):
    """The first packet of a client's question; `destination` is None while the tunnel address is not known."""

    interface: str
    family: int
    protocol: int
    destination: bytes | None

    @property
    def network_header(self) -> bytes:
        """Its IP header, without options."""
        source = _CLIENTS[self.family]
        destination = self.destination or bytes(len(source))
        if self.family == NFPROTO_IPV4:
            return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 60, 0, 0x4000, _TTL, self.protocol, 0, source, destination)
        return struct.pack("!IHBB16s16s", 6 << 28, 40, self.protocol, _TTL, source, destination)

    @property
    def transport_header(self) -> bytes:
        """Its UDP header, or the one of a TCP SYN."""
        ports = struct.pack("!HH", _CLIENT_PORT, DNS_PORT)
        if self.protocol == socket.IPPROTO_UDP:
            return ports + struct.pack("!HH", 40, 0)
        return ports + struct.pack("!IIBBHHH", 1, 0, 5 << 4, 2, 0xFFFF, 0, 0)


# -- what rules load into registers; None where that is not known


def _meta(data: Any, _registers: Registers, arrival: Arrival) -> bytes | None:
    match data.get_attr("NFTA_META_KEY"):
        case "NFT_META_IIFNAME":
            return arrival.interface.encode().ljust(_IFNAMSIZ, b"\0")
        case "NFT_META_IIF":
            try:
                return struct.pack("=I", socket.if_nametoindex(arrival.interface))
            except OSError:  # not there now: no rule names its number
                return bytes(4)
        case "NFT_META_IIFTYPE":
            return struct.pack("=H", _ARPHRD_NONE)
        case "NFT_META_NFPROTO":
            return bytes((arrival.family,))
        case "NFT_META_L4PROTO":
            return bytes((arrival.protocol,))
        case "NFT_META_PROTOCOL":
            return struct.pack("!H", _ETHERTYPE[arrival.family])
        case "NFT_META_PKTTYPE":
            return b"\0"  # for this host
        case "NFT_META_MARK" | "NFT_META_IIFGROUP":
            return bytes(4)
    return None


def _payload(data: Any, _registers: Registers, arrival: Arrival) -> bytes | None:
    offset, length = data.get_attr("NFTA_PAYLOAD_OFFSET"), data.get_attr("NFTA_PAYLOAD_LEN")
    match data.get_attr("NFTA_PAYLOAD_BASE"):
        case base if base == _NETWORK_HEADER:
            header = arrival.network_header
            size = 4 if arrival.family == NFPROTO_IPV4 else 16
            if arrival.destination is None and offset + length > len(header) - size:
                return None
        case base if base == _TRANSPORT_HEADER:
            header = arrival.transport_header
        case _:
            return None
    value = header[offset : offset + length]
    return value if len(value) == length else None


def _conntrack(data: Any, _registers: Registers, _arrival: Arrival) -> bytes | None:
    match data.get_attr("NFTA_CT_KEY"):
        case "NFT_CT_STATE":
            return struct.pack("=I", _CT_NEW)
        case "NFT_CT_STATUS" | "NFT_CT_MARK":
            return bytes(4)
        case "NFT_CT_DIRECTION":
            return b"\0"
    return None


def _bitwise(data: Any, registers: Registers, _arrival: Arrival) -> bytes | None:
    value = registers.get(data.get_attr("NFTA_BITWISE_SREG"))
    mask, flip = (value_of(data, f"NFTA_BITWISE_{part}") for part in ("MASK", "XOR"))
    if value is None or len(mask) != len(value) or len(flip) != len(value):
        return None
    return bytes(octet & kept ^ flipped for octet, kept, flipped in zip(value, mask, flip, strict=True))


def _byteorder(data: Any, registers: Registers, _arrival: Arrival) -> bytes | None:
    value, size = registers.get(data.get_attr("NFTA_BYTEORDER_SREG")), data.get_attr("NFTA_BYTEORDER_SIZE")
    if value is None or sys.byteorder == "big":
        return value
    return b"".join(value[at : at + size][::-1] for at in range(0, len(value), size))


def _fib(data: Any, _registers: Registers, _arrival: Arrival) -> bytes | None:
    # The decoder takes the result's number for bits, and the bits of the flags for a number.
    is_type = data.get_attr("NFTA_FIB_RESULT") == {"NFT_FIB_RESULT_UNSPEC", "NFT_FIB_RESULT_OIF"}
    is_of_destination = data.get_attr("NFTA_FIB_FLAGS") == "NFTA_FIB_F_MARK"
    return struct.pack("=I", _RTN_LOCAL) if is_type and is_of_destination else None


LOADS: Final = {
    "meta": _meta,
    "payload": _payload,
    "ct": _conntrack,
    "bitwise": _bitwise,
    "byteorder": _byteorder,
    "fib": _fib,
}


def value_of(data: Any, attribute: str) -> bytes:
    """The bytes of an attribute that holds data; empty without."""
    held = data.get_attr(attribute)
    return ruleset.octets(held.get_attr("NFTA_DATA_VALUE") or b"") if held is not None else b""


# -- matches of iptables-nft, as its extensions lay them out (linux/netfilter/xt_*.h)


def extension_matches(data: Any, arrival: Arrival) -> bool | None:
    """Whether a match of iptables is one about this packet; None where that is not understood."""
    name, revision = data.get_attr("NFTA_MATCH_NAME"), data.get_attr("NFTA_MATCH_REV")
    try:
        info = bytes.fromhex(str(data.get_attr("NFTA_MATCH_INFO") or "").replace(":", ""))
        match name, revision:
            case "comment", _:
                return True
            case (("udp" | "tcp"), 0):
                return _ports_match(name, info, arrival)
            case "conntrack", 3:
                flags, inverted, states = struct.unpack_from("=HHH", info, 146)
                return bool(states & _CT_NEW) != bool(inverted & 1) if flags == 1 else None  # states alone
            case "addrtype", 1:
                source, destination, flags = struct.unpack_from("=HHI", info)
                if source or flags & ~1 & ~2:
                    return None
                return bool(destination & 1 << _RTN_LOCAL) != bool(flags & 2)
            case "limit", 0:
                return True
    except (struct.error, ValueError):
        return None
    return None


def _ports_match(name: str, info: bytes, arrival: Arrival) -> bool | None:
    if arrival.protocol != (socket.IPPROTO_UDP if name == "udp" else socket.IPPROTO_TCP):
        return False
    first_source, last_source, first, last = struct.unpack_from("=HHHH", info)
    inverted = info[8] if name == "udp" else info[11]
    if name == "tcp" and (info[8] or info[9]):
        return None  # options or flags
    from_client = (first_source <= _CLIENT_PORT <= last_source) is not bool(inverted & 1)
    return from_client and (first <= DNS_PORT <= last) is not bool(inverted & 2)
