"""A peer's handshakes in both roles: what is answered, what is dropped, which session sends."""

from __future__ import annotations

import pytest
from nacl.bindings import crypto_scalarmult_base

from fzg.secret import Secret
from fzg.wireguard.keys import KeyPair
from fzg.wireguard.peer import Expired, HandshakeCompleted, Peer, identify
from tests.unit.wireguard_world import DATA, INITIATION, RESPONSE, START, UNIX_OFFSET, Host, MemorySessions, World


def initiation(world: World) -> bytes:
    """A fresh initiation of the client that did not travel yet."""
    peer = world.client.peer
    peer._attempt_began = None
    peer.initiate(world.now)
    message = peer.poll_transmit()
    assert message is not None
    return message


def receive(host: Host, message: bytes, now: float) -> list[bytes]:
    host.handle(message, host.source, now)
    return host.drain()


def test_a_handshake_and_a_keepalive_let_both_sides_send() -> None:
    world = World()
    world.connect()
    assert [(each.sender, each.kind, len(each.datagram)) for each in world.log] == [
        ("client", INITIATION, 148),
        ("gateway", RESPONSE, 92),
        ("client", DATA, 32),
    ]
    assert world.client.events == world.gateway.events == [HandshakeCompleted(START)]
    world.send(world.client, b"up")
    world.send(world.gateway, b"down")
    assert (world.gateway.received, world.client.received) == ([b"up"], [b"down"])


@pytest.mark.spec("CONN-71")
def test_a_responder_does_not_send_on_a_session_before_it_is_confirmed() -> None:
    world = World()
    world.passes = lambda logged: logged.kind != DATA
    world.connect()
    assert not world.send(world.gateway)
    assert world.gateway.events == []


@pytest.mark.spec("CONN-71")
def test_a_responder_keeps_using_the_older_session_until_the_newer_is_confirmed() -> None:
    world = World()
    world.connect()
    older = world.gateway.engine.used[7]
    world.passes = lambda logged: logged.kind != DATA
    world.connect()
    assert len(world.gateway.engine.sessions) == 2
    assert world.gateway.engine.used[7] == older
    world.heal()
    world.send(world.gateway)
    assert world.client.received == [b"data"]
    world.send(world.client)
    assert world.gateway.engine.used[7] != older


def test_the_confirmation_of_an_unknown_session_is_ignored() -> None:
    world = World()
    world.passes = lambda logged: logged.kind != DATA
    world.connect()
    (index,) = world.gateway.engine.sessions
    for other in (index + 8, index + 1, index ^ 1 << 31):
        world.gateway.peer.handle_session_confirmed(other, START)
    assert world.gateway.engine.used == {}
    assert world.gateway.drain() == []
    assert world.gateway.events == []


def test_a_data_packet_confirms_a_session_as_well_as_a_keepalive() -> None:
    world = World()
    world.passes = lambda logged: logged.kind != DATA
    world.connect()
    world.heal()
    world.send(world.client, b"hello")
    assert world.gateway.received == [b"hello"]
    assert world.send(world.gateway)


def test_an_older_session_never_sends_again() -> None:
    world = World()
    world.passes = lambda logged: logged.kind != DATA
    world.connect()
    late = world.datagrams(world.client, DATA)[0]
    world.heal()
    world.now += 1
    world.connect()
    newer = world.gateway.engine.used[7]
    world.gateway.handle(late, world.client.source, world.now)
    assert world.gateway.engine.used[7] == newer


@pytest.mark.spec("CONN-72")
def test_a_replayed_initiation_is_not_answered() -> None:
    world = World()
    message = initiation(world)
    assert len(receive(world.gateway, message, START)) == 1
    assert receive(world.gateway, message, START + 1) == []
    assert world.gateway.peer.dropped == {"initiation replayed": 1}
    assert len(world.gateway.engine.sessions) == 1


@pytest.mark.spec("CONN-72")
def test_an_initiation_with_an_older_timestamp_is_not_answered() -> None:
    world = World()
    older = initiation(world)
    world.now += 1
    newer = initiation(world)
    assert len(receive(world.gateway, newer, world.now)) == 1
    assert receive(world.gateway, older, world.now) == []
    assert world.gateway.peer.dropped == {"initiation replayed": 1}


def test_initiations_at_the_same_instant_have_rising_timestamps() -> None:
    world = World()
    messages = [initiation(world) for _ in range(3)]
    assert [len(receive(world.gateway, message, START)) for message in messages] == [1, 1, 1]


def test_an_initiation_with_another_key_is_dropped() -> None:
    world = World()
    stranger = Host(
        "stranger",
        private=b"\x77" * 32,
        remote_public=world.gateway.static.public,
        psk=b"\x55" * 32,
        index=3,
        random=lambda n: b"\x09" * n,
    )
    stranger.peer.initiate(START)
    (message,) = stranger.drain()
    assert receive(world.gateway, message, START) == []
    assert world.gateway.peer.dropped == {"initiation with another key": 1}


def test_an_initiation_of_someone_who_only_knows_the_public_key_is_dropped() -> None:
    world = World()
    partial = identify(world.gateway.static, initiation(world))
    assert partial is not None
    forged = KeyPair.of(Secret(b"\x78" * 32))
    claimed = type(partial)(partial.remote_static, 1, forged.public, bytes(28), partial.state)
    assert not world.gateway.peer.handle_initiation(claimed, START)
    assert world.gateway.peer.dropped == {"initiation not authentic": 1}


@pytest.mark.spec("CONN-82")
def test_an_initiation_with_a_wrong_psk_is_answered_and_changes_nothing() -> None:
    world = World()
    world.connect()
    used = world.gateway.engine.used[7]
    wrong = World(client_psk=b"\x66" * 32, seed=9)
    wrong.now = START + 1
    for _ in range(20):  # more than the ring has slots
        wrong.now += 1
        (response,) = receive(world.gateway, initiation(wrong), wrong.now)
        assert len(response) == 92
        assert receive(wrong.client, response, wrong.now) == []
        assert wrong.client.events == []
        assert world.gateway.engine.used[7] == used
    assert wrong.client.peer.dropped == {"response not authentic": 20}
    world.send(world.gateway)
    world.send(world.client)
    assert (world.client.received, world.gateway.received) == ([b"data"], [b"data"])


@pytest.mark.spec("CONN-73")
def test_eight_further_handshakes_leave_the_latest_session_working() -> None:
    world = World()
    world.connect()
    for _ in range(8):
        world.now += 1
        world.connect()
        world.send(world.client, b"up")
        world.send(world.gateway, b"down")
    assert world.gateway.received == [b"up"] * 8
    assert world.client.received == [b"down"] * 8
    assert len(world.gateway.engine.sessions) == 8


@pytest.mark.spec("CONN-73")
def test_data_on_the_previous_session_still_opens_after_a_rekey() -> None:
    world = World()
    world.connect()
    up, down = world.client.send(b"late up", world.now), world.gateway.send(b"late down", world.now)
    assert up is not None
    assert down is not None
    world.connect()
    world.carry(world.client, up)
    world.carry(world.gateway, down)
    assert (world.gateway.received, world.client.received) == ([b"late up"], [b"late down"])


@pytest.mark.spec("CONN-5", "CONN-6")
def test_all_session_indices_of_a_connection_share_its_index_and_count_from_one() -> None:
    world = World()
    for _ in range(4):
        world.connect()
        world.now += 1
    assert [int.from_bytes(each[4:8], "little") for each in world.datagrams(world.gateway, RESPONSE)] == [
        0x12345601,
        0x12345602,
        0x12345603,
        0x12345604,
    ]


def test_simultaneous_initiations_both_complete() -> None:
    world = World()
    world.client.peer.initiate(START)
    world.gateway.peer.initiate(START)
    from_client, from_gateway = world.client.drain(), world.gateway.drain()
    for message in from_client:
        world.carry(world.client, message)
    for message in from_gateway:
        world.carry(world.gateway, message)
    world.settle()
    assert len(world.client.engine.sessions) == len(world.gateway.engine.sessions) == 2
    world.send(world.client)
    world.send(world.gateway)
    assert (world.client.received, world.gateway.received) == ([b"data"], [b"data"])


def test_a_response_to_the_initiation_before_the_last_is_accepted() -> None:
    world = World()
    first, _ = initiation(world), initiation(world)
    (response,) = receive(world.gateway, first, START)
    assert world.client.peer.handle_response(response, START)
    assert world.client.peer.poll_event() == HandshakeCompleted(START)


def test_a_response_to_the_third_last_initiation_is_dropped() -> None:
    world = World()
    first, _, _ = initiation(world), initiation(world), initiation(world)
    (response,) = receive(world.gateway, first, START)
    assert not world.client.peer.handle_response(response, START)
    assert world.client.peer.dropped == {"response to no initiation of ours": 1}


def test_a_response_to_the_later_initiation_is_accepted_after_one_to_the_earlier() -> None:
    """Peers with room for one unconfirmed session, as Linux's own, have dropped the earlier by then."""
    world = World()
    first, second = initiation(world), initiation(world)
    (early,), (late,) = receive(world.gateway, first, START), receive(world.gateway, second, START)
    assert world.client.peer.handle_response(early, START)
    assert world.client.peer.handle_response(late, START + 1)
    assert world.client.engine.used[7] == max(world.client.engine.sessions)
    assert len(world.client.engine.sessions) == 2


def test_a_response_to_the_earlier_initiation_is_dropped_after_one_to_the_later() -> None:
    world = World()
    first, second = initiation(world), initiation(world)
    (early,), (late,) = receive(world.gateway, first, START), receive(world.gateway, second, START)
    assert world.client.peer.handle_response(late, START)
    assert not world.client.peer.handle_response(early, START)


def test_a_response_is_accepted_although_the_peers_own_handshake_was_completed_first() -> None:
    """Of two simultaneous handshakes both are completed, in whatever order their messages come."""
    world = World()
    world.gateway.peer.initiate(START)
    (ours,) = world.gateway.drain()
    (response,) = receive(world.client, ours, START)
    world.client.peer.initiate(START)
    world.settle()
    assert world.gateway.events == [HandshakeCompleted(START)]
    assert world.gateway.peer.handle_response(response, START)


def test_a_response_that_comes_after_the_attempts_end_is_dropped() -> None:
    world = World()
    (response,) = receive(world.gateway, initiation(world), START)
    assert not world.client.peer.handle_response(response, START + 20.001)
    assert world.client.peer.dropped == {"response to no initiation of ours": 1}


def test_a_response_is_accepted_once() -> None:
    world = World()
    (response,) = receive(world.gateway, initiation(world), START)
    assert world.client.peer.handle_response(response, START)
    assert not world.client.peer.handle_response(response, START)


def test_malformed_messages_are_dropped() -> None:
    world = World()
    assert not world.client.peer.handle_response(b"\x02\0\0\0", START)
    assert not world.client.peer.handle_cookie_reply(b"\x03\0\0\0", START)
    assert world.client.peer.dropped == {"not a WireGuard response": 1, "not a WireGuard cookie reply": 1}


def test_a_cookie_reply_to_the_latest_message_fills_mac2_for_120_seconds() -> None:
    world = World()
    for _ in range(100):
        world.gateway.gate._count(START)
    message = initiation(world)
    (reply,) = receive(world.gateway, message, START)
    assert world.client.peer.handle_cookie_reply(reply, START)
    assert world.client.peer.poll_transmit() is None
    stamped = initiation(world)
    assert stamped[-16:] != bytes(16)
    (response,) = receive(world.gateway, stamped, START + 0.5)
    assert response[0] == RESPONSE
    world.now = START + 119.9
    assert initiation(world)[-16:] != bytes(16)
    world.now = START + 120.0
    assert initiation(world)[-16:] == bytes(16)


def test_a_cookie_reply_to_an_earlier_message_or_a_forged_one_is_dropped() -> None:
    world = World()
    for _ in range(100):
        world.gateway.gate._count(START)
    message = initiation(world)
    (reply,) = receive(world.gateway, message, START)
    forged = bytearray(reply)
    forged[-1] ^= 1
    assert not world.client.peer.handle_cookie_reply(bytes(forged), START)
    elsewhere = reply[:4] + bytes(4) + reply[8:]
    assert not world.client.peer.handle_cookie_reply(elsewhere, START)
    initiation(world)
    assert not world.client.peer.handle_cookie_reply(reply, START)
    assert initiation(world)[-16:] == bytes(16)


def test_a_cookie_asked_for_by_the_initiator_covers_the_responders_messages() -> None:
    world = World()
    for _ in range(100):
        world.client.gate._count(START)
    world.connect()  # the client answers the response with a cookie reply
    assert world.client.events == []
    (response,) = receive(world.gateway, initiation(world), START)
    assert response[-16:] != bytes(16)


def test_a_peer_with_a_key_of_low_order_never_completes_and_does_not_fail() -> None:
    peer = Peer(
        static=KeyPair.of(Secret(b"\x22" * 32)),
        remote_public=bytes(32),
        preshared_key=Secret(bytes(32)),
        connection_index=1,
        peer=1,
        engine=MemorySessions(),
        random=lambda n: b"\x01" * n,
        unix_offset=UNIX_OFFSET,
        now=START,
    )
    peer.initiate(START)
    assert peer.poll_transmit() is None
    for _ in range(10):
        deadline = peer.poll_timeout()
        if deadline is not None:
            peer.handle_timeout(deadline.at)
    assert peer.poll_event() == Expired()


def test_closing_removes_all_sessions_and_ends_all_timers() -> None:
    world = World()
    world.connect()
    world.connect()
    world.gateway.peer.close()
    assert world.gateway.engine.sessions == {}
    assert world.gateway.peer.poll_timeout() is None
    partial = identify(world.gateway.static, initiation(world))
    assert partial is not None
    assert not world.gateway.peer.handle_initiation(partial, START)
    world.gateway.peer.initiate(START)
    assert world.gateway.drain() == []


def test_the_public_key_is_that_of_the_private_key() -> None:
    pair = KeyPair.generate(lambda n: b"\x22" * n)
    assert pair.public == crypto_scalarmult_base(b"\x22" * 32)
    assert "22" not in repr(pair.private)
