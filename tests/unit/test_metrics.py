"""What a scrape says: of a gateway in memory with a client, relays and dropped packets."""

from __future__ import annotations

import itertools
import math
import re
import socket
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fzg.ops import metrics
from fzg.ops.flow_logs import Backlog
from fzg.ops.lag import Histogram, LoopLag
from fzg.ops.metrics import Metrics, Sources, buffers_of
from tests.unit.dataplane_world import udp
from tests.unit.gateway_world import (
    CLIENT_ID,
    RELAY_IDS,
    RESOURCE_ID,
    SERVER,
    SETTLED,
    close_worlds,  # noqa: F401
    world,
)

REFERENCE = {
    "connlib_network_packets",
    "connlib_network_dropped",
    "connlib_network_errors",
    "connlib_queue_length",
    "tunnel_connection_count",
    "portal_connection_hiccup",
    "dns_lookup_duration",
    "eventloop_poll_duration",
}
OURS = re.compile(r"connlib_network_(bytes|calls)|firezone_gateway_\w+|process_\w+")
PATHS = {"peer-to-peer", "peer-to-relay", "relay-to-peer", "relay-to-relay"}


class Scraped:
    """A gateway in memory whose metrics can be read; each attribute may be changed between two scrapes."""

    def __init__(self):
        self.world = world().start()
        self.core = self.world.gateway.core
        self.portal = SimpleNamespace(away_since=100.0, hiccups=0)
        self.lag, self.lookups = LoopLag(), Histogram((0.005, 10.0))
        self.reason = None
        self.backlog = Backlog(7, 2, 1)
        self.now = 130.0
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.metrics = Metrics(
            Sources(
                gateway=self.core,
                engine=self.core.engine,
                portal=self.portal,
                lag=self.lag,
                lookups=self.lookups,
                not_ready_because=lambda: self.reason,
                backlog=lambda: self.backlog,
                sockets=[self.udp],
                log_lines=lambda: {"INFO": 3, "WARN": 1},
                clock=lambda: self.now,
                facts={"version": "1.6.1", "engine": "pure"},
                max_partition=86_400.0,
            )
        )

    @property
    def text(self):
        return self.metrics.render("")[0].decode()

    @property
    def families(self):
        return {family.name: family for family in text_string_to_metric_families(self.text)}

    def values(self, family):
        return {tuple(sample.labels.values()): sample.value for sample in self.families[family].samples}

    def value(self, family):
        (value,) = self.values(family).values()
        return value


@pytest.fixture
def scraped():
    scraped = Scraped()
    yield scraped
    scraped.udp.close()


@pytest.mark.spec("OPS-42")
def test_the_names_are_those_of_the_reference_with_underscores(scraped):
    names = set(scraped.families)
    assert names >= REFERENCE
    assert all(OURS.fullmatch(name) for name in names - REFERENCE)


def test_each_family_says_what_it_is(scraped):
    for family in scraped.families.values():
        assert family.documentation.endswith("."), family.name
        assert family.type in {"counter", "gauge", "histogram", "info"} or family.name.startswith("process_")


def test_a_scraper_may_prefer_open_metrics(scraped):
    body, content_type = scraped.metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    assert scraped.metrics.render("")[1].startswith("text/plain; version=0.0.4")


def test_connections_are_counted_by_path_and_state(scraped):
    assert scraped.values("tunnel_connection_count") == {(path,): 0 for path in PATHS}
    assert scraped.values("firezone_gateway_connections") == {("connecting",): 0, ("connected",): 0, ("idle",): 0}
    assert scraped.value("firezone_gateway_handshakes") == 0
    scraped.world.connect()
    scraped.world.net.run(SETTLED)
    counts = scraped.values("tunnel_connection_count")
    assert set(counts) == {(path,) for path in PATHS}
    assert sum(counts.values()) == 1
    assert scraped.values("firezone_gateway_connections")["connected",] == 1
    assert scraped.value("firezone_gateway_clients") == 1
    assert scraped.value("firezone_gateway_handshakes") == 1


def test_handshakes_of_connections_that_are_gone_still_count(scraped):
    scraped.world.connect()
    scraped.world.net.run(SETTLED)
    scraped.core.node.drop(CLIENT_ID)
    assert sum(scraped.values("tunnel_connection_count").values()) == 0
    assert scraped.value("firezone_gateway_handshakes") == 1


def test_packets_and_bytes_are_counted_by_interface_and_direction(scraped):
    scraped.world.connect()
    scraped.world.net.run(SETTLED)
    before = scraped.values("connlib_network_packets")
    assert set(before) == set(itertools.product(("udp", "tun"), ("receive", "transmit")))
    packet = udp(source=scraped.world.client.ipv4, destination=SERVER)
    scraped.world.client.send(packet)
    scraped.world.net.run(0.01)
    after = scraped.values("connlib_network_packets")
    assert after["tun", "transmit"] == before["tun", "transmit"] + 1
    assert scraped.values("connlib_network_bytes")["tun", "transmit"] >= len(packet)


def test_drops_have_a_reason_and_a_direction_and_all_that_the_engine_knows_is_there_from_the_start(scraped):
    before = scraped.values("connlib_network_dropped")
    assert before["udp_queue_full", "transmit"] == before["replayed", "receive"] == 0
    scraped.core.counters["from client: NoPeerState"] += 2
    scraped.core.counters["to client: no WireGuard session"] += 3
    scraped.core.counters["to client: NotAPeer"] += 9
    scraped.core.node.counters["STUN: unknown connection"] += 4
    scraped.core.node.relays.counters["unknown transaction"] += 5
    scraped.core.engine._counters.update({"drop_udp_send_eperm": 6, "drop_replayed": 7, "drop_tun_write_einval": 8})
    after = scraped.values("connlib_network_dropped")
    grown = {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)}
    assert grown == {
        ("no_peer_state", "receive"): 2,
        ("no_wire_guard_session", "transmit"): 3,
        ("not_a_peer", "transmit"): 9,
        ("stun_unknown_connection", "receive"): 4,
        ("turn_unknown_transaction", "both"): 5,
        ("udp_send_eperm", "transmit"): 6,
        ("replayed", "receive"): 7,
        ("tun_write_einval", "receive"): 8,
    }


def test_reasons_that_nobody_foresaw_do_not_grow_the_scrape_without_end(scraped):
    scraped.core.counters.update(Counter({f"from client: {number}": 1 for number in range(5000)}))
    dropped = scraped.values("connlib_network_dropped")
    assert len(dropped) <= metrics.MAX_REASONS + 1
    assert sum(dropped.values()) >= 5000


def test_no_label_carries_an_id_or_an_address(scraped):
    scraped.world.connect()
    scraped.world.net.run(SETTLED)
    text = scraped.text
    for one in (CLIENT_ID, RESOURCE_ID, *RELAY_IDS):
        assert one not in text
    assert re.search(r'="[^"]*(\d+\.\d+\.\d+\.\d+|:[0-9a-f]*:)[^"]*"', text) is None


def test_relays_by_state_with_their_round_trips_and_channels(scraped):
    relays = scraped.values("firezone_gateway_relays")
    assert set(relays) == {("probing",), ("allocating",), ("active",), ("suspended",)}
    assert sum(relays.values()) == relays["active",] >= 1
    times = scraped.values("firezone_gateway_relay_rtt_seconds")
    assert 0 < times["nearest",] <= times["farthest",] < 1
    assert scraped.value("firezone_gateway_relay_channels") >= 0


def test_without_relays_there_is_no_round_trip(scraped):
    scraped.core.node.relays.shutdown(0.0)
    assert all(math.isnan(value) for value in scraped.values("firezone_gateway_relay_rtt_seconds").values())


def test_the_portal_is_away_while_it_says_so(scraped):
    assert (scraped.value("firezone_gateway_portal_joined"), scraped.value("firezone_gateway_ready")) == (0, 1)
    assert scraped.value("firezone_gateway_portal_partition_seconds") == 30
    scraped.portal.away_since = None
    assert scraped.value("firezone_gateway_portal_joined") == 1
    assert scraped.value("firezone_gateway_portal_partition_seconds") == 0
    scraped.portal.away_since, scraped.portal.hiccups = 200.0, 2
    scraped.now, scraped.reason = 260.0, "the gateway is shutting down"
    assert scraped.value("firezone_gateway_portal_partition_seconds") == 60
    assert scraped.values("portal_connection_hiccup") == {(): 2}
    assert scraped.value("firezone_gateway_portal_partition_limit_seconds") == 86_400
    assert scraped.value("firezone_gateway_ready") == 0


def test_histograms_count_values_up_to_each_bound(scraped):
    for value in (0.001, 0.005, 3.0, 60.0):
        scraped.lookups.observe(value)
    samples = {
        (sample.name, sample.labels.get("le")): sample.value
        for sample in scraped.families["dns_lookup_duration"].samples
    }
    assert samples == {
        ("dns_lookup_duration_bucket", "0.005"): 2,
        ("dns_lookup_duration_bucket", "10.0"): 3,
        ("dns_lookup_duration_bucket", "+Inf"): 4,
        ("dns_lookup_duration_count", None): 4,
        ("dns_lookup_duration_sum", None): pytest.approx(63.006),
    }


def test_the_flow_log_backlog_the_log_and_the_build_are_there(scraped):
    assert scraped.value("firezone_gateway_flow_log_spool_records") == 7
    assert scraped.values("connlib_queue_length") == {("flow_record",): 2}
    assert scraped.value("firezone_gateway_flow_log_dropped") == 1
    assert scraped.values("firezone_gateway_log_lines") == {("INFO",): 3, ("WARN",): 1}
    assert scraped.families["firezone_gateway_build_info"].samples[0].labels == {"version": "1.6.1", "engine": "pure"}
    scraped.backlog = Backlog(None, 0, 0)
    assert math.isnan(scraped.value("firezone_gateway_flow_log_spool_records"))


def test_the_process_s_own_costs_are_there(scraped):
    for name in ("process_cpu_seconds", "process_resident_memory_bytes", "process_open_fds"):
        assert scraped.value(name) > 0


def test_what_the_kernel_drops_for_want_of_room_is_counted(scraped):
    scraped.udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    scraped.udp.bind(("127.0.0.1", 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(100):
            sender.sendto(bytes(1000), scraped.udp.getsockname())
    assert scraped.values("firezone_gateway_udp_receive_buffer_drops")["ipv4",] > 0
    assert scraped.values("firezone_gateway_udp_buffer_bytes")["receive", "ipv4"] > 0
    assert scraped.values("firezone_gateway_udp_buffer_limit_bytes")["receive", "ipv4"] >= 4096


def test_a_kernel_that_does_not_tell_of_its_memory_costs_those_figures_only(scraped):
    def refuse(*_):
        raise OSError(92, "Protocol not available")

    assert buffers_of(SimpleNamespace(getsockopt=refuse, family=socket.AF_INET)) is None


def test_each_metric_is_on_the_page_about_monitoring(scraped):
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    for name in scraped.families:
        if not name.startswith("process_"):
            short = name.removeprefix("firezone_gateway").removeprefix("connlib_network")
            assert re.search(rf"{short}(_total)?`", page), name


def test_the_direction_of_each_drop_that_an_engine_counts_is_known():
    sources = (Path(__file__).parents[2] / "fzg" / "dataplane").glob("*.py*")
    named = {name for path in sources for name in re.findall(r'"(drop_[a-z_]+)"', path.read_text(errors="replace"))}
    assert len(named) >= 15
    assert named - metrics._ENGINE_DROPS.keys() == set()
