"""The resolver of DNS resources against dnsmasq, a name server that nobody here wrote."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

from fzg.host import resolver as resolver_module
from fzg.host.resolver import Resolver
from tests.lab.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.needs("dnsmasq", "setpriv")]

MANY = [f"10.1.{number // 250}.{number % 250 + 1}" for number in range(60)]  # above 512 bytes of answer
TTL_S = 60
CONFIGURATION = f"""
no-resolv
no-hosts
no-daemon
user=
group=
bind-interfaces
listen-address=127.0.0.1
log-queries
log-facility=-
local=/test/
local-ttl={TTL_S}
host-record=web.test,10.0.0.7,2001:db8::7
host-record=four.test,10.0.0.4
host-record=six.test,2001:db8::6
host-record=tunnel.test,100.64.0.9,fd00:2021:1111::9
host-record=tunnel.test,10.0.0.9
host-record=short.test,10.0.0.1,1
cname=alias.test,other.test,web.test
cname=chain.test,alias.test
txt-record=text.test,nothing but text
{chr(10).join(f"host-record=many.test,{address}" for address in MANY)}
"""


class Dnsmasq:
    """A running dnsmasq. `silent` is a name server that never answers, to which it forwards one name."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port("127.0.0.1")
        self.silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.silent.bind(("127.0.0.1", 0))
        configuration = directory / "dnsmasq.conf"
        forward = f"server=/silent.test/127.0.0.1#{self.silent.getsockname()[1]}\n"
        configuration.write_text(f"{CONFIGURATION}port={self.port}\npid-file={directory / 'pid'}\n{forward}")
        self._log = directory / "dnsmasq.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", "dnsmasq", f"--conf-file={configuration}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait_until_serving()
        except BaseException:
            self.close()
            raise

    def queries(self, name: str) -> list[str]:
        """The types that were asked for a name so far, in order."""
        return re.findall(rf"query\[(\w+)\] {re.escape(name)} from", self._log.read_text())

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(5)
        self.silent.close()

    def _wait_until_serving(self) -> None:
        deadline = time.monotonic() + 10
        while "started" not in self._log.read_text():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.01)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dnsmasq]:
    server = Dnsmasq(tmp_path_factory.mktemp("dnsmasq"))
    yield server
    server.close()


@pytest.fixture
def resolver(server: Dnsmasq, tmp_path: Path) -> Resolver:
    resolv_conf, hosts = tmp_path / "resolv.conf", tmp_path / "hosts"
    resolv_conf.write_text("nameserver 127.0.0.1\nsearch test\n")
    hosts.write_text("")
    return Resolver(resolv_conf=resolv_conf, hosts=hosts, port=server.port)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("web.test", ["10.0.0.7", "2001:db8::7"]),
        ("WEB.Test.", ["10.0.0.7", "2001:db8::7"]),
        ("four.test", ["10.0.0.4"]),
        ("six.test", ["2001:db8::6"]),
        ("alias.test", ["10.0.0.7", "2001:db8::7"]),
        ("chain.test", ["10.0.0.7", "2001:db8::7"]),
        ("tunnel.test", ["10.0.0.9"]),
        ("text.test", []),
        ("missing.test", []),
        ("web", []),
        ("refused.example", []),
    ],
)
def test_names_have_the_addresses_that_the_server_knows(resolver: Resolver, name: str, found: list[str]) -> None:
    assert resolver.resolve(name) == [ip_address(text) for text in found]


def test_an_answer_that_is_too_long_for_a_datagram_comes_over_tcp(server: Dnsmasq, resolver: Resolver) -> None:
    assert resolver.resolve("many.test") == [ip_address(text) for text in MANY]
    assert sorted(server.queries("many.test")) == ["A", "A", "AAAA"]


def test_answers_are_kept_for_as_long_as_the_server_says(
    server: Dnsmasq, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: len(server.queries(name)) for name in ("four.test", "short.test")}

    def asked(name: str) -> int:
        return server.queries(name)[before[name] :].count("A")

    def resolve_all() -> None:
        for name in before:
            assert resolver.resolve(name)

    for _ in range(3):
        resolve_all()
    assert (asked("four.test"), asked("short.test")) == (1, 1)
    start = time.time()
    for later, expected in ((2, (1, 2)), (TTL_S - 1, (1, 3)), (TTL_S + 1, (2, 4))):
        monkeypatch.setattr(time, "time", lambda later=later: start + later)
        resolve_all()
        assert (asked("four.test"), asked("short.test")) == expected


def test_silence_behind_the_server_is_no_answer(resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver_module, "_LOOKUP_SECONDS", 0.3)
    assert resolver.resolve("silent.test") is None
