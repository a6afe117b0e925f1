"""What the agent answers and what it says, byte by byte (spec connectivity 3.3 to 3.7, appendix A)."""

from __future__ import annotations

import random
import zlib

import pytest

from fzg.ice import binding
from fzg.ice.agent import SERVER_DEFAULT, Agent, Role
from fzg.wire import Malformed, stun
from fzg.wire.candidate import Kind
from tests.unit.ice_world import (
    A1,
    CLIENT,
    CLIENT_KEY,
    GATEWAY,
    GATEWAY_KEY,
    HOST4,
    HOST6,
    PEER4,
    RELAY4,
    Scripted,
    answer,
    endpoint,
    remote,
    request,
)

A2 = bytes.fromhex(
    "0101002c2112a4420102030405060708090a0b0c002000080001bd52ea12d54500080014c8ffeaba50eee9c89675"
    "501ff5909527e10037cd80280004a3979ef5"
)
A3 = bytes.fromhex(
    "000100442112a44215161718191a1b1c1d1e1f2000060009616263643a7778797a0000008029000899aabbccddee"
    "ff00002400046efffeff00080014dc9bbe925d618b1b4b6f0914cf2d2f071e984cd7802800049b5fc5bf"
)
ROLE_CONFLICT_TO_A1 = bytes.fromhex(
    "011100382112a4420102030405060708090a0b0c0009001100000457526f6c6520436f6e666c6963740000000008"
    "00146e251497a39bc21000b0451d06b6556c46f22f21802800048323fc98"
)


@pytest.fixture
def world():
    world = Scripted()
    world.host()
    world.run(0)
    return world


def attributes(payload: bytes) -> list[tuple[int, bytes, bytes]]:
    """Type, value and padding, in order."""
    found, offset = [], 20
    while offset < len(payload):
        kind, size = (
            int.from_bytes(payload[offset : offset + 2], "big"),
            int.from_bytes(payload[offset + 2 : offset + 4], "big"),
        )
        end = offset + 4 + (size + 3) // 4 * 4
        found.append((kind, payload[offset + 4 : offset + 4 + size], payload[offset + 4 + size : end]))
        offset = end
    return found


@pytest.mark.spec("CONN-39")
def test_the_request_of_the_vector_is_answered_with_the_response_of_the_vector(world):
    reply, check = world.receive(stun.parse(A1), endpoint("203.0.113.7:40000"))

    assert reply.payload == A2
    assert (reply.source, reply.destination, reply.transaction_id) == (HOST4, PEER4, None)
    assert (check.source, check.destination) == (HOST4, PEER4)


@pytest.mark.spec("CONN-45")
def test_a_check_equals_the_vector():
    ids = iter([bytes.fromhex("99aabbccddeeff00"), bytes.fromhex("15161718191a1b1c1d1e1f20")])
    agent = Agent(
        role=Role.CONTROLLED,
        local=GATEWAY,
        remote=CLIENT,
        timing=SERVER_DEFAULT,
        random=lambda n: next(ids),
        now=0,
    )
    agent.add_local_candidate(Kind.HOST, HOST4, HOST4, now=0)
    agent.add_remote_candidate(remote("host", PEER4), 0)

    agent.handle_timeout(0)

    check = agent.poll_transmit()
    assert check.payload == A3
    assert check.transaction_id == bytes.fromhex("15161718191a1b1c1d1e1f20")


@pytest.mark.spec("CONN-40")
def test_flipping_any_bit_up_to_the_integrity_causes_silence_and_a_fingerprint_bit_does_not(world):
    fingerprint = len(A1) - 8
    answered = []
    for bit in range(len(A1) * 8):
        flipped = bytearray(A1)
        flipped[bit // 8] ^= 0x80 >> bit % 8
        try:
            message = stun.parse(bytes(flipped))
        except Malformed:
            continue
        sent = world.receive(message)
        if sent:
            answered.append(bit)
    # The type and length of FINGERPRINT are no value: a changed type is an unknown attribute behind the integrity.
    assert [bit for bit in answered if bit < fingerprint * 8] == []
    assert set(range((fingerprint + 4) * 8, len(A1) * 8)) <= set(answered)


@pytest.mark.spec("CONN-41")
@pytest.mark.parametrize("missing", ["PRIORITY", "USERNAME", "MESSAGE-INTEGRITY"])
def test_a_request_without_a_required_attribute_causes_silence(world, missing):
    present = {
        "USERNAME": (0x0006, b"wxyz:abcd"),
        "CONTROLLING": (0x802A, bytes(8)),
        "PRIORITY": (0x0024, bytes(4)),
    }
    present.pop(missing, None)
    key = None if missing == "MESSAGE-INTEGRITY" else GATEWAY_KEY

    message = stun.parse(stun.encode(1, 0, bytes(12), present.values(), integrity_key=key, fingerprint=True))

    assert world.receive(message) == []
    assert world.agent.dropped["not a binding"] == 1


@pytest.mark.parametrize("username", ["wxyz", "wxyz:", ":abcd", ""])
def test_a_user_name_without_two_parts_causes_silence(world, username):
    assert world.receive(request(username=username)) == []


@pytest.mark.spec("CONN-42")
def test_unknown_comprehension_required_attributes_are_ignored(world):
    message = request(extra=((0x7ABC, b"what is this"), (0x0003, bytes(4))))

    assert len(world.receive(message)) == 2


@pytest.mark.spec("CONN-43")
@pytest.mark.parametrize("username", ["wxyz:abce", "wxyy:abcd", "wxyz:abcd:", "abcd:wxyz"])
def test_a_foreign_user_name_causes_silence(world, username):
    assert world.receive(request(username=username)) == []
    assert world.agent.dropped["foreign user name"] == 1


def test_a_request_signed_with_the_clients_password_causes_silence(world):
    assert world.receive(request(key=CLIENT_KEY)) == []
    assert world.agent.dropped["bad integrity"] == 1


@pytest.mark.spec("CONN-44")
def test_a_request_at_an_address_that_is_neither_host_nor_relay_candidate_causes_silence(world):
    srflx = endpoint("203.0.113.99:40000")
    world.agent.add_local_candidate(Kind.SRFLX, srflx, HOST4, now=0)

    assert world.receive(request(), destination=endpoint("192.0.2.11:52625")) == []
    assert world.receive(request(), destination=srflx) == []
    assert world.agent.dropped["no such local candidate"] == 2


def test_a_request_through_the_relay_is_answered_through_the_relay(world):
    world.relay()

    reply, check = world.receive(request(), destination=RELAY4)

    assert reply.source == check.source == RELAY4
    assert world.agent.is_relayed(RELAY4)
    assert not world.agent.is_relayed(HOST4)
    mapped = stun.parse(reply.payload)
    assert mapped.xor_mapped_address == PEER4
    assert mapped.verify_integrity(GATEWAY_KEY)


@pytest.mark.spec("CONN-45")
def test_our_requests_carry_the_right_attributes_in_the_right_order(world):
    world.host(HOST6)
    world.learn("host", PEER4)
    world.learn("host", "[2001:db8:9::9]:1")
    world.receive(request(nominate=True))
    world.run(100)

    requests = [check for _, _, check in world.sent if check.transaction_id]
    assert len(requests) > 10
    tie_breakers = set()
    for check in requests:
        found = attributes(check.payload)
        assert [kind for kind, _, _ in found] == [0x0006, 0x8029, 0x0024, 0x0008, 0x8028]
        values = {kind: value for kind, value, _ in found}
        assert values[0x0006] == b"abcd:wxyz"
        assert all(set(padding) <= {0} for _, _, padding in found)
        tie_breakers.add(values[0x8029])
        assert int.from_bytes(values[0x0024], "big") == (1862270719 if check.source == HOST4 else 1862270975)
        assert int.from_bytes(values[0x8028], "big") == zlib.crc32(check.payload[:-8]) ^ 0x5354554E
        assert stun.parse(check.payload).verify_integrity(CLIENT_KEY)
    assert len(tie_breakers) == 1
    assert len(tie_breakers.pop()) == 8


@pytest.mark.spec("CONN-46")
def test_the_first_ipv4_host_is_checked_from_with_priority_1862270719(world):
    world.learn("host", PEER4)
    world.run(0)

    assert stun.parse(world.sent[-1][2].payload).priority == 1862270719


@pytest.mark.parametrize(("address", "priority"), [(RELAY4, 1849687807), (endpoint("[2001:db8::3]:61234"), 1849688063)])
def test_relays_are_checked_from_with_the_priority_of_the_table(address, priority):
    world = Scripted()
    world.relay(address)
    world.learn("host", PEER4 if address.is_ipv4 else "[2001:db8:9::9]:1")
    world.run(0)

    assert stun.parse(world.sent[-1][2].payload).priority == priority


@pytest.mark.parametrize("forgery", ["integrity", "source", "transaction"])
def test_a_response_that_is_not_ours_does_not_count(world, forgery):
    world.answers = lambda check: False
    world.learn("host", PEER4)
    world.run(0)
    check = world.sent[-1][2]
    other = world.learn("host", "192.0.2.200:1")
    assert other

    message = answer(check, key=GATEWAY_KEY if forgery == "integrity" else CLIENT_KEY)
    if forgery == "transaction":
        message = stun.parse(bytes([*message._data[:8], *random.Random(3).randbytes(12), *message._data[20:]]))
    world.receive(message, endpoint("192.0.2.200:1") if forgery == "source" else PEER4)

    reason = {
        "integrity": "bad integrity",
        "source": "response from another address",
        "transaction": "unknown transaction",
    }
    assert world.agent.dropped == {reason[forgery]: 1}


def test_other_messages_are_not_bindings(world):
    for message_class, method in [(1, 1), (0, 3), (2, 3), (3, 1)]:
        message = stun.parse(stun.encode(method, message_class, bytes(12), (), integrity_key=GATEWAY_KEY))
        assert world.receive(message) == []
    assert world.agent.dropped == {"not a binding": 4}


@pytest.mark.spec("CONN-57")
def test_the_higher_tie_breaker_keeps_its_role_and_answers_487(world):
    ours = world.agent.tie_breaker
    tid = bytes.fromhex("0102030405060708090a0b0c")

    (reply,) = world.receive(request(tid=tid, controlling=None, controlled=ours - 1))

    assert reply.payload == ROLE_CONFLICT_TO_A1
    assert world.agent.role is Role.CONTROLLED
    (reply,) = world.receive(request(tid=tid, controlling=None, controlled=ours))
    assert reply.payload == ROLE_CONFLICT_TO_A1


@pytest.mark.spec("CONN-57")
def test_the_lower_tie_breaker_switches_and_goes_on_with_the_request(world):
    reply, check = world.receive(request(controlling=None, controlled=world.agent.tie_breaker + 1))

    assert world.agent.role is Role.CONTROLLING
    assert stun.parse(reply.payload).message_class == 2
    assert stun.parse(check.payload).ice_controlling == world.agent.tie_breaker


def test_a_487_switches_the_role_once(world):
    world.answers = lambda check: False
    world.learn("host", PEER4)
    world.run(0.3)
    first, second = (check for _, _, check in world.sent)

    def conflict(check, key=CLIENT_KEY):
        return stun.parse(binding.role_conflict(check.transaction_id, key=key))

    world.receive(conflict(first, GATEWAY_KEY))
    assert world.agent.role is Role.CONTROLLED
    world.receive(conflict(first))
    assert world.agent.role is Role.CONTROLLING
    world.receive(conflict(second))  # it was sent in the role we left
    assert world.agent.role is Role.CONTROLLING
    world.run(0.3)
    assert stun.parse(world.sent[-1][2].payload).ice_controlling == world.agent.tie_breaker


def test_a_controlling_agent_does_not_take_nominations(world):
    world.receive(request(controlling=None, controlled=world.agent.tie_breaker + 1))

    assert world.receive(request(controlling=None, controlled=1, nominate=True)) == []
