"""What `status` says of the core: NAT kind, paths and why they are relayed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import gevent
import pytest

from fzg.commands import status
from fzg.commands.connection import NoGatewayError
from fzg.commands.status import amount, duration, packets, render
from fzg.node.path import PathKind
from fzg.ops import snapshot
from fzg.ops.drops import MEANINGS
from fzg.ops.requests import Requests
from fzg.ops.snapshot import NatKind
from fzg.portal.websocket import State
from fzg.secret import Secret
from fzg.turn.allocation import State as RelayState
from fzg.turn.relays import RelayStatus
from fzg.wire.candidate import Kind
from fzg.wire.endpoint import Endpoint
from tests.unit.gateway_world import CLIENT_ID, SETTLED, close_worlds, world  # noqa: F401

HERE = Endpoint.parse("192.168.1.5:52625")


def relay(*mapped, rtt=0.01):
    pairs = tuple((HERE, Endpoint.parse(each)) for each in mapped)
    return RelayStatus("r", RelayState.ACTIVE, rtt, (), 0, (), pairs, is_near=True)


@pytest.mark.parametrize(
    ("relays", "kind"),
    [
        ([], NatKind.UNKNOWN),
        ([relay(rtt=None)], NatKind.UNKNOWN),
        ([relay()], NatKind.NONE),
        ([relay("192.168.1.5:52625")], NatKind.NONE),
        ([relay("203.0.113.9:52625")], NatKind.SOME),
        ([relay("203.0.113.9:52625"), relay("203.0.113.9:52625")], NatKind.ENDPOINT_INDEPENDENT),
        ([relay("203.0.113.9:52625"), relay("203.0.113.9:1024")], NatKind.BY_DESTINATION),
        ([relay("203.0.113.9:52625"), relay("192.168.1.5:52625")], NatKind.SOME),
    ],
)
def test_the_kind_of_nat_follows_from_where_relays_see_us(relays, kind):
    assert snapshot.nat_kind(relays) == kind


def test_which_port_to_forward_is_that_of_our_socket():
    other = (Endpoint.parse("192.168.1.5:40000"), Endpoint.parse("203.0.113.9:1024"))
    behind = relay()._replace(mapped=(other, (other[0], Endpoint.parse("203.0.113.9:1025"))))
    assert "forward UDP port 40000 to this host" in snapshot._nat([behind])["explained"]


def portal(**fields):
    values = {"host": "portal.test", "joined_at": None, "away_since": None, "dials_at": None, "last_error": None}
    return SimpleNamespace(**(values | {"state": State.CONNECTED} | fields))


def overview(w, door=None):
    return snapshot.overview(
        w.gateway.core,
        door or portal(joined_at=w.net.now),
        now=w.net.now,
        started=w.net.now - 90,
        not_ready_because=None,
    )


def connected(**placement):
    w = world(**placement).start()
    w.connect()
    w.net.run(SETTLED)
    return w


def test_a_direct_client_has_a_path_and_no_reason_to_be_relayed():
    w = connected()
    shown = snapshot.client(w.gateway.core, CLIENT_ID, w.net.now)
    assert shown["path"] == "PeerToPeer"
    assert shown["relayed"] is False
    assert shown["relayed_because"] is None
    assert shown["remote"] == "203.0.113.7:52625"
    assert shown["resources"] == 1
    assert 0 <= shown["handshake_age"] <= shown["age"] < 10
    json.dumps(shown)


@pytest.mark.parametrize(
    ("placement", "why"),
    [
        ({"gateway": "symmetric", "client": "symmetric"}, snapshot.WhyRelayed.NAT_BY_DESTINATION),
        ({"gateway": "nat", "client": "symmetric"}, snapshot.WhyRelayed.NO_DIRECT_CHECK),
    ],
)
def test_a_relayed_client_says_why(placement, why):
    w = connected(**placement)
    shown = snapshot.client(w.gateway.core, CLIENT_ID, w.net.now)
    assert shown["path"] in {"RelayToPeer", "PeerToRelay", "RelayToRelay"}
    assert shown["relayed"] is True
    assert shown["relayed_because"] == why


@pytest.mark.parametrize(
    ("theirs", "why"),
    [
        ([], snapshot.WhyRelayed.NO_DIRECT_CANDIDATE),
        (["relay 198.51.100.101:3000"], snapshot.WhyRelayed.NO_DIRECT_CANDIDATE),
        (["host [2001:db8::7]:52625"], snapshot.WhyRelayed.NO_COMMON_FAMILY),
    ],
)
def test_a_client_without_a_usable_address_is_relayed_for_that(theirs, why):
    def offered(texts):
        parts = [each.split() for each in texts]
        return [SimpleNamespace(kind=Kind(kind), address=Endpoint.parse(address)) for kind, address in parts]

    agent = SimpleNamespace(
        local_candidates=lambda: offered(["host 203.0.113.5:52625"]), remote_candidates=lambda: offered(theirs)
    )
    connection = SimpleNamespace(path=SimpleNamespace(kind=PathKind.RELAY_TO_RELAY), agent=agent)
    core = SimpleNamespace(node=SimpleNamespace(relays=SimpleNamespace(nat_maps_by_destination=True)))
    assert snapshot.why_relayed(core, connection) == why


def test_the_portal_s_partition_and_its_next_attempt_are_told():
    w = connected()
    now = w.net.now
    away = portal(
        state=State.CONNECTING, joined_at=now - 100, away_since=now - 30, dials_at=now + 4, last_error="refused"
    )
    shown = overview(w, away)["portal"]
    assert shown == {
        "host": "portal.test",
        "state": "connecting",
        "connected_for": None,
        "partition_age": 30.0,
        "last_error": "refused",
        "next_attempt_in": 4.0,
    }


def test_everything_can_be_shown_as_tables_and_no_text_of_others_steers_the_terminal():
    from rich.console import Console

    w = connected()
    shown = overview(w, portal(state=State.CONNECTING, away_since=w.net.now, last_error="\x1b[31m[red]no[/]"))
    shown["clients"] = [snapshot.client(w.gateway.core, CLIENT_ID, w.net.now)]
    shown["clients"][0] |= {"relayed": True, "relayed_because": "our NAT maps by destination"}
    shown["drops"] = {"to client: NotAllowed": 12345}
    console = Console(width=200, record=True, file=io.StringIO(), highlight=False)
    console.print(render(shown))
    text = console.export_text()
    assert "\x1b" not in text
    assert "[red]no[/]" in text
    assert CLIENT_ID[:8] in text
    assert "is relayed because our NAT maps by destination" in text
    assert "12,345" in text
    assert "no resource of the client admits packets from there" in text
    assert "NotAllowed" not in text
    assert "1 resource " in text


LONGEST_ADDRESS = "[2001:db8:1234:5678:9abc:def0:1234:5678]:52625"


def crowded():
    """A status whose parts are as wide as they get."""
    w = connected()
    shown = overview(w, portal(joined_at=w.net.now - 90_000))
    (ours,) = [snapshot.client(w.gateway.core, CLIENT_ID, w.net.now)]
    numbers = {"packets": 12_345_678_901, "bytes": 12_345_678_901_234}
    why = {"relayed": True, "relayed_because": "the client offered no address of its own", "path": "PeerToRelay"}
    wide = ours | why | {"age": 90_000.0, "handshake_age": 119.0, "received": numbers, "sent": numbers}
    wide |= {"remote": LONGEST_ADDRESS, "resources": 1234}
    shown["clients"] = [wide | {"id": f"{number:08}-x"} for number in range(9)]
    shown["client_count"] = 9
    shown["relays"] = [relays | {"addresses": [LONGEST_ADDRESS]} for relays in shown["relays"]]
    shown["nat"]["seen_at"] = [LONGEST_ADDRESS] * 4
    shown["drops"] = dict.fromkeys(MEANINGS, 1_234_567)
    return shown


def drawn(shown, width):
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    console.print(render(shown))
    return console.export_text()


def test_the_tables_fit_into_80_columns_and_cut_nothing():
    shown = crowded()
    text = drawn(shown, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for word in ("00000000", "1234 resources", "connected 1d01h", "handshake 1m59s", "client's relay", "11.2 TiB"):
        assert word in text, word
    assert "12.3 G packets" in text
    whole = drawn(shown, 200)
    assert LONGEST_ADDRESS in whole
    for meaning in MEANINGS.values():
        assert meaning in whole


def test_one_sentence_says_why_for_all_clients_of_whom_it_is_true():
    text = drawn(crowded(), 200)
    assert (
        "00000000, 00000001, 00000002, 00000003, 00000004 and 4 more are relayed because the client offered no" in text
    )
    assert "Clients  9: 9 relayed" in text


def test_who_watches_into_a_file_sees_each_refresh_also_that_the_gateway_went_and_came(monkeypatch, capsys):
    shown = crowded()
    answers = [shown, NoGatewayError("no gateway is running here [x]"), shown, KeyboardInterrupt()]

    def fetch():
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(status, "fetch", fetch)
    monkeypatch.setattr(status.time, "sleep", lambda seconds: None)
    status.command.main(["--watch", "1"], standalone_mode=False)
    printed = capsys.readouterr().out
    first, second = printed.split("no gateway is running here [x]\n\n")
    assert first.count("Gateway  1.6.1") == second.count("Gateway  1.6.1") == 1


def test_without_a_gateway_nothing_is_watched(monkeypatch):
    def fetch():
        raise NoGatewayError("no gateway is running here")

    monkeypatch.setattr(status, "fetch", fetch)
    with pytest.raises(NoGatewayError):
        status.command.main(["--watch", "1"], standalone_mode=False)


def test_numbers_of_packets_are_short():
    assert [packets(each) for each in (0, 1, 2_345, 999_999, 12_345_678)] == [
        "0 packets",
        "1 packet",
        "2,345 packets",
        "999,999 packets",
        "12.3 M packets",
    ]


def test_what_a_program_reads_is_on_the_page():
    page = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
    w = connected()
    shown = overview(w)
    client = snapshot.client(w.gateway.core, CLIENT_ID, w.net.now)
    names = [*(name for name in shown if name not in {"portal", "nat", "relays", "drops"}), "drops"]
    names += [f"portal.{name}" for name in shown["portal"]] + [f"nat.{name}" for name in shown["nat"]]
    assert [name for name in names if f"`{name}`" not in page] == []
    assert shown["relays"]
    for what, fields in (("relays", shown["relays"][0]), ("clients", client)):
        rows = "".join(line for line in page.splitlines() if line.startswith(f"| `{what}[]`"))
        assert [name for name in fields if f"`.{name}`" not in rows] == []


def test_a_client_whose_connection_failed_is_shown_with_what_it_holds():
    w = connected()
    w.gateway.core.node.drop(CLIENT_ID)
    shown = snapshot.client(w.gateway.core, CLIENT_ID, w.net.now)
    assert (shown["state"], shown["path"], shown["handshake_age"]) == ("disconnected", None, None)
    assert shown["resources"] == 1
    w.reject()
    assert snapshot.client(w.gateway.core, CLIENT_ID, w.net.now) is None


def test_thousands_of_clients_are_described_in_small_turns(monkeypatch):
    """No packet waits while more than 32 are described, and each line is a moment of its own."""
    w = connected()
    core = w.gateway.core
    ids = [CLIENT_ID] * 100
    monkeypatch.setattr(type(core), "client_ids", property(lambda self: ids))
    asked = Requests(
        gateway=core,
        portal=portal(joined_at=w.net.now),
        drain=None,
        settings={},
        token=Secret("t"),
        not_ready_because=lambda: None,
    )
    lines = asked.status({})
    assert next(lines)["client_count"] == 100
    turns = []
    others = gevent.spawn(lambda: [turns.append(gevent.sleep(0)) for _ in range(1000)])
    sizes = []
    for line in lines:
        sizes.append(len(line["clients"]))
    assert sizes == [32, 32, 32, 4]
    assert len(turns) >= 3, "others ran in between"
    others.kill()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.04, "0.0s"), (4.23, "4.2s"), (59.9, "59s"), (187, "3m07s"), (18_120, "5h02m"), (273_600, "3d04h")],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 40, "3.0 TiB")])
def test_amounts_have_units(size, text):
    assert amount(size) == text
