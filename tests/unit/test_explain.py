"""`trace`: the explanation ends as the policy decides, and leaves nothing behind."""

from __future__ import annotations

import copy
import itertools
import random
from types import SimpleNamespace

import pytest

from fzg.ops.control import Refused
from fzg.ops.trace import _IN_THE_PORTAL, _REMEDIES, find_client, trace
from fzg.tunnel.events import Deliver, Forward
from fzg.tunnel.explain import _named, explain_incoming, explain_outgoing
from fzg.tunnel.filters import IcmpFilter, TcpFilter, UdpFilter
from tests.unit import tunnel_world as tw
from tests.unit.tunnel_world import A4, A6, B4, GATEWAY4, P1, P2, P3, A, B

REAL = "10.9.0.7"


def populated():
    """One client with every kind of right: open, filtered, expired, and names with sessions."""
    w = tw.World()
    w.cidr("10.0.0.0/24", number=1)
    w.cidr("10.0.1.0/24", TcpFilter(443, 443), UdpFilter(53, 60), number=4)
    w.cidr("10.0.2.0/24", number=5, expires=w.now + 5)
    w.cidr("10.0.3.0/24", IcmpFilter(), number=6)
    w.cidr("10.0.4.0/24", number=7, client=B)
    w.dns("*.example.com", TcpFilter(80, 80), number=2)
    w.assign("wiki.example.com", [P1, P2], [REAL])
    w.assign("none.example.com", [P3], [])
    w.translated(tw.tcp(A4, P1, 5000, 80, tw.SYN))
    w.now += 10.0  # the third is over, though no tick has swept it
    return w


def state(tunnel):
    """All that a packet could have changed."""
    clients = {}
    for client in tunnel._clients.values():
        nat = client.nat
        sessions = {
            (proxy, value): tuple(getattr(entry, slot) for slot in entry.__slots__)
            for proxy, by_value in nat._inside.items()
            for value, entry in by_value.items()
        }
        outside = {key: sorted(ports.entries) for key, ports in nat._outside.items()}
        clients[client.id] = (
            client._icmp_window,
            client._icmp_replies,
            sessions,
            outside,
            nat._count,
            len(nat._due),
            list(nat._expired),
        )
    return clients, dict(tunnel.dropped), list(tunnel._events), dict(tunnel._tracked), list(tunnel._resolutions)


def verdict_of(told):
    stops = [step for step in told.steps if step.outcome == "stop"]
    assert len(stops) <= 1
    assert not stops or told.steps[-1] is stops[0], "the deciding step is the last"
    return told.passes


CASES = [
    (tw.tcp(A4, "10.0.0.5", 5000, 22), True, "policy", "admits it, without expiry"),
    (tw.tcp(A4, "10.0.1.5", 5000, 443), True, "resource", "its filters (tcp 443, udp 53-60) permit it"),
    (tw.tcp(A4, "10.0.1.5", 5000, 80), False, "policy", "no resource that covers the address admits the packet"),
    (tw.udp(A4, "10.0.1.5", 5000, 53), True, "policy", "admits it"),
    (tw.tcp(A4, "10.0.2.5", 5000, 443), False, "resource", "expired 5 s ago"),
    (tw.echo(A4, "10.0.3.5", 7), True, "resource", "(icmp) permit it"),
    (tw.tcp(A4, "10.0.4.5", 5000, 443), False, "policy", "no resource of the client covers 10.0.4.5"),
    (tw.tcp(B4, "10.0.0.5", 5000, 443), False, "source", "not its own: 100.64.0.1 and fd00:2021:1111::1 are"),
    (tw.tcp(A4, B4, 5000, 443), False, "destination", "clients do not reach each other here"),
    (tw.tcp(A4, GATEWAY4, 5000, 53535), True, "destination", "open to each of its clients"),
    (tw.udp(A4, "224.0.0.251", 5353, 5353), False, "destination", "multicast"),
    (tw.tcp(A4, P1, 5000, 80), True, "DNS NAT", f"stands for wiki.example.com, which is {REAL}"),
    (tw.tcp(A4, P1, 5001, 80), True, "NAT session", f"to {REAL} from port or identifier 5001"),
    (tw.tcp(A4, P2, 5000, 80), True, "NAT session", f"to {REAL} from port or identifier 5001"),
    (tw.tcp(A4, P1, 5000, 443), False, "resource", "do not permit"),
    (tw.tcp(A4, P3, 5000, 80), False, "DNS NAT", "has no address of this IP version"),
    (tw.tcp(A4, "100.96.0.99", 5000, 80), False, "policy", "no resource of the client covers"),
]


@pytest.mark.parametrize(("packet", "passes", "check", "detail"), CASES)
def test_a_client_s_packet_is_explained_by_the_check_that_decides(packet, passes, check, detail):
    w = populated()
    before = state(w.tunnel)
    told = explain_outgoing(w.tunnel, A, packet, w.now)
    assert verdict_of(told) is passes
    assert any(step.check == check and detail in step.detail for step in told.steps), told.steps
    assert state(w.tunnel) == before
    assert isinstance(w.out(packet), Forward) is passes


INCOMING = [
    (tw.tcp("10.0.0.5", A4, 443, 5000), True, "policy", "admits it"),
    (tw.tcp("10.0.1.5", A4, 80, 5000), False, "policy", "no resource that covers the address admits the packet"),
    (tw.tcp(REAL, A4, 80, 5000), True, "NAT session", f"the client knows {REAL} as {P1}, for wiki.example.com"),
    (tw.tcp(REAL, A4, 80, 5009), False, "policy", "no resource of the client covers"),
    (tw.tcp("10.0.0.5", "100.64.0.99", 443, 5000), False, "client", "no client here has the address 100.64.0.99"),
    (tw.tcp("10.0.0.5", "10.0.0.6", 443, 5000), False, "destination", "10.0.0.6 is no tunnel address"),
    (tw.tcp(P1, A4, 443, 5000), False, "source", "forged"),
    (tw.tcp(GATEWAY4, A4, 53535, 5000), True, "source", "open to each of its clients"),
]


@pytest.mark.parametrize(("packet", "passes", "check", "detail"), INCOMING)
def test_a_packet_from_the_network_is_explained_by_the_check_that_decides(packet, passes, check, detail):
    w = populated()
    before = state(w.tunnel)
    told = explain_incoming(w.tunnel, packet, w.now)
    assert verdict_of(told) is passes
    assert any(step.check == check and detail in step.detail for step in told.steps), told.steps
    assert state(w.tunnel) == before
    assert isinstance(w.back(packet), Deliver) is passes


@pytest.mark.slow
def test_explanation_and_policy_agree_on_every_combination_of_ends_and_protocols():
    """Thousands of packets, each judged by a copy of the tunnel as well."""
    w = populated()
    w.internet(number=3, client=B)
    ends = [
        A4,
        A6,
        B4,
        GATEWAY4,
        P1,
        P2,
        P3,
        REAL,
        "10.0.0.5",
        "10.0.1.5",
        "10.0.2.5",
        "10.0.3.5",
        "8.8.8.8",
        "224.0.0.1",
    ]
    makers = [
        lambda s, d: tw.tcp(s, d, 443, 80),
        lambda s, d: tw.tcp(s, d, 5000, 80, tw.SYN),
        lambda s, d: tw.tcp(s, d, 80, 5000, tw.RST),
        lambda s, d: tw.udp(s, d, 53, 53),
        lambda s, d: tw.echo(s, d, 9),
        tw.gre,
        lambda s, d: tw.icmp(s, d, 3, 1, payload=tw.tcp(A4, REAL, 5000, 80)[:28]),
    ]
    seen = set()
    for source, destination, make in itertools.product(ends, ends, makers):
        if (":" in source) != (":" in destination):
            continue
        packet = make(source, destination)
        before = state(w.tunnel)
        for client in (A, B):
            told = explain_outgoing(w.tunnel, client, packet, w.now)
            real = copy.deepcopy(w.tunnel).handle_inner_packet(client, packet, 0, w.now)
            assert told.passes is isinstance(real, Forward), (source, destination, told)
            assert (told.steps[-1].outcome == "stop") <= (not told.passes)
            seen.add((told.verdict, told.reason))
        told = explain_incoming(w.tunnel, packet, w.now)
        real = copy.deepcopy(w.tunnel).handle_tun_packet(packet, w.now)
        assert told.passes is isinstance(real, Deliver), (source, destination, told)
        seen.add((told.verdict, told.reason))
        assert state(w.tunnel) == before
    assert len(seen) >= 6


# -- the request


def core(w):
    return SimpleNamespace(
        tunnel=w.tunnel, client_ids=list(w.tunnel._clients), node=SimpleNamespace(connection=lambda client_id: None)
    )


def ask(w, protocol, source, destination, **fields):
    source, _, source_port = source.partition("|")
    destination, _, destination_port = destination.partition("|")
    request = {"protocol": protocol, "source": source, "destination": destination, **fields}
    request["source_port"] = int(source_port) if source_port else None
    request["destination_port"] = int(destination_port) if destination_port else None
    return trace(core(w), request, w.now)


def test_the_source_decides_the_direction_and_the_client():
    w = populated()
    shown = ask(w, "tcp", A4, "10.0.0.5|443")
    assert (shown["direction"], shown["client"], shown["passes"]) == ("from client", A, True)
    shown = ask(w, "tcp", "10.0.0.5|443", f"{A4}|5000")
    assert (shown["direction"], shown["client"], shown["passes"]) == ("to client", A, True)
    assert shown["connection"] == "none: the client is not connected now"


def test_what_is_dropped_says_why_in_words_what_to_do_and_under_which_name_it_is_counted():
    shown = ask(populated(), "tcp", "10.0.1.5|80", f"{A4}|5000")
    assert shown["verdict"] == "dropped: no resource of the client admits packets from there"
    assert shown["reason"] == "to client: NotAllowed"
    assert shown["remedy"] == _IN_THE_PORTAL
    shown = ask(populated(), "udp", A4, "224.0.0.251|5353")
    assert shown["verdict"] == "dropped: it goes to a multicast address, which no resource covers"
    assert shown["reason"] == "from client: Multicast"


def test_what_is_refused_has_a_remedy_and_what_passes_needs_none():
    shown = ask(populated(), "tcp", A4, "10.0.1.5|80")
    assert (shown["reason"], shown["passes"]) == (None, False)
    assert shown["remedy"] == _IN_THE_PORTAL
    shown = ask(populated(), "tcp", A4, "10.0.0.5|22")
    assert (shown["reason"], shown["remedy"], shown["passes"]) == (None, None, True)


def test_each_check_that_can_stop_a_packet_has_a_remedy():
    for packet, passes, *_ in CASES:
        told = explain_outgoing(populated().tunnel, A, packet, populated().now)
        assert passes or (told.steps[-1].check, True) in _REMEDIES, told.steps[-1]
    for packet, passes, *_ in INCOMING:
        told = explain_incoming(populated().tunnel, packet, populated().now)
        assert passes or (told.steps[-1].check, False) in _REMEDIES, told.steps[-1]


def test_times_are_as_people_say_them_and_a_resource_is_named_once():
    w = tw.World()
    w.cidr("10.0.0.0/24", number=1, expires=w.now + 1_209_590)
    shown = {
        step.check: step.detail for step in explain_outgoing(w.tunnel, A, tw.tcp(A4, "10.0.0.5", 1, 2), w.now).steps
    }
    assert shown["policy"].endswith("admits it, for another 14 days")
    told = _named("10.0.0.0/24", "10.0.0.0/24"), _named("Wiki", "*.example.com")
    assert told == ("resource 10.0.0.0/24", "resource Wiki (*.example.com)")


def test_one_resource_is_not_some_resources():
    w = tw.World()
    w.cidr("10.0.0.0/24", number=1)
    (step, *_) = explain_outgoing(w.tunnel, A, tw.tcp(A4, "10.0.0.5", 5000, 22), w.now).steps
    assert step.detail.endswith("holds 1 resource")


def test_a_name_stands_for_the_client_s_proxy_address():
    w = populated()
    shown = ask(w, "tcp", A4, "Wiki.Example.com|80")
    assert shown["passes"] is True
    assert shown["name"] == "Wiki.Example.com"
    assert shown["translated"] == f"{A4} port 50000 to {REAL} port 80"


@pytest.mark.parametrize("protocol", ["icmp", "ICMP", "1", "47"])
def test_protocols_go_by_name_or_number(protocol):
    assert ask(populated(), protocol, A4, "10.0.0.5")["passes"] is True


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("tcp", A4, "10.0.0.5"), "need the port of the destination"),
        (("tcp", "10.0.0.5", f"{A4}|80"), "need the port of the source"),
        (("sctp", A4, "10.0.0.5|1"), "'sctp' is no protocol"),
        (("255", A4, "10.0.0.5|1"), "'255' is no protocol"),
        (("tcp", "nonsense", "10.0.0.5|1"), "is no IP address"),
        (("tcp", A4, "nobody.example.com|1"), "has asked for no name"),
        (("tcp", "10.0.0.5", "wiki.example.com|1"), "a name is known only for a client's own packets"),
        (("tcp", A6, "10.0.0.5|1"), "different IP versions"),
        (("tcp", A4, "10.0.0.5|70000"), "is not from 0 to 65535"),
        (("tcp", "100.64.0.99", "10.0.0.5|1"), "no client here has the address 100.64.0.99"),
    ],
)
def test_what_cannot_be_used_is_named(arguments, sentence):
    with pytest.raises(Refused, match=sentence):
        ask(populated(), *arguments)


def test_the_client_may_be_named_by_the_beginning_of_its_id():
    w = populated()
    assert ask(w, "tcp", B4, "10.0.0.5|443", client=A[:4])["steps"][1]["check"] == "source"
    assert find_client(core(w), A.upper()[:5]) == A
    with pytest.raises(Refused, match="no client here"):
        find_client(core(w), "77")
    twins = SimpleNamespace(client_ids=["abc1", "abc2", "abc"])
    with pytest.raises(Refused, match="give more of it"):
        find_client(twins, "ab")
    assert find_client(twins, "abc") == "abc"


def test_random_ports_do_not_break_the_agreement():
    w = populated()
    dice = random.Random(7)
    for _ in range(300):
        packet = tw.tcp(A4, dice.choice([P1, P2, "10.0.1.5"]), dice.randrange(65536), dice.choice([80, 443]))
        told = explain_outgoing(w.tunnel, A, packet, w.now)
        assert told.passes is isinstance(w.out(packet), Forward)
