"""A portal, two relays and the gateway's own process on loopback: no privileges, no TUN, no namespace.

The gateway is 127.0.0.1 and ::1, its relay 127.0.0.2 and ::1, the client's relay 127.0.0.3, the client 127.0.0.4
and ::1. Different addresses matter: a relay's permissions are by address.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from tests.lab.portal_client import TOKEN, PortalProcess
from tests.lab.ports import free_port
from tests.lab.process import lab_environment
from tests.lab.relay_client import RelayProcess
from tests.lab.secrets import WATCH
from tests.unit.tunnel_world import echo, udp

GATEWAY_RELAY, CLIENT_RELAY = "127.0.0.2", "127.0.0.3"
CLIENT4, CLIENT6 = "127.0.0.4", "::1"
IPV4_RESOURCE, IPV6_RESOURCE = "10.9.0.0/16", "2001:db8:9::/64"
SERVER4, SERVER6 = "10.9.0.5", "2001:db8:9::5"

# Generous: the machine may be busy. Nothing waits that long when all is well.
PATIENCE_S = 20.0

_VNET_HEADER = struct.Struct("=BBHHHH")  # <linux/virtio_net.h>: flags, gso_type, hdr_len, gso_size, start, offset
_GSO_NONE, _GSO_UDP_L4 = 0, 5
_marks = itertools.count()  # no two exchanges look alike


class Device(Protocol):
    """A client of foreign parts, as its inner packets see it."""

    ipv4: str

    def send(self, packet: bytes) -> None:
        """Into its tunnel."""

    async def receive(self, wanted: bytes) -> None:
        """Wait for this packet from its tunnel."""


class Tun:
    """The far end of what the gateway takes for its TUN: the network of the resources."""

    def __init__(self) -> None:
        self._near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._near.setblocking(False)
        self._queue: deque[bytes] = deque()
        self.skipped: list[bytes] = []

    async def receive(self, *, timeout: float = PATIENCE_S) -> bytes:
        """The next packet from the gateway."""
        async with asyncio.timeout(timeout):
            while not self._queue:
                read = await asyncio.get_running_loop().sock_recv(self._near, 1 << 17)
                self._queue.extend(packets_of(read))
        return self._queue.popleft()

    async def expect(self, wanted: bytes, *, timeout: float = PATIENCE_S) -> None:
        """Wait for this packet; others go to `skipped`."""
        async with asyncio.timeout(timeout):
            while (packet := await self.receive(timeout=timeout)) != wanted:
                self.skipped.append(packet)

    async def is_silent(self, unwanted: bytes, *, seconds: float) -> bool:
        """Whether this packet does not come for a while."""
        try:
            await self.expect(unwanted, timeout=seconds)
        except TimeoutError:
            return True
        return False

    def send(self, packet: bytes) -> None:
        """A packet that the kernel routed to the TUN."""
        self._near.send(bytes(_VNET_HEADER.size) + packet)

    def close(self) -> None:
        self._near.close()
        self.far.close()


def packets_of(read: bytes) -> list[bytes]:
    """The IP packets of one write to the TUN; only datagrams are split, as tests send nothing else in bulk."""
    header, packet = _VNET_HEADER.unpack_from(read), read[_VNET_HEADER.size :]
    _, gso_type, headers, size, start, _ = header
    if gso_type == _GSO_NONE:
        return [packet]
    assert gso_type == _GSO_UDP_L4
    payload = packet[headers:]
    segments = []
    for at in range(0, len(payload), size):
        body = payload[at : at + size]
        segment = bytearray(packet[:headers] + body)
        if packet[0] >> 4 == 4:
            struct.pack_into("!H", segment, 2, len(segment))
            struct.pack_into("!HH", segment, 10, 0, 0)  # lengths and sums are not compared
        else:
            struct.pack_into("!H", segment, 4, len(segment) - 40)
        struct.pack_into("!HH", segment, start + 4, 8 + len(body), 0)
        segments.append(bytes(segment))
    return segments


class GatewayProcess:
    """`python -m fzg` with a `Tun`."""

    def __init__(self, url: str, directory: Path, *, name: str = "interop") -> None:
        self.tun = Tun()
        self._log = directory / f"{name}.log"
        self._begin = self._log.stat().st_size if self._log.exists() else 0
        descriptor = self.tun.far.fileno()
        command = [sys.executable, "-m", "fzg", "--tun-fd", str(descriptor), "-u", url, "-i", name]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command, "--health-check-addr", "127.0.0.1:0"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[descriptor],
                env=os.environ | lab_environment() | {"FIREZONE_TOKEN": TOKEN, "RUST_LOG": "debug"},
            )
        self.tun.far.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def log_text(self) -> str:
        """What it logged since its start."""
        return self._log.read_bytes()[self._begin :].decode(errors="replace")

    async def logs(self, text: str, *, timeout: float = PATIENCE_S) -> None:
        """Wait until the log holds `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.log_text():
            assert time.monotonic() < deadline, f"the gateway did not log {text!r}:\n{self.log_text()[-4000:]}"
            await asyncio.sleep(0.01)

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.send_signal(signal.SIGTERM)

    def close(self) -> int:
        """End it; the exit status."""
        if self._process.poll() is None:
            self.terminate()
        try:
            status = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        WATCH.hear_log("the gateway", self._log)
        self.tun.close()
        return status


class Ids(NamedTuple):
    """What the portal calls the resources."""

    ipv4: str
    ipv6: str


class World:
    """All of it, running. `gateway_relay` is the program that serves the gateway; the client gets the other one."""

    def __init__(self, *, gateway_relay: str = "relay", client_relay: str = "coturn") -> None:
        self._stack = contextlib.ExitStack()
        try:
            self._start(gateway_relay, client_relay)
        except BaseException:
            self.close()
            raise

    def _start(self, gateway_relay: str, client_relay: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="fzg-interop-"))
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        resources = [f"cidr={IPV4_RESOURCE}", f"cidr={IPV6_RESOURCE}"]
        self.portal = self._stack.enter_context(PortalProcess(resources=resources))
        self.gateway_relay = self._relay(gateway_relay, GATEWAY_RELAY, ipv6="::1")
        self.client_relay = self._relay(client_relay, CLIENT_RELAY)
        self.portal.choose_relays(whom="gateway", relays=[self.gateway_relay.id])
        self.portal.choose_relays(whom="client", relays=[self.client_relay.id])
        self.gateway = self.start_gateway()
        known = self.portal.state()["resources"]
        by_address = {resource["address"]: key for key, resource in known.items()}
        self.resources = Ids(by_address[IPV4_RESOURCE], by_address[IPV6_RESOURCE])

    @property
    def tun(self) -> Tun:
        """The network behind the gateway."""
        return self.gateway.tun

    def start_gateway(self, name: str = "interop") -> GatewayProcess:
        """A gateway that has an allocation at its relay. It dies with the calling thread."""
        gateway = GatewayProcess(self.portal.url, self.directory, name=name)
        self._stack.callback(gateway.close)
        asyncio.run(gateway.logs("allocation active"))
        return gateway

    def _relay(self, program: str, address: str, ipv6: str | None = None) -> RelayProcess:
        return self._stack.enter_context(
            RelayProcess(
                program=program,
                name=f"{program}-{address}",
                ipv4=address,
                ipv6=ipv6 if program == "relay" else None,
                port=free_port(address),
                portal_url=self.portal.url,
                loopback_peers=True,
            )
        )

    def close(self) -> None:
        """End everything, the gateway first."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def exchange(device: Device, tun: Tun, *, size: int = 100) -> None:
    """An echo and its reply, then a datagram that the server sends unasked, `size` bytes each."""
    payload = f"{next(_marks):08}".encode().ljust(size - 28, b"-")
    request = echo(device.ipv4, SERVER4, 7, payload=payload)
    device.send(request)
    await tun.expect(request)
    reply = echo(SERVER4, device.ipv4, 7, reply=True, payload=payload)
    tun.send(reply)
    await device.receive(reply)
    unasked = udp(SERVER4, device.ipv4, 53, 4000, payload)
    assert len(unasked) == size
    tun.send(unasked)
    await device.receive(unasked)
