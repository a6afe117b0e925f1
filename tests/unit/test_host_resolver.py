from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from ipaddress import ip_address

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from fzg.host import resolver as resolver_module
from fzg.host.resolver import Resolver
from tests.lab.ports import free_port


class Nameserver:
    """Answers from `zone`, {(name, type): [rdata, ...] or rcode}; counts what it was asked; silent for other names."""

    def __init__(self, address="127.0.0.1", port=0):
        self.zone = {}
        self.questions = []
        self.truncate = False
        self.port = port or free_port(address)
        self.tcp = socket.create_server((address, self.port))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind((address, self.port))
        for target in (self._serve_udp, self._serve_tcp):
            threading.Thread(target=target, daemon=True).start()

    def close(self):
        self.udp.close()
        self.tcp.close()

    def _answer(self, data, tcp):
        query = dns.message.from_wire(data)
        question = query.question[0]
        key = (str(question.name).lower(), dns.rdatatype.to_text(question.rdtype))
        self.questions.append((*key, "tcp" if tcp else "udp"))
        found = self.zone.get(key, self.zone.get((key[0], "*")))
        if found is None:
            return None
        response = dns.message.make_response(query, recursion_available=True)
        if isinstance(found, dns.rcode.Rcode):
            response.set_rcode(found)
        elif self.truncate and not tcp:
            response.flags |= dns.flags.TC
        else:
            for name, ttl, rdtype, *rdata in found:
                response.answer.append(dns.rrset.from_text(name, ttl, "IN", rdtype, *rdata))
        return response.to_wire()

    def _serve_udp(self):
        while True:
            try:
                data, peer = self.udp.recvfrom(4096)
            except OSError:
                return
            if (answer := self._answer(data, tcp=False)) is not None:
                self.udp.sendto(answer, peer)

    def _serve_tcp(self):
        while True:
            try:
                connection, _ = self.tcp.accept()
            except OSError:
                return
            with connection:
                data = connection.recv(4096)
                answer = self._answer(data[2:], tcp=True)
                connection.sendall(len(answer).to_bytes(2, "big") + answer)


@pytest.fixture
def nameserver():
    server = Nameserver()
    yield server
    server.close()


@pytest.fixture
def files(tmp_path):
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\nsearch corp.example\noptions ndots:5\n")
    (tmp_path / "hosts").write_text("")
    return tmp_path


class Ticks:
    """A clock on which every look is a new second, so that changes of files are seen at once."""

    def __init__(self):
        self.value = 0.0

    def __call__(self):
        self.value += 2.0
        return self.value


@pytest.fixture
def resolver(files, nameserver):
    return Resolver(resolv_conf=files / "resolv.conf", hosts=files / "hosts", port=nameserver.port, clock=Ticks())


def addresses(*texts):
    return [ip_address(text) for text in texts]


def test_addresses_of_both_families_come_back_sorted_and_without_repeats(resolver, nameserver):
    nameserver.zone = {
        ("db.example.", "A"): [("db.example.", 60, "A", "10.0.0.7", "10.0.0.3", "9.0.0.1")],
        ("db.example.", "AAAA"): [("db.example.", 60, "AAAA", "2001:db8::2", "2001:db8::1")],
    }
    expected = addresses("9.0.0.1", "10.0.0.3", "10.0.0.7", "2001:db8::1", "2001:db8::2")
    assert resolver.resolve("db.example") == expected
    assert resolver.resolve("db.example.") == expected


def test_chains_of_aliases_are_followed(resolver, nameserver):
    chain = [("a.example.", 60, "CNAME", "b.example."), ("b.example.", 60, "CNAME", "c.example.")]
    nameserver.zone = {
        ("a.example.", "A"): [*chain, ("c.example.", 60, "A", "10.0.0.1")],
        ("a.example.", "AAAA"): chain,
    }
    assert resolver.resolve("a.example") == addresses("10.0.0.1")


@pytest.mark.parametrize("failure", [dns.rcode.SERVFAIL, dns.rcode.REFUSED, dns.rcode.NXDOMAIN])
def test_one_family_that_fails_contributes_nothing(resolver, nameserver, failure):
    nameserver.zone = {
        ("db.example.", "A"): [("db.example.", 60, "A", "10.0.0.1")],
        ("db.example.", "AAAA"): failure,
    }
    assert resolver.resolve("db.example") == addresses("10.0.0.1")


def test_a_name_that_does_not_exist_has_no_addresses(resolver, nameserver):
    nameserver.zone = {("db.example.", "*"): dns.rcode.NXDOMAIN}
    assert resolver.resolve("db.example") == []


def test_names_are_absolute_and_never_meet_the_search_list(resolver, nameserver):
    nameserver.zone = {
        ("db.", "*"): dns.rcode.NXDOMAIN,
        ("db.corp.example.", "A"): [("db.corp.example.", 60, "A", "10.0.0.1")],
    }
    assert resolver.resolve("db") == []
    assert {name for name, *_ in nameserver.questions} == {"db."}


@pytest.mark.parametrize("domain", ["a..b", "x" * 64 + ".example", "", "a" + ".b" * 200])
def test_what_is_no_name_has_no_addresses(resolver, nameserver, domain):
    nameserver.zone = {(".", "*"): dns.rcode.NXDOMAIN}
    assert resolver.resolve(domain) == []


def test_addresses_inside_the_tunnel_ranges_are_discarded(resolver, nameserver):
    nameserver.zone = {
        ("loop.example.", "A"): [
            ("loop.example.", 60, "A", "100.64.0.1", "100.95.255.255", "100.96.0.1", "100.127.255.255", "100.128.0.0")
        ],
        ("loop.example.", "AAAA"): [
            (
                "loop.example.",
                60,
                "AAAA",
                "fd00:2021:1111::1",
                "fd00:2021:1111:8000::1f:ffff",
                "::ffff:10.0.0.1",
                "fd00::1",
            )
        ],
    }
    assert resolver.resolve("loop.example") == addresses("100.128.0.0", "fd00::1")


def test_a_truncated_answer_is_asked_for_again_over_tcp(resolver, nameserver):
    nameserver.truncate = True
    nameserver.zone = {
        ("big.example.", "A"): [("big.example.", 60, "A", "10.0.0.1")],
        ("big.example.", "AAAA"): dns.rcode.NXDOMAIN,
    }
    assert resolver.resolve("big.example") == addresses("10.0.0.1")
    assert ("big.example.", "A", "tcp") in nameserver.questions


def test_answers_are_kept_for_their_time_to_live_and_no_longer(resolver, nameserver, monkeypatch):
    nameserver.zone = {
        ("kept.example.", "A"): [("kept.example.", 60, "A", "10.0.0.1")],
        ("kept.example.", "AAAA"): [("kept.example.", 60, "AAAA", "2001:db8::1")],
        ("fresh.example.", "A"): [("fresh.example.", 0, "A", "10.0.0.2")],
        ("fresh.example.", "AAAA"): [("fresh.example.", 0, "AAAA", "2001:db8::2")],
    }
    for _ in range(3):
        resolver.resolve("kept.example")
        resolver.resolve("fresh.example")
    asked = [name for name, *_ in nameserver.questions]
    assert asked.count("kept.example.") == 2
    assert asked.count("fresh.example.") == 6
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    resolver.resolve("kept.example")
    assert [name for name, *_ in nameserver.questions].count("kept.example.") == 4


def test_the_cache_holds_512_responses(resolver):
    assert resolver._resolver.cache.max_size == 512


def test_the_hosts_file_comes_first_per_family(resolver, nameserver, files):
    (files / "hosts").write_text("# local\n10.9.9.9  DB.example db # comment\nnonsense x\n::1\n10.9.9.10 db.example.\n")
    nameserver.zone = {
        ("db.example.", "A"): [("db.example.", 60, "A", "10.0.0.1")],
        ("db.example.", "AAAA"): [("db.example.", 60, "AAAA", "2001:db8::1")],
    }
    assert resolver.resolve("db.EXAMPLE") == addresses("10.9.9.9", "10.9.9.10", "2001:db8::1")
    assert [rdtype for _, rdtype, _ in nameserver.questions] == ["AAAA"]


@pytest.mark.spec("OPS-49")
def test_changes_of_resolv_conf_are_followed_and_the_file_is_left_alone(files, nameserver):
    other = Nameserver("127.0.0.2", nameserver.port)
    try:
        for server, address in ((nameserver, "10.0.0.1"), (other, "10.0.0.2")):
            server.zone = {
                ("db.example.", "A"): [("db.example.", 3600, "A", address)],
                ("db.example.", "AAAA"): dns.rcode.NXDOMAIN,
            }
        path = files / "resolv.conf"
        resolver = Resolver(resolv_conf=path, hosts=files / "hosts", port=nameserver.port, clock=Ticks())
        assert resolver.resolve("db.example") == addresses("10.0.0.1")
        path.write_text("# new\nnameserver 127.0.0.2\n")
        assert resolver.resolve("db.example") == addresses("10.0.0.2")
        assert resolver.nameservers == ["127.0.0.2"]
        assert path.read_text() == "# new\nnameserver 127.0.0.2\n"
    finally:
        other.close()


def test_a_nameserver_that_is_silent_costs_its_timeout_once(files, nameserver, monkeypatch):
    monkeypatch.setattr(resolver_module, "_TRY_SECONDS", 0.05)
    silent = Nameserver("127.0.0.3", nameserver.port)
    try:
        nameserver.zone = {
            (f"{name}.example.", rdtype): [(f"{name}.example.", 60, rdtype, address)]
            for name in ("a", "b")
            for rdtype, address in (("A", "10.0.0.1"), ("AAAA", "2001:db8::1"))
        }
        (files / "resolv.conf").write_text("nameserver 127.0.0.3\nnameserver 127.0.0.1\n")
        resolver = Resolver(
            resolv_conf=files / "resolv.conf", hosts=files / "hosts", port=nameserver.port, clock=Ticks()
        )
        assert resolver.resolve("a.example") == addresses("10.0.0.1", "2001:db8::1")
        asked_before = len(silent.questions)
        assert asked_before >= 1
        assert resolver.resolve("b.example") == addresses("10.0.0.1", "2001:db8::1")
        assert len(silent.questions) == asked_before
    finally:
        silent.close()


def test_silence_of_all_nameservers_is_a_timeout_rather_than_an_answer(resolver, monkeypatch):
    monkeypatch.setattr(resolver_module, "_LOOKUP_SECONDS", 0.05)
    assert resolver.resolve("silent.example") is None


def test_silence_about_one_family_does_not_lose_the_other(resolver, nameserver, monkeypatch):
    monkeypatch.setattr(resolver_module, "_LOOKUP_SECONDS", 0.05)
    nameserver.zone = {("db.example.", "A"): [("db.example.", 60, "A", "10.0.0.1")]}
    assert resolver.resolve("db.example") == addresses("10.0.0.1")


@pytest.mark.parametrize("text", [None, "search corp.example\n", "nameserver not-an-address\n"])
def test_a_host_without_nameservers_says_so_and_still_reads_the_hosts_file(files, text):
    path = files / "resolv.conf"
    path.unlink() if text is None else path.write_text(text)
    (files / "hosts").write_text("10.9.9.9 db.example\n")
    resolver = Resolver(resolv_conf=path, hosts=files / "hosts", clock=Ticks())
    assert str(path) in resolver.problem
    assert resolver.nameservers == []
    assert resolver.resolve("db.example") == addresses("10.9.9.9")
    assert resolver.resolve("other.example") == []
    path.write_text("nameserver 127.0.0.1\n")
    assert resolver.problem == ""


SCRIPT = """
from gevent import monkey; monkey.patch_all()
import sys, time, gevent
from pathlib import Path
from fzg.host import resolver as module
module.LIMIT_SECONDS, module._LOOKUP_SECONDS = 0.6, 0.5
resolver = module.Resolver(nameservers=["127.0.0.1"], port=int(sys.argv[1]), hosts=Path("/nonexistent"))
start = time.monotonic()
lookups = [gevent.spawn(resolver.resolve, f"n{i}.example") for i in range(50)]
gevent.joinall(lookups)
print(time.monotonic() - start < 1.5, {str(lookup.value) for lookup in lookups})
"""


@pytest.mark.slow
def test_many_silent_lookups_wait_side_by_side_under_gevent(nameserver):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(nameserver.port)], capture_output=True, text=True, check=True, timeout=30
    )
    assert result.stdout == "True {'None'}\n"
    asked = [(name, rdtype) for name, rdtype, _ in nameserver.questions]
    assert {(f"n{i}.example.", rdtype) for i in range(50) for rdtype in ("A", "AAAA")} <= set(asked)
