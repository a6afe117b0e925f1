"""Inner packets as the specification describes them (tunnel 2, 3.1, 4.2, 6.1), byte by byte and without any hurry.

Written from the specification alone, as the wire half of `policy_model`; nothing of `fzg` is imported on purpose.
"""

from __future__ import annotations

import functools
import json
import re
from ipaddress import ip_address, ip_network
from typing import NamedTuple
from uuid import UUID

MTU = 1280
ICMP, TCP, UDP, ICMPV6, CONTROL = 1, 6, 17, 58, 255
EXTENSION_HEADERS = {0, 43, 44, 60, 135, 139, 140, 253, 254}
FRAGMENT = 44
FIN, RST = 0x01, 0x04

PEERS = [ip_network("100.64.0.0/11"), ip_network("fd00:2021:1111::/107")]
PROXIES = [ip_network("100.96.0.0/11"), ip_network("fd00:2021:1111:8000::/107")]
MULTICAST = [ip_network("224.0.0.0/4"), ip_network("ff00::/8")]
NOT_INTERNET = [
    ip_network(text)
    for text in (
        "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "169.254.0.0/16", "100.64.0.0/10",
        "224.0.0.0/4", "240.0.0.0/4", "::1/128", "::ffff:0:0/96", "fc00::/7", "fe80::/10", "ff00::/8",
    )
]  # fmt: skip


class Value(NamedTuple):
    """The protocol value of one direction (2.2): `tcp`, `udp` or `echo`, and a port or an identifier."""

    kind: str
    number: int


class Packet(NamedTuple):
    """A packet that passed validation (2.1)."""

    data: bytes
    version: int
    source: bytes
    destination: bytes
    protocol: int
    l4_at: int

    @property
    def l4(self) -> bytes:
        return self.data[self.l4_at :]

    @property
    def is_icmp(self) -> bool:
        return self.protocol in {ICMP, ICMPV6}


class Embedded(NamedTuple):
    """What an ICMP error quotes (2.3)."""

    source: bytes
    destination: bytes
    source_value: Value
    raw: bytes
    l4_at: int


def inside(ip: bytes, networks: list) -> bool:
    address = _address(ip)
    return any(address.version == network.version and address in network for network in networks)


_address = functools.lru_cache(1000)(ip_address)


def word(data: bytes, at: int) -> int:
    return data[at] * 256 + data[at + 1]


# -- validation (1.2, 2.1)


def unpadded(plaintext: bytes) -> bytes | None:
    """What a client sent, without what its WireGuard may have appended; None if the packet is not all there."""
    version = plaintext[0] >> 4 if plaintext else 0
    if version == 4 and len(plaintext) >= 20:
        length = word(plaintext, 2)
    elif version == 6 and len(plaintext) >= 40:
        length = word(plaintext, 4) + 40
    else:
        return None
    return plaintext[:length] if length <= len(plaintext) else None


def validated(data: bytes) -> Packet | None:
    """The packet, or None if any of the ten rules rejects it."""
    if not 1 <= len(data) <= MTU:
        return None
    version = data[0] >> 4
    if version == 4:
        packet = _ipv4(data)
    elif version == 6:
        packet = _ipv6(data)
    else:
        packet = None
    if packet is None or not _transport_is_valid(packet):
        return None
    return packet


def _ipv4(data: bytes) -> Packet | None:
    if len(data) < 20:
        return None
    words_in_header = data[0] & 0x0F
    header = words_in_header * 4
    if words_in_header < 5 or header > len(data) or word(data, 2) != len(data):
        return None
    more_fragments, offset = word(data, 6) & 0x2000, word(data, 6) & 0x1FFF
    if more_fragments or offset:
        return None
    return Packet(data, 4, data[12:16], data[16:20], data[9], header)


def _ipv6(data: bytes) -> Packet | None:
    if len(data) < 40 or word(data, 4) + 40 != len(data):
        return None
    protocol, at = data[6], 40
    while protocol in EXTENSION_HEADERS:
        if at + 8 > len(data):
            return None
        if protocol == FRAGMENT:
            if word(data, at + 2) & 0xFFF9:  # offset or M
                return None
            size = 8
        else:
            size = (data[at + 1] + 1) * 8
        if at + size > len(data):
            return None
        protocol, at = data[at], at + size
    return Packet(data, 6, data[8:24], data[24:40], protocol, at)


def _transport_is_valid(packet: Packet) -> bool:
    l4 = packet.l4
    if packet.protocol == UDP:
        return len(l4) >= 8 and word(l4, 4) == len(l4)
    if packet.protocol == TCP:
        return len(l4) >= 20 and l4[12] >> 4 >= 5 and (l4[12] >> 4) * 4 <= len(l4)
    if packet.protocol == ICMP:
        return packet.version == 4 and len(l4) >= 8
    if packet.protocol == ICMPV6:
        return packet.version == 6 and len(l4) >= 8
    return True


# -- protocol values (2.2) and ICMP errors (2.3)


def source_value(packet: Packet) -> Value | None:
    return _value(packet, 0)


def destination_value(packet: Packet) -> Value | None:
    return _value(packet, 2)


def _value(packet: Packet, at: int) -> Value | None:
    l4 = packet.l4
    if packet.protocol == TCP:
        return Value("tcp", word(l4, at))
    if packet.protocol == UDP:
        return Value("udp", word(l4, at))
    if is_echo(packet):
        return Value("echo", word(l4, 4))
    return None


def is_echo(packet: Packet) -> bool:
    kinds = {ICMP: (8, 0), ICMPV6: (128, 129)}.get(packet.protocol, ())
    return packet.is_icmp and packet.l4[0] in kinds and packet.l4[1] == 0


def tcp_flags(packet: Packet) -> int:
    return packet.l4[13] if packet.protocol == TCP else 0


def icmp_error(packet: Packet) -> Embedded | str:
    """The quoted packet; "no"; or "unsupported"."""
    if not packet.is_icmp or is_echo(packet):
        return "no"
    kind, code = packet.l4[0], packet.l4[1]
    is_error = kind in {3, 11} if packet.version == 4 else kind in {1, 3} or (kind, code) == (2, 0)
    if not is_error:
        return "unsupported"
    raw = packet.l4[8:]
    header = _quoted_header(raw, packet.version)
    if header is None:
        return "unsupported"
    source, destination, protocol, at = header
    l4 = raw[at:]
    if protocol in {TCP, UDP} and len(l4) >= 4:
        value = Value("tcp" if protocol == TCP else "udp", word(l4, 0))
    elif (protocol, packet.version) in {(ICMP, 4), (ICMPV6, 6)} and len(l4) >= 8:
        if (l4[0], l4[1]) != (8 if packet.version == 4 else 128, 0):
            return "unsupported"
        value = Value("echo", word(l4, 4))
    else:
        return "unsupported"
    return Embedded(source, destination, value, raw, at)


def _quoted_header(raw: bytes, version: int) -> tuple[bytes, bytes, int, int] | None:
    if not raw or raw[0] >> 4 != version:
        return None
    if version == 4:
        header = (raw[0] & 0x0F) * 4
        if header < 20 or len(raw) < header:
            return None
        return raw[12:16], raw[16:20], raw[9], header
    if len(raw) < 40:
        return None
    protocol, at = raw[6], 40
    while protocol in EXTENSION_HEADERS:
        size = 8 if protocol == FRAGMENT else (raw[at + 1] + 1) * 8 if at + 1 < len(raw) else 8
        if at + size > len(raw):
            return None
        protocol, at = raw[at], at + size
    return raw[8:24], raw[24:40], protocol, at


# -- checksums and changes (2.4)


def folded(total: int) -> int:
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def checksum_of(data: bytes) -> int:
    padded = data + b"\0" * (len(data) % 2)
    return 0xFFFF - folded(sum(word(padded, at) for at in range(0, len(padded), 2)))


def replaced(packet: Packet, changes: list[tuple[int, bytes]], *, address: tuple[int, bytes] | None = None) -> bytes:
    """Bytes of the transport header (`changes`, counted from its start) and an IP address changed, checksums with them.

    RFC 1624 word by word: new = ~(~old + ~removed + added); a result of zero is written as 0xFFFF.
    """
    data = bytearray(packet.data)
    words: list[tuple[int, int]] = []
    for at, new in [(packet.l4_at + at, new) for at, new in changes]:
        words += [(word(data, at), word(new, 0))]
        data[at : at + 2] = new
    address_words: list[tuple[int, int]] = []
    if address is not None:
        at, new = address
        for step in range(0, len(new), 2):
            address_words.append((word(data, at + step), word(new, step)))
        data[at : at + len(new)] = new
    if packet.version == 4:
        _apply(data, 10, address_words)
    in_pseudo_header = [] if packet.protocol == ICMP else address_words
    where = {TCP: 16, UDP: 6, ICMP: 2, ICMPV6: 2}[packet.protocol]
    if not (packet.protocol == UDP and word(data, packet.l4_at + where) == 0):
        _apply(data, packet.l4_at + where, words + in_pseudo_header)
    return bytes(data)


def _apply(data: bytearray, at: int, words: list[tuple[int, int]]) -> None:
    if not words:
        return
    total = 0xFFFF - word(data, at)
    for old, new in words:
        total = folded(total + 0xFFFF - old + new)
    result = 0xFFFF - total or 0xFFFF
    data[at : at + 2] = result.to_bytes(2, "big")


def ecn_of(data: bytes) -> int:
    return data[1] & 3 if data[0] >> 4 == 4 else data[1] >> 4 & 3


def with_congestion_mark(data: bytes, outer_ecn: int) -> bytes:
    """CE of the outer datagram goes into an ECT inner packet (2.5)."""
    if outer_ecn != 3 or ecn_of(data) not in {1, 2}:
        return data
    marked = bytearray(data)
    if data[0] >> 4 == 6:
        marked[1] |= 3 << 4
        return bytes(marked)
    before = word(marked, 0)
    marked[1] |= 3
    _apply(marked, 10, [(before, word(marked, 0))])
    return bytes(marked)


# -- packets of ours (3.1, 4.2, 6.1)


def ip_packet(source: bytes, destination: bytes, payload: bytes, *, protocol: int, ttl: int) -> bytes:
    if len(source) == 4:
        head = bytearray(20)
        head[0] = 0x45
        head[2:4] = (20 + len(payload)).to_bytes(2, "big")
        head[8], head[9] = ttl, protocol
        head[12:16], head[16:20] = source, destination
        head[10:12] = checksum_of(bytes(head)).to_bytes(2, "big")
        return bytes(head) + payload
    return b"\x60\0\0\0" + len(payload).to_bytes(2, "big") + bytes((protocol, ttl)) + source + destination + payload


def icmp_packet(source: bytes, destination: bytes, kind: int, code: int, rest: bytes, quoted: bytes) -> bytes:
    """An ICMP error of ours: TTL 20, nothing else set."""
    message = bytearray(bytes((kind, code, 0, 0)) + rest + quoted)
    if len(source) == 4:
        covered = bytes(message)
    else:
        covered = source + destination + len(message).to_bytes(4, "big") + b"\0\0\0\x3a" + bytes(message)
    message[2:4] = checksum_of(covered).to_bytes(2, "big")
    return ip_packet(source, destination, bytes(message), protocol=ICMP if len(source) == 4 else ICMPV6, ttl=20)


def refusal(packet: Packet, name: str) -> bytes:
    """The ICMP error *prohibited* or *network* about a client's packet."""
    if packet.version == 4:
        kind, code = {"prohibited": (3, 13), "network": (3, 0)}[name]
        quoted = packet.data[: packet.l4_at + 8]
    else:
        kind, code = {"prohibited": (1, 1), "network": (1, 3)}[name]
        quoted = packet.data[:1232]
    return icmp_packet(packet.destination, packet.source, kind, code, bytes(4), quoted)


def translated_error(packet: Packet, embedded: Embedded, proxy: bytes, value: Value, client: bytes) -> bytes:
    """The error that a client sees when one comes back for a packet that was translated (4.2)."""
    kind, code, rest = packet.l4[0], packet.l4[1], bytes(4)
    if (packet.version, kind, code) in {(4, 3, 4), (6, 2, 0)}:
        rest = packet.l4[4:8]
    quoted = bytearray(embedded.raw)
    if packet.version == 4:
        quoted[16:20] = proxy
    else:
        quoted[24:40] = proxy
    at = embedded.l4_at + (4 if value.kind == "echo" else 0)
    quoted[at : at + 2] = value.number.to_bytes(2, "big")
    return icmp_packet(proxy, client, kind, code, rest, bytes(quoted))


def is_control(packet: Packet) -> bool:
    is_addressed = packet.version == 6 and packet.source == packet.destination == bytes(16)
    return is_addressed and packet.protocol == CONTROL and len(packet.l4) >= 8


def control_packet(kind: int, payload: bytes) -> bytes:
    return ip_packet(bytes(16), bytes(16), bytes((kind,)) + bytes(7) + payload, protocol=CONTROL, ttl=0)


def domain_status(resource: str, domain: str, status: str) -> bytes:
    body = f'{{"resource":"{resource}","domain":"{domain}","status":"{status}"}}'
    return control_packet(1, body.encode())


def assigned_ips(payload: bytes) -> tuple[str, str, list[bytes]] | None:
    """Resource id, domain and proxy IPs of an AssignedIps event (6.2); None if anything is wrong with it."""
    try:
        fields = json.loads(payload.decode("utf-8"))
        resource, domain, texts = fields["resource"], fields["domain"], fields["proxy_ips"]
        UUID(resource)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return None
        proxies = [ip_address(text).packed for text in texts]
        labels = domain.removesuffix(".").split(".")
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    if any(not 1 <= len(label) <= 63 for label in labels) or sum(len(label) + 1 for label in labels) + 1 > 255:
        return None
    return resource, domain, proxies


# -- patterns of names (7.1)


def matches(pattern: str, domain: str) -> bool:
    wanted, given = pattern.lower().split("."), domain.lower().removesuffix(".").split(".")
    if any("**" in label and label != "**" for label in wanted):
        return False
    return _labels_match(wanted, given) or (wanted[0] == "*" and _labels_match(wanted[1:], given))


def _labels_match(wanted: list[str], given: list[str]) -> bool:
    if not wanted:
        return not given
    if wanted[0] == "**":
        return any(_labels_match(wanted[1:], given[skipped:]) for skipped in range(len(given) + 1))
    return bool(given) and _label_matches(wanted[0], given[0]) and _labels_match(wanted[1:], given[1:])


def _label_matches(wanted: str, given: str) -> bool:
    expression = ""
    for token in re.findall(r"\[!?[^]]+\]|.", wanted):
        if token == "*":
            expression += ".*"
        elif token == "?":
            expression += "."
        elif len(token) > 1:
            expression += "[^" + token[2:] if token.startswith("[!") else token
        else:
            expression += re.escape(token)
    return re.fullmatch(expression, given) is not None
