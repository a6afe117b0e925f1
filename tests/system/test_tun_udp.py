"""Two engines with real TUN devices, UDP sockets and TCP connections, each side in a namespace of its own."""

from __future__ import annotations

import ctypes
import os
import select
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING, TypeVar

import pytest

from fzg.dataplane.engine import Datagram, InnerPacket, OutboundPacket
from fzg.host import tun, udp
from fzg.sansio import Transmit
from fzg.wire.endpoint import Endpoint
from tests.unit.dataplane_world import World, each_engine, key_of  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

CLIENT, SERVER = "100.64.0.9", "10.0.0.5"
CLIENT6, SERVER6 = "fd00:2021:1111::9", "fd00:99::5"


def in_new_namespace(function: Callable[[], T]) -> T:
    """Call it in a network namespace that lives as long as the descriptors opened in it."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if _libc.unshare(_CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "unshare")
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _may() -> bool:
    try:
        return in_new_namespace(lambda: os.path.exists("/dev/net/tun"))
    except OSError:
        return False


pytestmark = [
    pytest.mark.usefixtures("each_engine"),
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not _may(), reason="needs root for network namespaces and TUN devices"),
]


def ip(*lines: str) -> None:
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True, timeout=10)


class Side:
    """One end: an engine between its TUN and one UDP socket, with a policy that allows everything once asked."""

    def __init__(self, device: tun.TunDevice, bound: udp.UdpSocket, *, vnet_hdr: bool = True) -> None:
        self.device, self.bound = device, bound
        self.engine = World.engine()
        self.engine.attach_tun(device.descriptor, vnet_hdr=vnet_hdr, offloads=device.offloads)
        self.engine.attach_udp(bound.family, bound.socket, port=bound.port)

    def connect(self, other: Side, number: int) -> None:
        ours, theirs = bytes((number,)) * 32, bytes((3 - number,)) * 32
        self.engine.add_session(1, number, 3 - number, receive_key=ours, send_key=theirs, now=1.0)
        self.engine.use_session(1, number)
        self.path = Endpoint.of("127.0.0.1", other.bound.port)
        self.engine.set_path(1, None, self.path, None)

    def step(self, items: list, now: float) -> None:
        for item in items:
            match item:
                case InnerPacket():
                    self._allow(item.packet, inbound=True, now=now)
                    self.engine.write_tun(item.packet)
                case OutboundPacket() if item.packet[0] >> 4 == 4 or item.packet[6] in {6, 17}:
                    self._allow(item.packet, inbound=False, now=now)
                    message = self.engine.seal(1, item.packet, now)
                    assert message is not None
                    self.engine.transmit(Transmit(self.path, message))
                case Datagram():
                    raise AssertionError(item)

    def _allow(self, packet: bytes, *, inbound: bool, now: float) -> None:
        self.engine.install_flow(1, key_of(packet), inbound=inbound, rewrite=None, valid_until=now + 1.0, token=1)


class Pair:
    """A client and a gateway whose datagrams meet on one loopback interface; servers listen beyond the gateway."""

    def __init__(self, *, offloads: bool = True, gro: bool = True) -> None:
        def client_side() -> tuple[udp.UdpSocket, udp.UdpSocket, tun.TunDevice, dict[int, list[socket.socket]]]:
            ip("link set lo up")
            sockets = [udp.open_socket(socket.AF_INET, port=0, gro=gro) for _ in range(2)]
            device = tun.open_tun(offloads=offloads)
            ip(
                f"link set {device.name} mtu 1280 up",
                f"addr add {CLIENT}/32 dev {device.name}",
                f"addr add {CLIENT6}/128 dev {device.name} nodad",
                f"route add 10.0.0.0/24 dev {device.name}",
                f"route add fd00:99::/64 dev {device.name}",
            )
            return sockets[0], sockets[1], device, _application_sockets(CLIENT, CLIENT6)

        def gateway_side() -> tuple[tun.TunDevice, dict[int, list[socket.socket]]]:
            device = tun.open_tun(offloads=offloads)
            ip(
                "link set lo up",
                f"link set {device.name} mtu 1280 up",
                f"addr add {SERVER}/32 dev {device.name}",
                f"addr add {SERVER6}/128 dev {device.name} nodad",
                f"route add 100.64.0.0/11 dev {device.name}",
                f"route add fd00:2021:1111::/107 dev {device.name}",
            )
            return device, _application_sockets(SERVER, SERVER6)

        udp_client, udp_gateway, tun_client, self.client_apps = in_new_namespace(client_side)
        tun_gateway, self.server_apps = in_new_namespace(gateway_side)
        self.client, self.gateway = Side(tun_client, udp_client), Side(tun_gateway, udp_gateway)
        self.client.connect(self.gateway, 1)
        self.gateway.connect(self.client, 2)
        self._stop = threading.Event()
        self._pump = threading.Thread(target=self._run)
        self._pump.start()

    def close(self) -> None:
        self._stop.set()
        self._pump.join()
        for side in (self.client, self.gateway):
            os.close(side.device.descriptor)
            side.bound.socket.close()
        for apps in (*self.client_apps.values(), *self.server_apps.values()):
            for app in apps:
                app.close()

    def _run(self) -> None:
        sides = (self.client, self.gateway)
        by_descriptor = {side.device.descriptor: (side, True) for side in sides}
        by_descriptor |= {side.bound.socket.fileno(): (side, False) for side in sides}
        while not self._stop.is_set():
            waiting = [fd for fd, (side, is_tun) in by_descriptor.items()
                       if side.engine.has_backlog(None if is_tun else socket.AF_INET)]  # fmt: skip
            ready = select.select(list(by_descriptor), [], [], 0 if waiting else 0.1)[0]
            for descriptor in {*ready, *waiting}:
                side, is_tun = by_descriptor[descriptor]
                now = time.monotonic()
                engine = side.engine
                items = engine.receive_tun(now) if is_tun else engine.receive_udp(socket.AF_INET, now)
                side.step(list(items), now)
                engine.flush()


def _application_sockets(ipv4: str, ipv6: str) -> dict[int, list[socket.socket]]:
    """A TCP and a UDP socket of each family, bound."""
    apps = {}
    for family, host in ((socket.AF_INET, ipv4), (socket.AF_INET6, ipv6)):
        pair = [socket.socket(family, socket.SOCK_STREAM), socket.socket(family, socket.SOCK_DGRAM)]
        for app in pair:
            app.bind((host, 0))
            app.settimeout(10)
        apps[family] = pair
    return apps


@pytest.fixture(params=[True, False], ids=["offloads", "plain"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(offloads=request.param, gro=request.param)
    yield pair
    pair.close()


def _transfer(sender: socket.socket, receiver: socket.socket, size: int) -> None:
    """Move so many random bytes and compare them."""
    block = os.urandom(1 << 16)
    wanted = block * (size // len(block))
    writer = threading.Thread(target=lambda: (sender.sendall(wanted), sender.shutdown(socket.SHUT_WR)))
    writer.start()
    received = bytearray()
    while chunk := receiver.recv(1 << 20):
        received += chunk
    writer.join()
    assert received == wanted


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_tcp_crosses_both_ways_intact_and_as_super_packets(pair: Pair, family: int):
    listener, client = pair.server_apps[family][0], pair.client_apps[family][0]
    listener.listen()
    client.connect(listener.getsockname())
    server, _ = listener.accept()
    server.settimeout(10)
    size = 8 << 20
    _transfer(client, server, size)
    _transfer(server, client, size)
    server.close()
    for counters in (pair.client.engine.counters(), pair.gateway.engine.counters()):
        assert {name: count for name, count in counters.items() if name.startswith("drop")} == {}
        packets_per_send = counters["udp_tx_packets"] / counters["udp_tx_calls"]
        packets_per_write = counters["tun_tx_packets"] / counters["tun_tx_calls"]
        if pair.gateway.device.offloads:
            assert packets_per_send > 5  # acknowledgements included
            assert packets_per_write > 5
        else:
            assert packets_per_write == 1


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_trains_of_datagrams_cross_both_ways_intact(pair: Pair, family: int):
    server, client = pair.server_apps[family][1], pair.client_apps[family][1]
    payloads = [bytes((i,)) * 1200 for i in range(20)] + [b"end"]
    for sender, receiver in ((client, server), (server, client), (client, server)):
        sender.sendmsg(payloads, [(17, 103, (1200).to_bytes(2, "little"))], 0, receiver.getsockname())
        assert [receiver.recv(2000) for _ in payloads] == payloads
    counters = pair.gateway.engine.counters()
    assert {name: count for name, count in counters.items() if name.startswith("drop")} == {}
    if pair.gateway.device.offloads:
        assert counters["tun_rx_calls"] < counters["tun_rx_packets"]


@pytest.mark.spec("CONN-2")
def test_sockets_take_the_preferred_port_when_free_and_another_when_not():
    def bind_twice() -> None:
        ip("link set lo up")
        first, missing = udp.open_sockets()
        second, missing_too = udp.open_sockets()
        assert missing == missing_too == []
        assert [opened.port for opened in first] == [52625, 52625]
        assert 52625 not in {opened.port for opened in second}
        assert [opened.family for opened in second] == [socket.AF_INET, socket.AF_INET6]
        for opened in (*first, *second):
            mark = opened.socket.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)
            assert mark & 0xFFFF_FFFF == 0xFD002021
            opened.socket.close()

    in_new_namespace(bind_twice)


def test_a_second_process_cannot_attach_to_the_device():
    def attach_twice() -> None:
        device = tun.open_tun("tun-test")
        try:
            with pytest.raises(tun.TunError, match="tun-test is in use by another process"):
                tun.open_tun("tun-test")
            assert not os.get_blocking(device.descriptor)
            assert not os.get_inheritable(device.descriptor)
        finally:
            os.close(device.descriptor)
        os.close(tun.open_tun("tun-test").descriptor)

    in_new_namespace(attach_twice)


def test_a_missing_node_is_made(tmp_path):
    node = tmp_path / "net" / "tun"

    def attach() -> None:
        device = tun.open_tun("tun-test", node=node, offloads=False)
        assert not device.offloads
        os.close(device.descriptor)

    in_new_namespace(attach)
    assert os.stat(node).st_rdev == os.makedev(10, 200)
    assert node.parent.stat().st_mode & 0o777 == 0o751 & ~_umask()


def test_reading_from_a_deleted_device_raises():
    def lose() -> None:
        device = tun.open_tun("tun-test")
        engine = World.engine()
        engine.attach_tun(device.descriptor)
        assert engine.receive_tun(1.0) == []
        ip("link del tun-test")
        with pytest.raises(OSError, match="bad state"):
            engine.receive_tun(1.0)
        os.close(device.descriptor)

    in_new_namespace(lose)


def test_a_name_that_another_kind_of_interface_has_is_explained():
    def clash() -> None:
        ip("link add tun-test type veth peer name other")
        with pytest.raises(tun.TunError, match="another kind"):
            tun.open_tun("tun-test")

    in_new_namespace(clash)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
