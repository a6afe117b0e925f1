"""The demonstration for machines without network namespaces or TUN: everything on loopback, devices in memory."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.lab.control import Control, ControlError
from tests.lab.portal_client import TOKEN, PortalProcess
from tests.lab.process import lab_environment, wait_until
from tests.lab.program import gateway_command
from tests.lab.relay_client import RelayProcess

if TYPE_CHECKING:
    from rich.console import Console

RESOURCE = "10.20.0.100"
VNET_HEADER = bytes(10)
ROUNDS = 20
NOT_SHOWN = (
    "TCP, HTTP, the download with its checksum and the revocation under it (they need a TUN device)",
    "NAT routers and DNS resources (they need network namespaces)",
    "host set-up: addresses, routes, nftables",
)


class DemoError(Exception):
    """Something did not work as promised; the message says what was seen."""


def show(console: Console, gateway: str, reason: str) -> None:
    """Ping and UDP echo over a direct and a relayed path."""
    console.print(f"[yellow]No network laboratory here ({reason}): portal, relays, gateway and client run on loopback.")
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fzlab-demo-")))
        portal = stack.enter_context(PortalProcess(directory=directory, resources=["cidr=10.20.0.0/16"]))
        for number in (2, 3):
            stack.enter_context(
                RelayProcess(
                    name=f"relay{number}", ipv4=f"127.0.0.{number}", portal_url=portal.url, directory=directory
                )
            )
        portal.wait_relays(2)
        command = shlex.split(gateway) or gateway_command()
        environment = {"FIREZONE_TOKEN": TOKEN, "FIREZONE_ID": "demo", "HEALTH_CHECK_ADDR": "127.0.0.1:0"}
        network = _start(stack, directory, "gateway", [*command, "--api-url", portal.url], environment)
        threading.Thread(target=_answer, args=(network,), daemon=True).start()
        portal.wait_gateway()
        for path, options in (("direct", []), ("relayed", ["--relay-only"])):
            _tour(stack, directory, portal, console, path, options)
    for missing in NOT_SHOWN:
        console.print(f"  not shown: {missing}")


def _tour(
    stack: contextlib.ExitStack, directory: Path, portal: PortalProcess, console: Console, path: str, options: list[str]
) -> None:
    control = Control(directory / f"{path}.sock")
    arguments = [
        "--portal-url",
        portal.url,
        "--token",
        TOKEN,
        "--external-id",
        path,
        "--control",
        control.path,
        *options,
    ]
    device = _start(stack, directory, f"client-{path}", [sys.executable, "-m", "tests.lab.client", *arguments], {})

    def ready() -> bool:
        with contextlib.suppress(ControlError):
            return bool(control.call("status")["ready"])
        return False

    wait_until(ready, timeout=20, what="the client is ready")
    source = socket.inet_aton(control.call("status")["interface"]["ipv4"])
    destination = socket.inet_aton(RESOURCE)
    for what, packet in (("ping", _echo(source, destination)), ("UDP echo", _udp(source, destination))):
        times = [_round_trip(device, packet) for _ in range(ROUNDS)]
        console.print(
            f"  {path} path, {what}: [green]{times[0]:.1f} ms the first, {min(times):.2f} ms the best of {ROUNDS}"
        )
    kind = control.call("status")["links"][0]["path"]
    if (path == "relayed") != ("Relay" in str(kind)):
        raise DemoError(f"the {path} path is {kind}")
    console.print(f"  {path} path: [green]{kind}")


def _start(
    stack: contextlib.ExitStack, directory: Path, name: str, command: list[str], environment: dict[str, str]
) -> socket.socket:
    """A process with an in-memory TUN; returns the far end, where packets carry a virtio header."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with (directory / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--tun-fd", str(near.fileno())],
            pass_fds=[near.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=os.environ | lab_environment() | environment,
        )  # fmt: skip
    near.close()

    def stop() -> None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        far.close()

    stack.callback(stop)
    return far


def _round_trip(device: socket.socket, packet: bytes) -> float:
    device.settimeout(20.0)
    begin = time.perf_counter()
    device.send(VNET_HEADER + packet)
    reply = device.recv(1 << 16)[len(VNET_HEADER) :]
    if reply[12:16] != packet[16:20] or reply[16:20] != packet[12:16]:
        raise DemoError("an answer came that nobody asked for")
    return (time.perf_counter() - begin) * 1000


def _answer(network: socket.socket) -> None:
    """The resource: answers pings and echoes datagrams; the checksums of swapped addresses and ports stay right."""
    while True:
        try:
            packet = bytearray(network.recv(1 << 16)[len(VNET_HEADER) :])
        except OSError:
            return
        if not packet:
            return
        if packet[0] >> 4 != 4:
            continue
        packet[12:16], packet[16:20] = packet[16:20], packet[12:16]
        if packet[9] == 1:
            packet[20] = 0
            packet[22:24] = struct.pack("!H", _checksum(bytes(packet[20:22]) + bytes(2) + bytes(packet[24:])))
        elif packet[9] == 17:
            packet[20:22], packet[22:24] = packet[22:24], packet[20:22]
        network.send(VNET_HEADER + packet)


def _echo(source: bytes, destination: bytes) -> bytes:
    body = struct.pack("!BBHHH", 8, 0, 0, os.getpid() & 0xFFFF, 1) + b"firezone"
    return _ipv4(source, destination, 1, body[:2] + struct.pack("!H", _checksum(body)) + body[4:])


def _udp(source: bytes, destination: bytes) -> bytes:
    return _ipv4(source, destination, 17, struct.pack("!HHHH", 40_000, 7, 16, 0) + b"firezone")


def _ipv4(source: bytes, destination: bytes, protocol: int, payload: bytes) -> bytes:
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 0, 0x4000, 64, protocol, 0, source, destination)
    return header[:10] + struct.pack("!H", _checksum(header)) + header[12:] + payload


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF
