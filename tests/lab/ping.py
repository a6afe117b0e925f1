"""ICMP echo without the ping program, which minimal machines lack."""

from __future__ import annotations

import os
import select
import socket
import struct
import time

INTERVAL_S = 0.2


def ping(host: str, timeout: float) -> float | None:
    """Seconds from the answered request to its answer, or None if none came within `timeout`; asks each 200 ms."""
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
    ipv6 = family == socket.AF_INET6
    identifier = os.getpid() & 0xFFFF
    sent: dict[int, float] = {}
    protocol = socket.IPPROTO_ICMPV6 if ipv6 else socket.IPPROTO_ICMP
    with socket.socket(family, socket.SOCK_RAW, protocol) as sock:
        begin = time.monotonic()
        sequence = 0
        while (now := time.monotonic()) < begin + timeout:
            sequence += 1
            sent[sequence] = now
            sock.sendto(request(ipv6, identifier, sequence), address)
            while (left := now + INTERVAL_S - time.monotonic()) > 0:
                if not select.select([sock], [], [], left)[0]:
                    break
                packet = sock.recv(2048)
                reply = packet if ipv6 else packet[(packet[0] & 15) * 4 :]
                kind, _, _, identity, number = struct.unpack_from("!BBHHH", reply)
                if kind == (129 if ipv6 else 0) and identity == identifier and number in sent:
                    return time.monotonic() - sent[number]
    return None


def request(ipv6: bool, identifier: int, sequence: int) -> bytes:
    body = struct.pack("!HH", identifier, sequence) + b"firezone-lab"
    if ipv6:
        return struct.pack("!BBH", 128, 0, 0) + body  # the kernel completes ICMPv6 checksums
    head = struct.pack("!BBH", 8, 0, 0)
    total = sum(struct.unpack(f"!{len(head + body) // 2}H", head + body))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!BBH", 8, 0, ~total & 0xFFFF) + body
