"""Probes of paths without ICE: the vectors of spec connectivity A.4, and what the gateway does with them."""

from __future__ import annotations

import pytest

from fzg.wire import probe
from fzg.wire.endpoint import Endpoint
from tests.unit.gateway_world import close_worlds, world  # noqa: F401

HEADER = "6000000000083a40" + "01000000000000000000dead01ce0001" + "01000000000000000000dead01ce0002"
REQUEST = bytes.fromhex(HEADER + "8000541612345678")
REPLY = bytes.fromhex(HEADER + "8100531612345678")
REQUEST_7 = bytes.fromhex(HEADER + "8000aa8712340007")
REPLY_7 = bytes.fromhex(HEADER + "8100a98712340007")


def test_the_reply_has_the_same_addresses_identifier_and_sequence():
    assert probe.answer(REQUEST) == REPLY
    assert probe.answer(REQUEST_7) == REPLY_7


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        REPLY,
        REQUEST[:-1],
        REQUEST + b"\0",
        REQUEST[:-1] + b"\x79",  # a wrong checksum
        REQUEST[:8] + REQUEST[24:40] + REQUEST[8:24] + REQUEST[40:],  # addresses swapped
        REQUEST[:6] + b"\x11" + REQUEST[7:],
    ],
    ids=["empty", "reply", "short", "long", "checksum", "swapped", "UDP"],
)
def test_nothing_else_is_a_probe(packet):
    assert probe.answer(packet) is None


def connected(*, iceless):
    w = world().start()
    w.connect()
    connection = w.connection
    connection.identity = connection.identity._replace(is_iceless=iceless)
    w.client.received.clear()
    return w


@pytest.mark.spec("TUNNEL-70")
def test_a_probe_is_answered_and_does_not_reach_the_tun():
    w = connected(iceless=True)
    w.client.send(REQUEST_7)
    w.net.run(0.1)
    assert w.client.received == [REPLY_7]
    assert w.gateway.written() == []


@pytest.mark.spec("TUNNEL-70")
def test_the_answer_takes_the_way_that_the_probe_took():
    w = connected(iceless=True)
    core, elsewhere = w.gateway.core, Endpoint.of("203.0.113.77", 40_000)
    w.client.send(REQUEST_7)  # until a packet of the client came, the session is not ours to use
    w.net.run(0.1)
    (handle,) = core._handles.values()
    core.handle_inner_packet(handle, REQUEST_7, 0, w.net.now, (elsewhere, w.connection.path.source))
    assert core.poll_transmit().destination == elsewhere


def test_with_ice_it_is_a_packet_under_a_foreign_address():
    w = connected(iceless=False)
    w.client.send(REQUEST_7)
    w.net.run(0.1)
    (refused,) = w.client.received
    assert refused[40:42] == bytes((1, 1))  # administratively prohibited
    assert w.gateway.written() == []
