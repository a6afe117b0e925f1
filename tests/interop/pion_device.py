"""A client with the ICE agent of pion/ice and the WireGuard of wireguard-go, and relays of pion/turn."""

from __future__ import annotations

import asyncio
import base64
import socket
from typing import TYPE_CHECKING, Any

from tests.interop.loopback import CLIENT4, CLIENT6, PATIENCE_S, World
from tests.interop.pion.program import PionAgent, PionTurn
from tests.interop.portal_device import PortalDevice
from tests.interop.wireguard_go.program import WireguardGo
from tests.lab.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Collection

ALL_KINDS = frozenset({"host", "srflx", "relay"})


class PionWorld(World):
    """Both relays by pion/turn."""

    def __init__(self) -> None:
        super().__init__(gateway_relay="pion", client_relay="pion")

    def _relay(self, program: str, address: str, ipv6: str | None = None) -> Any:
        turn = PionTurn(ipv4=address, port=free_port(address), portal_url=self.portal.url)
        return self._stack.enter_context(turn)


class PionDevice(PortalDevice):
    """`kinds`: of its own candidates; `remote_kinds`: the only ways to the gateway."""

    def __init__(
        self,
        world: World,
        *,
        kinds: Collection[str] = ("host",),
        remote_kinds: Collection[str] = ALL_KINDS,
        ipv6: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(world, **options)
        self.agent = PionAgent()
        self._kinds, self._remote_kinds = sorted(kinds), frozenset(remote_kinds)
        self._host = CLIENT6 if ipv6 else CLIENT4

    async def open(self) -> None:
        await self.agent.start()
        self._stack.push_async_callback(self.agent.close)
        self._in_background(self.agent.follow())

    async def begin(self) -> None:
        mine, theirs = self.authorization["client_ice_credentials"], self.authorization["gateway_ice_credentials"]
        order = {"ufrag": mine["username"], "password": mine["password"], "address": self._host, "kinds": self._kinds}
        if "relay" in self._kinds:
            relay = self.init["relays"][0]
            order |= {"relay": relay["addr"], "relay_user": relay["username"], "relay_password": relay["password"]}
        self.agent.order("gather", **order)
        self.tell((await self.agent.until("candidates", timeout=PATIENCE_S))["lines"])
        self.agent.order("connect", remote_ufrag=theirs["username"], remote_password=theirs["password"])

    async def hear(self, lines: list[str]) -> None:
        for line in lines:
            words = line.split()
            if words[7] in self._remote_kinds:
                self.agent.order("add_remote", line=line)
            else:
                self.agent.order("block", **{"from": f"{words[4]}:{words[5]}"})

    async def unhear(self, lines: list[str]) -> None:
        """pion/ice knows no such thing."""

    async def connect(self) -> tuple[str, str]:
        """Up to a nominated pair; the kinds of its candidates, ours first."""
        await self.authorize(self.world.resources.ipv4)
        selected = await self.agent.until("selected", timeout=PATIENCE_S)
        return selected["local"], selected["remote"]

    async def open_tunnel(self) -> None:
        """WireGuard over the agent's path; the test is its TUN."""
        bridge = await self.agent.until("bridge", timeout=PATIENCE_S)
        self._tun = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._stack.callback(self._tun.close)
        self._tun.bind(("127.0.0.1", 0))
        self._tun.setblocking(False)
        self._wireguard = await asyncio.to_thread(
            WireguardGo, link=bridge["address"], tun=f"udp:127.0.0.1:{self._tun.getsockname()[1]}"
        )
        self._stack.push_async_callback(asyncio.to_thread, self._wireguard.close)
        host, _, port = self._wireguard.tun.rpartition(":")
        self._tun.connect((host, int(port)))
        self._wireguard.set(
            f"private_key={bytes(self.key).hex()}",
            f"public_key={base64.b64decode(self.authorization['gateway_public_key']).hex()}",
            f"preshared_key={base64.b64decode(self.authorization['preshared_key']).hex()}",
            "endpoint=192.0.2.1:1",
            "allowed_ip=0.0.0.0/0",
        )

    def send(self, packet: bytes) -> None:
        """An IP packet of the device's user."""
        self._tun.send(packet)

    async def receive(self, wanted: bytes, *, timeout: float = PATIENCE_S) -> None:
        """Wait until exactly this packet comes out of the tunnel."""
        async with asyncio.timeout(timeout):
            while await asyncio.get_running_loop().sock_recv(self._tun, 1 << 16) != wanted:
                pass
