"""Nothing that arrives raises, and two peers agree on a session whatever the link did to their first messages."""

from __future__ import annotations

import random as pseudo
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from fzg.wire import Malformed
from fzg.wire import wireguard as wire
from fzg.wireguard.keys import keyed_mac, mac1_key
from fzg.wireguard.peer import identify
from tests.unit.wireguard_world import START, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.wireguard_world import Host, Logged

_RECORDS = (wire.Initiation.parse, wire.Response.parse, wire.CookieReply.parse, wire.DataHeader.parse)


@given(st.binary(max_size=200), st.integers(0, 5))
def test_parsers_raise_only_malformed(data: bytes, kind: int) -> None:
    for message in (data, bytes((kind, 0, 0, 0)) + data):
        shape = wire.classify(message)
        for parse, expected in zip(_RECORDS, wire.MessageType, strict=True):
            try:
                parse(message)
            except Malformed:
                assert shape is not expected
            else:
                assert shape is expected
        try:
            wire.receiver_index(message)
        except Malformed:
            assert shape in {None, wire.MessageType.INITIATION}


@settings(max_examples=60, deadline=None)
@given(
    which=st.sampled_from([0, 1]),
    changes=st.lists(st.tuples(st.integers(0, 147), st.integers(1, 255)), max_size=4),
    restamp=st.booleans(),
    truncate=st.integers(0, 3),
)
def test_changed_handshake_messages_are_dropped_without_raising(
    which: int, changes: list[tuple[int, int]], restamp: bool, truncate: int
) -> None:
    world = World()
    world.connect()
    sender, receiver = ((world.client, world.gateway), (world.gateway, world.client))[which]
    sender.peer.initiate(START + 1)
    (message,) = sender.drain()
    changed = bytearray(message)
    for offset, flip in changes:
        changed[offset] ^= flip
    del changed[len(changed) - truncate :]
    if restamp:  # an attacker who knows our public key can make MAC1 right
        changed[-32:-16] = keyed_mac(mac1_key(receiver.static.public), bytes(changed[:-32]))
    sessions = len(receiver.engine.sessions)
    receiver.handle(bytes(changed), sender.source, START + 1)
    identify(receiver.static, bytes(changed))
    receiver.peer.handle_response(bytes(changed), START + 1)
    receiver.peer.handle_cookie_reply(bytes(changed), START + 1)
    answered = len(receiver.drain())
    authentic = bytes(changed[8:-32]) == message[8:-32] and len(changed) == len(message)
    mac1_right = keyed_mac(mac1_key(receiver.static.public), bytes(changed[:-32])) == bytes(changed[-32:-16])
    assert answered == (1 if authentic and mac1_right and changed[:4] == message[:4] else 0)
    assert len(receiver.engine.sessions) == sessions + answered


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    fates=st.lists(st.sampled_from(["pass", "drop", "drop", "twice", "hold"]), max_size=25),
    sends=st.lists(st.tuples(st.floats(0.0, 40.0), st.booleans()), max_size=12),
    both_initiate=st.booleans(),
)
def test_two_peers_over_a_bad_link_end_with_a_common_session(
    seed: int, fates: list[str], sends: list[tuple[float, bool]], both_initiate: bool
) -> None:
    world = World(seed=seed)
    held: list[tuple[Host, bytes]] = []
    fate = iter(fates)

    def passes(logged: Logged) -> bool:
        sender = world.client if logged.sender == "client" else world.gateway
        # The link recovers at 12 s: early enough for a retry before the 20 s of giving up.
        match next(fate, "pass") if world.now < START + 12.0 else "pass":
            case "drop":
                return False
            case "hold":
                held.append((sender, logged.datagram))
                return False
            case "twice":
                world.other(sender).handle(logged.datagram, sender.source, world.now)
        return True

    world.passes = passes
    world.client.peer.initiate(world.now)
    if both_initiate:
        world.gateway.peer.initiate(world.now)
    world.settle()
    for at, up in sorted(sends):
        world.run_until(at)
        world.send(world.client if up else world.gateway)
    world.run_until(45.0)
    for sender, datagram in held:  # arrive long after they were sent
        world.other(sender).handle(datagram, sender.source, world.now)
        world.settle()
    world.run_until(80.0)
    assert not world.client.expired
    assert not world.gateway.expired
    _exchange(world, pseudo.Random(seed).randbytes)


def _exchange(world: World, random: Callable[[int], bytes]) -> None:
    up, down = random(20), random(20)
    assert world.send(world.client, up)
    assert world.send(world.gateway, down)
    assert world.gateway.received[-1] == up
    assert world.client.received[-1] == down
