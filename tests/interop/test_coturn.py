"""The relay set on real sockets: against coturn, which nobody here wrote, and the test relay (spec turn 8).

Hours pass as `TurnClient.wait` moves the client's clock from deadline to deadline; servers notice nothing of it.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from fzg.secret import Secret
from fzg.turn.events import CandidateAdded, CandidateInvalidated, NoRelays, Relay, RelayRemoved, Unwrapped, Use
from fzg.turn.relays import RelaySet
from fzg.wire.endpoint import Endpoint
from tests.lab import stun
from tests.lab.coturn import Coturn
from tests.lab.derivations import TurnCredentials, turn_credentials
from tests.lab.ports import free_port
from tests.lab.relay_client import RelayProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fzg.turn.events import Event

pytestmark = [pytest.mark.slow, pytest.mark.needs("turnserver", "setpriv")]

RELAY = "r"
LIFETIME, REBIND = 600, 240
DATAGRAM = b"\x04\0\0\0"  # how WireGuard data begins
PATIENCE_S = 10.0


class Server(NamedTuple):
    """A relay and what is said to it by the way."""

    host: str
    port: int
    credentials: Callable[[], TurnCredentials]
    control: RelayProcess | None
    """The test relay's orders; coturn takes none."""


class Sent(NamedTuple):
    """A request of ours, on the client's clock."""

    at: float
    message: stun.Message
    transaction_id: bytes


class TurnClient:
    """A `RelaySet` on a UDP socket."""

    def __init__(self, server: Server, *, credentials: TurnCredentials | None = None, port: int = 0) -> None:
        self.credentials = credentials or server.credentials()
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", port))
        self.local = Endpoint.of(*self.socket.getsockname())
        self.relay = Endpoint.of(server.host, server.port)
        self.sent: list[Sent] = []
        self.answers: list[stun.Message] = []
        self.events: list[Event] = []
        self.received: list[Unwrapped] = []
        self.strangers: list[bytes] = []
        self._skipped = 0.0
        self.set = RelaySet(random=os.urandom)
        username, password = self.credentials
        self.set.update((), [Relay(RELAY, self.relay, None, username, Secret(password))], self.now)

    @property
    def now(self) -> float:
        return time.monotonic() + self._skipped

    def run_until(self, condition: Callable[[], object], *, timeout: float = PATIENCE_S) -> None:
        """Serve socket and timers in real time until something holds."""
        limit = time.monotonic() + timeout
        self._drain()
        while not condition():
            assert time.monotonic() < limit, (self.set.status(), [code(answer) for answer in self.answers])
            self._turn(0.02)

    def wait(self, seconds: float) -> None:
        """Let this time pass for the client alone; every request is answered before the clock moves on."""
        end = self.now + seconds
        while self.now < end:
            self.run_until(lambda: not self._in_flight())
            deadline = self.set.poll_timeout()
            step = end if deadline is None else min(deadline.at, end)
            self._skipped += max(step - self.now, 0.0)
            self.set.handle_timeout(self.now)
            self._drain()

    def allocate(self) -> None:
        """Run until there is an allocation."""
        self.run_until(lambda: any(one.relayed for one in self.set.status()))

    def bind(self, peer: Endpoint) -> int:
        """Have a channel; its number."""
        self.set.bind_channel(RELAY, peer, self.now)
        self.run_until(lambda: not self._in_flight())
        route = self.set.route(RELAY, peer, self.now, use=Use.LOOKUP)
        assert route is not None
        return route.channel

    def send(self, peer: Endpoint, payload: bytes) -> bool:
        """Send if there is a way."""
        route = self.set.route(RELAY, peer, self.now)
        self._drain()
        if route is None:
            return False
        header = struct.pack("!HH", route.channel, len(payload))
        self.socket.sendto(header + payload, (route.relay.host, route.relay.port))
        return True

    def requests(self, method: int) -> list[Sent]:
        """What was asked so far, retransmissions included."""
        return [sent for sent in self.sent if sent.message.method == method]

    def outcomes(self, *methods: int) -> list[tuple[int, int]]:
        """Method and code (0 for success) of the answers so far."""
        return [(answer.method, code(answer)) for answer in self.answers if answer.method in methods]

    def close(self) -> None:
        """End without a word, as a killed process does."""
        self.socket.close()

    def _in_flight(self) -> bool:
        answered = {answer.transaction_id for answer in self.answers}
        return any(sent.transaction_id not in answered for sent in self.sent)

    def _turn(self, patience: float) -> None:
        self._drain()
        deadline = self.set.poll_timeout()
        pause = patience if deadline is None else min(max(deadline.at - self.now, 0), patience)
        if select.select([self.socket], [], [], pause)[0]:
            self._handle(*self.socket.recvfrom(4096))
        self.set.handle_timeout(self.now)
        self._drain()

    def _handle(self, data: bytes, source: tuple[str, int]) -> None:
        if data[0] < 4:
            self.answers.append(stun.Message(data))
        result = self.set.handle_datagram(data, Endpoint.of(*source), self.local, self.now)
        if isinstance(result, Unwrapped):
            self.received.append(result)
        elif result is None:
            self.strangers.append(data)

    def _drain(self) -> None:
        while (transmit := self.set.poll_transmit()) is not None:
            message = stun.Message(transmit.payload)
            self.sent.append(Sent(self.now, message, message.transaction_id))
            self.socket.sendto(transmit.payload, (transmit.destination.host, transmit.destination.port))
        while (event := self.set.poll_event()) is not None:
            self.events.append(event)


def code(answer: stun.Message) -> int:
    """The error code, 0 for a success."""
    if answer.message_class == stun.SUCCESS:
        return 0
    value = answer.attributes[stun.ERROR_CODE]
    return value[2] * 100 + value[3]


@pytest.fixture(scope="module")
def lab_relay() -> Iterator[Server]:
    with RelayProcess(ipv4="127.0.0.2", ipv6="::1", port=0) as relay:
        yield Server("127.0.0.2", relay.port, lambda: turn_credentials(os.urandom(8).hex(), relay.secret), relay)


@pytest.fixture(scope="module")
def coturn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running, server = start_coturn(tmp_path_factory.mktemp("coturn"))
    yield server
    running.close()


def start_coturn(directory: Path, *, port: int = 0, **options: int) -> tuple[Coturn, Server]:
    """A running coturn, on a free port unless one is given."""
    port = port or free_port("127.0.0.3")
    running = Coturn(directory, ipv4="127.0.0.3", port=port, loopback_peers=True, **options)

    def credentials() -> TurnCredentials:
        made = turn_credentials(os.urandom(8).hex(), "coturn")
        running.add_user(*made)
        return made

    return running, Server("127.0.0.3", port, credentials, None)


@pytest.fixture(params=["lab_relay", "coturn"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def client(server: Server) -> Iterator[TurnClient]:
    client = TurnClient(server)
    client.allocate()
    yield client
    client.set.shutdown(client.now)
    client.run_until(lambda: True)
    client.close()


class Peer:
    """Somebody out there."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.4", 0))
        self.socket.settimeout(5)
        self.endpoint = Endpoint.of(*self.socket.getsockname())

    def exchange(self, client: TurnClient, payload: bytes) -> None:
        """There, and back from where it came."""
        assert client.send(self.endpoint, payload)
        data, relayed = self.socket.recvfrom(4096)
        assert data == payload
        before = len(client.received)
        self.socket.sendto(payload, relayed)
        client.run_until(lambda: len(client.received) > before)
        back = client.received[-1]
        assert (back.payload, back.peer, back.relayed) == (payload, self.endpoint, Endpoint.of(*relayed))


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.socket.close()


@pytest.mark.spec("TURN-11")
def test_the_first_allocate_is_bare_and_the_second_complete(client: TurnClient) -> None:
    first, second = (set(sent.message.attributes) for sent in client.requests(stun.ALLOCATE))
    credentials = {stun.USERNAME, stun.REALM, stun.NONCE, stun.MESSAGE_INTEGRITY}
    wishes = {stun.REQUESTED_TRANSPORT, stun.ADDITIONAL_ADDRESS_FAMILY}
    assert first & (credentials | wishes) == wishes
    assert second >= credentials | wishes
    assert client.outcomes(stun.ALLOCATE) == [(stun.ALLOCATE, 401), (stun.ALLOCATE, 0)]


@pytest.mark.spec("TURN-12")
def test_candidates_come_as_host_reflexive_relay(server: Server, client: TurnClient) -> None:
    added = [event.candidate for event in client.events if isinstance(event, CandidateAdded)]
    kinds = [str(candidate.kind) for candidate in added]
    families = 2 if server.control else 1  # coturn 4.6 ignores the wish for another family
    assert kinds == ["host", "srflx"] + ["relay"] * families
    assert [candidate.address for candidate in added[:2]] == [client.local] * 2
    assert added[2].address.host == server.host


@pytest.mark.spec("TURN-15")
def test_refreshes_are_sent_at_half_of_the_lifetime_and_accepted(client: TurnClient) -> None:
    begin = client.now
    client.wait(2 * LIFETIME + 10)
    refreshes = client.requests(stun.REFRESH)
    assert [sent.at - begin for sent in refreshes] == pytest.approx([300, 600, 900, 1200], abs=1)
    for sent in refreshes:
        assert not sent.message.attributes.keys() & {
            stun.REQUESTED_TRANSPORT, stun.ADDITIONAL_ADDRESS_FAMILY, stun.LIFETIME
        }  # fmt: skip
    granted = [answer.attributes[stun.LIFETIME] for answer in client.answers if answer.method == stun.REFRESH]
    assert granted == [struct.pack("!I", LIFETIME)] * 4
    assert not any(isinstance(event, CandidateInvalidated) for event in client.events)
    keep_alives = [sent.at - begin for sent in client.requests(stun.BINDING)][1:]
    assert len(keep_alives) >= 40


@pytest.mark.spec("TURN-21")
def test_a_nonce_that_went_stale_is_replaced_at_the_test_relay(lab_relay: Server, peer: Peer) -> None:
    client = TurnClient(lab_relay)
    client.allocate()
    assert lab_relay.control is not None
    lab_relay.control.forget_nonces()
    answer_a_challenge(client, peer)


@pytest.mark.spec("TURN-21")
def test_a_nonce_that_went_stale_is_replaced_at_coturn(tmp_path: Path, peer: Peer) -> None:
    running, server = start_coturn(tmp_path, stale_nonce=1)
    try:
        client = TurnClient(server)
        client.allocate()
        time.sleep(2.1)  # coturn looks at whole seconds
        answer_a_challenge(client, peer)
    finally:
        running.close()


def answer_a_challenge(client: TurnClient, peer: Peer) -> None:
    client.bind(peer.endpoint)
    first, second = client.requests(stun.CHANNEL_BIND)
    assert client.outcomes(stun.CHANNEL_BIND) == [(stun.CHANNEL_BIND, 438), (stun.CHANNEL_BIND, 0)]
    assert second.at - first.at < 0.1
    assert second.transaction_id != first.transaction_id
    nonces = [sent.message.attributes[stun.NONCE] for sent in (first, second)]
    assert nonces[1] == next(a.attributes[stun.NONCE] for a in client.answers if code(a) == 438) != nonces[0]
    peer.exchange(client, b"after")
    client.close()


@pytest.mark.spec("TURN-23")
def test_a_wrong_password_ends_the_relay(coturn: Server) -> None:
    username, _ = coturn.credentials()
    client = TurnClient(coturn, credentials=TurnCredentials(username, "wrong"))
    client.run_until(lambda: len(client.set) == 0)
    assert client.outcomes(stun.ALLOCATE) == [(stun.ALLOCATE, 401)] * 2
    ends = [event for event in client.events if isinstance(event, RelayRemoved | NoRelays)]
    assert ends == [RelayRemoved(RELAY, replaced=False, failed=True), NoRelays()]
    client.close()


@pytest.mark.spec("TURN-28", "TURN-31")
def test_a_restart_on_the_same_port_heals(server: Server, peer: Peer) -> None:
    first = TurnClient(server)
    first.allocate()
    first.close()
    second = TurnClient(server, credentials=first.credentials, port=first.local.port)
    second.allocate()
    assert (stun.ALLOCATE, 437) in second.outcomes(stun.ALLOCATE)
    deletes = second.requests(stun.REFRESH)
    assert {sent.message.attributes[stun.LIFETIME] for sent in deletes} == {bytes(4)}
    assert second.sent[-1].message.method == stun.ALLOCATE
    second.bind(peer.endpoint)
    peer.exchange(second, b"healed")
    second.close()


@pytest.mark.spec("TURN-30")
def test_an_allocation_that_the_test_relay_lost_is_made_anew(lab_relay: Server, peer: Peer) -> None:
    assert lab_relay.control is not None
    client = TurnClient(lab_relay)
    client.allocate()
    lab_relay.control.expire(what="allocations")
    client.set.bind_channel(RELAY, peer.endpoint, client.now)
    client.run_until(lambda: (stun.CHANNEL_BIND, 0) in client.outcomes(stun.CHANNEL_BIND))
    assert client.outcomes(stun.ALLOCATE, stun.REFRESH, stun.CHANNEL_BIND)[2:] == [
        (stun.CHANNEL_BIND, 437),
        (stun.ALLOCATE, 0),
        (stun.CHANNEL_BIND, 0),
    ]
    assert any(isinstance(event, CandidateInvalidated) for event in client.events)
    peer.exchange(client, b"healed")
    client.close()


@pytest.mark.spec("TURN-45")
def test_an_allocation_that_coturn_lost_is_made_anew(tmp_path: Path, peer: Peer) -> None:
    running, server = start_coturn(tmp_path)
    try:
        client = TurnClient(server)
        client.allocate()
        running.close()
        running, _ = start_coturn(tmp_path, port=server.port)
        running.add_user(*client.credentials)
        client.set.bind_channel(RELAY, peer.endpoint, client.now)
        client.run_until(lambda: (stun.CHANNEL_BIND, 0) in client.outcomes(stun.CHANNEL_BIND))
        told = client.outcomes(stun.REFRESH, stun.CHANNEL_BIND)
        assert (stun.CHANNEL_BIND, 400) in told
        assert (stun.REFRESH, 437) in told
        peer.exchange(client, b"healed")
        client.close()
    finally:
        running.close()


@pytest.mark.spec("TURN-40")
def test_channels_with_traffic_are_bound_again_and_idle_ones_when_needed(client: TurnClient, peer: Peer) -> None:
    idle = Endpoint.of("127.0.0.4", 9)
    busy_number, idle_number = client.bind(peer.endpoint), client.bind(idle)
    assert (busy_number, idle_number) == (0x4000, 0x4001)
    bound = client.requests(stun.CHANNEL_BIND)[0].at
    for _ in range(REBIND // 10 + 1):
        peer.exchange(client, DATAGRAM + b"data")
        client.wait(10)
    again = client.requests(stun.CHANNEL_BIND)[2:]
    assert [number_of(sent) for sent in again] == [busy_number]
    assert again[0].at - bound == pytest.approx(REBIND, abs=2)
    client.wait(LIFETIME - 240)
    assert not client.send(idle, DATAGRAM)
    client.run_until(lambda: len(client.outcomes(stun.CHANNEL_BIND)) == len(client.requests(stun.CHANNEL_BIND)))
    assert number_of(client.requests(stun.CHANNEL_BIND)[-1]) == idle_number
    assert set(client.outcomes(stun.CHANNEL_BIND)) == {(stun.CHANNEL_BIND, 0)}
    assert client.send(idle, DATAGRAM)


def number_of(sent: Sent) -> int:
    return int(struct.unpack_from("!H", sent.message.attributes[stun.CHANNEL_NUMBER])[0])


@pytest.mark.spec("TURN-42", "TURN-46")
def test_data_of_every_size_passes_both_ways(client: TurnClient, peer: Peer) -> None:
    client.bind(peer.endpoint)
    for size in (1, 2, 3, 61, 1309, 1310, 1311, 1312):
        peer.exchange(client, (DATAGRAM + os.urandom(size))[:size])


@pytest.mark.spec("TURN-42", "TURN-46")
def test_up_to_three_surplus_bytes_are_cut_off_and_four_are_none_of_ours(lab_relay: Server, peer: Peer) -> None:
    assert lab_relay.control is not None
    client = TurnClient(lab_relay)
    client.allocate()
    client.bind(peer.endpoint)
    try:
        for surplus in (1, 2, 3):
            lab_relay.control.pad(surplus=surplus)
            for size in (4, 97, 1312):
                peer.exchange(client, DATAGRAM + os.urandom(size - 4))
        lab_relay.control.pad(surplus=4)
        assert client.send(peer.endpoint, DATAGRAM)
        _, relayed = peer.socket.recvfrom(100)
        before = len(client.received)
        peer.socket.sendto(DATAGRAM, relayed)
        client.run_until(lambda: client.strangers)
        assert client.strangers == [b"\x40\x00\x00\x04" + DATAGRAM + bytes(4)]
        assert len(client.received) == before
    finally:
        lab_relay.control.pad(surplus=0)
        client.close()


@pytest.mark.spec("TURN-57")
def test_an_orderly_end_deletes_the_allocation(server: Server) -> None:
    client = TurnClient(server)
    client.allocate()
    client.set.shutdown(client.now)
    client.run_until(lambda: any(answer.method == stun.REFRESH for answer in client.answers))
    (delete,) = client.requests(stun.REFRESH)
    assert delete.message.attributes[stun.LIFETIME] == bytes(4)
    assert client.answers[-1].attributes[stun.LIFETIME] == bytes(4)
    if server.control is not None:
        assert client.credentials.username not in [one["username"] for one in server.control.allocations()]
    client.close()
