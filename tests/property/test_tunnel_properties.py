"""The policy on arbitrary input: NAT is one to one, routes equal a naive search, nothing raises."""

from __future__ import annotations

import random
from ipaddress import IPv4Network, ip_address, ip_network

from hypothesis import given, settings
from hypothesis import strategies as st

from fzg.tunnel.events import Consumed, Deliver, Drop, Forward, Reply
from fzg.tunnel.filters import Filters, IcmpFilter, TcpFilter, UdpFilter, UnknownFilter
from fzg.tunnel.nat import Entry, Lookup, NatTable
from fzg.tunnel.resources import Authorization, CidrResource
from fzg.tunnel.routes import Routes
from fzg.wire import ip
from tests.property.test_ip_properties import mutated
from tests.unit.tunnel_world import (
    A4,
    P1,
    P2,
    P3,
    P4,
    World,
    addresses,
    checksums_hold,
    echo,
    icmp,
    ports,
    resource_id,
    tcp,
    udp,
)

UDP = 17 << 16

steps = st.lists(
    st.tuples(
        st.sampled_from(["out", "out", "out", "in", "sweep"]),
        st.sampled_from([1, 2, 3, 4, 65533, 65534, 65535, 0]),
        st.sampled_from([P1, P2, P3, P4]),
        st.sampled_from(["10.0.0.1", "10.0.0.2"]),
        st.sampled_from([0, 0, 0, ip.TCP_FIN, ip.TCP_RST]),
        st.floats(0.0, 70.0),
    ),
    max_size=80,
)


@settings(max_examples=200)
@given(steps)
def test_nat_is_a_bijection(actions: list[tuple[str, int, str, str, int, float]]) -> None:
    """Whatever happens, live sessions have distinct inside keys and distinct outside keys, and find each other."""
    table = NatTable()
    live: dict[tuple[int, bytes], Entry] = {}
    now = 0.0
    for action, port, proxy_text, real_text, flags, pause in actions:
        now += pause
        value, proxy, real = UDP | port, ip_address(proxy_text).packed, ip_address(real_text).packed
        if action == "out":
            entry = table.outgoing(value, proxy, real, flags, now)
            assert entry is not None
            assert live.setdefault((value, proxy), entry) is entry
        elif action == "in":
            found = table.incoming(value, real, flags, now)
            expected = [each for each in live.values() if (each.outside_value, each.real) == (value, real)]
            assert expected == ([found] if isinstance(found, Entry) else [])
        else:
            for ended in table.sweep(now, 1000):
                assert ended.deadline() <= now
                del live[ended.source_value, ended.proxy]
                assert table.incoming(ended.outside_value, ended.real, 0, now) is Lookup.EXPIRED
            assert all(each.deadline() > now for each in live.values())
        assert len(table) == len(live)
        assert len({(each.outside_value, each.real) for each in live.values()}) == len(live)
        assert all(each.source_value & ~0xFFFF == each.outside_value & ~0xFFFF for each in live.values())


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["udp", "tcp", "echo"]),
            st.sampled_from([P1, P2, P3, P4]),
            st.integers(0, 3),
            st.integers(1, 0xFFFF),
            st.binary(max_size=9),
        ),
        max_size=40,
    )
)
def test_what_leaves_through_nat_comes_back_as_it_went(packets: list[tuple[str, str, int, int, bytes]]) -> None:
    world = World()
    world.dns("*.example")
    world.assign("db.example", [P1, P2, P3, P4], ["10.0.0.1", "10.0.0.2"])
    outside: dict[tuple[str, tuple[int, int] | int, str], tuple[str, int]] = {}
    for kind, proxy, sport, dport, payload in packets:
        if kind == "echo":
            out = world.translated(echo(A4, proxy, sport, payload=payload))
            server, mapped = addresses(out)[1], int.from_bytes(out[24:26], "big")
            back = world.delivered(echo(server, A4, mapped, reply=True, payload=payload))
            assert int.from_bytes(back[24:26], "big") == sport
        else:
            make = udp if kind == "udp" else tcp
            sent = udp(A4, proxy, sport, dport, payload) if make is udp else tcp(A4, proxy, sport, dport, 0x10, payload)
            out = world.translated(sent)
            server, mapped = addresses(out)[1], ports(out)[0]
            answer = make(server, A4, dport, mapped)
            back = world.delivered(answer)
            assert ports(back) == (dport, sport)
            error = world.delivered(icmp("203.0.113.1", A4, 3, 1, payload=out))
            assert addresses(error) == (proxy, A4)
            assert ports(error[28:]) == (sport, dport)
            assert checksums_hold(error)
        assert addresses(back) == (proxy, A4)
        assert checksums_hold(out)
        assert checksums_hold(back)
        # One outside key never serves two inside keys.
        assert outside.setdefault((kind, mapped, server), (proxy, sport)) == (proxy, sport)


filters = st.lists(
    st.one_of(
        st.builds(TcpFilter, st.integers(0, 20), st.integers(0, 20)),
        st.builds(UdpFilter, st.integers(0, 20), st.integers(65530, 65535)),
        st.just(IcmpFilter()),
        st.just(UnknownFilter()),
    ),
    max_size=4,
)
packets = st.tuples(st.sampled_from([1, 6, 17, 47, 58]), st.integers(0, 22) | st.integers(65528, 65535), st.booleans())


def naive_permits(listed: list[object], protocol: int, port: int) -> bool:
    if not listed:
        return True
    for entry in listed:
        match entry:
            case TcpFilter(start, end) if protocol == 6 and start <= port <= end:
                return True
            case UdpFilter(start, end) if protocol == 17 and start <= port <= end:
                return True
            case IcmpFilter() if protocol in (1, 58):
                return True
    return False


def value_of(protocol: int, port: int, *, valued: bool) -> int | None:
    if protocol in (6, 17):
        return protocol << 16 | port
    return 1 << 16 | port if protocol in (1, 58) and valued else None


@given(filters, packets)
def test_compiled_filters_equal_the_list(listed: list[object], packet: tuple[int, int, bool]) -> None:
    protocol, port, valued = packet
    value = value_of(protocol, port, valued=valued)
    assert Filters(listed).permits(protocol, value) == naive_permits(listed, protocol, port)


@given(st.lists(filters, max_size=4), packets)
def test_a_union_permits_what_any_part_permits(parts: list[list[object]], packet: tuple[int, int, bool]) -> None:
    protocol, port, valued = packet
    value = value_of(protocol, port, valued=valued)
    union = Filters.union([Filters(part) for part in parts])
    assert union.permits(protocol, value) == any(Filters(part).permits(protocol, value) for part in parts)


networks = st.builds(
    lambda number, length: ip_network((number, length), strict=False),
    st.integers(0x0A000000, 0x0A00001F),
    st.sampled_from([0, 8, 27, 28, 30, 31, 32]),
)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(networks, filters, st.sampled_from([None, 5.0, 15.0])), max_size=8),
    st.sets(st.integers(0, 7)),
    st.integers(0x0A000000, 0x0A00001F),
    packets,
)
def test_routes_equal_a_naive_search(
    granted: list[tuple[IPv4Network, list[object], float | None]],
    removed: set[int],
    number: int,
    packet: tuple[int, int, bool],
) -> None:
    routes = Routes()
    held = [
        Authorization(CidrResource(resource_id(index), network, tuple(listed)), expires)
        for index, (network, listed, expires) in enumerate(granted)
    ]
    for authorization in held:
        routes.add(authorization.resource.network, authorization)
    for index in removed:
        if index < len(held):
            routes.remove(held[index].resource.network, held[index])
    protocol, port, valued = packet
    address = ip_address(number)
    candidates = [
        authorization
        for index, authorization in enumerate(held)
        if index not in removed
        and address in authorization.resource.network
        and authorization.expires > 10.0
        and naive_permits(list(authorization.resource.filters), protocol, port)
    ]
    best = max(candidates, key=lambda each: (each.resource.network.prefixlen, each.resource.id), default=None)
    assert routes.lookup(address.packed, protocol, value_of(protocol, port, valued=valued), 10.0) is best


def test_mutants_raise_nothing_in_either_direction() -> None:
    world = World()
    world.cidr("10.0.0.0/8", UdpFilter(0, 100))
    world.cidr("2001:db8::/32", number=3)
    world.dns("*.corp.example")
    world.assign("db.corp.example", [P1, P2], ["10.0.0.1"])
    rng = random.Random(1)
    seen: set[type] = set()
    for seed in range(5000):
        packet = mutated(seed)
        verdict = world.out(packet, ecn=rng.randrange(4))
        assert isinstance(verdict, Forward | Reply | Drop | Consumed)
        seen.add(type(verdict))
        verdict = world.back(packet)
        assert isinstance(verdict, Deliver | Drop)
        world.drain()
        if world.tunnel.client_count == 0:  # a mutant was a goodbye
            world.cidr("10.0.0.0/8")
            world.dns("*.corp.example")
            world.assign("db.corp.example", [P1, P2], ["10.0.0.1"])
        if seed % 100 == 0:
            world.run(1.0)
    assert seen == {Forward, Reply, Drop, Consumed}
