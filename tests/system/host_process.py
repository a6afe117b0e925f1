"""A process that does to its namespace what the gateway does, one JSON command per line of standard input.

Options: `--gevent` runs everything in a native thread of a patched process, as the gateway does; `--only-net-admin`
becomes an ordinary user with that one capability first, `--no-capability` one without any.
"""

from __future__ import annotations

import sys

if "--gevent" in sys.argv:
    from gevent import monkey

    monkey.patch_all()

import ctypes
import json
import os
import select
import struct
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from fzg.host.masquerade import Masquerade
from fzg.host.network import HostError, HostNetwork
from fzg.host.tun import open_tun

NOBODY = 65534
NET_ADMIN = 1 << 12


def become_nobody(capabilities: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    keep_capabilities = 8  # PR_SET_KEEPCAPS
    assert libc.prctl(keep_capabilities, 1, 0, 0, 0) == 0
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    data = struct.pack("=IIIIII", capabilities, capabilities, 0, 0, 0, 0)
    assert libc.capset(header, data) == 0


def udp(source: str, destination: str, payload: bytes, port: int = 9000) -> bytes:
    """An IP packet with a UDP datagram from port 7000; over IPv4 without a checksum."""
    version = 6 if ":" in source else 4
    make = IPv6Address if version == 6 else IPv4Address
    src, dst = make(source).packed, make(destination).packed
    length = 8 + len(payload)
    segment = struct.pack("!HHHH", 7000, port, length, 0) + payload
    if version == 4:
        header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + length, 1, 0, 64, 17, 0, src, dst)
        return header[:10] + struct.pack("!H", ones(header)) + header[12:] + segment
    checksum = ones(src + dst + struct.pack("!IHBB", length, 0, 0, 17) + segment)
    header = struct.pack("!IHBB16s16s", 6 << 28, length, 17, 64, src, dst)
    return header + segment[:6] + struct.pack("!H", checksum) + segment[8:]


def ones(data: bytes) -> int:
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def received(descriptor: int, seconds: float) -> str | None:
    """The destination of the next UDP packet out of the TUN."""
    while select.select([descriptor], [], [], seconds)[0]:
        packet = os.read(descriptor, 65536)[10:]
        if packet[0] >> 4 == 4 and packet[9] == 17:
            return str(IPv4Address(packet[16:20]))
        if packet[0] >> 4 == 6 and packet[6] == 17:
            return str(IPv6Address(packet[24:40]))
    return None


def main() -> None:
    network = HostNetwork()
    tun = open_tun()
    if "--only-net-admin" in sys.argv:
        become_nobody(NET_ADMIN)
    if "--no-capability" in sys.argv:
        become_nobody(0)
    run = lambda function, *arguments: function(*arguments)
    if "--gevent" in sys.argv:
        from gevent.threadpool import ThreadPool

        pool = ThreadPool(1)
        run = lambda function, *arguments: pool.spawn(function, *arguments).get()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = execute(run, network, tun.descriptor, name, arguments)
        except HostError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


def execute(run, network, descriptor, name, arguments):
    match name:
        case "prepare":
            report = run(network.prepare, Masquerade(arguments[0]))
        case "repair":
            report = run(network.repair)
        case "remove":
            report = run(network.remove)
        case "configure":
            ipv4, ipv6 = arguments
            report = run(network.configure, ipv4 and IPv4Address(ipv4), ipv6 and IPv6Address(ipv6))
            return {"ipv4": report.ipv4, "ipv6": report.ipv6, "notes": report.notes, "warnings": report.warnings}
        case "send":
            source, destination, seconds, *port = arguments
            os.write(descriptor, bytes(10) + udp(source, destination, source.encode(), *port))
            return {"answered": received(descriptor, seconds)}
        case "status":
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            return {"uid": fields["Uid"].split(), "effective": fields["CapEff"].strip()}
    return {"notes": report.notes, "warnings": report.warnings}


main()
