"""A client of foreign parts: aioice for ICE and TURN, wireguard-go for WireGuard; only the signalling is the lab's."""

from __future__ import annotations

import asyncio
import base64
import socket
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import aioice
import aioice.ice

from tests.interop.loopback import CLIENT4, CLIENT6, PATIENCE_S, World
from tests.interop.portal_device import PortalDevice
from tests.interop.wireguard_go.program import WireguardGo

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from nacl.public import PrivateKey

ALL_KINDS = frozenset({"host", "srflx", "relay"})


def only_loopback(*, use_ipv4: bool, use_ipv6: bool) -> list[str]:
    """In place of aioice's `get_host_addresses`, which leaves loopback out and takes everything else."""
    return [CLIENT4] * use_ipv4 + [CLIENT6] * use_ipv6


class Firewalled(aioice.ice.StunProtocol):
    """In place of aioice's `StunProtocol`: nothing comes in from the addresses in the connection's `blocked`."""

    def datagram_received(self, data: bytes | str, addr: tuple[Any, ...]) -> None:
        if addr[:2] not in self.receiver.blocked:
            super().datagram_received(data, addr)


class IceClient(PortalDevice):
    """A device at the portal with an aioice agent that controls."""

    def __init__(
        self,
        world: World,
        *,
        external_id: str | None = None,
        key: PrivateKey | None = None,
        relayed: bool = False,
        ipv6: bool = False,
        remote_kinds: Collection[str] = ALL_KINDS,
        controlling: bool = True,
    ) -> None:
        """`relayed`: by an allocation at the client's relay alone; `remote_kinds`: the only ways to the gateway."""
        super().__init__(world, external_id=external_id, key=key)
        self.ice: aioice.Connection
        self._relayed, self._ipv6 = relayed, ipv6
        self._remote_kinds = frozenset(remote_kinds)
        self._controlling = controlling
        self.has_candidates = asyncio.Event()

    async def open(self) -> None:
        """Nothing: the agent needs the credentials of an authorization."""

    async def begin(self) -> None:
        """Make the ICE agent of this authorization."""
        self._make_agent()

    async def hear(self, lines: list[str]) -> None:
        """Check these, unless they are of a kind that is blocked."""
        for line in lines:
            assert line.startswith("candidate:")
            candidate = aioice.Candidate.from_sdp(line.removeprefix("candidate:"))
            if candidate.type not in self._remote_kinds:
                self.ice.blocked.add((candidate.host, candidate.port))
                continue
            await self.ice.add_remote_candidate(candidate)
            self.has_candidates.set()

    async def unhear(self, lines: list[str]) -> None:
        """Nothing: aioice cannot take candidates back."""

    async def gather(self) -> None:
        """Find our candidates and tell them to the gateway, in one message."""
        await self.gather_without_telling()
        lines = [f"candidate:{candidate.to_sdp()}" for candidate in self.ice.local_candidates]
        assert lines
        self.tell(lines)

    async def gather_without_telling(self) -> None:
        """Find our candidates."""
        with (
            patch.object(aioice.ice, "get_host_addresses", only_loopback),
            patch.object(aioice.ice, "StunProtocol", Firewalled),
        ):
            await self.ice.gather_candidates()

    async def connect(self) -> None:
        """All of it, until aioice has nominated a pair."""
        async with asyncio.timeout(PATIENCE_S):
            await self.authorize(self.world.resources.ipv4)
            await self.has_candidates.wait()
            await self.gather()
            await self.ice.connect()

    @property
    def pair(self) -> tuple[str, str]:
        """The kinds of the nominated pair: ours, the gateway's."""
        nominated = self.ice._nominated[1]
        return nominated.local_candidate.type, nominated.remote_candidate.type

    def _make_agent(self) -> None:
        mine = self.authorization["client_ice_credentials"]
        theirs = self.authorization["gateway_ice_credentials"]
        turn = {}
        if self._relayed:
            relay = self.init["relays"][0]
            host, _, port = relay["addr"].rpartition(":")
            turn = {
                "turn_server": (host, int(port)),
                "turn_username": relay["username"],
                "turn_password": relay["password"],
                "transport_policy": aioice.TransportPolicy.RELAY,
            }
        self.ice = aioice.Connection(
            ice_controlling=self._controlling,
            use_ipv4=not self._ipv6,
            use_ipv6=self._ipv6,
            local_username=mine["username"],
            local_password=mine["password"],
            **turn,
        )
        self.ice.blocked = set()
        self.ice.remote_username, self.ice.remote_password = theirs["username"], theirs["password"]
        self._stack.push_async_callback(self.ice.close)


class Device(IceClient):
    """An `IceClient` with wireguard-go on top; the test writes and reads IP packets at its TUN."""

    def __init__(self, world: World, **options: Any) -> None:
        super().__init__(world, **options)
        self.to_gateway: Callable[[bytes], bytes | None] = lambda message: message
        self.from_gateway: Callable[[bytes], bytes | None] = lambda message: message
        """Hooks on the way between wireguard-go and aioice; None drops a message."""
        self._carriers: list[asyncio.Task[None]] = []

    async def connect(self, *, psk: bytes | None = None) -> None:
        """ICE first, then wireguard-go with the portal's keys (or another `psk`)."""
        await super().connect()
        await self.start_wireguard(psk)
        self.start_carrying()

    async def start_wireguard(self, psk: bytes | None = None) -> None:
        """Run wireguard-go; its messages wait for `start_carrying`."""
        self._link, self._tun = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        for each in (self._link, self._tun):
            self._stack.callback(each.close)
            each.bind(("127.0.0.1", 0))
            each.setblocking(False)
        self.go = await asyncio.to_thread(WireguardGo, link=_name(self._link), tun="udp:" + _name(self._tun))
        self._stack.push_async_callback(asyncio.to_thread, self.go.close)
        self._link.connect(_address(self.go.link))
        self._tun.connect(_address(self.go.tun))
        self.go.set(f"private_key={bytes(self.key).hex()}")
        self.add_peer(psk)

    def start_carrying(self) -> None:
        """Connect wireguard-go to the nominated pair."""
        for task in self._carriers:
            task.cancel()
        self._carriers = [self._in_background(carry()) for carry in (self._carry_up, self._carry_down)]

    async def move(self) -> None:
        """Vanish, then come back from other ports with everything else as before."""
        await self.ice.close()
        self._make_agent()
        self.has_candidates.clear()
        await super().connect()
        self.start_carrying()

    async def next_message(self) -> bytes:
        """The next message of wireguard-go, before `start_carrying`."""
        return await asyncio.get_running_loop().sock_recv(self._link, 1 << 16)

    @property
    def gateway_key(self) -> bytes:
        """The gateway's public key."""
        return base64.b64decode(self.authorization["gateway_public_key"])

    @property
    def psk(self) -> bytes:
        """The pre-shared key of the portal."""
        return base64.b64decode(self.authorization["preshared_key"])

    def add_peer(self, psk: bytes | None = None) -> None:
        """Forget all sessions with the gateway and configure it anew: the next packet makes a handshake."""
        key = f"public_key={self.gateway_key.hex()}"
        self.go.set(key, "remove=true")
        self.go.set(
            key,
            f"preshared_key={(psk or self.psk).hex()}",
            "endpoint=192.0.2.1:1",
            "allowed_ip=0.0.0.0/0",
            "allowed_ip=::/0",
        )

    def send(self, packet: bytes) -> None:
        """An IP packet of the device's user."""
        self._tun.send(packet)

    async def receive(self, wanted: bytes, *, timeout: float = PATIENCE_S) -> None:
        """Wait until exactly this packet comes out of the tunnel."""
        async with asyncio.timeout(timeout):
            while await asyncio.get_running_loop().sock_recv(self._tun, 1 << 16) != wanted:
                pass

    async def receive_any(self, *, timeout: float = PATIENCE_S) -> bytes:
        """The next packet that comes out of the tunnel."""
        async with asyncio.timeout(timeout):
            return await asyncio.get_running_loop().sock_recv(self._tun, 1 << 16)

    def handshake_at(self) -> tuple[int, int]:
        """When the last handshake was completed, seconds and nanoseconds; zeros for never."""
        state = self.go.get()
        return int(state["last_handshake_time_sec"]), int(state["last_handshake_time_nsec"])

    async def _carry_up(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            message = await loop.sock_recv(self._link, 1 << 16)
            if (passed := self.to_gateway(message)) is not None:
                await self.ice.send(passed)

    async def _carry_down(self) -> None:
        while True:
            message = await self.ice.recv()
            if (passed := self.from_gateway(message)) is not None:
                self._link.send(passed)


def _name(bound: socket.socket) -> str:
    host, port = bound.getsockname()
    return f"{host}:{port}"


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)
