"""A day without the portal, in virtual time: traffic, renewals and relays go on, every expiry is kept to the second,
and the `init` at the end of it reconciles exactly (spec portal 1.13, 1.14, 2.2; tunnel 5.7, 5.8).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from fzg.portal import messages
from fzg.portal.backoff import DEFAULT_MAX_PARTITION_S, Reconnect
from fzg.wire.wireguard import MessageType, classify
from tests.unit.dataplane_world import ENGINES, udp
from tests.unit.gateway_world import (
    SETTLED,
    UNIX_START,
    close_worlds,  # noqa: F401
    world,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.gateway_world import ClientParty, World

HOUR = 3600.0
DAY = 24 * HOUR
MS = 0.001
SPARSE_S, DENSE_S = 600.0, 100.0
"""Between two looks at the traffic. The sparse ones find the connection idle, the dense ones keep its session alive:
it is renewed after 120 s if something was sent."""
STUN_REFRESH, STUN_CHANNEL_BIND = 4, 9
CHANNEL_DATA = 0x40
REFRESH_S = 300.0  # an allocation lasts 10 min and is refreshed half-way
BIND_S = 600.0  # as long as a channel lasts, at the most


def resource(number: int) -> str:
    return f"99999999-8888-4777-8666-{number:012d}"


def network(number: int) -> messages.CidrResource:
    return messages.CidrResource(
        id=messages.Id(resource(number)),
        address=messages.Cidr(f"10.{number}.0.0/16"),
        name="Lab",
        filters=messages.Filters(),
    )


def server(number: int) -> bytes:
    return bytes((10, number, 0, 5))


def listed(client: ClientParty, number: int, expires_at: int) -> messages.Authorization:
    return messages.Authorization(
        client_id=messages.Id(client.client_id), resource_id=messages.Id(resource(number)), expires_at=expires_at
    )


class Outage:
    """A world whose portal is away, packets that take no time, and a look at what passes at exact moments."""

    def __init__(self, make_engine: Callable[[], Any], placement: str, every: float) -> None:
        self.every = every
        self.w = world(gateway=placement, client=placement, make_engine=make_engine)
        self.w.start()
        self.start = float(int(self.w.net.now))
        self.w.net.run(0.37)  # grants end on the second, and nobody looks through them just then
        self.initiations: set[bytes] = set()

    def unix(self, after: float) -> int:
        """Unix seconds, so long after the start."""
        return int(UNIX_START + self.start + after)

    def grant(self, client: ClientParty, number: int, after: float | None) -> None:
        expires_at = None if after is None else self.unix(after)
        if self.w.gateway.node.connection(client.client_id) is None:
            self.w.connect(client, resource=network(number), expires_at=expires_at)
        else:
            self.w.authorize(client, resource=network(number), expires_at=expires_at)

    def at(self, after: float) -> None:
        """Exactly this long after the start; nothing is under way."""
        self.w.net.run(self.start + after - self.w.net.now)
        self.w.net.now = self.start + after
        self._count()

    def until(self, after: float, flows: list[tuple[ClientParty, int]]) -> None:
        """Traffic of these pairs, both ways, all the time."""
        net = self.w.net
        while net.now + self.every < self.start + after - 24.0:
            net.run(self.every)
            for client, number in flows:
                if passes(self.w, client, number) != (True, True):
                    # Who was silent stops sending after 170 s and renews the session after 180 s (connectivity 5.4).
                    assert self.every == SPARSE_S, f"{net.now - self.start:.3f} s"
                    net.run(11.0)
                    assert passes(self.w, client, number) == (True, True), f"{net.now - self.start:.3f} s"
            self._count()

    def _count(self) -> None:
        """What went over the wire since the last look, which is then forgotten: a day of it is much."""
        for _, _, _, payload in self.w.net.log:
            message = payload[4:] if payload[0] & 0xF0 == CHANNEL_DATA else payload
            if classify(message) is MessageType.INITIATION:
                self.initiations.add(message)
        self.w.net.log.clear()


def passes(w: World, client: ClientParty, number: int, *, port: int = 50_000) -> tuple[bool, bool]:
    """Whether a packet passes from the client, and to it, right now: the clock does not move meanwhile."""
    w.net.latency, latency = 0.0, w.net.latency
    up = udp(os.urandom(8), source=client.ipv4, destination=server(number), sport=port)
    down = udp(os.urandom(8), source=server(number), destination=client.ipv4, sport=53, dport=port)
    client.send(up)
    w.gateway.read_tun(down)
    w.net.run(0.0)
    w.net.latency = latency
    return up in w.gateway.written(), down in client.received


def assert_ends_at(outage: Outage, client: ClientParty, number: int, after: float) -> None:
    """The last millisecond is the client's, the moment itself is not: for a flow the engine knows and for a new one."""
    outage.at(after - 12.0)
    passes(outage.w, client, number)  # wakes the connection
    outage.at(after - 0.5)
    assert passes(outage.w, client, number) == (True, True)
    outage.at(after - MS)
    assert passes(outage.w, client, number) == (True, True)
    assert passes(outage.w, client, number, port=50_001) == (True, True)
    outage.at(after)
    assert passes(outage.w, client, number) == (False, False)
    assert passes(outage.w, client, number, port=50_002) == (False, False)
    assert outage.w.gateway.core.tunnel.poll_timeout().at % 1 > 0.1, "what the look at each second does shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "every"),
    [
        pytest.param(2 * HOUR, SPARSE_S, id="two-hours"),
        pytest.param(DAY, DENSE_S, id="day", marks=[pytest.mark.long, pytest.mark.timeout(1200)]),
    ],
)
@pytest.mark.parametrize("make_engine", ENGINES, ids=[engine.__name__ for engine in ENGINES])
@pytest.mark.parametrize("placement", ["public", "symmetric"], ids=["direct", "relayed"])
def test_an_outage_of_the_portal(make_engine: Any, placement: str, length: float, every: float) -> None:
    outage = Outage(make_engine, placement, every)
    w = outage.w
    staying, leaving = w.client, w.add_client(placement)
    always, ends_within, dropped, moved, all_day = 1, 2, 3, 4, 5
    outage.grant(staying, always, None)
    outage.grant(staying, ends_within, HOUR)
    outage.grant(staying, dropped, 3 * length)
    outage.grant(staying, moved, 2 * length)
    outage.grant(leaving, all_day, length - 60.0)
    said = len(w.gateway.frames)
    w.portal_goes()

    outage.until(HOUR, [(staying, ends_within), (leaving, all_day)])
    assert_ends_at(outage, staying, ends_within, HOUR)
    outage.until(length - 60.0, [(staying, number) for number in (always, dropped, moved)] + [(leaving, all_day)])
    assert_ends_at(outage, leaving, all_day, length - 60.0)
    outage.at(length - 58.5)
    assert w.gateway.node.connection(leaving.client_id) is None  # its last grant is gone
    assert w.gateway.core.tunnel.client_count == 1
    outage.at(length)

    assert len(w.gateway.frames) == said, "something was told to nobody"
    # A session carries data for three minutes; of the two clients each has one at every look.
    assert len(outage.initiations) > 2 * length / max(every, 180.0) * 0.95
    for relay in w.relays:
        assert relay.count[STUN_REFRESH] > length / REFRESH_S
    if placement == "symmetric":
        assert sum(relay.count[STUN_CHANNEL_BIND] for relay in w.relays) > length / BIND_S

    # What the portal says now is how it is: earlier, later, gone, and nothing that is not there.
    never_granted = 6
    w.portal_returns(
        authorizations=(
            listed(staying, always, outage.unix(length + 20.0)),
            listed(staying, moved, outage.unix(length + 40.0)),
            listed(staying, never_granted, outage.unix(2 * length)),
            listed(leaving, all_day, outage.unix(2 * length)),
        )
    )
    verdicts = {number: passes(w, staying, number)[0] for number in (always, ends_within, dropped, moved, 6)}
    assert verdicts == {always: True, ends_within: False, dropped: False, moved: True, never_granted: False}
    assert w.gateway.node.connection(leaving.client_id) is None
    assert w.gateway.core.tunnel.client_count == 1
    assert_ends_at(outage, staying, always, length + 20.0)
    assert_ends_at(outage, staying, moved, length + 40.0)
    outage.at(length + 41.5)
    assert w.gateway.core.tunnel.client_count == 0
    assert w.gateway.node.connection(staying.client_id) is None

    # And a client that comes now is served as ever.
    w.connect(leaving, resource=network(all_day))
    w.net.run(SETTLED)
    assert passes(w, leaving, all_day) == (True, True)


@pytest.mark.spec("PORTAL-34")
def test_the_day_is_a_day_of_waiting_and_a_delay_that_just_fits_is_waited_for() -> None:
    """Delays count, not the time that dials take; `Retry-After` does not count."""
    assert DEFAULT_MAX_PARTITION_S == DAY
    exact = 0.5 + 0.75 + 1.125
    for budget, retries in ((exact, 3), (exact - 1e-6, 2), (exact + 1.687, 3), (exact + 1.6875, 4)):
        reconnect = Reconnect(random=bytes, max_partition=budget)
        reconnect.handle_joined()
        given = 0
        while reconnect.handle_failure() is not None:
            given += 1
            reconnect.handle_failure(retry_after=HOUR)
        assert given == retries, budget
