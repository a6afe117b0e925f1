"""A whole client with the ICE agent and the WireGuard that are also in the original's client."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
from typing import TYPE_CHECKING, Any

from tests.interop.loopback import CLIENT4, CLIENT6, PATIENCE_S, World
from tests.interop.portal_device import PortalDevice
from tests.interop.rust_client.program import RustClient

if TYPE_CHECKING:
    from collections.abc import Collection

ALL_KINDS = frozenset({"host", "srflx", "relay"})
REALM = "firezone"
_indices = itertools.count(1)


class RustDevice(PortalDevice):
    """`offer`: kinds of candidates that it tells; `remote_kinds`: the only ways to the gateway."""

    def __init__(
        self,
        world: World,
        *,
        offer: Collection[str] = ("host", "srflx", "relay"),
        remote_kinds: Collection[str] = ALL_KINDS,
        ipv6: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(world, **options)
        self.program = RustClient()
        self._offer = sorted(offer)
        self._remote_kinds = frozenset(remote_kinds)
        self.host = CLIENT6 if ipv6 else CLIENT4
        self._blocked: set[str] = set()

    async def open(self) -> None:
        await self.program.start()
        self._stack.push_async_callback(self.program.close)
        self._in_background(self.program.follow())
        ipv6 = ":" in self.host
        host = f"[{self.host}]:0" if ipv6 else f"{self.host}:0"
        self.program.order("open", hosts=[host], relay=None if ipv6 else self._relay())
        (self.host,) = (await self.until("opened"))["hosts"]

    async def begin(self) -> None:
        authorization = self.authorization
        keys = {
            "local": _credentials(authorization["client_ice_credentials"]),
            "remote": _credentials(authorization["gateway_ice_credentials"]),
            "private_key": bytes(self.key).hex(),
            "public_key": base64.b64decode(authorization["gateway_public_key"]).hex(),
            "preshared_key": base64.b64decode(authorization["preshared_key"]).hex(),
            "index": next(_indices),
        }
        since = self.mark()
        self.program.order("connect", keys=keys, offer=self._offer)
        self.tell((await self.until("candidates", since=since))["lines"])

    async def hear(self, lines: list[str]) -> None:
        for line in lines:
            if line.split()[7] in self._remote_kinds:
                self.program.order("add_remote", line=line)
            else:
                self._block(line)

    async def unhear(self, lines: list[str]) -> None:
        for line in lines:
            if line.split()[7] in self._remote_kinds:
                self.program.order("remove_remote", line=line)

    def lose(self, kind: str) -> None:
        """Lose what comes from the gateway's candidates of this kind from now on."""
        for line in self.told:
            if line.split()[7] == kind:
                self._block(line)

    def allow(self, kind: str) -> None:
        """Let candidates of the gateway of this kind in from now on."""
        self._remote_kinds |= {kind}
        self._blocked.clear()
        self.program.order("block", addresses=[])
        for line in self.told:
            if line.split()[7] == kind:
                self.program.order("add_remote", line=line)

    async def connect(self) -> None:
        """Up to the first handshake."""
        await self.authorize(self.world.resources.ipv4)
        await self.until("handshake")

    async def offer(self, *kinds: str) -> None:
        """Tell the gateway more candidates."""
        since = self.mark()
        self.program.order("offer", kinds=kinds)
        self.tell((await self.until("candidates", since=since))["lines"])

    async def withdraw(self, *kinds: str) -> None:
        """Take candidates back."""
        since = self.mark()
        self.program.order("withdraw", kinds=kinds)
        self.untell((await self.until("withdrawn", since=since))["lines"])

    def received(self) -> list[bytes]:
        """The packets that came and were not yet taken."""
        packets = []
        while not self.program.packets.empty():
            packets.append(self.program.packets.get_nowait())
        return packets

    def mark(self) -> int:
        """A position among the program's events."""
        return len(self.program.events)

    async def until(self, event: str, *, since: int = 0, timeout: float = PATIENCE_S, **wanted: Any) -> dict[str, Any]:
        """An event of the program; waits for it."""
        return await self.program.until(event, since=since, timeout=timeout, **wanted)

    def send(self, packet: bytes) -> None:
        """An IP packet of the device's user."""
        self.program.order("send", packet=packet.hex())

    async def receive(self, wanted: bytes, *, timeout: float = PATIENCE_S) -> None:
        """Wait until exactly this packet comes out of the tunnel."""
        async with asyncio.timeout(timeout):
            while await self.program.packets.get() != wanted:
                pass

    async def receive_any(self, *, timeout: float = PATIENCE_S) -> bytes:
        """The next packet that comes out of the tunnel."""
        async with asyncio.timeout(timeout):
            return await self.program.packets.get()

    def _block(self, line: str) -> None:
        host, port = line.split()[4:6]
        self._blocked.add(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        self.program.order("block", addresses=sorted(self._blocked))

    def _relay(self) -> dict[str, str] | None:
        relay = next((relay for relay in self.init["relays"] if "[" not in relay["addr"]), None)
        if relay is None:
            return None
        key = hashlib.md5(f"{relay['username']}:{REALM}:{relay['password']}".encode()).hexdigest()
        return {"server": relay["addr"], "username": relay["username"], "realm": REALM, "key": key}


def _credentials(said: dict[str, str]) -> dict[str, str]:
    return {"ufrag": said["username"], "pass": said["password"]}
