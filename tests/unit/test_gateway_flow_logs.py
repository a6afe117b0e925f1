"""Flow logs through the whole core: tokens, switches, and figures that include what the engine carried."""

from __future__ import annotations

import logging

import pytest

from fzg.gateway import ConfigureUploads, KeepToken
from fzg.portal import messages
from fzg.portal.messages import IngestToken
from fzg.secret import Secret
from fzg.tunnel.flow_record import FlowRecord
from tests.unit.dataplane_world import tcp, udp
from tests.unit.flow_log_world import attribution, token
from tests.unit.gateway_world import (
    RESOURCE_ID,
    SERVER,
    SETTLED,
    cidr,
    close_worlds,  # noqa: F401
    world,
)

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
UPLOADS = messages.FlowLogs(api_url="https://flows.example.com/", upload_interval_secs=60, upload_batch_size=0)
NO_UPLOADS = messages.FlowLogs(api_url="", upload_interval_secs=0, upload_batch_size=0)


def logged(*, init=UPLOADS, ingest_token=None, **placement):
    """A connected client whose flows are logged."""
    w = world(**placement).start()
    w.gateway.portal(w.init(flow_logs=init))
    w.connect(flow_logs_ingest_token=ingest_token or IngestToken(token()))
    w.net.run(SETTLED)
    return w


def records(w):
    return [event for event in w.gateway.flow_logs if isinstance(event, FlowRecord)]


def started(w):
    return [record for record in records(w) if record.figures is None]


def completed(w):
    return [record for record in records(w) if record.figures is not None]


class Connection:
    """TCP segments of one connection, both ends in the test's hand."""

    def __init__(self, w, sport=50000):
        self.w = w
        self.ends = {"source": w.client.ipv4, "destination": SERVER, "sport": sport, "dport": 443}
        self.back = {"source": SERVER, "destination": w.client.ipv4, "sport": 443, "dport": sport}

    def up(self, flags=ACK, payload=b""):
        assert self.w.client.send(tcp(payload, flags=flags, **self.ends)) is None
        self.w.net.run(0.01)

    def down(self, flags=ACK, payload=b""):
        self.w.gateway.read_tun(tcp(payload, flags=flags, **self.back))
        self.w.net.run(0.01)

    def open(self):
        self.up(SYN)
        self.down(SYN | ACK)
        self.up(ACK)


def count_decisions(w):
    """How often the core is asked about a packet of a client from now on."""
    decided = []
    handle = w.gateway.core.handle_inner_packet

    def counted(*arguments):
        decided.append(arguments)
        handle(*arguments)

    w.gateway.core.handle_inner_packet = counted
    return decided


@pytest.mark.spec("TUNNEL-91")
def test_the_figures_are_exact_though_the_engine_carried_almost_everything():
    w = logged()
    connection = Connection(w)
    connection.open()
    decided = count_decisions(w)
    for _ in range(300):  # six seconds
        connection.up(ACK, b"x" * 10)
        connection.down(ACK, b"y" * 100)
    assert len(decided) < 10
    connection.up(FIN | ACK)
    connection.down(FIN | ACK)
    connection.up(ACK)
    w.net.run(2.0)
    (record,) = completed(w)
    figures = record.figures
    # The last ACK came after both FINs; it counts if the flow was still there.
    assert figures.tx_packets in (303, 304)
    assert (figures.tx_bytes, figures.rx_packets, figures.rx_bytes) == (3000, 302, 30_000)
    assert figures.flow_end == figures.last_packet
    assert record.stem == started(w)[0].stem
    assert record.attribution == attribution()


def test_what_was_carried_just_before_a_reset_is_in():
    w = logged()
    connection = Connection(w)
    connection.open()
    for _ in range(20):
        connection.down(ACK, b"y" * 100)
    connection.up(RST)
    w.net.run(1.5)
    assert completed(w)[0].figures.rx_bytes == 2000


@pytest.mark.spec("TUNNEL-94")
def test_a_client_that_roams_amid_an_established_flow_is_noticed_within_a_second():
    w = logged(client="symmetric")
    connection = Connection(w)
    connection.open()
    for _ in range(20):
        connection.up(ACK, b"data")
    w.client.nat.rebind()
    for _ in range(60):
        connection.up(ACK, b"data")
    connection.up(RST)
    w.net.run(1.5)
    (record,) = completed(w)
    first, second = record.outers
    assert first.client.ip == second.client.ip == w.client.nat.public
    assert first.client.port != second.client.port
    assert str(first.gateway) == str(second.gateway) == "203.0.113.5:52625"
    assert 0 < second.activated - first.activated < 1.6
    assert record.figures.tx_bytes == 320


def test_udp_is_counted_in_both_directions_and_ends_when_it_is_idle():
    w = logged()
    w.client.send(udp(b"four", source=w.client.ipv4, destination=SERVER, sport=4000, dport=53))
    w.net.run(0.01)
    for _ in range(200):
        w.client.send(udp(b"four", source=w.client.ipv4, destination=SERVER, sport=4000, dport=53))
        w.gateway.read_tun(udp(b"answer", source=SERVER, destination=w.client.ipv4, sport=53, dport=4000))
        w.net.run(0.01)
    w.net.run(119)
    assert completed(w) == []
    w.net.run(5)
    figures = completed(w)[0].figures
    assert (figures.tx_packets, figures.tx_bytes, figures.rx_packets, figures.rx_bytes) == (201, 804, 200, 1200)


def with_3000_bytes_that_the_engine_carried():
    w = logged()
    connection = Connection(w)
    connection.open()
    for _ in range(30):
        connection.down(ACK, b"y" * 100)
    assert completed(w) == []
    return w


def test_the_end_of_the_gateway_records_every_flow_with_the_engines_last_figures_before_goodbye():
    w = with_3000_bytes_that_the_engine_carried()
    sent = len(w.net.log)
    w.gateway.core.shutdown(w.net.now)
    assert len(w.net.log) == sent
    w.gateway.drain()
    assert completed(w)[0].figures.rx_bytes == 3000
    assert len(w.net.log) > sent, "goodbye"


def test_without_flow_logs_in_init_nothing_is_logged_unless_the_operator_wants_it():
    for init, wanted in ((None, 0), (NO_UPLOADS, 0), (UPLOADS, 1)):
        w = logged(init=init)
        Connection(w).open()
        assert len(started(w)) == wanted
    w = logged(init=NO_UPLOADS)
    w.gateway.core._flow_logs = True
    w.gateway.portal(w.init(flow_logs=NO_UPLOADS))
    Connection(w).open()
    assert len(started(w)) == 1


@pytest.mark.spec("TUNNEL-96")
def test_each_init_says_how_uploads_go_and_switches():
    w = logged()
    Connection(w).open()
    w.gateway.portal(w.init(flow_logs=NO_UPLOADS))
    assert len(completed(w)) == 1
    told = [event.settings for event in w.gateway.flow_logs if isinstance(event, ConfigureUploads)]
    assert told == [None, UPLOADS, None], "an interval of 0 means never"


def test_an_init_that_ends_the_log_leaves_records_of_all_that_the_engine_carried_and_in_time_to_be_kept():
    w = with_3000_bytes_that_the_engine_carried()
    w.gateway.flow_logs.clear()
    w.gateway.portal(w.init(flow_logs=NO_UPLOADS))
    record, settings = w.gateway.flow_logs
    assert record.figures.rx_bytes == 3000
    assert settings == ConfigureUploads(None)  # from here on nothing is kept


def test_the_token_is_handed_on_and_one_that_cannot_be_read_costs_only_the_log(caplog):
    caplog.set_level(logging.DEBUG)
    w = logged()
    assert [event for event in w.gateway.flow_logs if isinstance(event, KeepToken)] == [KeepToken(attribution())]
    broken = Secret("eyJhbGciOiJIUzI1NiJ9.secret-claims.sig")
    for bad in (IngestToken(broken), IngestToken(None), None):
        w.gateway.flow_logs.clear()
        w.authorize(flow_logs_ingest_token=bad)
        assert w.reaches()
        assert w.gateway.flow_logs == []
    assert "secret-claims" not in caplog.text


def test_a_revoked_resource_is_logged_no_more():
    w = logged()
    Connection(w).open()
    w.authorize(resource=cidr("192.168.0.0/16", resource_id="88888888-8888-4777-8666-555555555555"))
    w.reject(resource_id=RESOURCE_ID)
    w.client.send(udp(source=w.client.ipv4, destination=SERVER, sport=4444))
    w.net.run(1.0)
    assert len(started(w)) == 1
    w.net.run(125)
    assert len(completed(w)) == 1


def test_a_step_of_the_wall_clock_moves_the_times_of_later_flows():
    w = logged()
    Connection(w).open()
    w.gateway.core.handle_clock_step(-3600.0, w.net.now)
    Connection(w, sport=50001).open()
    first, second = started(w)
    assert -3600 < second.flow_start - first.flow_start < -3599
