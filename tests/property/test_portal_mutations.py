"""A hundred thousand frames with one thing changed: each is taken or skipped as the specification says (portal 1.7, 6),
and what they grant and take back is what `Grants` makes of those that were to be taken.
"""

from __future__ import annotations

import json
import logging
import random
from typing import TYPE_CHECKING, Any

import pytest

from fzg.portal.channel import Channel, Hiccup, Joined, Received
from fzg.portal.messages import decode
from tests.lab.grants import FOREVER_S, Device, Grants, Message, Resource
from tests.lab.mutations import Frame, Verdict, frame, mutated
from tests.property.effort import SEED
from tests.property.test_fuzz import CANDIDATES, DEFAULT_LIMIT, LIMITS, sizes
from tests.unit import policy_world
from tests.unit.dataplane_world import ENGINES, udp
from tests.unit.test_portal_messages import turn

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

CLIENTS, RESOURCES = 12, 60
COMPARED_EVERY = 500
PAUSE_S = 1 / 64  # between frames; the first comes off the full second, when grants end, and so do all


class Recorded:
    """Valid messages of every event, about a dozen clients."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.devices = [Device.make(0x1000 + number, rng) for number in range(CLIENTS)]
        self.resources = [Resource(number) for number in range(1, RESOURCES + 1)]
        self.refs = 0

    def next(self, grants: Grants, now: float) -> Message:
        rng = self.rng
        device, resource = rng.choice(self.devices), rng.choice(self.resources)
        names = {"client_id": device.id, "resource_id": resource.id}
        expires_at = int(now) + rng.choice((2, 20, FOREVER_S, FOREVER_S))
        filters = rng.choice(([], [{"protocol": "udp"}], [{"protocol": "udp", "port_range_end": 50_000}]))
        match rng.randrange(16):
            case 0:
                listed = [entry for entry in grants.snapshot(now) if rng.random() < 0.97]
                return "init", policy_world.init(
                    relays=[turn(), turn(addr="[2001:db8::7]:3478")],
                    authorizations=[*listed, names | {"expires_at": expires_at}],
                    flow_logs={"api_url": "https://flows.example", "upload_interval_secs": 60, "upload_batch_size": 9},
                )
            case 1:
                return "reject_access", names
            case 2:
                return "access_authorization_expiry_updated", names | {"expires_at": expires_at}
            case 3:
                return "resource_updated", resource.for_gateway() | {"filters": filters}
            case 4:
                return "relays_presence", {"disconnected_ids": [turn()["id"]], "connected": [turn()]}
            case 5:
                event = rng.choice(("ice_candidates", "invalidate_ice_candidates"))
                return event, {"client_id": device.id, "candidates": CANDIDATES}
            case _:
                self.refs += 1
                described = resource.for_gateway() | {"filters": filters}
                return "create_authorization", {
                    "ref": f"ref-{self.refs}", **device.shared, "resource": described, "expires_at": expires_at,
                }  # fmt: skip


class Heard:
    """A gateway's channel and core, and what they made of the last frame."""

    def __init__(self, make_engine: Any) -> None:
        self.world = policy_world.World(make_engine)
        self.world.portal("init", policy_world.init())
        self.world.run(PAUSE_S / 2)
        self.connect()

    def connect(self) -> None:
        self.channel = Channel(now=self.world.now)
        self.channel.poll_transmit()
        self.channel.handle_frame('{"topic":"","event":"phx_reply","ref":0,"payload":{"status":"ok"}}', self.world.now)
        self.channel.handle_frame(
            '{"topic":"gateway","event":"phx_reply","ref":0,"payload":{"status":"ok"}}', self.world.now
        )
        assert self.channel.poll_event() == Joined()
        self.world.core.handle_portal_connected(self.world.now)

    def hear(self, text: str) -> Received | Hiccup | None:
        """What came of it: None if it was skipped."""
        skipped = self.channel.skipped.total()
        self.channel.handle_frame(text, self.world.now)
        event = self.channel.poll_event()
        assert self.channel.poll_event() is None
        match event:
            case Received(message):
                self.world.core.handle_portal_message(message, self.world.now)
                self.world.drain()
            case Hiccup():
                self.world.core.handle_portal_disconnected(self.world.now)
                self.connect()
                return event
            case None:
                assert self.channel.skipped.total() == skipped + 1
        return event


def is_right(outcome: object, given: Frame, message: Message) -> bool:
    """Whether a gateway did with a frame what it is to do."""
    event, payload = message
    match outcome:
        case Received(taken):
            original = decode(event, json.dumps(payload))
            if "far future" in given.how:
                original = type(original)(**{name: getattr(original, name) for name in original.__struct_fields__}
                                          | {"expires_at": taken.expires_at})  # fmt: skip
            return given.verdict in {Verdict.TAKEN, Verdict.EITHER} and taken == original
        case Hiccup():
            return given.verdict is Verdict.HICCUP
        case _:
            return given.verdict in {Verdict.SKIPPED, Verdict.EITHER}


def passing(world: policy_world.World, recorded: Recorded) -> set[tuple[str, str]]:
    """What passes from clients, of all there might be; to clients the same passes."""
    up, down = set(), set()
    for device in recorded.devices:
        own = policy_world.socket.inet_aton(device.ipv4)
        there = {resource.address.packed: (device.id, resource.id) for resource in recorded.resources}
        if device.id in world.node.lines:
            world.from_client(device.id, *(udp(source=own, destination=remote, dport=53) for remote in there))
        up |= {there[packet[16:20]] for packet in world.written()}
        world.from_tun(*(udp(source=remote, destination=own, sport=53, dport=50_000) for remote in there))
        down |= {there[packet[12:16]] for _, packet, _ in world.delivered() if packet[9] == 17}
    assert up == down
    return up


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """Each skipped frame is one: they would fill the memory of the test."""
    log = logging.getLogger("fzg")
    level = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(level)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("make_engine", ENGINES[-1:], ids=[engine.__name__ for engine in ENGINES[-1:]])
def test_each_mutation_is_taken_or_skipped_as_specified_and_grants_nothing_else(make_engine: Any, count: int) -> None:
    rng = random.Random(SEED)
    recorded, grants, heard = Recorded(rng), Grants(), Heard(make_engine)
    world = heard.world
    answered, taken, compared = 0, 0, 0
    try:
        for number in range(count):
            now = world.unix
            message = recorded.next(grants, now)
            # Each fifth is as the portal made it, so that there is something that could be lost.
            given = (
                mutated(rng, message) if rng.random() < 0.8 else Frame(json.dumps(frame(message)), "", Verdict.TAKEN)
            )
            outcome = heard.hear(given.text)
            assert is_right(outcome, given, message), (
                f"{given.verdict} expected, but {outcome}: {given.how}: {given.text[:1000]} (FZG_SEED={SEED})"
            )
            if isinstance(outcome, Received):
                taken += 1
                if "far future" in given.how:
                    message[1]["expires_at"] = int(now) + 86_000
                grants.apply(message, now)
            for ref in world.acknowledged[answered:]:
                grants.acknowledge(ref)
            answered = len(world.acknowledged)
            world.run(PAUSE_S)
            if number % COMPARED_EVERY == COMPARED_EVERY - 1:
                passes, now = passing(world, recorded), world.unix
                assert grants.must_pass(now) <= passes <= grants.may_pass(now), given.how
                compared += len(passes)
        assert taken > count // 4
        assert compared > count // COMPARED_EVERY * 20
        for place, size in sizes(world.core).items():
            limit = next((limit for part, limit in LIMITS.items() if part in place), DEFAULT_LIMIT)
            assert size <= limit, f"{place} holds {size} (FZG_SEED={SEED})"
        world.portal("init", policy_world.init(authorizations=[]))
        world.run(2.0)
        assert passing(world, recorded) == set()
        assert world.core.tunnel.client_count == 0
    finally:
        world.close()
