"""A whole client of foreign parts against the gateway's process: aioice carries, wireguard-go encrypts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.interop.foreign_client import Device
from tests.interop.loopback import PATIENCE_S, SERVER4, SERVER6, World, exchange
from tests.unit.tunnel_world import control, echo, udp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.slow, pytest.mark.needs("go", "turnserver", "setpriv")]

GOODBYE = control(2)
INITIATION, RESPONSE, DATA = 1, 2, 4
# wireguard-go rounds the time in its initiations to 2^24 ns, and a responder ignores one that is not later.
TIMESTAMP_S = 0.02


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """The gateway at the test relay, the client at coturn."""
    with World() as world:
        yield world


@pytest.fixture(scope="module")
def coturn_world() -> Iterator[World]:
    """The gateway at coturn, the client at the test relay."""
    with World(gateway_relay="coturn", client_relay="relay") as world:
        yield world


def overhear(device: Device) -> list[bytes]:
    """The gateway's WireGuard messages from now on."""
    answers: list[bytes] = []
    device.from_gateway = lambda message: answers.append(message) or message
    return answers


async def until(condition: Callable[[], object]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


async def path_of(world: World, device: Device, kind: str) -> None:
    """Wait until the gateway has this kind of path to the client and a session."""
    await world.gateway.logs(f"Connection established cid={device.id} path={kind}\n")


@pytest.mark.parametrize("ipv6", [False, True])
def test_packets_of_all_sizes_pass_directly(world: World, ipv6: bool) -> None:
    async def scenario() -> None:
        async with Device(world, ipv6=ipv6) as device:
            await device.connect()
            for size in (36, 37, 52, 100, 1279, 1280):
                await exchange(device, world.tun, size=size)
            await path_of(world, device, "PeerToPeer")

    asyncio.run(scenario())


def test_packets_pass_through_the_clients_relay(world: World) -> None:
    async def scenario() -> None:
        async with Device(world, relayed=True) as device:
            await device.connect()
            await exchange(device, world.tun)
            await exchange(device, world.tun, size=1280)
            await path_of(world, device, "PeerToRelay")

    asyncio.run(scenario())


@pytest.mark.spec("TURN-46")
@pytest.mark.parametrize("relayed", [False, True])
@pytest.mark.parametrize("place", ["world", "coturn_world"])
def test_packets_pass_through_the_gateways_relay(request: pytest.FixtureRequest, place: str, relayed: bool) -> None:
    world: World = request.getfixturevalue(place)

    async def scenario() -> None:
        async with Device(world, relayed=relayed, remote_kinds={"relay"}) as device:
            await device.connect()
            await exchange(device, world.tun)
            await exchange(device, world.tun, size=1280)
            await path_of(world, device, "RelayToRelay" if relayed else "RelayToPeer")

    asyncio.run(scenario())


@pytest.mark.spec("TURN-46")
def test_packets_pass_through_a_relay_that_pads(world: World) -> None:
    async def scenario() -> None:
        async with Device(world, remote_kinds={"relay"}) as device:
            await device.connect()
            for surplus in (1, 2, 3):
                world.gateway_relay.pad(surplus=surplus)
                for size in (100, 101, 1264):  # the largest needs no padding, and room for it is not kept
                    await exchange(device, world.tun, size=size)

    try:
        asyncio.run(scenario())
    finally:
        world.gateway_relay.pad(surplus=0)


def test_both_families_pass_inside(world: World) -> None:
    async def scenario() -> None:
        async with Device(world) as device:
            await device.connect()
            await device.authorize(world.resources.ipv6)
            request = echo(device.ipv6, SERVER6, 9)
            device.send(request)
            await world.tun.expect(request)
            reply = echo(SERVER6, device.ipv6, 9, reply=True)
            world.tun.send(reply)
            await device.receive(reply)

    asyncio.run(scenario())


def test_bursts_arrive_complete_and_in_order(world: World) -> None:
    async def scenario() -> None:
        async with Device(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            up = [b"%04d" % number + bytes(1000) for number in range(60)]
            for payload in up:
                device.send(udp(device.ipv4, SERVER4, 5000, 6000, payload))
            assert [(await world.tun.receive())[28:] for _ in up] == up
            down = [udp(SERVER4, device.ipv4, 6000, 5000, payload) for payload in up]
            for packet in down:
                world.tun.send(packet)
            assert [await device.receive_any() for _ in down] == down

    asyncio.run(scenario())


def test_what_is_not_allowed_does_not_pass(world: World) -> None:
    async def scenario() -> None:
        async with Device(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            outside = udp(device.ipv4, "10.10.0.1", 1, 2)
            device.send(outside)
            refusal = await device.receive_any()
            assert (refusal[20:22], refusal[28:]) == (b"\x03\x0d", outside[:28])
            world.tun.send(udp("10.10.0.1", device.ipv4, 2, 1))
            world.tun.send(udp(SERVER4, "100.64.255.254", 2, 1))
            spoofed = udp("100.64.255.254", SERVER4, 1, 2)
            device.send(spoofed)
            await exchange(device, world.tun)
            assert spoofed not in world.tun.skipped
            assert outside not in world.tun.skipped

    asyncio.run(scenario())


def test_a_new_handshake_keeps_the_traffic_going(world: World) -> None:
    async def scenario() -> None:
        async with Device(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            first = device.handshake_at()
            async with asyncio.timeout(15):
                while device.handshake_at() == first:
                    device.go.handshake(device.gateway_key)  # does nothing within 5 s of the one before
                    await exchange(device, world.tun)
                    await asyncio.sleep(0.1)
            await exchange(device, world.tun)

    asyncio.run(scenario())


def test_a_client_that_lost_its_sessions_makes_another(world: World) -> None:
    async def scenario() -> None:
        async with Device(world) as device:
            await device.connect()
            for _ in range(10):  # more than a peer's ring of sessions has
                await exchange(device, world.tun)
                await asyncio.sleep(TIMESTAMP_S)
                device.add_peer()

    asyncio.run(scenario())


@pytest.mark.spec("CONN-82")
def test_with_a_wrong_psk_nothing_passes_and_with_the_right_one_all(world: World) -> None:
    async def scenario() -> None:
        async with Device(world) as device:
            await device.connect(psk=b"\x01" * 32)
            answers = overhear(device)
            request = echo(device.ipv4, SERVER4, 1, payload=b"never")
            device.send(request)
            assert await world.tun.is_silent(request, seconds=0.3)
            assert [(message[0], len(message)) for message in answers] == [(RESPONSE, 92)]
            assert device.handshake_at() == (0, 0)
            await asyncio.sleep(TIMESTAMP_S)
            device.add_peer()
            await exchange(device, world.tun)
            session = answers[-1][4:8]
            await asyncio.sleep(TIMESTAMP_S)
            device.add_peer(psk=b"\x02" * 32)
            device.send(request)
            assert await world.tun.is_silent(request, seconds=0.3)
            world.tun.send(udp(SERVER4, device.ipv4, 1, 2, b"by the old session, which wireguard-go forgot"))
            await until(lambda: answers[-1][0] == DATA)
            assert answers[-1][4:8] == session

    asyncio.run(scenario())


@pytest.mark.spec("CONN-33")
def test_an_initiation_before_the_nomination_is_answered_upon_it(world: World) -> None:
    async def scenario() -> None:
        async with Device(world) as device:
            await device.authorize(world.resources.ipv4)
            await device.has_candidates.wait()
            await device.gather()
            await device.start_wireguard()
            request = echo(device.ipv4, SERVER4, 1, payload=b"early")
            device.send(request)
            initiation = await device.next_message()
            assert initiation[0] == INITIATION
            answers = overhear(device)
            gateway = next(one for one in device.ice.remote_candidates if one.type == "host" and ":" not in one.host)
            await device.ice._protocols[0].send_data(initiation, (gateway.host, gateway.port))
            await asyncio.sleep(0.1)
            await device.ice.connect()
            device.start_carrying()
            await world.tun.expect(request, timeout=4)  # wireguard-go asks again after 5 s
            assert [message[0] for message in answers] == [RESPONSE]

    asyncio.run(scenario())


def test_repeated_and_forged_messages_do_not_pass(world: World) -> None:
    async def scenario() -> None:
        async with Device(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            sent: list[bytes] = []
            device.to_gateway = sent.append
            packet = udp(device.ipv4, SERVER4, 1, 2, b"once")
            device.send(packet)
            await until(lambda: sent)
            device.to_gateway = lambda message: message
            for place in (4, 8, 16, -1):
                forged = bytearray(sent[0])
                forged[place] ^= 1
                await device.ice.send(bytes(forged))
            for _ in range(3):
                await device.ice.send(sent[0])
            assert await world.tun.receive() == packet
            await exchange(device, world.tun)
            assert packet not in world.tun.skipped

    asyncio.run(scenario())


@pytest.mark.spec("CONN-19")
def test_a_repeated_authorization_keeps_the_session_and_repeats_the_candidates(world: World) -> None:
    async def scenario() -> None:
        async with Device(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            sent: list[bytes] = []
            device.to_gateway = lambda message: sent.append(message) or message
            await exchange(device, world.tun)
            told = list(device.told)
            await device.authorize(world.resources.ipv6)
            await until(lambda: device.told == told * 2)
            await exchange(device, world.tun)
            assert {message[0] for message in sent} == {DATA}
            assert len({message[4:8] for message in sent}) == 1
            await world.gateway.logs(f"Connection reused cid={device.id}")
            assert world.gateway.log_text().count(f"Path changed cid={device.id}") == 1

    asyncio.run(scenario())


@pytest.mark.spec("CONN-20")
def test_a_client_that_restarts_with_another_key_replaces_what_it_was(world: World) -> None:
    async def scenario() -> None:
        async with Device(world) as old:
            await old.connect()
            await exchange(old, world.tun)
            async with Device(world, external_id=old.external_id) as new:
                await new.connect()
                assert new.ipv4 == old.ipv4
                await exchange(new, world.tun)
                late = udp(old.ipv4, SERVER4, 1, 2, b"from the old one")
                old.send(late)
                assert await world.tun.is_silent(late, seconds=0.2)
                await exchange(new, world.tun)

    asyncio.run(scenario())


def test_tunnels_outlive_the_portals_connections(world: World) -> None:
    async def scenario() -> None:
        async with Device(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            mark = world.portal.mark()
            world.portal.drop(kind="gateway")
            await exchange(device, world.tun)
            await asyncio.to_thread(world.portal.wait_for, since=mark, kind="gateway", direction="in", event="phx_join")
            await exchange(device, world.tun)
            await device.authorize(world.resources.ipv6)

    asyncio.run(scenario())


@pytest.mark.spec("CONN-28")
def test_losing_the_last_authorization_brings_one_goodbye(world: World) -> None:
    async def scenario() -> None:
        async with Device(world) as device:
            await device.connect()
            await device.authorize(world.resources.ipv6)
            await exchange(device, world.tun)
            world.portal.reject_access(client=device.id, resource=world.resources.ipv6)
            await exchange(device, world.tun)
            world.portal.reject_access(client=device.id, resource=world.resources.ipv4)
            assert await device.receive_any() == GOODBYE
            with pytest.raises(TimeoutError):
                await device.receive_any(timeout=0.3)
            request = echo(device.ipv4, SERVER4, 1, payload=b"gone")
            device.send(request)
            assert await world.tun.is_silent(request, seconds=0.2)

    asyncio.run(scenario())


@pytest.mark.spec("CONN-29")
def test_a_clients_goodbye_ends_its_connection_silently(world: World) -> None:
    async def scenario() -> None:
        async with Device(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            device.send(GOODBYE)
            await asyncio.sleep(0.1)
            answers = overhear(device)
            request = echo(device.ipv4, SERVER4, 1, payload=b"gone")
            device.send(request)
            assert await world.tun.is_silent(request, seconds=0.3)
            world.tun.send(udp(SERVER4, device.ipv4, 1, 2))
            await asyncio.sleep(0.1)
            assert answers == []
            await device.authorize(world.resources.ipv4)

    asyncio.run(scenario())


@pytest.mark.spec("CONN-30")
def test_the_gateway_says_goodbye_to_all_when_it_ends(world: World) -> None:
    async def scenario() -> None:
        async with Device(world) as one, Device(world) as other:
            for device in (one, other):
                await device.connect()
                await exchange(device, world.tun)
            loop = asyncio.get_running_loop()
            begin = loop.time()
            world.gateway.terminate()
            assert [await one.receive_any(), await other.receive_any()] == [GOODBYE] * 2
            assert await asyncio.to_thread(world.gateway.close) == 0
            assert loop.time() - begin < 1.5

    asyncio.run(scenario())
    world.gateway = world.start_gateway()


def test_a_client_that_moved_without_a_word_is_followed(world: World) -> None:
    """It comes back with its key and credentials from another port; nothing answers at the one before."""

    async def scenario() -> None:
        async with Device(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            await device.move()
            unasked = udp(SERVER4, device.ipv4, 53, 4000, b"are you there?")
            async with asyncio.timeout(40):
                while True:
                    world.tun.send(unasked)
                    try:
                        await device.receive(unasked, timeout=0.2)
                    except TimeoutError:
                        continue
                    break
            await exchange(device, world.tun)

    asyncio.run(scenario())


@pytest.mark.long
@pytest.mark.spec("CONN-78")
def test_the_gateway_asks_for_a_new_session_when_the_client_falls_silent(world: World) -> None:
    async def scenario() -> None:
        async with Device(world) as device:
            await device.connect()
            await exchange(device, world.tun)
            answers = overhear(device)
            device.to_gateway = lambda message: message if message[0] == RESPONSE else None
            loop = asyncio.get_running_loop()
            begin = loop.time()
            world.tun.send(udp(SERVER4, device.ipv4, 53, 4000, b"not acknowledged"))
            await until(lambda: INITIATION in {message[0] for message in answers})
            assert 14.9 < loop.time() - begin < 15.7
            device.to_gateway = lambda message: message
            await exchange(device, world.tun)

    asyncio.run(scenario())
