"""pion, which nobody here wrote: the relay set against pion/turn, the gateway's process against pion/ice."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import time
from typing import TYPE_CHECKING

import pytest

from fzg.secret import Secret
from fzg.turn import NoRelays, Relay, RelaySet, Unwrapped
from fzg.wire import channel_data, stun
from fzg.wire.endpoint import Endpoint
from tests.interop.loopback import World, exchange
from tests.interop.pion.program import PionTurn, build
from tests.interop.pion_device import PionDevice, PionWorld
from tests.interop.wireguard_go.program import build as build_wireguard_go
from tests.lab.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The first build takes ten seconds on two idle cores.
pytestmark = [pytest.mark.slow, pytest.mark.needs("go", "setpriv"), pytest.mark.timeout(600)]

ALLOCATE, REFRESH, CHANNEL_BIND = 3, 4, 9
SUCCESS = 2


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build()
    build_wireguard_go()


# -- pion/turn


class Gateway:
    """A `RelaySet` on a socket of its own; where only time can help, time jumps."""

    def __init__(self, server: PionTurn, *, password: str | None = None) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.local = Endpoint.of(*self.socket.getsockname())
        self.set = RelaySet(random=os.urandom)
        self.sent: list[stun.Message] = []
        self.answers: list[stun.Message] = []
        self.unwrapped: list[tuple[Unwrapped, int]] = []
        self.jumped = 0.0
        username, derived = server.credentials()
        self.relay = Relay("r", Endpoint.of(*server.address), None, username, Secret(password or derived))
        self.events: list[object] = []
        self.set.update([], [self.relay], self.now)

    @property
    def now(self) -> float:
        return time.monotonic() + self.jumped

    @property
    def relayed(self) -> Endpoint | None:
        status = self.set.status()
        return status[0].relayed[0] if status and status[0].relayed else None

    def run_until(self, condition: Callable[[], object], *, at_most: float = 60) -> float:
        """Work until the condition holds; the seconds that took, jumps included."""
        begin = self.now
        while not condition():
            assert self.now - begin < at_most, (self.set.status(), self.sent[-3:], self.answers[-3:])
            self._work()
        self._transmit()
        return self.now - begin

    def wait(self, seconds: float) -> None:
        """Let this much time pass at once."""
        self.jumped += seconds
        self._work()

    def send(self, peer: Endpoint, payload: bytes) -> None:
        route = self.set.route("r", peer, self.now)
        assert route is not None
        self.socket.sendto(channel_data.encode(route.channel, payload), (route.relay.host, route.relay.port))

    def errors(self) -> list[tuple[int, int]]:
        """Method and code of the errors that came."""
        return [(answer.method, answer.error.code) for answer in self.answers if answer.error is not None]

    def successes(self, method: int) -> int:
        """How many requests of this method were granted."""
        return sum(answer.method == method and answer.message_class == SUCCESS for answer in self.answers)

    def requests(self, method: int) -> int:
        """How many requests of this method were sent."""
        return sum(message.method == method for message in self.sent)

    def _work(self) -> None:
        self._transmit()
        # An answer on loopback takes less than 0.1 s.
        if select.select([self.socket], [], [], 0.1)[0]:
            data, address = self.socket.recvfrom(2048)
            if data[0] < 4:
                self.answers.append(stun.parse(data))
            result = self.set.handle_datagram(data, Endpoint.of(*address), self.local, self.now)
            if isinstance(result, Unwrapped):
                self.unwrapped.append((result, len(data)))
        elif (deadline := self.set.poll_timeout()) is not None and self.now < deadline.at < self.now + 20:
            self.jumped += deadline.at - self.now
        self.set.handle_timeout(self.now)
        self._transmit()

    def _transmit(self) -> None:
        while (event := self.set.poll_event()) is not None:
            self.events.append(event)
        while (transmit := self.set.poll_transmit()) is not None:
            self.sent.append(stun.parse(transmit.payload))
            self.socket.sendto(transmit.payload, (transmit.destination.host, transmit.destination.port))


@pytest.fixture
def server() -> Iterator[PionTurn]:
    with PionTurn(ipv4="127.0.0.1", port=free_port("127.0.0.1")) as server:
        yield server


@pytest.fixture
def gateway(server: PionTurn) -> Iterator[Gateway]:
    """With an allocation."""
    gateway = Gateway(server)
    gateway.run_until(lambda: gateway.relayed)
    yield gateway
    gateway.socket.close()


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(5)
        yield peer


def test_an_allocation_comes_with_one_challenge(gateway: Gateway) -> None:
    assert gateway.errors() == [(ALLOCATE, 401)]
    assert gateway.requests(ALLOCATE) == 2
    assert [one.kind for one in gateway.set.candidates("r")] == ["host", "srflx", "relay"]


@pytest.mark.spec("TURN-42")
def test_padded_channel_data_is_taken_as_it_was_sent(gateway: Gateway, peer: socket.socket) -> None:
    address = Endpoint.of(*peer.getsockname())
    gateway.set.bind_channel("r", address, gateway.now)
    gateway.run_until(lambda: gateway.successes(CHANNEL_BIND))
    payload = os.urandom(1312)
    lengths = [1312, 1311, 1310, 1309, 64, 63, 62, 61]
    for length in lengths:
        gateway.send(address, payload[:length])
        received, relayed = peer.recvfrom(2048)
        assert received == payload[:length]
        peer.sendto(received, relayed)
    gateway.run_until(lambda: len(gateway.unwrapped) == len(lengths))
    assert [one.payload for one, _ in gateway.unwrapped] == [payload[:length] for length in lengths]
    assert {one.peer for one, _ in gateway.unwrapped} == {address}
    assert [length for _, length in gateway.unwrapped] == [4 + (length + 3) // 4 * 4 for length in lengths]


def test_an_allocation_and_its_channels_are_kept(gateway: Gateway, peer: socket.socket) -> None:
    address = Endpoint.of(*peer.getsockname())
    gateway.set.bind_channel("r", address, gateway.now)
    gateway.run_until(lambda: gateway.successes(CHANNEL_BIND))
    relayed = gateway.relayed
    gateway.send(address, b"keep it")
    gateway.wait(241)
    gateway.run_until(lambda: gateway.successes(CHANNEL_BIND) == 2)
    gateway.wait(61)
    gateway.run_until(lambda: gateway.successes(REFRESH))
    gateway.send(address, b"kept")
    assert [peer.recv(100), peer.recv(100)] == [b"keep it", b"kept"]
    assert gateway.relayed == relayed
    assert gateway.errors() == [(ALLOCATE, 401)]


def test_a_refresh_without_an_answer_leads_to_a_new_allocation(server: PionTurn, gateway: Gateway) -> None:
    """The server forgot everything and says nothing about it, but that the nonce is stale."""
    server.restart()
    gateway.set.update([], [], gateway.now)
    assert gateway.run_until(lambda: gateway.successes(ALLOCATE) == 2) < 10
    assert (REFRESH, 438) in gateway.errors()
    assert gateway.successes(REFRESH) == 0
    assert gateway.relayed is not None


def test_a_channel_bind_without_an_answer_leads_to_a_new_allocation_since_bindings_are_answered(
    server: PionTurn, gateway: Gateway, peer: socket.socket
) -> None:
    server.restart()
    address = Endpoint.of(*peer.getsockname())
    gateway.set.bind_channel("r", address, gateway.now)
    # 8.125 s each for the ChannelBind and for the Refresh that asks whether there is an allocation.
    assert gateway.run_until(lambda: gateway.successes(ALLOCATE) == 2) < 17
    assert NoRelays() not in gateway.events
    gateway.set.bind_channel("r", address, gateway.now)  # as what is sent to the peer does
    gateway.run_until(lambda: gateway.successes(CHANNEL_BIND))
    gateway.send(address, b"healed")
    assert peer.recv(100) == b"healed"


def test_refused_credentials_end_the_relay(server: PionTurn) -> None:
    gateway = Gateway(server, password="wrong")
    assert gateway.run_until(lambda: "r" not in gateway.set) < 10
    assert gateway.requests(ALLOCATE) <= 5
    gateway.socket.close()


def test_shutting_down_frees_the_allocation(gateway: Gateway) -> None:
    gateway.set.shutdown(gateway.now)
    gateway.run_until(lambda: gateway.successes(REFRESH))
    assert gateway.answers[-1].lifetime == 0


# -- pion/ice


@pytest.fixture(scope="module")
def world() -> Iterator[PionWorld]:
    with PionWorld() as world:
        yield world


@pytest.mark.parametrize(
    ("kind", "remote", "path"),
    [
        ("host", "host", "PeerToPeer"),
        ("host", "relay", "RelayToPeer"),
        ("relay", "host", "PeerToRelay"),
        ("relay", "relay", "RelayToRelay"),
    ],
)
def test_pion_connects_and_packets_pass(world: PionWorld, kind: str, remote: str, path: str) -> None:
    async def scenario() -> None:
        async with PionDevice(world, kinds={kind}, remote_kinds={remote}) as device:
            assert await device.connect() == (kind, remote)
            await device.open_tunnel()
            for size in (100, 1277, 1278, 1279, 1280):
                await exchange(device, world.tun, size=size)
            await world.gateway.logs(f"Path changed cid={device.id} path={path} ")
            assert device.agent.all("bad_candidate") == []

    asyncio.run(scenario())


def test_pion_connects_by_ipv6() -> None:
    """Behind a relay that has both families: from it the gateway knows its addresses."""

    async def scenario(world: World) -> None:
        async with PionDevice(world, ipv6=True) as device:
            assert await device.connect() == ("host", "host")
            await world.gateway.logs(f"Path changed cid={device.id} path=PeerToPeer [::1]")

    with World(client_relay="relay") as world:
        asyncio.run(scenario(world))
