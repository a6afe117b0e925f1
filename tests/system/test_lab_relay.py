"""The test relay and coturn accept TURN clients with the portal's credentials and refuse others."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time

import aioice.turn
import pytest
from aioice.stun import TransactionFailed

from fzg.secret import Secret
from fzg.turn.events import Relay as KnownRelay
from fzg.turn.relays import RelaySet
from fzg.wire.candidate import Kind
from fzg.wire.endpoint import Endpoint
from tests.lab import coturn, derivations, stun
from tests.lab.phoenix import PhoenixSocket
from tests.lab.portal_client import PortalProcess
from tests.lab.ports import free_port
from tests.lab.relay_client import RelayProcess

KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
FUTURE = 2145916800

needs_coturn = pytest.mark.skipif(not coturn.available(), reason="coturn is not installed")


@pytest.fixture(scope="module")
def lab_relay():
    with RelayProcess(ipv4="127.0.0.1", ipv6="::1", port=0) as relay:
        yield relay


@pytest.fixture(scope="module")
def coturn_relay():
    with RelayProcess(program="coturn", name="coturn", port=free_port("127.0.0.1"), loopback_peers=True) as relay:
        yield relay


@pytest.fixture(params=["relay", pytest.param("coturn", marks=needs_coturn)])
def relay(request):
    return request.getfixturevalue("lab_relay" if request.param == "relay" else "coturn_relay")


def credentials(relay: RelayProcess, expiry: int = FUTURE, key: str = KEY) -> derivations.TurnCredentials:
    turn = derivations.turn_credentials(key, relay.secret, expiry)
    if relay.program == "coturn":
        relay.add_user(username=turn.username, password=turn.password)
    return turn


class Received(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.packets: asyncio.Queue[tuple[bytes, tuple[str, int]]] = asyncio.Queue()

    def datagram_received(self, data, addr):
        self.packets.put_nowait((data, addr))


async def allocate(relay: RelayProcess, username: str, password: str):
    return await aioice.turn.create_turn_endpoint(Received, (relay.ipv4, relay.port), username, password)


@pytest.mark.spec("PORTAL-69")
def test_a_foreign_turn_client_with_derived_credentials_reaches_a_peer_and_back(relay):
    async def scenario() -> None:
        turn = credentials(relay)
        transport, received = await allocate(relay, *turn)
        loop = asyncio.get_running_loop()
        peer_transport, peer = await loop.create_datagram_endpoint(Received, local_addr=("127.0.0.1", 0))
        peer_address = peer_transport.get_extra_info("sockname")
        transport.sendto(b"there", peer_address)
        data, relayed = await asyncio.wait_for(peer.packets.get(), 5)
        assert data == b"there"
        assert relayed == transport.get_extra_info("sockname")
        peer_transport.sendto(b"and back", relayed)
        assert await asyncio.wait_for(received.packets.get(), 5) == (b"and back", peer_address)
        transport.close()
        peer_transport.close()

    asyncio.run(scenario())


@pytest.mark.spec("PORTAL-69")
def test_the_test_relay_refuses_expired_credentials(lab_relay):
    async def scenario() -> None:
        with pytest.raises(TransactionFailed) as caught:
            await allocate(lab_relay, *credentials(lab_relay, int(time.time()) - 1))
        assert caught.value.response.attributes["ERROR-CODE"][0] == 401
        transport, _ = await allocate(lab_relay, *credentials(lab_relay, int(time.time()) + 60))
        transport.close()

    asyncio.run(scenario())


def test_wrong_passwords_are_refused(relay):
    async def scenario() -> None:
        username, _ = credentials(relay)
        with pytest.raises(TransactionFailed) as caught:
            await allocate(relay, username, "wrong")
        assert caught.value.response.attributes["ERROR-CODE"][0] == 401

    asyncio.run(scenario())


class OurClient:
    """The gateway's relay set on real sockets."""

    def __init__(self, relay: RelayProcess, *, ipv6: bool = False) -> None:
        turn = credentials(relay, key=os.urandom(8).hex())
        host = relay.ipv6 if ipv6 else relay.ipv4
        self.socket = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((host, 0))
        self.socket.settimeout(0.01)
        self.local = Endpoint.of(*self.socket.getsockname()[:2])
        self.received = []
        self.relays = RelaySet(random=os.urandom)
        endpoint = Endpoint.of(host, relay.port)
        known = KnownRelay(
            relay.id, None if ipv6 else endpoint, endpoint if ipv6 else None, turn.username, Secret(turn.password)
        )
        self.relays.update((), [known], self.now)

    @property
    def now(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def run_until(self, condition, timeout: float = 5.0):
        deadline = time.monotonic() + timeout
        while True:
            assert time.monotonic() < deadline
            value = condition()
            self.relays.handle_timeout(self.now)
            while (transmit := self.relays.poll_transmit()) is not None:
                self.socket.sendto(transmit.payload, (transmit.destination.host, transmit.destination.port))
            while self.relays.poll_event() is not None:
                pass
            if value:
                return value  # whatever the condition asked for is on the wire
            try:
                data, source = self.socket.recvfrom(65536)
            except TimeoutError:
                continue
            result = self.relays.handle_datagram(data, Endpoint.of(*source[:2]), self.local, self.now)
            if hasattr(result, "payload"):
                self.received.append(result)

    def relayed(self, relay: RelayProcess):
        return [c.address for c in self.relays.candidates(relay.id) if c.kind is Kind.RELAY]


@pytest.mark.spec("PORTAL-69")
def test_our_turn_client_with_derived_credentials_reaches_a_peer_and_back(relay):
    client = OurClient(relay)
    relayed = client.run_until(lambda: client.relayed(relay))
    assert len(relayed) == (2 if relay.program == "relay" else 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(5)
        peer_endpoint = Endpoint.of(*peer.getsockname())
        client.relays.bind_channel(relay.id, peer_endpoint, client.now)
        route = client.run_until(lambda: client.relays.route(relay.id, peer_endpoint, client.now))
        client.socket.sendto(struct.pack("!HH", route.channel, 5) + b"there", (route.relay.host, route.relay.port))
        data, source = peer.recvfrom(100)
        assert data == b"there"
        peer.sendto(b"and back", source)
        client.run_until(lambda: client.received)
    assert (client.received[0].payload, client.received[0].peer) == (b"and back", peer_endpoint)


def test_a_client_on_ipv6_gets_an_allocation_of_both_families(lab_relay):
    client = OurClient(lab_relay, ipv6=True)
    relayed = client.run_until(lambda: client.relayed(lab_relay))
    assert [address.is_ipv4 for address in relayed].count(True) == 1
    assert len({address.port for address in relayed}) == 1
    assert all(49152 <= address.port <= 65535 for address in relayed)


# --- the test relay on the wire, request by request ---


class Wire:
    """A client that writes each request by hand."""

    def __init__(self, relay: RelayProcess, *, expiry: int = FUTURE) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.connect((relay.ipv4, relay.port))
        self.socket.settimeout(2)
        self.username, password = derivations.turn_credentials(os.urandom(8).hex(), relay.secret, expiry)
        self.key = derivations.long_term_key(self.username, password)
        self.nonce = b""

    def ask(self, method, attributes=(), *, signed=True):
        parts = list(attributes)
        if signed:
            parts += [(stun.USERNAME, self.username.encode()), (stun.REALM, b"firezone"), (stun.NONCE, self.nonce)]
        self.socket.send(stun.encode(method, stun.REQUEST, os.urandom(12), parts, self.key if signed else None))
        return self.answer()

    def answer(self):
        reply = stun.Message(self.socket.recv(2000))
        if stun.NONCE in reply.attributes:
            self.nonce = reply.attributes[stun.NONCE]
        return reply

    def allocate(self, *more):
        transport = (stun.REQUESTED_TRANSPORT, b"\x11\x00\x00\x00")
        if not self.nonce:
            assert code(self.ask(stun.ALLOCATE, [transport, *more], signed=False)) == 401
        return self.ask(stun.ALLOCATE, [transport, *more])

    def bind(self, number, peer):
        transaction_id = os.urandom(12)
        parts = [
            (stun.XOR_PEER_ADDRESS, stun.encode_address(peer, transaction_id)),
            (stun.CHANNEL_NUMBER, struct.pack("!HH", number, 0)),
            (stun.USERNAME, self.username.encode()),
            (stun.NONCE, self.nonce),
        ]
        self.socket.send(stun.encode(stun.CHANNEL_BIND, stun.REQUEST, transaction_id, parts, self.key))
        return self.answer()


def code(reply: stun.Message) -> int:
    if reply.message_class == stun.SUCCESS:
        return 0
    value = reply.attributes[stun.ERROR_CODE]
    return value[2] * 100 + value[3]


@pytest.fixture
def wire(lab_relay):
    client = Wire(lab_relay)
    yield client
    client.socket.close()


def test_an_unauthenticated_allocate_is_answered_as_the_vector_says(wire):
    wire.socket.send(bytes.fromhex(
        "000300242112a4420102030405060708090a0b0c00190004110000008000000402000000"
        "80220010666972657a6f6e652d67617465776179"
    ))  # fmt: skip
    reply = wire.answer()
    assert list(reply.attributes) == [stun.SOFTWARE, stun.ERROR_CODE, stun.REALM, stun.NONCE]
    assert (code(reply), reply.attributes[stun.REALM], len(wire.nonce)) == (401, b"firezone", 36)
    assert reply.integrity_at is None


def test_a_success_is_signed_and_in_the_relays_order(wire):
    reply = wire.allocate((stun.ADDITIONAL_ADDRESS_FAMILY, b"\x02\x00\x00\x00"))
    assert reply.signed_with(wire.key)
    assert [*reply.attributes] == [
        stun.SOFTWARE, stun.XOR_RELAYED_ADDRESS, stun.XOR_MAPPED_ADDRESS, stun.LIFETIME, stun.MESSAGE_INTEGRITY
    ]  # fmt: skip
    assert reply.attributes[stun.LIFETIME] == struct.pack("!I", 600)
    assert code(wire.allocate()) == 437


def test_refresh_with_lifetime_zero_deletes(wire):
    assert code(wire.allocate()) == 0
    assert code(wire.ask(stun.REFRESH, [(stun.LIFETIME, bytes(4))])) == 0
    assert code(wire.ask(stun.REFRESH)) == 437


def test_channels_keep_their_peer_for_their_life_and_the_cool_down(lab_relay, wire):
    assert code(wire.bind(0x4000, ("127.0.0.1", 9))) == 401
    wire.allocate()
    assert code(wire.bind(0x4000, ("127.0.0.1", 9))) == 0
    assert code(wire.bind(0x4000, ("127.0.0.1", 10))) == 400
    assert code(wire.bind(0x4001, ("127.0.0.1", 9))) == 400
    assert code(wire.bind(0x4002, ("::1", 9))) == 443
    lab_relay.expire(what="channels")
    assert code(wire.bind(0x4001, ("127.0.0.1", 9))) == 400
    assert code(wire.bind(0x4000, ("127.0.0.1", 9))) == 0


def test_a_stale_nonce_gets_438_signed(lab_relay, wire):
    wire.allocate()
    lab_relay.forget_nonces()
    reply = wire.ask(stun.REFRESH)
    assert code(reply) == 438
    assert reply.signed_with(wire.key)


def test_a_username_that_cannot_be_parsed_gets_no_answer(wire):
    wire.allocate()
    wire.username = "a:b:c"
    wire.socket.settimeout(0.2)
    with pytest.raises(TimeoutError):
        wire.ask(stun.REFRESH)


def test_the_knobs_do_what_they_say(lab_relay, wire):
    wire.allocate()
    before = lab_relay.requests()["refresh"]
    lab_relay.drop_next(method="refresh")
    wire.socket.settimeout(0.2)
    with pytest.raises(TimeoutError):
        wire.ask(stun.REFRESH)
    lab_relay.force_error(method="refresh", code=508, signed=False)
    reply = wire.ask(stun.REFRESH)
    assert (code(reply), reply.integrity_at) == (508, None)
    assert lab_relay.requests()["refresh"] == before + 2
    lab_relay.mapped_address(host="192.0.2.1", port=7)
    mapped = wire.ask(stun.BINDING, signed=False)
    lab_relay.mapped_address()
    assert stun.decode_address(mapped.attributes[stun.XOR_MAPPED_ADDRESS], mapped.transaction_id) == ("192.0.2.1", 7)
    lab_relay.expire(what="allocations")
    assert code(wire.ask(stun.REFRESH)) == 437


@pytest.mark.parametrize("segments", [1, 3, 70])
def test_bulk_data_is_framed_and_unframed_message_by_message(lab_relay, wire, segments):
    """Whatever the kernel glued together arrives as it was sent, a shorter last message included."""
    wire.allocate()
    payloads = [bytes([i]) * 900 for i in range(segments)] + [b"short"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(2)
        assert code(wire.bind(0x4000, peer.getsockname())) == 0
        for start in range(0, len(payloads), 60):
            batch = b"".join(struct.pack("!HH", 0x4000, len(p)) + p for p in payloads[start : start + 60])
            wire.socket.sendmsg([batch], [(17, 103, struct.pack("=H", 904))])
        got = [peer.recvfrom(2000) for _ in payloads]
        assert [data for data, _ in got] == payloads
        relayed = got[0][1]
        for start in range(0, len(payloads), 60):
            peer.sendmsg([b"".join(payloads[start : start + 60])], [(17, 103, struct.pack("=H", 900))], 0, relayed)
        back = [wire.socket.recv(2000) for _ in payloads]
        assert back == [struct.pack("!HH", 0x4000, len(p)) + p for p in payloads]
        lab_relay.pad(surplus=3)
        peer.sendto(b"x", relayed)
        padded = wire.socket.recv(2000)
        lab_relay.pad(surplus=0)
        assert padded == struct.pack("!HH", 0x4000, 1) + b"x" + bytes(3)


def test_only_the_bound_peer_is_heard(wire):
    wire.allocate()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger,
    ):
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(2)
        wire.bind(0x4000, peer.getsockname())
        wire.socket.send(struct.pack("!HH", 0x4000, 2) + b"hi")
        _, relayed = peer.recvfrom(100)
        stranger.sendto(b"stranger", relayed)
        peer.sendto(b"peer", relayed)
        assert wire.socket.recv(100)[4:] == b"peer"


# --- with the portal ---


@pytest.mark.parametrize("program", ["relay", pytest.param("coturn", marks=needs_coturn)])
def test_a_device_can_use_the_credentials_that_the_portal_hands_it_at_once(program):
    with (
        PortalProcess() as portal,
        RelayProcess(
            program=program, name="relay-1", port=free_port("127.0.0.1"), portal_url=portal.url, loopback_peers=True
        ) as relay,
    ):
        portal.wait_relays(1)
        query = {"external_id": "g", "name": "edge", "public_key": KEY}
        with PhoenixSocket(portal.url, "gateway", query) as gateway:
            gateway.join()
            (entry,) = gateway.expect("init")["relays"]
        assert entry["id"] == relay.id

        async def scenario() -> None:
            transport, _ = await allocate(relay, entry["username"], entry["password"])
            transport.close()

        asyncio.run(scenario())


@pytest.mark.slow
def test_a_restarted_relay_joins_under_its_new_id():
    with PortalProcess() as portal, RelayProcess(port=0, portal_url=portal.url) as relay:
        assert portal.wait_relays(1) == [relay.id]
        new = relay.restart()
        since = portal.mark()
        portal.wait_for(since=since - 5, kind="relay", device=new, event="init", timeout=5)
        assert list(portal.state()["relays"]) == [new]
