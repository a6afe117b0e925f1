"""Inner packets made by hand, and a tunnel with the clients of the specification's acceptance checks."""

from __future__ import annotations

import struct
from ipaddress import ip_address, ip_network

from fzg.tunnel.events import Deliver, Drop, Forward, Reply, ResolveDomain, SendToClient
from fzg.tunnel.resources import CidrResource, DnsResource, InternetResource
from fzg.tunnel.tunnel import Tunnel

A, B, C = (f"{digit * 8}-2222-4333-8444-555555555555" for digit in "123")
GATEWAY4, GATEWAY6 = "100.64.0.2", "fd00:2021:1111::2"
A4, A6 = "100.64.0.1", "fd00:2021:1111::1"
B4, B6 = "100.64.0.3", "fd00:2021:1111::3"
P1, P2, P3, P4 = "100.96.0.1", "100.96.0.2", "100.96.0.3", "100.96.0.4"
Q1, Q2 = "fd00:2021:1111:8000::", "fd00:2021:1111:8000::1"

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
ICMP, TCP, UDP, GRE, ICMPV6, SCTP = 1, 6, 17, 47, 58, 132


def packed(text: str) -> bytes:
    return ip_address(text).packed


def resource_id(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012x}"


def naive_sum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = 0
    for high, low in zip(data[::2], data[1::2], strict=True):
        total += high << 8 | low
        total = (total & 0xFFFF) + (total >> 16)
    return total


def naive_checksum(data: bytes) -> int:
    return 0xFFFF - naive_sum(data)


def pseudo(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    if len(source) == 4:
        return source + destination + struct.pack("!BBH", 0, protocol, length)
    return source + destination + struct.pack("!IHBB", length, 0, 0, protocol)


def v4(source, destination, protocol, l4, *, tos=0, ttl=64, fragment=0, options=b"", total=None):
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x45 + len(options) // 4,
        tos,
        20 + len(options) + len(l4) if total is None else total,
        0x1234,
        fragment,
        ttl,
        protocol,
        0,
        packed(source),
        packed(destination),
    )
    checksum = naive_checksum(header + options)
    return header[:10] + struct.pack("!H", checksum) + header[12:] + options + l4


def v6(source, destination, next_header, l4, *, traffic_class=0, hop_limit=64, length=None):
    first = 0x60000000 | traffic_class << 20
    size = len(l4) if length is None else length
    return struct.pack("!IHBB16s16s", first, size, next_header, hop_limit, packed(source), packed(destination)) + l4


def ip(source, destination, protocol, l4, **fields):
    return (v6 if ":" in source else v4)(source, destination, protocol, l4, **fields)


def fill_checksum(source, destination, protocol, l4, offset):
    covered = pseudo(packed(source), packed(destination), protocol, len(l4)) + l4
    return l4[:offset] + struct.pack("!H", naive_checksum(covered) or 0xFFFF) + l4[offset + 2 :]


def udp(source, destination, sport, dport, payload=b"hi", *, checksum=None, **fields):
    l4 = struct.pack("!HHHH", sport, dport, 8 + len(payload), checksum or 0) + payload
    if checksum is None:
        l4 = fill_checksum(source, destination, UDP, l4, 6)
    return ip(source, destination, UDP, l4, **fields)


def tcp(source, destination, sport, dport, flags=ACK, payload=b"", *, data_offset=5, **fields):
    l4 = struct.pack("!HHIIBBHHH", sport, dport, 1, 2, data_offset << 4, flags, 1000, 0, 0) + payload
    return ip(source, destination, TCP, fill_checksum(source, destination, TCP, l4, 16), **fields)


def icmp(source, destination, kind, code, rest=bytes(4), payload=b"", **fields):
    l4 = struct.pack("!BBH4s", kind, code, 0, rest) + payload
    if ":" in source:
        return v6(source, destination, ICMPV6, fill_checksum(source, destination, ICMPV6, l4, 2), **fields)
    return v4(source, destination, ICMP, l4[:2] + struct.pack("!H", naive_checksum(l4) or 0xFFFF) + l4[4:], **fields)


def echo(source, destination, identifier, *, reply=False, sequence=1, payload=b"ping", **fields):
    kind = (129 if reply else 128) if ":" in source else (0 if reply else 8)
    return icmp(source, destination, kind, 0, struct.pack("!HH", identifier, sequence), payload, **fields)


def gre(source, destination, **fields):
    return ip(source, destination, GRE, b"\0\0\x08\0payload!", **fields)


def checksums_hold(packet: bytes) -> bool:
    """Recomputed from scratch; a zero UDP checksum counts as right."""
    if packet[0] >> 4 == 4:
        header = (packet[0] & 15) * 4
        if naive_sum(packet[:header]) not in (0, 0xFFFF):
            return False
        source, destination, protocol, l4 = packet[12:16], packet[16:20], packet[9], packet[header:]
    else:
        source, destination, protocol, l4 = packet[8:24], packet[24:40], packet[6], packet[40:]
    if protocol == ICMP:
        return naive_sum(l4) == 0xFFFF
    if protocol == UDP and l4[6:8] == b"\0\0":
        return True
    if protocol in (TCP, UDP, ICMPV6):
        return naive_sum(pseudo(source, destination, protocol, len(l4)) + l4) == 0xFFFF
    return True


def addresses(packet: bytes) -> tuple[str, str]:
    source, destination = (packet[12:16], packet[16:20]) if packet[0] >> 4 == 4 else (packet[8:24], packet[24:40])
    return str(ip_address(source)), str(ip_address(destination))


def ports(packet: bytes) -> tuple[int, int]:
    offset = (packet[0] & 15) * 4 if packet[0] >> 4 == 4 else 40
    return struct.unpack_from("!HH", packet, offset)


def icmp_kind(packet: bytes) -> tuple[int, int]:
    offset = 20 if packet[0] >> 4 == 4 else 40
    return packet[offset], packet[offset + 1]


def control(kind: int, payload: bytes = b"", *, hop_limit: int = 0, filler: bytes = bytes(7)) -> bytes:
    return v6("::", "::", 255, bytes((kind,)) + filler + payload, hop_limit=hop_limit)


class World:
    """One tunnel with the gateway's addresses set, and what it said."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.tunnel = Tunnel(now=now)
        self.tunnel.set_gateway_addresses(packed(GATEWAY4), packed(GATEWAY6))
        self.events = []

    def drain(self):
        """Events since the last look."""
        drained = []
        while (event := self.tunnel.poll_event()) is not None:
            drained.append(event)
        self.events += drained
        return drained

    def grant(self, resource, client=A, ipv4=None, ipv6=None, expires=None):
        own = {A: (A4, A6), B: (B4, B6)}.get(client, (None, None))
        return self.tunnel.grant(client, packed(ipv4 or own[0]), packed(ipv6 or own[1]), resource, expires, self.now)

    def cidr(self, network, *filters, number=1, client=A, expires=None):
        return self.grant(CidrResource(resource_id(number), ip_network(network), filters), client, expires=expires)

    def dns(self, pattern, *filters, number=2, client=A, expires=None):
        return self.grant(DnsResource(resource_id(number), pattern, filters), client, expires=expires)

    def internet(self, number=3, client=A, expires=None):
        return self.grant(InternetResource(resource_id(number)), client, expires=expires)

    def out(self, packet, client=A, ecn=0):
        return self.tunnel.handle_inner_packet(client, packet, ecn, self.now)

    def back(self, packet):
        return self.tunnel.handle_tun_packet(packet, self.now)

    def passes(self, packet, client=A):
        """Forwarded to the TUN byte for byte."""
        verdict = self.out(packet, client)
        return isinstance(verdict, Forward) and verdict.packet == packet

    def refusal(self, packet, client=A):
        """Type and code of the ICMP error that a packet earns; None if it earns none."""
        verdict = self.out(packet, client)
        return icmp_kind(verdict.packet) if isinstance(verdict, Reply) else None

    def translated(self, packet, client=A) -> bytes:
        verdict = self.out(packet, client)
        assert isinstance(verdict, Forward), verdict
        return verdict.packet

    def delivered(self, packet) -> bytes:
        verdict = self.back(packet)
        assert isinstance(verdict, Deliver), verdict
        return verdict.packet

    def dropped(self, packet):
        """The reason for which a packet from the TUN is dropped; None if it is not."""
        verdict = self.back(packet)
        return verdict.reason if isinstance(verdict, Drop) else None

    def assign(self, domain, proxy_ips, answer=(), *, number=2, client=A):
        """AssignedIps and, if asked for, the answer; the status that the client gets, None without one."""
        resolve = self.ask(domain, proxy_ips, number=number, client=client)
        if resolve is None:
            return self.last_status(client)
        self.tunnel.handle_resolved(resolve.request, [ip_address(text) for text in answer], self.now)
        self.drain()
        return self.last_status(client)

    def ask(self, domain, proxy_ips, *, number=2, client=A):
        """AssignedIps alone; the resolution that it starts."""
        texts = ",".join(f'"{text}"' for text in proxy_ips)
        payload = f'{{"resource":"{resource_id(number)}","domain":"{domain}","proxy_ips":[{texts}]}}'.encode()
        self.out(control(0, payload), client)
        return next((event for event in self.drain() if isinstance(event, ResolveDomain)), None)

    def last_status(self, client=A):
        sent = [event.packet for event in self.events if isinstance(event, SendToClient) and event.client_id == client]
        if not sent or sent[-1][40] != 1:
            return None
        return sent[-1].rpartition(b'"status":"')[2].removesuffix(b'"}').decode()

    def run(self, seconds):
        """Let time pass, with timeouts when they are due."""
        end = self.now + seconds
        while (due := self.tunnel.poll_timeout()) is not None and due.at <= end:
            self.now = max(self.now, due.at)
            self.tunnel.handle_timeout(self.now)
            self.drain()
        self.now = end
