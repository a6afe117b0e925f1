"""Names: control events, resolution, mapping, patterns."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from fzg.tunnel import proxies
from fzg.tunnel.dns_pattern import Pattern
from fzg.tunnel.events import ClientGone, Consumed, ResolveDomain, Revoked, SendToClient
from fzg.tunnel.filters import TcpFilter, UdpFilter
from fzg.tunnel.proxies import ProxyTable
from tests.unit.tunnel_world import (
    A4,
    A6,
    P1,
    P2,
    P3,
    P4,
    Q1,
    Q2,
    A,
    B,
    World,
    addresses,
    control,
    icmp_kind,
    packed,
    resource_id,
    tcp,
    udp,
)

PROHIBITED4, NETWORK4, NETWORK6 = (3, 13), (3, 0), (1, 3)


@pytest.fixture
def world() -> World:
    world = World()
    world.dns("*.corp.example")
    world.drain()
    world.events.clear()
    return world


def resolutions(world):
    return [event for event in world.events if isinstance(event, ResolveDomain)]


# -- 13.5


@pytest.mark.spec("TUNNEL-55")
def test_an_unknown_resource_is_inactive_without_a_lookup(world):
    assert world.ask("db.corp.example", [P1], number=77) is None
    sent = world.events[-1]
    assert isinstance(sent, SendToClient)
    assert sent.client_id == A
    expected = f'{{"resource":"{resource_id(77)}","domain":"db.corp.example","status":"Inactive"}}'
    assert sent.packet == control(1, expected.encode())
    assert resolutions(world) == []


@pytest.mark.spec("TUNNEL-56")
def test_a_network_has_no_names(world):
    world.cidr("10.0.0.0/24", number=9)
    world.internet(number=10)
    assert world.assign("db.corp.example", [P1], number=9) == "Inactive"
    assert world.assign("db.corp.example", [P1], number=10) == "Inactive"


@pytest.mark.spec("TUNNEL-57")
def test_a_name_with_ipv4_only(world):
    assert world.assign("db.corp.example", [P1, Q1], ["10.0.0.1"]) == "Active"
    assert addresses(world.translated(udp(A4, P1, 1, 2))) == (A4, "10.0.0.1")
    assert world.refusal(udp(A6, Q1, 1, 2)) == NETWORK6


@pytest.mark.spec("TUNNEL-58")
def test_a_name_without_addresses_is_active_and_unreachable(world):
    assert world.assign("db.corp.example", [P1, Q1], []) == "Active"
    assert world.refusal(udp(A4, P1, 1, 2)) == NETWORK4
    assert world.refusal(udp(A6, Q1, 1, 2)) == NETWORK6


@pytest.mark.spec("TUNNEL-59")
def test_a_resolver_that_hangs_makes_the_name_inactive_after_10_seconds(world):
    resolve = world.ask("db.corp.example", [P1])
    world.run(9)
    assert world.last_status() is None
    world.run(2)
    assert world.last_status() == "Inactive"
    assert world.refusal(udp(A4, P1, 1, 2)) == PROHIBITED4
    world.tunnel.handle_resolved(resolve.request, [ip_address("10.0.0.1")], world.now)
    assert world.drain() == []


def test_a_resolver_that_gives_up_makes_the_name_inactive(world):
    resolve = world.ask("db.corp.example", [P1])
    world.tunnel.handle_resolved(resolve.request, None, world.now)
    world.drain()
    assert world.last_status() == "Inactive"


@pytest.mark.spec("TUNNEL-60")
def test_a_name_outside_of_the_pattern_is_inactive(world):
    assert world.assign("db.other.example", [P1], ["10.0.0.1"]) == "Inactive"
    assert world.refusal(udp(A4, P1, 1, 2)) == PROHIBITED4


@pytest.mark.spec("TUNNEL-61")
@pytest.mark.parametrize("order", [["10.0.0.7", "10.0.0.3"], ["10.0.0.3", "10.0.0.7", "10.0.0.3"]])
def test_the_mapping_of_the_example(world, order):
    proxies = ["100.96.0.9", "100.96.0.10", "100.96.0.11", "100.96.0.12", Q1, Q2]
    world.assign("db.corp.example", proxies[::-1], order)
    reached = [addresses(world.translated(udp(A4, proxy, 1, 2)))[1] for proxy in proxies[:4]]
    assert reached == ["10.0.0.3", "10.0.0.7", "10.0.0.3", "10.0.0.7"]
    assert world.refusal(udp(A6, Q1, 1, 2)) == NETWORK6


def test_families_are_mapped_apart(world):
    world.assign("db.corp.example", [Q2, P1, Q1, P2], ["2001:db8::1", "10.0.0.200", "10.0.0.9"])
    assert addresses(world.translated(udp(A4, P1, 1, 2)))[1] == "10.0.0.9"
    assert addresses(world.translated(udp(A4, P2, 1, 2)))[1] == "10.0.0.200"
    assert addresses(world.translated(udp(A6, Q1, 1, 2)))[1] == "2001:db8::1"
    assert addresses(world.translated(udp(A6, Q2, 1, 2)))[1] == "2001:db8::1"


def test_ipv6_is_mapped_in_order_too(world):
    proxies = [f"fd00:2021:1111:8000::{n}" for n in ("8", "9", "a", "b")]
    world.assign("db.corp.example", proxies[::-1], ["2001:db8::7", "2001:db8::3"])
    reached = [addresses(world.translated(udp(A6, proxy, 1, 2)))[1] for proxy in proxies]
    assert reached == ["2001:db8::3", "2001:db8::7", "2001:db8::3", "2001:db8::7"]


@pytest.mark.spec("TUNNEL-62")
def test_two_resources_share_the_proxies_of_one_name():
    world = World()
    world.dns("db.example", UdpFilter(80, 80), number=1)
    world.dns("*.example", TcpFilter(443, 443), number=2)
    assert world.assign("db.example", [P1], ["10.0.0.1"], number=1) == "Active"
    assert world.refusal(tcp(A4, P1, 1, 443)) == PROHIBITED4
    assert world.assign("db.example", [P1], ["10.0.0.1"], number=2) == "Active"
    assert world.translated(udp(A4, P1, 1, 80))
    assert world.translated(tcp(A4, P1, 1, 443))
    assert world.refusal(tcp(A4, P1, 1, 80)) == PROHIBITED4
    world.tunnel.reject(A, resource_id(1), world.now)
    assert world.refusal(udp(A4, P1, 1, 80)) == PROHIBITED4
    assert world.translated(tcp(A4, P1, 1, 443))


@pytest.mark.spec("TUNNEL-63")
def test_unknown_events_are_ignored_and_filler_is_not_read(world):
    for kind in (1, 3, 7, 255):
        assert world.out(control(kind, b"\xff{arbitrary")) == Consumed()
    assert world.drain() == []
    payload = f'{{"resource":"{resource_id(2)}","domain":"db.corp.example","proxy_ips":["{P1}"]}}'.encode()
    assert world.out(control(0, payload, hop_limit=64, filler=b"\xaa" * 7)) == Consumed()
    assert [type(event) for event in world.drain()] == [ResolveDomain]


@pytest.mark.spec("TUNNEL-64")
def test_extra_fields_are_accepted_and_ours_are_the_known_ones(world):
    payload = f'{{"v":[1,{{}}],"resource":"{resource_id(2)}","domain":"db.corp.example","proxy_ips":["{P1}"]}}'.encode()
    world.out(control(0, payload))
    (resolve,) = world.drain()
    world.tunnel.handle_resolved(resolve.request, [], world.now)
    world.drain()
    assert world.last_status() == "Active"
    assert world.assign("x.other.example", [P1]) == "Inactive"


@pytest.mark.parametrize("payload", [b"", b"\xff", b"{}", b"[1]", b'{"resource":1,"domain":"a","proxy_ips":[]}'])
def test_bad_json_is_ignored_without_an_answer(world, payload):
    assert world.out(control(0, payload)) == Consumed()
    assert world.drain() == []


@pytest.mark.spec("TUNNEL-65")
def test_addresses_that_are_no_proxies_do_not_become_reachable(world):
    foreign = ["10.0.0.9", "100.64.0.3", "2001:db8::9", "100.100.111.1", "fd00:2021:1111:8000:100:100:111:1"]
    assert world.assign("db.corp.example", foreign, ["10.0.0.1"]) == "Inactive"
    assert world.assign("db.corp.example", [*foreign, P1], ["10.0.0.1"]) == "Active"
    assert world.refusal(udp(A4, "10.0.0.9", 1, 2)) == PROHIBITED4
    assert world.refusal(udp(A6, "2001:db8::9", 1, 2)) == (1, 1)
    assert world.refusal(udp(A4, "100.100.111.1", 1, 2)) == PROHIBITED4
    assert world.translated(udp(A4, P1, 1, 2))


@pytest.mark.spec("TUNNEL-66")
def test_a_proxy_that_was_not_assigned_is_prohibited(world):
    assert world.refusal(udp(A4, P1, 1, 2)) == PROHIBITED4
    world.ask("db.corp.example", [P1])
    assert world.refusal(udp(A4, P1, 1, 2)) == PROHIBITED4


@pytest.mark.spec("TUNNEL-67")
def test_the_1001st_resolution_is_dropped(world):
    for number in range(1000):
        assert world.ask(f"host{number}.corp.example", [P1])
    assert world.ask("one-more.corp.example", [P1]) is None
    assert world.last_status() is None
    world.tunnel.handle_resolved(resolutions(world)[0].request, [], world.now)
    world.drain()
    assert world.assign("one-more.corp.example", [P1], ["10.0.0.1"]) == "Active"


@pytest.mark.spec("TUNNEL-69")
def test_goodbye_forgets_the_client_and_sends_nothing(world):
    assert world.out(control(2)) == Consumed()
    events = world.drain()
    assert ClientGone(A) in events
    assert not any(isinstance(event, SendToClient) for event in events)
    assert world.tunnel.client_count == 0
    world.tunnel.reject(A, resource_id(2), world.now)
    assert world.drain() == []
    assert world.dropped(udp("10.0.0.1", A4, 1, 2)) == "NoPeerState"


# -- chapter 14 and 7.3


def test_too_many_proxies_in_one_event_are_refused(world):
    proxies = [f"100.96.1.{number}" for number in range(17)]
    assert world.assign("db.corp.example", proxies, ["10.0.0.1"]) == "Inactive"
    assert world.assign("db.corp.example", proxies[:16], ["10.0.0.1"]) == "Active"


def test_no_proxies_make_nothing_active(world):
    assert world.assign("db.corp.example", [], ["10.0.0.1"]) == "Inactive"


def test_a_client_has_a_limited_number_of_proxies(world, monkeypatch):
    monkeypatch.setattr(proxies, "MAX_PROXIES", 2)
    assert world.assign("db.corp.example", [P1, P2], ["10.0.0.1"]) == "Active"
    assert world.assign("web.corp.example", [P3], ["10.0.0.1"]) == "Inactive"
    assert world.assign("db.corp.example", [P1, P2], ["10.0.0.2"]) == "Active"
    assert world.assign("web.corp.example", [P1, P2], ["10.0.0.3"]) == "Active"


def test_a_client_has_a_limited_number_of_pairs(monkeypatch):
    monkeypatch.setattr(proxies, "MAX_PAIRS", 2)
    table = ProxyTable()
    first, second = {packed(P1)}, {packed(P1), packed(P2)}
    table.assign("a", "r1", first, [])
    assert table.has_room(first)
    assert not table.has_room(second)


def test_upper_case_matches_and_is_echoed(world):
    assert world.assign("DB.Corp.Example", [P1], ["10.0.0.1"]) == "Active"
    assert b'"domain":"DB.Corp.Example"' in world.events[-1].packet
    world.translated(udp(A4, P1, 5, 6))
    assert world.assign("db.corp.example.", [P1], ["10.0.0.2"]) == "Active"
    assert addresses(world.translated(udp(A4, P1, 5, 6)))[1] == "10.0.0.1"


def test_the_resolver_is_asked_for_the_name_without_its_dot(world):
    assert world.ask("db.corp.example.", [P1]).domain == "db.corp.example"


def test_parallel_resolutions_both_run_and_the_later_result_wins(world):
    first, second = world.ask("db.corp.example", [P1]), world.ask("db.corp.example", [P1])
    world.tunnel.handle_resolved(second.request, [ip_address("10.0.0.2")], world.now)
    world.tunnel.handle_resolved(first.request, [ip_address("10.0.0.1")], world.now)
    assert addresses(world.translated(udp(A4, P1, 5, 6)))[1] == "10.0.0.1"


def test_a_result_after_the_resource_was_rejected_is_inactive(world):
    world.cidr("10.9.0.0/24", number=9)
    resolve = world.ask("db.corp.example", [P1])
    world.tunnel.reject(A, resource_id(2), world.now)
    world.tunnel.handle_resolved(resolve.request, [ip_address("10.0.0.1")], world.now)
    world.drain()
    assert world.last_status() == "Inactive"


def test_a_result_after_goodbye_is_discarded_even_if_the_client_came_back(world):
    resolve = world.ask("db.corp.example", [P1])
    world.out(control(2))
    world.dns("*.corp.example")
    world.drain()
    world.tunnel.handle_resolved(resolve.request, [ip_address("10.0.0.1")], world.now)
    assert world.drain() == []
    assert world.refusal(udp(A4, P1, 1, 2)) == PROHIBITED4


def test_answers_that_lead_back_into_the_tunnel_are_discarded(world):
    answer = ["100.64.0.3", "100.96.0.7", "fd00:2021:1111::3", "10.0.0.1"]
    assert world.assign("db.corp.example", [P1, P2, Q1], answer) == "Active"
    assert addresses(world.translated(udp(A4, P2, 1, 2)))[1] == "10.0.0.1"
    assert world.refusal(udp(A6, Q1, 1, 2)) == NETWORK6


def test_loopback_and_private_answers_are_taken(world):
    assert world.assign("db.corp.example", [P1, P2], ["127.0.0.1", "192.168.1.1"]) == "Active"
    assert addresses(world.translated(udp(A4, P1, 1, 2)))[1] == "127.0.0.1"


def test_a_name_that_loses_its_addresses_voids_flows(world):
    world.assign("db.corp.example", [P1], ["10.0.0.1"])
    assert world.out(udp(A4, P1, 1, 2)).flow is not None
    world.events.clear()
    assert world.assign("db.corp.example", [P1], []) == "Active"
    assert Revoked(A) in world.events
    assert world.refusal(udp(A4, P1, 1, 2)) == NETWORK4


def test_a_resource_that_comes_back_finds_its_proxies(world):
    world.cidr("10.9.0.0/24", number=9)
    world.assign("db.corp.example", [P1], ["10.0.0.1"])
    world.tunnel.reject(A, resource_id(2), world.now)
    assert world.refusal(udp(A4, P1, 1, 2)) == PROHIBITED4
    world.dns("*.corp.example")
    assert addresses(world.translated(udp(A4, P1, 1, 2)))[1] == "10.0.0.1"


def test_proxies_belong_to_one_client(world):
    world.dns("*.corp.example", client=B)
    world.assign("db.corp.example", [P1], ["10.0.0.1"])
    verdict = world.out(udp("100.64.0.3", P1, 1, 2), client=B)
    assert icmp_kind(verdict.packet) == PROHIBITED4


def test_numbering_anew_keeps_routes_of_other_resources_right(world):
    world.dns("**.lab.example", number=4)
    world.assign("a.corp.example", [P1, P2], ["10.0.0.1"])
    world.assign("a.lab.example", [P3, P4], ["10.0.0.2"], number=4)
    world.assign("b.lab.example", [P1], ["10.0.0.3"], number=4)
    assert addresses(world.translated(udp(A4, P1, 1, 2)))[1] == "10.0.0.3"
    for stale in (P2, P3, P4):
        assert world.refusal(udp(A4, stale, 1, 2)) == PROHIBITED4
    world.tunnel.reject(A, resource_id(4), world.now)
    assert world.refusal(udp(A4, P1, 1, 2)) == PROHIBITED4


@pytest.mark.parametrize("become", [lambda w: w.internet(number=4), lambda w: w.cidr("192.168.0.0/16", number=4)])
def test_numbering_anew_survives_a_resource_that_was_of_names_and_is_of_another_kind_now(world, become):
    world.dns("**.lab.example", number=4)
    world.assign("a.lab.example", [P1, P2], ["10.0.0.2"], number=4)
    world.tunnel.reject(A, resource_id(4), world.now)
    become(world)
    assert world.assign("a.corp.example", [P1], ["10.0.0.1"]) == "Active"
    assert addresses(world.translated(udp(A4, P1, 1, 2)))[1] == "10.0.0.1"
    assert world.refusal(udp(A4, P2, 1, 2)) == PROHIBITED4


def test_a_proxy_that_comes_back_for_a_name_outside_of_the_pattern_leads_nowhere(world):
    world.assign("a.corp.example", [P1, P2], ["10.0.0.1"])
    assert world.ask("a.other.example", [P1]) is None
    for stale in (P1, P2):
        assert world.refusal(udp(A4, stale, 1, 2)) == PROHIBITED4


# -- 7.1


POSITIVE = [
    ("**.example.com", "example.com"),
    ("**.example.com", "a.example.com"),
    ("**.example.com", "a.b.example.com"),
    ("*.example.com", "example.com"),
    ("*.example.com", "a.example.com"),
    ("app.**.web.**.example.com", "app.web.example.com"),
    ("app.**.web.**.example.com", "app.a.b.web.c.example.com"),
    ("app.f??.example.com", "app.foo.example.com"),
    ("app.*.*.example.com", "app.a.b.example.com"),
    ("*?*.example.com", "app.example.com"),
    ("*ample.com", "example.com"),
    ("ex*le.com", "example.com"),
    ("EXAMPLE.com", "example.COM"),
    ("example.com", "example.com."),
    ("**", "a.b.c"),
    ("[abc].example.com", "b.example.com"),
    ("[!a-z]x.example.com", "7x.example.com"),
    ("[a-c]*.example.com", "cat.example.com"),
    ("[A-C].example.com", "b.example.com"),
    ("[]]x.com", "]x.com"),
    ("a.**", "a.b.c"),
]
NEGATIVE = [
    ("*.example.com", "a.b.example.com"),
    ("app.*.example.com", "app.a.b.example.com"),
    ("app.*com", "app.foo.com"),
    ("app?com", "app.com"),
    ("?.example.com", "example.com"),
    ("?.example.com", "ab.example.com"),
    ("example.com", "example.org"),
    ("example.com", "xexample.com"),
    ("example.com", "a.example.com"),
    ("**.example.com", "example.com.evil.org"),
    ("**.example.com", "notexample.com"),
    ("app.*.example.com", "app.example.com"),
    ("[abc].example.com", "d.example.com"),
    ("[!a-z].example.com", "d.example.com"),
    ("[a-c].example.com", "-.example.com"),
    ("a.b", "a-b"),
    ("", "a"),
    # Invalid patterns never match.
    ("a**.example.com", "a.example.com"),
    ("a**.example.com", "a**.example.com"),
    ("***.example.com", "a.example.com"),
    ("[abc.example.com", "a.example.com"),
    ("*.[z.com", "[z.com"),
]


@pytest.mark.spec("TUNNEL-68")
def test_the_pattern_table():
    for pattern, domain in POSITIVE:
        assert Pattern(pattern).matches(domain), (pattern, domain)
    for pattern, domain in NEGATIVE:
        assert not Pattern(pattern).matches(domain), (pattern, domain)


def test_hostile_patterns_take_no_exponential_time():
    pattern = Pattern(".".join(["*a" * 15 + "b"] * 4 + ["**", "x"] * 30))
    assert not pattern.matches(".".join(["a" * 63] * 4 + ["y"] * 60))
