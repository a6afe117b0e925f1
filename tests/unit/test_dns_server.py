from __future__ import annotations

import contextlib
import time
from ipaddress import ip_address

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import gevent
import pytest
from gevent import socket
from gevent.server import DatagramServer, StreamServer

from fzg.host import dns_server as module
from fzg.host.dns_server import DnsServer
from fzg.host.errors import HostError
from fzg.host.nameservers import Nameservers, Probe, Ranking, Upstream
from fzg.host.resolver import Resolver
from tests.lab.ports import free_port
from tests.lab.scripted_portal import wait_until

HERE, THERE = "127.0.0.11", "127.0.0.12"


class Nameserver:
    """Answers TXT queries with `size` bytes of text, after `delay`; `wrong` changes what it sends; None is silence."""

    def __init__(self, host, port):
        self.host = host
        self.size = 10
        self.delay = 0.0
        self.wrong = lambda answer: answer
        self.queries = []
        self._udp = DatagramServer((host, port), self._on_datagram)
        self._tcp = StreamServer((host, port), self._on_connection)
        self._udp.start()
        self._tcp.start()

    def close(self):
        self._udp.close()
        self._tcp.close()

    def asked(self, name):
        return [transport for asked, transport in self.queries if asked == name]

    def _answer(self, data, transport):
        query = dns.message.from_wire(data)
        self.queries.append((str(query.question[0].name), transport))
        gevent.sleep(self.delay)
        answer = dns.message.make_response(query)
        if self.size:
            texts = " ".join('"' + "x" * 200 + '"' for _ in range(self.size // 200)) or '"text"'
            answer.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "TXT", texts))
        return self.wrong(answer.to_wire(max_size=65535))

    def _on_datagram(self, data, client):
        answer = self._answer(data, "udp")
        if answer is not None:
            self._udp.sendto(answer, client)

    def _on_connection(self, connection, _address):
        with connection:
            length = int.from_bytes(connection.recv(2), "big")
            answer = self._answer(connection.recv(length), "tcp")
            if answer is not None:
                connection.sendall(len(answer).to_bytes(2, "big") + answer)


class World:
    """A DNS server on HERE with the nameservers of a resolv.conf."""

    def __init__(self, directory):
        self._port = free_port(HERE, THERE, "127.0.0.21", "127.0.0.22")
        self.resolv_conf = directory / "resolv.conf"
        self.nameservers = [self.start_nameserver("127.0.0.21")]
        self.write("127.0.0.21")
        resolver = Resolver(
            resolv_conf=self.resolv_conf, hosts=directory / "hosts", clock=lambda: time.monotonic() * 100
        )
        upstream = Upstream(port=self._port)
        self.measured = Nameservers(lambda: resolver.nameservers, upstream=upstream, clock=time.monotonic)
        self.server = DnsServer(self.measured, upstream=upstream, port=self._port)
        self.server.bind([ip_address(HERE)])

    def write(self, *hosts):
        self.resolv_conf.write_text("".join(f"nameserver {host}\n" for host in hosts) + "# " + "x" * len(hosts) * 7)

    def start_nameserver(self, host):
        return Nameserver(host, self._port)

    def close(self):
        self.measured.stop()
        self.server.close()
        for nameserver in self.nameservers:
            nameserver.close()

    def udp(self, data, host=HERE, patience=1.0):
        """The answer over UDP with its sender; None if there is none."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(patience)
            client.sendto(data, (host, self._port))
            try:
                answer, sender = client.recvfrom(4096)
            except TimeoutError:
                return None
        assert sender == (host, self._port), "an answer comes from where the query went"
        return answer

    @property
    def address(self):
        return HERE, self._port

    def connect(self, host=HERE):
        return socket.create_connection((host, self._port))

    def text(self, data, **options):
        return dns.message.from_wire(self.udp(data, **options))


@pytest.fixture(name="world")
def world_fixture(tmp_path):
    world = World(tmp_path)
    yield world
    world.close()


def query(name="db.example.", kind="TXT"):
    return dns.message.make_query(name, kind)


def read_file(file):
    return dns.message.from_wire(file.read(int.from_bytes(file.read(2), "big")))


def read_tcp(connection):
    return read_file(connection.makefile("rb"))


def framed(message):
    wire = message.to_wire()
    return len(wire).to_bytes(2, "big") + wire


def test_the_port_is_53535():
    assert module.PORT == 53535


@pytest.mark.spec("TUNNEL-78")
def test_a_query_is_passed_on_and_its_answer_comes_back_unchanged(world):
    sent = query()
    answer = world.text(sent.to_wire())
    assert answer.id == sent.id
    assert answer.question == sent.question
    assert 'db.example. 60 IN TXT "text"' in answer.to_text()
    assert world.nameservers[0].queries == [("db.example.", "udp")]


def test_who_asks_for_it_sees_each_query_in_the_log(world, caplog):
    world.text(query().to_wire())
    assert not [record for record in caplog.records if record.name.startswith("wire")]
    caplog.set_level(5, logger="wire.dns")
    world.text(query().to_wire())
    (record,) = [record for record in caplog.records if record.name == "wire.dns.qry"]
    assert (record.domain, record.type, record.tcp, record.client) == ("db.example.", 16, False, "127.0.0.1")


@pytest.mark.spec("TUNNEL-80")
def test_a_long_answer_is_cut_over_udp_and_whole_over_tcp(world):
    world.nameservers[0].size = 3000
    cut = world.text(query().to_wire())
    assert cut.flags & dns.flags.TC
    assert (cut.answer, cut.authority, cut.additional) == ([], [], [])
    with world.connect() as connection:
        connection.sendall(framed(query()))
        whole = read_tcp(connection)
    assert not whole.flags & dns.flags.TC
    assert len(whole.to_wire(max_size=65535)) > 3000
    assert world.nameservers[0].queries == [("db.example.", "udp"), ("db.example.", "tcp")]


@pytest.mark.spec("TUNNEL-81")
def test_queries_of_one_connection_are_answered_in_order(world):
    first, second = query("first.example."), query("second.example.")
    world.nameservers[0].delay = 0.05
    with world.connect() as connection:
        connection.sendall(framed(first) + framed(second))
        file = connection.makefile("rb")
        answers = [read_file(file), read_file(file)]
    assert [(answer.id, answer.question) for answer in answers] == [
        (each.id, each.question) for each in (first, second)
    ]


@pytest.mark.spec("TUNNEL-82")
def test_what_is_no_query_is_not_answered_and_does_no_harm(world):
    two = query()
    two.question += query("b.example.").question
    for bad in (dns.message.make_response(query()).to_wire(), two.to_wire(), b"", b"x" * 2000):
        assert world.udp(bad, patience=0.05) is None
        with world.connect() as connection:
            connection.sendall(len(bad).to_bytes(2, "big") + bad)
            assert connection.recv(1) == b""
    assert world.text(query().to_wire()).rcode() == dns.rcode.NOERROR
    assert world.nameservers[0].asked("db.example.") == ["udp"]


@pytest.mark.slow
@pytest.mark.spec("TUNNEL-79")
def test_a_silent_nameserver_costs_five_seconds_and_ends_in_server_failure(world):
    world.nameservers[0].wrong = lambda answer: None
    started = time.monotonic()
    sent = query()
    answers = [gevent.spawn(world.text, sent.to_wire(), patience=8.0), gevent.spawn(_over_tcp, world, sent)]
    gevent.joinall(answers)
    assert 4.5 < time.monotonic() - started < 5.5
    for answer in answers:
        assert (answer.value.rcode(), answer.value.id) == (dns.rcode.SERVFAIL, sent.id)


def _over_tcp(world, message):
    with world.connect() as connection:
        connection.sendall(framed(message))
        return read_tcp(connection)


@pytest.mark.spec("TUNNEL-79")
def test_without_nameservers_the_failure_is_immediate_and_a_new_resolv_conf_ends_it(world):
    world.write()
    wait_until(lambda: world.measured.fastest(tcp=False) is None)
    started = time.monotonic()
    assert world.text(query().to_wire()).rcode() == dns.rcode.SERVFAIL
    assert time.monotonic() - started < 0.1
    world.write("127.0.0.21")
    wait_until(lambda: world.text(query().to_wire()).rcode() == dns.rcode.NOERROR)


@pytest.mark.parametrize("wrong", [lambda answer: answer[:2] + answer[2:12] + b"\x3f", lambda answer: b"\xc0"])
def test_an_answer_that_cannot_be_read_ends_in_server_failure_over_tcp(world, wrong):
    world.nameservers[0].wrong = wrong
    assert _over_tcp(world, query()).rcode() == dns.rcode.SERVFAIL


def test_a_forged_datagram_does_not_take_the_place_of_the_answer(world):
    nameserver = world.nameservers[0]

    def forge(answer):
        nameserver.wrong = lambda genuine: genuine
        return bytes([answer[0] ^ 0xFF]) + answer[1:]

    nameserver.wrong = forge
    result = gevent.spawn(world.udp, query().to_wire(), patience=0.3)
    assert result.get() is None, "the datagram with another id was taken for the answer"
    assert world.text(query().to_wire()).rcode() == dns.rcode.NOERROR


def test_a_refused_connection_fails_at_once(world):
    world.nameservers[0].close()
    started = time.monotonic()
    assert world.text(query().to_wire()).rcode() == dns.rcode.SERVFAIL
    assert _over_tcp(world, query()).rcode() == dns.rcode.SERVFAIL
    assert time.monotonic() - started < 1.0


def test_binding_again_moves_the_server_and_ends_connections_to_the_former_address(world):
    staying = world.connect()
    world.server.bind([ip_address(HERE)])
    staying.sendall(framed(query()))
    assert read_tcp(staying).rcode() == dns.rcode.NOERROR
    world.server.bind([ip_address(THERE)])
    assert staying.recv(1) == b""
    assert world.text(query().to_wire(), host=THERE).rcode() == dns.rcode.NOERROR
    assert world.udp(query().to_wire(), patience=0.05) is None
    with pytest.raises(ConnectionRefusedError):
        world.connect()


def test_all_addresses_are_bound_or_none_after_three_attempts_100_ms_apart(world):
    started = time.monotonic()
    with pytest.raises(HostError, match=r"203\.0\.113\.77"):
        world.server.bind([ip_address(HERE), ip_address("203.0.113.77")])
    assert 0.19 < time.monotonic() - started < 0.6
    assert world.udp(query().to_wire(), patience=0.05) is None


def test_an_address_that_comes_late_is_waited_for(world):
    port = world._port
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as squatter:
        squatter.bind((THERE, port))
        gevent.spawn_later(0.05, squatter.close)
        world.server.bind([ip_address(THERE)])
    assert world.text(query().to_wire(), host=THERE).rcode() == dns.rcode.NOERROR


def test_queries_above_the_limit_get_no_answer(world, monkeypatch):
    monkeypatch.setattr(module, "MAX_IN_FLIGHT", 2)
    world.nameservers[0].delay = 0.2
    waiting = [gevent.spawn(world.udp, query().to_wire()) for _ in range(2)]
    wait_until(lambda: world.server._in_flight.total() == 2)
    assert world.udp(query().to_wire(), patience=0.05) is None
    assert world.server.dropped["too many in flight"] == 1
    assert all(each.get() is not None for each in waiting)
    assert world.udp(query().to_wire()) is not None


def test_queries_that_come_all_at_once_are_all_answered(world):
    world.write()  # nobody to ask, so that each is answered at once
    clients = []
    with contextlib.ExitStack() as stack:
        for host in ("127.0.0.31", "127.0.0.32"):
            client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            client.bind((host, 0))
            client.settimeout(1.0)
            clients.append(client)
        for client in clients:
            for _ in range(250):  # half of what may be in flight; the server does not run meanwhile
                client.sendto(query().to_wire(), world.address)
        for client in clients:
            for _ in range(250):
                assert dns.message.from_wire(client.recv(4096)).rcode() == dns.rcode.SERVFAIL


def test_one_client_cannot_use_up_what_all_share():
    assert module.MAX_IN_FLIGHT == 1000
    server = DnsServer(None, upstream=Upstream())
    assert sum(server._reserve("100.64.0.1") for _ in range(1000)) == 250
    assert server._reserve("100.64.0.3")


def test_connections_above_the_limit_of_a_client_are_closed(world, monkeypatch):
    monkeypatch.setattr(module, "MAX_CONNECTIONS_PER_CLIENT", 1)
    with world.connect() as first, world.connect() as second:
        assert second.recv(1) == b""
        first.sendall(framed(query()))
        assert read_tcp(first).rcode() == dns.rcode.NOERROR


def test_a_silent_connection_is_closed(world, monkeypatch):
    monkeypatch.setattr(module, "IDLE_TIMEOUT", 0.05)
    with world.connect() as connection:
        connection.sendall(b"\0")
        assert connection.recv(1) == b""


def test_the_fastest_nameserver_is_asked(world):
    quick = world.start_nameserver("127.0.0.22")
    world.nameservers.append(quick)
    world.nameservers[0].delay = 0.2
    world.write("127.0.0.21", "127.0.0.22")
    world.measured.start()
    wait_until(
        lambda: world.measured.fastest(tcp=False) == "127.0.0.22" and world.measured.fastest(tcp=True) == "127.0.0.22"
    )
    world.udp(query().to_wire())
    assert quick.asked("db.example.") == ["udp"]
    assert sorted(quick.asked("firezone.dev.")) == ["tcp", "udp"]


def test_the_latest_round_decides_and_an_empty_one_changes_nothing():
    ranking = Ranking()
    servers = ["a", "b"]
    assert ranking.fastest(servers, tcp=False) == "a"
    ranking.update({Probe("a", tcp=False): 0.02, Probe("b", tcp=False): 0.01, Probe("a", tcp=True): 0.03})
    assert (ranking.fastest(servers, tcp=False), ranking.fastest(servers, tcp=True)) == ("b", "a")
    ranking.update({})
    assert ranking.fastest(servers, tcp=False) == "b"
    ranking.update({Probe("a", tcp=False): 1.9})
    assert ranking.fastest(servers, tcp=False) == "a"
    assert ranking.fastest(["c"], tcp=False) == "c", "a winner that is no longer configured is not asked"
    assert ranking.fastest([], tcp=False) is None


def test_a_failed_query_brings_the_next_measurement_forward_but_not_each_time():
    now = [100.0]
    wanted = Nameservers(lambda: ["127.0.0.21"], upstream=Upstream(), clock=lambda: now[0])
    wanted._round_at = 96.0
    wanted.note_failure()
    assert not wanted._wanted.is_set()
    now[0] = 101.0
    wanted.note_failure()
    assert wanted._wanted.is_set()
