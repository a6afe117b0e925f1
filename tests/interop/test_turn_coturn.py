"""The relay set against coturn, on loopback and the real clock."""

from __future__ import annotations

import os
import select
import socket
import time
from typing import TYPE_CHECKING

import pytest

from fzg.secret import Secret
from fzg.turn import Relay, RelaySet, Unwrapped
from fzg.wire import channel_data, stun
from fzg.wire.endpoint import Endpoint
from tests.lab import coturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

if not coturn.available():
    pytest.skip("coturn is not installed (Debian: coturn)", allow_module_level=True)

pytestmark = pytest.mark.slow

USERNAME, PASSWORD = "2145916800:salt", "q0BSQVnXUbqgoXf5emeTjlD"
ALLOCATE, REFRESH, CHANNEL_BIND = 3, 4, 9


class Gateway:
    """A `RelaySet` on a UDP socket of its own."""

    def __init__(self, relay: tuple[str, int], *, port: int = 0, username: str = USERNAME) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", port))
        self.local = Endpoint.of(*self.socket.getsockname())
        self.set = RelaySet(random=os.urandom)
        self.sent: list[stun.Message] = []
        self.answers: list[stun.Message] = []
        self.unwrapped: list[Unwrapped] = []
        endpoint = Endpoint.of(*relay)
        self.set.update([], [Relay("r", endpoint, None, username, Secret(PASSWORD))], time.monotonic())

    def run_until(self, condition: Callable[[], object], *, timeout: float) -> float:
        """Work until `condition` holds; the seconds that took."""
        begin = time.monotonic()
        while not condition():
            assert time.monotonic() - begin < timeout, self.set.status()
            self._transmit()
            deadline = self.set.poll_timeout()
            pause = 0.05 if deadline is None else min(max(deadline.at - time.monotonic(), 0), 0.05)
            if select.select([self.socket], [], [], pause)[0]:
                data, address = self.socket.recvfrom(2048)
                if data[0] < 4:
                    self.answers.append(stun.parse(data))
                result = self.set.handle_datagram(data, Endpoint.of(*address), self.local, time.monotonic())
                if isinstance(result, Unwrapped):
                    self.unwrapped.append(result)
            self.set.handle_timeout(time.monotonic())
        self._transmit()
        return time.monotonic() - begin

    def _transmit(self) -> None:
        while self.set.poll_event() is not None:
            pass
        while (transmit := self.set.poll_transmit()) is not None:
            self.sent.append(stun.parse(transmit.payload))
            self.socket.sendto(transmit.payload, (transmit.destination.host, transmit.destination.port))

    def is_active(self) -> bool:
        return any(status.relayed for status in self.set.status())

    def errors(self) -> list[tuple[int, int]]:
        """Method and code of the errors that came."""
        return [(answer.method, answer.error.code) for answer in self.answers if answer.error is not None]

    def send(self, peer: Endpoint, payload: bytes) -> None:
        route = self.set.route("r", peer, time.monotonic())
        assert route is not None
        destination = (route.relay.host, route.relay.port)
        self.socket.sendto(channel_data.encode(route.channel, payload), destination)


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[coturn.Coturn]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = coturn.Coturn(tmp_path, ipv4="127.0.0.1", port=port, loopback_peers=True)
    server.add_user(USERNAME, PASSWORD)
    yield server
    server.close()


@pytest.fixture
def client() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        yield sock


@pytest.mark.spec("TURN-11", "TURN-12")
def test_allocation_comes_with_two_allocates(relay: coturn.Coturn) -> None:
    gateway = Gateway(relay.address)
    gateway.run_until(gateway.is_active, timeout=5)
    assert gateway.errors() == [(ALLOCATE, 401)]
    assert [one.kind for one in gateway.set.candidates("r")] == ["host", "srflx", "relay"]


@pytest.mark.spec("TURN-42")
def test_full_size_data_passes_both_ways(relay: coturn.Coturn, client: socket.socket) -> None:
    gateway = Gateway(relay.address)
    gateway.run_until(gateway.is_active, timeout=5)
    peer = Endpoint.of(*client.getsockname())
    gateway.set.bind_channel("r", peer, time.monotonic())
    gateway.run_until(lambda: any(one.method == CHANNEL_BIND for one in gateway.answers), timeout=5)
    payload = os.urandom(1312)
    gateway.send(peer, payload)
    received, relayed = client.recvfrom(2048)
    assert received == payload
    assert Endpoint.of(*relayed) == gateway.set.status()[0].relayed[0]
    for length in (1312, 61, 62, 63):
        client.sendto(payload[:length], relayed)
    gateway.run_until(lambda: len(gateway.unwrapped) == 4, timeout=5)
    assert [one.payload for one in gateway.unwrapped] == [payload[:length] for length in (1312, 61, 62, 63)]
    assert {one.peer for one in gateway.unwrapped} == {peer}


@pytest.mark.spec("TURN-15")
def test_refresh_is_accepted(relay: coturn.Coturn) -> None:
    gateway = Gateway(relay.address)
    gateway.run_until(gateway.is_active, timeout=5)
    gateway.set.update([], [], time.monotonic())
    gateway.run_until(lambda: any(one.method == REFRESH for one in gateway.answers), timeout=5)
    (answer,) = [one for one in gateway.answers if one.method == REFRESH]
    assert answer.error is None
    assert answer.lifetime == 600


@pytest.mark.spec("TURN-28", "TURN-31")
def test_restart_on_the_same_port_has_an_allocation_again_in_time(relay: coturn.Coturn) -> None:
    first = Gateway(relay.address)
    first.run_until(first.is_active, timeout=5)
    first.socket.close()
    second = Gateway(relay.address, port=first.local.port)
    assert second.run_until(second.is_active, timeout=10) < 10
    assert (ALLOCATE, 437) in second.errors()
    assert [one.lifetime for one in second.sent if one.method == REFRESH][-1] == 0


@pytest.mark.spec("TURN-45")
def test_allocation_that_vanished_is_found_out_by_a_channel_bind(relay: coturn.Coturn, client: socket.socket) -> None:
    gateway = Gateway(relay.address)
    gateway.run_until(gateway.is_active, timeout=5)
    thief = RelaySet(random=os.urandom)  # deletes the allocation behind our back, from our own socket
    gateway.set, mine = thief, gateway.set
    endpoint = Endpoint.of(*relay.address)
    thief.update([], [Relay("r", endpoint, None, USERNAME, Secret(PASSWORD))], time.monotonic())
    gateway.run_until(gateway.is_active, timeout=10)
    thief.shutdown(time.monotonic())
    gateway.run_until(lambda: gateway.answers[-1].lifetime == 0, timeout=5)
    gateway.set = mine
    time.sleep(1.2)  # coturn keeps a deleted allocation for a second
    gateway.answers.clear()
    gateway.sent.clear()
    peer = Endpoint.of(*client.getsockname())
    gateway.set.bind_channel("r", peer, time.monotonic())
    bound = lambda: any(one.method == CHANNEL_BIND and one.error is None for one in gateway.answers)
    gateway.run_until(bound, timeout=10)
    assert (CHANNEL_BIND, 400) in gateway.errors() or (CHANNEL_BIND, 437) in gateway.errors()
    gateway.send(peer, b"healed")
    assert client.recv(100) == b"healed"


@pytest.mark.spec("TURN-21")
def test_stale_nonce_is_answered(relay: coturn.Coturn) -> None:
    gateway = Gateway(relay.address)
    gateway.run_until(gateway.is_active, timeout=5)
    gateway.set._allocations["r"]._authentication.nonce = b"0123456789abcdef"
    gateway.set.update([], [], time.monotonic())
    gateway.run_until(lambda: any(one.method == REFRESH and one.lifetime for one in gateway.answers), timeout=5)
    assert (REFRESH, 438) in gateway.errors()
