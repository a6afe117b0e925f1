"""The gateway's process on one side, aioice, which nobody here wrote, as the client's ICE agent on the other."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import TYPE_CHECKING

import aioice.ice
import pytest

from tests.interop.foreign_client import IceClient
from tests.interop.loopback import World

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.slow, pytest.mark.needs("turnserver", "setpriv")]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as world:
        yield world


async def path_of(world: World, client: IceClient, kind: str) -> None:
    """Wait until the gateway sends to this client by a path of this kind."""
    await world.gateway.logs(f"Path changed cid={client.id} path={kind} ")


@pytest.mark.parametrize("ipv6", [False, True])
def test_aioice_nominates_the_direct_path(world: World, ipv6: bool) -> None:
    async def scenario() -> None:
        async with IceClient(world, ipv6=ipv6) as client:
            await client.connect()
            assert client.pair == ("host", "host")
            await path_of(world, client, "PeerToPeer")

    asyncio.run(scenario())


def test_aioice_reaches_the_gateway_through_its_own_relay(world: World) -> None:
    async def scenario() -> None:
        async with IceClient(world, relayed=True) as client:
            await client.connect()
            assert client.pair == ("relay", "host")
            await path_of(world, client, "PeerToRelay")

    asyncio.run(scenario())


@pytest.mark.parametrize("ipv6", [False, True])
def test_aioice_reaches_the_gateways_relay(world: World, ipv6: bool) -> None:
    async def scenario() -> None:
        async with IceClient(world, ipv6=ipv6, remote_kinds={"relay"}) as client:
            await client.connect()
            assert client.pair == ("host", "relay")
            await path_of(world, client, "RelayToPeer")
            ours = client.ice.local_candidates[0]
            (allocation,) = world.gateway_relay.allocations()
            assert [ours.host, ours.port] in [channel["peer"] for channel in allocation["channels"]]

    asyncio.run(scenario())


def test_aioice_reaches_the_gateway_from_relay_to_relay(world: World) -> None:
    async def scenario() -> None:
        async with IceClient(world, relayed=True, remote_kinds={"relay"}) as client:
            await client.connect()
            assert client.pair == ("relay", "relay")
            await path_of(world, client, "RelayToRelay")

    asyncio.run(scenario())


@pytest.mark.spec("CONN-17", "CONN-63")
def test_the_gateways_candidates_come_behind_its_word_in_one_message(world: World) -> None:
    async def scenario() -> None:
        async with IceClient(world) as client:
            await client.connect()
            said = [
                entry
                for entry in world.portal.entries(kind="gateway", direction="in")
                if entry["event"] in {"authorization_created", "broadcast_ice_candidates"}
            ][-2:]
            assert [entry["event"] for entry in said] == ["authorization_created", "broadcast_ice_candidates"]
            assert said[1]["payload"] == {"client_ids": [client.id], "candidates": client.told}
            priorities = [int(line.split()[3]) for line in client.told]
            assert priorities == sorted(priorities, reverse=True)
            kinds = sorted(line.split()[7] for line in client.told)
            assert kinds[-3:] == ["host", "relay", "relay"]  # hosts: loopback, and what this machine has besides

    asyncio.run(scenario())


def test_checks_that_overtake_the_candidates_are_answered(world: World) -> None:
    """The client's candidates never come: all that the gateway knows are the addresses of its checks."""

    async def scenario() -> None:
        world.portal.settings(muted_events=["ice_candidates"])
        mark = world.portal.mark()
        try:
            async with IceClient(world) as client:
                await client.authorize(world.resources.ipv4)
                await client.gather()
                said = world.portal.message("broadcast_ice_candidates", since=mark)
                await client.hear(said["candidates"])
                await asyncio.wait_for(client.ice.connect(), 10)
                await path_of(world, client, "PeerToPeer")
        finally:
            world.portal.settings(muted_events=[])

    asyncio.run(scenario())


def test_checks_of_consent_go_on_being_answered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aioice.ice, "CONSENT_INTERVAL", 0.05)

    async def scenario() -> None:
        async with IceClient(world) as client:
            await client.connect()
            asked = []
            build = client.ice.build_request
            client.ice.build_request = lambda *arguments, **more: asked.append(1) or build(*arguments, **more)
            begin = time.monotonic()
            # One that is not answered takes 0.5 s.
            while len(asked) < 10:
                assert time.monotonic() < begin + 4, len(asked)
                await asyncio.sleep(0.05)

    asyncio.run(scenario())


@pytest.mark.parametrize("wrong", ["remote_password", "remote_username"])
def test_checks_with_wrong_credentials_meet_silence(world: World, wrong: str) -> None:
    async def scenario() -> None:
        async with IceClient(world) as client:
            await client.authorize(world.resources.ipv4)
            setattr(client.ice, wrong, "wrong" * 5)
            await client.has_candidates.wait()
            await client.gather_without_telling()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.ice.connect(), 1)
            assert f"Path changed cid={client.id}" not in world.gateway.log_text()

    asyncio.run(scenario())


@pytest.mark.parametrize("tie_breaker", [0, (1 << 64) - 1])
def test_two_controlled_agents_agree_on_a_controlling_one(world: World, tie_breaker: int) -> None:
    async def scenario() -> None:
        async with IceClient(world, controlling=False) as client:
            await client.authorize(world.resources.ipv4)
            client.ice._tie_breaker = tie_breaker
            await client.has_candidates.wait()
            await client.gather()
            await asyncio.wait_for(client.ice.connect(), 10)
            await path_of(world, client, "PeerToPeer")

    asyncio.run(scenario())


def test_a_client_that_restarts_with_another_key_connects_anew(world: World) -> None:
    async def scenario() -> None:
        async with IceClient(world) as first:
            await first.connect()
            name = first.id
        async with IceClient(world, external_id=first.external_id) as second:
            assert second.id == name
            await second.connect()
            assert second.ice.remote_username != first.ice.remote_username
            await world.gateway.logs(f"Connection replaced: the authorization has other keys or credentials cid={name}")

    asyncio.run(scenario())


@pytest.mark.spec("CONN-1")
def test_each_start_of_the_gateway_makes_another_key(world: World) -> None:
    def key() -> str:
        return next(iter(world.portal.state()["gateways"].values()))["public_key"]

    async def scenario() -> None:
        before = key()
        async with IceClient(world) as client:
            await client.connect()
            assert client.authorization["gateway_public_key"] == before == key()

    asyncio.run(scenario())
    first = key()
    assert len(base64.b64decode(first)) == 32
    assert world.gateway.close() == 0
    world.gateway = world.start_gateway()
    assert key() != first
    asyncio.run(scenario())
