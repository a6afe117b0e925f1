"""The gateway's process against a client of the crates `is` and `boringtun`: what the original's client is made of."""

from __future__ import annotations

import asyncio
import itertools
import re
from typing import TYPE_CHECKING

import pytest

from tests.interop.loopback import PATIENCE_S, SERVER4, SERVER6, Tun, World, exchange
from tests.interop.rust_client.program import build
from tests.interop.rust_device import RustDevice
from tests.unit.tunnel_world import control, echo, udp

if TYPE_CHECKING:
    from collections.abc import Iterator

# The first build takes half a minute on two idle cores.
pytestmark = [pytest.mark.slow, pytest.mark.needs("cargo", "setpriv"), pytest.mark.timeout(600)]

GOODBYE = control(2)
# Without an answer to its first initiation the client sends the next one after 5 s.
AT_ONCE_S = 2.0
# How often the client checks each pair; with USE-CANDIDATE, if it ever nominated it.
CHECK_INTERVAL_S = 1.6
_marks = itertools.count()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    build()
    with World(client_relay="relay") as world:
        yield world


async def path_of(world: World, device: RustDevice, kind: str, *, timeout: float = PATIENCE_S) -> None:
    """Wait until the gateway sends to the client by a path of this kind."""
    await world.gateway.logs(f"Path changed cid={device.id} path={kind} ", timeout=timeout)


def paths(world: World, device: RustDevice) -> list[str]:
    """The kinds of path by which the gateway has sent to the client, in order."""
    return re.findall(rf"Path changed cid={device.id} path=(\w+) ", world.gateway.log_text())


class Stream:
    """A datagram to the server and one back, over and over: none may be lost."""

    def __init__(self, device: RustDevice, tun: Tun) -> None:
        self._device, self._tun = device, tun
        self._going = True

    async def run(self) -> None:
        while self._going:
            await self.once()

    async def once(self) -> None:
        payload = b"stream %08d" % next(_marks)
        up = udp(self._device.ipv4, SERVER4, 5000, 6000, payload)
        self._device.send(up)
        await self._tun.expect(up, timeout=AT_ONCE_S)
        down = udp(SERVER4, self._device.ipv4, 6000, 5000, payload)
        self._tun.send(down)
        await self._device.receive(down, timeout=AT_ONCE_S)

    def stop(self) -> None:
        """Let `run` end."""
        self._going = False


@pytest.mark.spec("CONN-33")
@pytest.mark.parametrize("ipv6", [False, True])
def test_the_direct_path_is_up_with_the_first_exchange(world: World, ipv6: bool) -> None:
    """The initiation comes before USE-CANDIDATE, so the response must wait for the path, and no longer."""

    async def scenario() -> None:
        async with RustDevice(world, ipv6=ipv6) as device:
            await device.connect()
            nominated, handshake = await device.until("nominated"), await device.until("handshake")
            assert handshake["initiator"]
            assert handshake["at"] - nominated["at"] < AT_ONCE_S
            for size in (36, 37, 52, 100, 1279, 1280):
                await exchange(device, world.tun, size=size)
            await path_of(world, device, "PeerToPeer")
            assert device.program.all("bad_candidate") == device.program.all("wireguard_error") == []

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("offer", "remote", "path"),
    [("host", "relay", "RelayToPeer"), ("relay", "host", "PeerToRelay"), ("relay", "relay", "RelayToRelay")],
)
def test_relayed_paths_carry_packets_of_full_size(world: World, offer: str, remote: str, path: str) -> None:
    async def scenario() -> None:
        async with RustDevice(world, offer={offer}, remote_kinds={remote}) as device:
            await device.connect()
            await exchange(device, world.tun)
            await exchange(device, world.tun, size=1280)
            await path_of(world, device, path)

    asyncio.run(scenario())


def test_packets_that_wait_for_the_path_arrive(world: World) -> None:
    async def scenario() -> None:
        async with RustDevice(world) as device:
            await device.authorize(world.resources.ipv4)
            payloads = [b"waiting %d" % number for number in range(20)]
            for payload in payloads:
                device.send(udp(device.ipv4, SERVER4, 5000, 6000, payload))
            assert [(await world.tun.receive())[28:] for _ in payloads] == payloads

    asyncio.run(scenario())


@pytest.mark.spec("CONN-56")
def test_the_switch_from_relay_to_direct_loses_nothing(world: World) -> None:
    async def scenario() -> None:
        async with RustDevice(world, offer={"relay"}, remote_kinds={"relay"}) as device:
            await device.connect()
            await exchange(device, world.tun)
            await path_of(world, device, "RelayToRelay")
            device.allow("host")
            stream = Stream(device, world.tun)
            async with asyncio.TaskGroup() as group:
                group.create_task(stream.run())
                since = device.mark()
                await device.offer("host")
                nominated = await device.until("nominated", since=since, source=device.host)
                await path_of(world, device, "PeerToPeer")
                await asyncio.sleep(CHECK_INTERVAL_S)
                stream.stop()
            assert nominated["destination"].startswith("127.0.0.1:")
            assert paths(world, device)[-1] == "PeerToPeer"

    asyncio.run(scenario())


@pytest.mark.spec("CONN-61")
def test_a_withdrawn_direct_candidate_moves_the_path_to_the_relay_and_back(world: World) -> None:
    async def scenario() -> None:
        async with RustDevice(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            await device.withdraw("host")
            # Later it would change the path because the old one is silent.
            await path_of(world, device, "PeerToRelay", timeout=AT_ONCE_S)
            await exchange(device, world.tun)
            since = device.mark()
            await device.offer("host")
            await device.until("nominated", since=since, source=device.host)
            await exchange(device, world.tun)

    asyncio.run(scenario())


@pytest.mark.spec("CONN-19")
def test_a_second_authorization_reuses_the_connection(world: World) -> None:
    async def scenario() -> None:
        async with RustDevice(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            told, since = list(device.told), device.mark()
            await device.authorize(world.resources.ipv6)
            request = echo(device.ipv6, SERVER6, 9)
            device.send(request)
            await world.tun.expect(request)
            reply = echo(SERVER6, device.ipv6, 9, reply=True)
            world.tun.send(reply)
            await device.receive(reply)
            await exchange(device, world.tun)
            async with asyncio.timeout(PATIENCE_S):
                while len(device.told) < 2 * len(told):
                    await asyncio.sleep(0.01)
            assert device.told == told * 2
            assert {event["event"] for event in device.program.events[since:]} == {"packet"}
            await world.gateway.logs(f"Connection reused cid={device.id}")

    asyncio.run(scenario())


@pytest.mark.spec("CONN-73")
def test_handshakes_one_after_the_other_leave_no_packet_behind(world: World) -> None:
    async def scenario() -> None:
        async with RustDevice(world) as device:
            await device.connect()
            stream = Stream(device, world.tun)
            await stream.once()
            for _ in range(10):  # more than a peer's ring of sessions has
                since = device.mark()
                device.program.order("handshake")
                await stream.once()
                await device.until("handshake", since=since, initiator=True)
                await stream.once()
            assert device.program.all("wireguard_error") == []

    asyncio.run(scenario())


@pytest.mark.spec("CONN-28")
def test_losing_the_last_authorization_brings_one_goodbye(world: World) -> None:
    async def scenario() -> None:
        async with RustDevice(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            world.portal.reject_access(client=device.id, resource=world.resources.ipv4)
            assert await device.receive_any() == GOODBYE
            with pytest.raises(TimeoutError):
                await device.receive_any(timeout=0.3)

    asyncio.run(scenario())


@pytest.mark.spec("CONN-29")
def test_a_clients_goodbye_ends_its_connection_silently(world: World) -> None:
    async def scenario() -> None:
        async with RustDevice(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            device.send(GOODBYE)
            request = echo(device.ipv4, SERVER4, 1, payload=b"gone")
            device.send(request)
            assert await world.tun.is_silent(request, seconds=0.3)
            assert device.program.packets.empty()

    asyncio.run(scenario())


@pytest.mark.spec("CONN-12")
def test_a_client_whose_nat_forgot_it_is_found_again(world: World) -> None:
    """What it sends goes on arriving; the gateway follows when the old address has been silent (spec D1)."""

    async def scenario() -> None:
        async with RustDevice(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            device.program.order("rebind")
            up = udp(device.ipv4, SERVER4, 5000, 6000, b"from another port")
            device.send(up)
            await world.tun.expect(up, timeout=AT_ONCE_S)
            down = udp(SERVER4, device.ipv4, 6000, 5000, b"to another port")
            async with asyncio.timeout(PATIENCE_S):
                while down not in device.received():
                    world.tun.send(down)
                    await asyncio.sleep(0.1)
            await exchange(device, world.tun)

    asyncio.run(scenario())


def test_a_relay_that_starts_anew_is_replaced_at_the_client(world: World) -> None:
    async def scenario() -> None:
        async with RustDevice(world, remote_kinds={"relay"}) as device:
            await device.connect()
            await exchange(device, world.tun)
            (before,) = [line.split()[4:6] for line in device.told if " typ relay" in line and "." in line.split()[4]]
            since = device.mark()
            new = await asyncio.to_thread(world.gateway_relay.restart)
            world.portal.choose_relays(whom="gateway", relays=[new])
            removed = await device.until("removed", since=since)
            assert removed["found"], "the client's agent does not know the candidate that the gateway withdrew"
            assert before[1] in removed["line"].split()
            await device.until("nominated", since=since)
            await exchange(device, world.tun)

    asyncio.run(scenario())


@pytest.mark.spec("CONN-81")
def test_more_handshakes_than_the_limit_allows_bring_a_cookie_and_then_a_session(world: World) -> None:
    async def scenario() -> None:
        async with RustDevice(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            for _ in range(150):
                device.program.order("handshake")
            await device.until("cookie")
            since = device.mark()
            device.program.order("handshake")
            await device.until("handshake", since=since, initiator=True, timeout=AT_ONCE_S)
            await exchange(device, world.tun)
        await asyncio.sleep(1)
        async with RustDevice(world) as device:
            await device.connect()
            nominated, handshake = await device.until("nominated"), await device.until("handshake")
            assert handshake["at"] - nominated["at"] < AT_ONCE_S

    asyncio.run(scenario())


@pytest.mark.long
def test_a_direct_path_that_dies_is_replaced_by_the_relay(world: World) -> None:
    """Nobody says so: the client gives the pair up after 16.5 s, the gateway follows 5 s later (spec D1)."""

    async def scenario() -> None:
        async with RustDevice(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            since = device.mark()
            device.lose("host")
            begin = asyncio.get_running_loop().time()
            nominated = await device.until("nominated", since=since, timeout=20)
            assert not nominated["destination"].startswith("127.0.0.1:")
            down = udp(SERVER4, device.ipv4, 6000, 5000, b"by the relay")
            while down not in device.received():
                assert asyncio.get_running_loop().time() < begin + 30
                world.tun.send(down)
                await asyncio.sleep(0.1)
            await exchange(device, world.tun)
            assert "Relay" in paths(world, device)[-1]

    asyncio.run(scenario())


@pytest.mark.long
def test_data_without_an_answer_makes_the_gateway_initiate(world: World) -> None:
    async def scenario() -> None:
        async with RustDevice(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            device.program.order("mute", muted=True)
            since = device.mark()
            unanswered = udp(SERVER4, device.ipv4, 6000, 5000, b"unanswered")
            world.tun.send(unanswered)
            await device.receive(unanswered)
            sent = await device.until("packet", since=since)
            answered = await device.until("handshake", since=since, initiator=False, timeout=30)
            assert 14.9 < answered["at"] - sent["at"] < 16
            device.program.order("mute", muted=False)
            await exchange(device, world.tun)

    asyncio.run(scenario())


@pytest.mark.long
def test_a_tunnel_outlives_the_age_at_which_the_client_rekeys(world: World) -> None:
    async def scenario() -> None:
        async with RustDevice(world) as device:
            await device.connect()
            stream = Stream(device, world.tun)
            begin, since = asyncio.get_running_loop().time(), device.mark()
            while not device.program.all("handshake", since=since):
                await stream.once()
                await asyncio.sleep(0.5)
                assert asyncio.get_running_loop().time() < begin + 130
            for _ in range(10):
                await stream.once()
            assert asyncio.get_running_loop().time() > begin + 115
            assert device.program.all("wireguard_error") == []

    asyncio.run(scenario())
