"""The UDP sockets as the kernel sees them, and the engine over real ones on the loopback interface."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from fzg.dataplane.engine import Datagram
from fzg.dataplane.pure import PureEngine
from fzg.host import udp
from fzg.sansio import Transmit
from fzg.wire.endpoint import Endpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])


def _has(family: int) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((LOOPBACK[family], 0))
    except OSError:
        return False
    return True


@pytest.fixture
def opened(family: int) -> Iterator[udp.UdpSocket]:
    if not _has(family):
        pytest.skip("no such family here")
    bound = udp.open_socket(family, port=0, mark=None)
    yield bound
    bound.socket.close()


@FAMILIES
def test_the_options_of_the_specification_are_set(opened: udp.UdpSocket, family: int):
    get = opened.socket.getsockopt
    assert opened.socket.getblocking() is False
    assert not opened.socket.get_inheritable()
    if family == socket.AF_INET:
        assert get(socket.IPPROTO_IP, 8) == 1  # IP_PKTINFO
        assert get(socket.IPPROTO_IP, 13) == 1  # IP_RECVTOS
        assert get(socket.IPPROTO_IP, 10) == 3  # IP_MTU_DISCOVER: probe
    else:
        assert get(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
        assert get(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO) == 1
        assert get(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS) == 1
        assert get(socket.IPPROTO_IPV6, 23) == 3  # IPV6_MTU_DISCOVER: probe
        assert get(socket.IPPROTO_IPV6, 72) & 2  # IPV6_PREFER_SRC_PUBLIC
    assert opened.gro == bool(get(17, 104))
    assert opened.send_buffer == get(socket.SOL_SOCKET, socket.SO_SNDBUF)
    assert opened.receive_buffer == get(socket.SOL_SOCKET, socket.SO_RCVBUF)


def test_train_reception_can_be_switched_off():
    bound = udp.open_socket(socket.AF_INET, port=0, mark=None, gro=False)
    assert not bound.gro
    assert bound.socket.getsockopt(17, 104) == 0
    bound.socket.close()


class Refusing:
    """A socket on which chosen options fail, and some ports are taken."""

    def __init__(self, *, options: dict[int, int] | None = None, taken: dict[int, int] | None = None) -> None:
        self.options = options or {}
        self.taken = taken or {}
        self.set: list[tuple[int, int, object]] = []
        self.bound: tuple[str, int] | None = None
        self.closed = False

    def __call__(self, family: int, kind: int) -> Refusing:
        self.family = family
        return self

    def setsockopt(self, level: int, option: int, value: object) -> None:
        if option in self.options:
            raise OSError(self.options[option], os.strerror(self.options[option]))
        self.set.append((level, option, value))

    def getsockopt(self, level: int, option: int) -> int:
        if -option in self.options:
            raise OSError(errno.ENOPROTOOPT, "")
        return next((v for _, o, v in reversed(self.set) if o == option), 0)  # type: ignore[return-value]

    def bind(self, address: tuple[str, int]) -> None:
        if address[1] in self.taken:
            raise OSError(self.taken[address[1]], "")
        self.bound = address

    def getsockname(self) -> tuple[str, int]:
        assert self.bound is not None
        return self.bound[0], self.bound[1] or 34567

    def close(self) -> None:
        self.closed = True


def refusing(monkeypatch: pytest.MonkeyPatch, **rules: dict[int, int]) -> Refusing:
    fake = Refusing(**rules)
    monkeypatch.setattr(udp, "_Socket", fake)
    return fake


def test_defaults_are_those_of_the_specification(monkeypatch: pytest.MonkeyPatch):
    fake = refusing(monkeypatch)
    bound = udp.open_socket(socket.AF_INET)
    assert bound.port == 52625
    assert fake.bound == ("0.0.0.0", 52625)
    assert (socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", 0xFD002021)) in fake.set
    assert (socket.SOL_SOCKET, 32, 2 << 20) in fake.set  # SO_SNDBUFFORCE
    assert (socket.SOL_SOCKET, 33, 16 << 20) in fake.set  # SO_RCVBUFFORCE


def test_a_taken_port_falls_back_to_any_other(monkeypatch: pytest.MonkeyPatch):
    refusing(monkeypatch, taken={52625: errno.EADDRINUSE})
    assert udp.open_socket(socket.AF_INET).port == 34567


def test_each_family_falls_back_on_its_own():
    if not _has(socket.AF_INET6):
        pytest.skip("no IPv6 here")
    first = udp.open_socket(socket.AF_INET, port=0, mark=None)
    bound, unbound = udp.open_sockets(port=first.port, mark=None)
    assert unbound == []
    assert {one.family: one.port == first.port for one in bound} == {socket.AF_INET: False, socket.AF_INET6: True}
    for one in (first, *bound):
        one.socket.close()


def test_a_family_without_addresses_is_reported_and_the_other_works(monkeypatch: pytest.MonkeyPatch):
    class Family(Refusing):
        def bind(self, address: tuple[str, int]) -> None:
            if self.family == socket.AF_INET6:
                raise OSError(errno.EADDRNOTAVAIL, "")
            super().bind(address)

    monkeypatch.setattr(udp, "_Socket", Family())
    bound, unbound = udp.open_sockets()
    assert [one.family for one in bound] == [socket.AF_INET]
    assert [(one.family, one.error.errno) for one in unbound] == [(socket.AF_INET6, errno.EADDRNOTAVAIL)]


def test_neither_family_is_not_an_exception_either(monkeypatch: pytest.MonkeyPatch):
    def none(family: int, kind: int) -> Refusing:
        raise OSError(errno.EAFNOSUPPORT, "")

    monkeypatch.setattr(udp, "_Socket", none)
    bound, unbound = udp.open_sockets()
    assert (bound, len(unbound)) == ([], 2)


def test_a_refused_mark_is_fatal(monkeypatch: pytest.MonkeyPatch):
    fake = refusing(monkeypatch, options={socket.SO_MARK: errno.EPERM})
    with pytest.raises(udp.MarkRefusedError, match="CAP_NET_ADMIN"):
        udp.open_sockets()
    assert fake.closed
    assert fake.bound is None


def test_without_the_right_to_force_buffers_the_ordinary_option_is_used(monkeypatch: pytest.MonkeyPatch):
    fake = refusing(monkeypatch, options={32: errno.EPERM, 33: errno.EPERM})
    bound = udp.open_socket(socket.AF_INET)
    assert (socket.SOL_SOCKET, socket.SO_SNDBUF, 2 << 20) in fake.set
    assert (bound.send_buffer, bound.receive_buffer) == (2 << 20, 16 << 20)


@pytest.mark.spec("OPS-1")
@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 10**18 - 1])
def test_a_buffer_larger_than_the_kernel_can_be_told_becomes_the_largest(size: int):
    granted = []
    for asked in (1 << 20, size):
        bound = udp.open_socket(socket.AF_INET, port=0, mark=None, receive_buffer=asked)
        bound.socket.close()
        granted.append(bound.receive_buffer)
    assert granted == sorted(granted)


def test_buffer_sizes_are_halved_until_64_kib_fails(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    class Small(Refusing):
        def setsockopt(self, level: int, option: int, value: object) -> None:
            if level == socket.SOL_SOCKET and option in {socket.SO_RCVBUF, 33}:
                assert isinstance(value, int)
                asked.append(value)
                raise OSError(errno.ENOBUFS, "")
            if level == socket.SOL_SOCKET and isinstance(value, int) and value > 300_000:
                raise OSError(errno.ENOBUFS, "")
            super().setsockopt(level, option, value)

    fake = Small()
    monkeypatch.setattr(udp, "_Socket", fake)
    udp.open_socket(socket.AF_INET, send_buffer=1 << 20, receive_buffer=256 << 10)
    assert asked == [256 << 10] * 2 + [128 << 10] * 2 + [64 << 10] * 2
    assert (socket.SOL_SOCKET, 32, 256 << 10) in fake.set


def test_a_stable_source_address_is_only_a_preference(monkeypatch: pytest.MonkeyPatch):
    fake = refusing(monkeypatch, options={72: errno.ENOPROTOOPT})
    assert udp.open_socket(socket.AF_INET6).port == 52625
    assert fake.bound == ("::", 52625)
    assert (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1) in fake.set


@pytest.mark.parametrize("options", [{104: errno.ENOPROTOOPT}, {-104: 1}], ids=["unknown", "before 5.12"])
def test_trains_are_not_asked_for_where_the_kernel_has_none_or_a_faulty_one(
    monkeypatch: pytest.MonkeyPatch, options: dict[int, int]
):
    fake = refusing(monkeypatch, options=options)
    assert not udp.open_socket(socket.AF_INET).gro
    assert [value for _, option, value in fake.set if option == 104] in ([], [1, 0])


def test_the_socket_is_not_a_cooperative_one(opened_v4: udp.UdpSocket):
    assert type(opened_v4.socket).__module__ == "socket"


@pytest.fixture
def opened_v4() -> Iterator[udp.UdpSocket]:
    bound = udp.open_socket(socket.AF_INET, port=0, mark=None)
    yield bound
    bound.socket.close()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs CAP_NET_ADMIN")
def test_real_sockets_carry_the_mark():
    bound, _ = udp.open_sockets(port=0)
    for one in bound:
        assert one.socket.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) & 0xFFFF_FFFF == 0xFD002021
        one.socket.close()


# The engine over real sockets.


def exchange(
    sender: udp.UdpSocket, receiver: udp.UdpSocket, transmits: list[Transmit]
) -> tuple[list[Datagram], dict[str, int]]:
    """What one engine gets of what another sends."""
    one, two = PureEngine(), PureEngine()
    one.attach_udp(sender.family, sender.socket, port=sender.port)
    two.attach_udp(receiver.family, receiver.socket, port=receiver.port)
    for transmit in transmits:
        one.transmit(transmit)
    assert one.flush()
    got: list[Datagram] = []
    while len(got) < len(transmits) and select.select([receiver.socket], [], [], 5.0)[0]:
        items = two.receive_udp(receiver.family, 1.0)
        got += [item for item in items if isinstance(item, Datagram)]
    return got, {**one.counters(), **two.counters()}


@FAMILIES
def test_a_batch_crosses_the_kernel_whole_and_in_order(opened: udp.UdpSocket, family: int):
    other = udp.open_socket(family, port=0, mark=None)
    here = Endpoint.of(LOOPBACK[family], other.port)
    payloads = [bytes((i,)) * 1316 for i in range(49)] + [b"end", b"x" * 40]
    got, counters = exchange(opened, other, [Transmit(here, payload, here.ip, ecn=2) for payload in payloads])
    assert [item.payload for item in got] == payloads
    assert {item.source for item in got} == {Endpoint(here.ip, opened.port)}
    assert {(item.local, item.ecn) for item in got} == {(here, 2)}
    assert counters["udp_tx_calls"] == 2
    assert counters["udp_rx_packets"] == 51
    if other.gro:
        assert counters["udp_rx_calls"] <= 3
    other.socket.close()


def test_the_named_source_address_is_used_and_the_local_one_reported(opened_v4: udp.UdpSocket):
    other = udp.open_socket(socket.AF_INET, port=0, mark=None)
    source, destination = bytes((127, 0, 0, 2)), Endpoint(bytes((127, 0, 0, 3)), other.port)
    (got,), _ = exchange(opened_v4, other, [Transmit(destination, b"x", source)])
    assert (got.source, got.local) == (Endpoint(source, opened_v4.port), destination)
    other.socket.close()


@FAMILIES
def test_a_closed_port_disturbs_nothing(opened: udp.UdpSocket, family: int):
    other = udp.open_socket(family, port=0, mark=None)
    gone = udp.open_socket(family, port=0, mark=None)
    gone.socket.close()
    lost = Transmit(Endpoint.of(LOOPBACK[family], gone.port), b"lost")
    kept = Transmit(Endpoint.of(LOOPBACK[family], other.port), b"kept")
    engine = PureEngine()
    engine.attach_udp(family, opened.socket, port=opened.port)
    for transmit in (lost, kept, lost, kept):
        engine.transmit(transmit)
        assert engine.flush()
    assert engine.receive_udp(family, 1.0) == []
    receiver = PureEngine()
    receiver.attach_udp(family, other.socket, port=other.port)
    got: list[object] = []
    while len(got) < 2 and select.select([other.socket], [], [], 5.0)[0]:
        got += receiver.receive_udp(family, 1.0)
    assert len(got) == 2
    other.socket.close()
