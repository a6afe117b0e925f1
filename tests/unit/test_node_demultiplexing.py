"""Which datagram reaches which part: relays, ICE agents, WireGuard peers, or nothing (spec connectivity 1.6, 1.7)."""

from __future__ import annotations

import random
import struct

import pytest

from fzg.node import node
from fzg.wire import stun
from fzg.wire.endpoint import Endpoint
from fzg.wireguard import noise
from fzg.wireguard.cookie import CookieJar
from fzg.wireguard.keys import KeyPair
from tests.unit.gateway_world import (
    SETTLED,
    UNIX_START,
    close_worlds,  # noqa: F401
    signalled,
    world,
)

GATEWAY = Endpoint.of("203.0.113.5", 52625)
STRANGER = Endpoint.of("192.0.2.77", 40000)
REQUEST, INDICATION, SUCCESS = 0, 1, 2


def sent_to(w, destination):
    """Payloads that left for this address since the last call of `mark`."""
    return [payload for _, _, target, payload in w.net.log[w.mark :] if target == destination]


def gateway_sent(w):
    return [(target, payload) for _, source, target, payload in w.net.log[w.mark :] if source.ip == GATEWAY.ip]


def mark(w):
    w.mark = len(w.net.log)


def inject(w, payload, source, local=GATEWAY):
    """A datagram for the gateway out of nowhere, and all that follows at once."""
    mark(w)
    w.gateway.receive(payload, source, local)
    w.net.run(SETTLED)


def check(w, transaction_id=b"transaction1", *, username=None, key=None, method=1, kind=REQUEST):
    """A Binding request as the first client sends it."""
    client = w.client
    username = username or f"{client.gateway_credentials.ufrag}:{client.credentials.ufrag}"
    attributes = [
        (0x0006, username.encode()),
        (0x802A, bytes(8)),
        (0x0024, struct.pack("!I", 1862270719)),
    ]
    key = key or client.gateway_credentials.password.reveal().encode()
    return stun.encode(method, kind, transaction_id, attributes, integrity_key=key, fingerprint=True)


def channel_data(number, payload, *, padding=0, length=None):
    return struct.pack("!HH", number, len(payload) if length is None else length) + payload + bytes(padding)


@pytest.fixture
def waiting():
    """A gateway that has made its half of a connection; the client has not heard of it."""
    w = world().start()
    w.gateway.on_frame = lambda message: None
    w.authorize()
    w.net.run(0.01)
    mark(w)
    return w


@pytest.mark.spec("CONN-7")
def test_stun_from_a_relay_reaches_the_relay_client_only(waiting):
    w = waiting
    inject(w, check(w), w.relays[0].v4)
    assert sent_to(w, w.relays[0].v4) == []
    assert w.connection.agent.remote_candidate_count == 0
    assert w.gateway.node.relays.counters["unknown transaction"] == 1


@pytest.mark.spec("CONN-8")
def test_a_check_from_the_relay_port_of_a_stranger_is_answered(waiting):
    w = waiting
    stranger = Endpoint.of("198.51.100.200", 3478)
    inject(w, check(w), stranger)
    answers = [stun.parse(payload) for payload in sent_to(w, stranger)]
    assert [answer.transaction_id for answer in answers if answer.message_class == SUCCESS] == [b"transaction1"]


def test_a_check_of_another_user_name_is_not_answered(waiting):
    w = waiting
    for username in ("wxy1:abc2", "wxy2:abc1", "wxy1:abc1:abc1", "wxy1"):
        inject(w, check(w, username=username), STRANGER)
        assert sent_to(w, STRANGER) == []
    assert w.gateway.node.counters["STUN: unknown connection"] == 4


def test_two_connections_with_one_local_ufrag_are_told_apart_by_the_remote_one():
    """D2."""
    w = world().start()
    w.gateway.on_frame = lambda message: None
    other = w.add_client(started=False)
    other.gateway_credentials = type(other.gateway_credentials)("wxy1", other.gateway_credentials.password)
    w.authorize()
    w.authorize(other)
    inject(w, check(w), STRANGER)
    key = other.gateway_credentials.password.reveal().encode()
    second = Endpoint.of("192.0.2.78", 40000)
    inject(w, check(w, b"transaction2", username="wxy1:abc2", key=key), second)
    assert w.connection.agent.remote_candidate_count == 1
    assert w.gateway.node.connection(other.client_id).agent.remote_candidate_count == 1
    assert any(payload[8:20] == b"transaction2" for payload in sent_to(w, second))


@pytest.mark.spec("CONN-3")
@pytest.mark.parametrize("local", ["203.0.113.5", "203.0.113.6"])
def test_a_check_is_answered_from_the_address_it_came_to(local):
    """The second relay is reached from the gateway's second address, which makes that a host candidate too."""
    w = world()
    w.gateway.addresses.append(bytes((203, 0, 113, 6)))
    receive = w.gateway.receive

    def arrive(payload, source, destination):
        second = source == w.relays[1].v4
        receive(payload, source, Endpoint.of("203.0.113.6", 52625) if second else destination)

    w.gateway.receive = arrive
    w.start()
    w.gateway.on_frame = lambda message: None
    w.authorize()
    mark(w)
    receive(check(w), STRANGER, Endpoint.of(local, 52625))
    sources = [source for _, source, target, payload in w.net.log[w.mark :] if payload[8:20] == b"transaction1"]
    assert sources == [Endpoint.of(local, 52625)]


@pytest.mark.parametrize(("method", "kind"), [(1, INDICATION), (3, REQUEST), (4, SUCCESS)])
def test_stun_that_is_no_binding_request_or_response_is_dropped(waiting, method, kind):
    w = waiting
    inject(w, check(w, method=method, kind=kind), STRANGER)
    assert sent_to(w, STRANGER) == []
    assert w.connection.agent.remote_candidate_count == 0


@pytest.mark.spec("CONN-16")
@pytest.mark.parametrize(("after", "counts"), [(9.999, True), (10.001, False)])
def test_a_binding_response_counts_for_ten_seconds(waiting, after, counts):
    """A response that counts teaches a peer-reflexive address, which a repeated authorization tells the client."""
    w = waiting
    start = w.net.now
    w.candidates("candidate:1 1 udp 2130706175 192.0.2.77 40000 typ host ufrag abc1")
    w.net.run(0.001)
    request = next(payload for payload in sent_to(w, STRANGER) if payload[:2] == b"\x00\x01")
    mapped = Endpoint.of("192.0.2.99", 4242)
    transaction_id = request[8:20]
    response = stun.encode(
        1, SUCCESS, transaction_id, [(0x20, stun.xor_address(mapped, transaction_id))],
        integrity_key=w.client.credentials.password.reveal().encode(),
    )  # fmt: skip
    w.net.run(start + after - w.net.now)
    inject(w, response, STRANGER)
    w.authorize()
    assert any("192.0.2.99 4242 typ prflx" in text for text in signalled(w.gateway)[-1]) is counts


def test_a_binding_response_counts_once_and_for_its_own_connection(waiting):
    w = waiting
    w.candidates("candidate:1 1 udp 2130706175 192.0.2.77 40000 typ host ufrag abc1")
    w.net.run(0.001)
    assert w.gateway.node._requests
    w.reject()
    transaction_id = next(payload for payload in sent_to(w, STRANGER) if payload[:2] == b"\x00\x01")[8:20]
    inject(w, stun.encode(1, SUCCESS, transaction_id, [(0x20, stun.xor_address(STRANGER, transaction_id))]), STRANGER)
    assert w.gateway.node.counters["STUN: unknown connection"] == 1


def initiation(w, private=None, at=0.0):
    """A handshake initiation as a client with this key pair makes it."""
    rng = random.Random(5).randbytes
    static = private or KeyPair.generate(rng)
    stamp = int((UNIX_START + w.net.now + at) * 1e9)
    message, pending = noise.initiate(
        static,
        remote_public=w.gateway.static.public,
        shared=static.exchange(w.gateway.static.public),
        local_index=0xABC01,
        ephemeral=KeyPair.generate(rng),
        timestamp=struct.pack("!QI", (1 << 62) + 37 + stamp // 10**9, stamp % 10**9),
    )
    return CookieJar(w.gateway.static.public).stamp(message, w.net.now), pending


@pytest.mark.spec("CONN-14")
def test_an_initiation_of_an_unknown_key_is_not_answered():
    w = world().start()
    w.connect()
    w.net.run(1.0)
    message, _ = initiation(w)
    inject(w, message, STRANGER)
    assert gateway_sent(w) == []
    assert w.gateway.node.counters["WireGuard: unknown client"] == 1


@pytest.mark.spec("CONN-13")
def test_initiations_of_two_clients_from_one_source_reach_their_connections():
    w = world().start()
    second = w.add_client()
    w.connect()
    w.connect(second)
    w.net.run(1.0)
    for client in w.clients:
        message, pending = initiation(w, client.static)
        inject(w, message, STRANGER)
        answers = [
            payload for target, payload in gateway_sent(w) if target.ip == client.addresses[0] and payload[0] == 2
        ]
        assert len(answers) == 1, "the answer goes to the nominated path of the client that owns the key"
        assert struct.unpack("<I", answers[0][8:12]) == (pending.local_index,)


def test_connections_that_share_a_key_are_told_apart_by_the_address_that_checks_us():
    """Else a client that claims another's key takes the other's handshakes, and with its end nobody gets them."""
    w = world().start()
    second = w.add_client(started=False)
    second.static = w.client.static
    w.connect()
    w.gateway.on_frame = lambda message: None
    w.authorize(second)
    second_address = Endpoint(second.addresses[0], 52625)
    key = second.gateway_credentials.password.reveal().encode()
    inject(w, check(w, username="wxy2:abc2", key=key), second_address)
    assert any(payload[:2] == b"\x01\x01" for payload in sent_to(w, second_address))
    handshakes = {client.client_id: w.gateway.node.connection(client.client_id) for client in w.clients}

    def taken(source, at):
        before = {name: connection.peer._indices._counter for name, connection in handshakes.items()}
        message, _ = initiation(w, w.client.static, at)
        inject(w, message, source)
        return [name for name, old in before.items() if handshakes[name].peer._indices._counter != old]

    assert taken(Endpoint(w.client.addresses[0], 52625), 1.0) == [w.client.client_id]
    assert taken(second_address, 2.0) == [second.client_id]
    assert taken(STRANGER, 3.0) == [w.client.client_id]
    # One that came back from the same address is the later one.
    inject(w, check(w, b"transaction2"), STRANGER)
    inject(w, check(w, b"transaction3", username="wxy2:abc2", key=key), STRANGER)
    assert taken(STRANGER, 4.0) == [second.client_id]
    w.reject(second)
    assert taken(Endpoint(w.client.addresses[0], 52625), 5.0) == [w.client.client_id]


@pytest.mark.spec("CONN-12")
def test_data_is_accepted_from_any_source():
    w = world().start()
    w.connect()
    assert w.reaches()
    mark(w)
    w.net.lose = lambda source, destination, payload: payload[0] == 4
    w.reaches()
    datagram = next(payload for _, _, target, payload in w.net.log[w.mark :] if payload[0] == 4 and target == GATEWAY)
    w.net.lose = lambda source, destination, payload: False
    path = w.connection.path
    w.gateway.receive(datagram, STRANGER, GATEWAY)
    assert len(w.gateway.written()) == 1
    assert w.connection.path == path


@pytest.mark.parametrize("payload", [b"", b"\x00", b"\x05" + bytes(40), b"\x01\x00\x00\x01" + bytes(144)])
def test_what_is_neither_stun_nor_wireguard_is_dropped(waiting, payload):
    w = waiting
    inject(w, payload, STRANGER)
    assert gateway_sent(w) == []


@pytest.mark.spec("CONN-11")
def test_late_datagrams_of_a_former_relay_are_swallowed(waiting):
    w = waiting
    gone = w.relays[0]
    w.relays_presence(w.relays[1], gone=[gone])
    w.net.run(SETTLED)
    for payload in (check(w), channel_data(0x4000, check(w))):
        inject(w, payload, gone.v4)
        assert gateway_sent(w) == []
    assert w.gateway.node.counters == {}


@pytest.mark.spec("CONN-10")
def test_channel_data_is_from_the_bound_peer_to_our_relay_address():
    w = world(relays=1).start()
    w.gateway.on_frame = lambda message: None
    w.authorize()
    w.net.run(0.01)
    w.candidates("candidate:1 1 udp 1686109951 192.0.2.77 40000 typ srflx raddr 0.0.0.0 rport 0 ufrag abc1")
    relay = w.relays[0]
    # The ChannelBind is on its way: the number is usable already.
    inject(w, channel_data(0x4000, check(w)), relay.v4)
    answers = [payload for payload in sent_to(w, relay.v4) if payload[0] == 0x40]
    answer = stun.parse(next(payload[4:] for payload in answers if payload[12:24] == b"transaction1"))
    assert answer.xor_mapped_address == STRANGER
    inject(w, channel_data(0x4FFF, check(w)), relay.v4)
    assert not any(payload[12:24] == b"transaction1" for payload in sent_to(w, relay.v4))


@pytest.mark.spec("CONN-9")
@pytest.mark.parametrize(("surplus", "unwrapped"), [(0, True), (3, True), (4, False), (-1, False)])
def test_channel_data_of_another_length_is_not_unwrapped(surplus, unwrapped):
    w = world(relays=1).start()
    w.gateway.on_frame = lambda message: None
    w.authorize()
    w.candidates("candidate:1 1 udp 1686109951 192.0.2.77 40000 typ srflx raddr 0.0.0.0 rport 0 ufrag abc1")
    w.net.run(SETTLED)
    request = check(w)
    payload = channel_data(0x4000, request, padding=max(0, surplus), length=len(request) - min(0, surplus))
    inject(w, payload, w.relays[0].v4)
    answered = any(sent[12:24] == b"transaction1" for sent in sent_to(w, w.relays[0].v4))
    assert answered is unwrapped


def test_a_busy_gateway_answers_a_valid_mac1_with_a_cookie_on_the_arrival_path():
    """D4: the answer needs no connection; a relayed sender gets it through the relay."""
    w = world(relays=1).start()
    w.gateway.on_frame = lambda message: None
    w.authorize()
    w.candidates("candidate:1 1 udp 1686109951 192.0.2.77 40000 typ srflx raddr 0.0.0.0 rport 0 ufrag abc1")
    w.net.run(SETTLED)
    message, _ = initiation(w)
    mark(w)
    for _ in range(101):
        w.gateway.receive(message, STRANGER, GATEWAY)
    assert [len(payload) for payload in sent_to(w, STRANGER)] == [64]
    mark(w)
    w.gateway.receive(channel_data(0x4000, message), w.relays[0].v4, GATEWAY)
    (relayed,) = [payload for payload in sent_to(w, w.relays[0].v4) if payload[0] == 0x40]
    assert struct.unpack("!HH", relayed[:4]) == (0x4000, 64)


def test_what_the_gate_refuses_costs_no_curve_operation(monkeypatch):
    """D4: MAC1 and the limiter come before the key that finds the connection."""
    w = world(relays=1).start()
    w.connect()
    w.net.run(2.0)
    identified = []
    monkeypatch.setattr(node, "identify", lambda static, message: identified.append(message))
    message, _ = initiation(w)
    for number in range(200):
        w.gateway.receive(message[:116] + bytes(12) + number.to_bytes(4) + bytes(16), STRANGER, GATEWAY)
    assert identified == []
    for _ in range(300):
        w.gateway.receive(message, STRANGER, GATEWAY)
    assert len(identified) == 100
