"""Where figures come from: labs with outposts in them, and beside the gateway wireguard-go and plain routing.

All of it runs through the same namespaces: client, its router, the internet, the gateway's router, gateway, resources.
What tells the programs apart is the resource's address: 10.20.0.110 lies behind the gateway's tunnel, 10.66.0.110
behind wireguard-go's, 10.68.0.110 is routed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from fzg.wireguard.keys import KeyPair
from tests.bench.crowd_client import Crowd
from tests.bench.outpost import Outpost
from tests.interop.wireguard_go import program as wireguard_go
from tests.lab.control import Control
from tests.lab.process import Process, cost_of, wait_until
from tests.lab.resources import ECHO_PORT
from tests.lab.scenario import Lab

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.namespaces import Namespace
    from tests.lab.process import Cost

GATEWAY_SERVER = "10.20.0.110"
WIREGUARD_GO_SERVER = "10.66.0.110"
ROUTED_SERVER = "10.68.0.110"
WIREGUARD_GO = "wireguard-go"
ROUTING = "routing"
PURE = "pure"
# The client must not be the limit (performance chapter 4.4).
CLIENT_ENGINE = "native" if importlib.util.find_spec("fzg.dataplane._native") else "pure"

_PORT = 51820
_TUN = "wg-bench"
_CROWD_NUMBER = 90
_NEIGHBOUR = "10.67.0.3"
_TUNNEL = {"client": "10.67.0.1", "gateway": "10.67.0.2"}
_SETTLED_S = 0.02  # for a goodbye to cross a network without latency
_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Program:
    """One of the programs under comparison: how to get through it, and what it costs at the gateway's end."""

    name: str
    path: str
    """`direct` or `relayed`; empty for plain routing."""
    server: str
    cost: Callable[[], Cost] | None
    pid: int | None = None
    """Of the gateway's end."""

    def figure(self, what: str, direction: str = "") -> str:
        """The name of a figure of this program (design 6)."""
        return figure_name(what, direction, self.path, self.name)


def figure_name(what: str, direction: str, path: str, program: str) -> str:
    """What, direction, path, program: those that apply (design 6)."""
    return ".".join(part for part in (what, direction, path, program) if part)


class Site:
    """A running lab with an outpost beside the client and in each router. `path` is what the scenario makes of it.

    `engine` is the gateway's; the one in Python makes it the program `pure`.
    """

    def __init__(self, path: str, *, engine: str = CLIENT_ENGINE) -> None:
        scenario = {"direct": "direct", "relayed": "relay-relay"}[path]
        self.path = path
        self.program_name = PURE if engine == "pure" else "gateway"
        self.lab = Lab(
            scenario,
            gateway_command=(sys.executable, "-m", "tests.bench.watched_gateway"),
            gateway_environment={"RUST_LOG": "info", "FIREZONE_ENGINE": engine},
            client_environment={"FIREZONE_ENGINE": CLIENT_ENGINE},
            start_gateway=False,
        )
        self.programs: list[Program] = []
        self.crowd: Crowd | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            lab = stack.enter_context(self.lab)
            control = lab.directory / "watched.sock"
            self._watched = Control(control)
            lab.scenario = replace(
                lab.scenario,
                gateway_environment={**lab.scenario.gateway_environment, "FZG_BENCH_CONTROL": str(control)},
            )
            lab.start_gateway()
            self.idle = lab.gateway.process.cost()
            lab.start_client(0)
            self.outpost = stack.enter_context(Outpost(lab.client.namespace))
            self.beside = stack.enter_context(Outpost(lab.gateway.namespace))
            self.resources = stack.enter_context(Outpost(lab.network.namespaces["resources"]))
            places = lab.places
            self._routers = []
            for near, far in (("client1", "gateway"), ("gateway", "client1")):
                router = places[near].router
                assert router is not None
                addresses = (places[far].public_ipv4, places[far].public_ipv6)
                self._routers.append((stack.enter_context(Outpost(router)), addresses))
            self._serve(GATEWAY_SERVER, stack)
            process = lab.gateway.process
            self.programs.append(Program(self.program_name, self.path, GATEWAY_SERVER, process.cost, process.pid))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def counters(self) -> dict[str, int]:
        """What the gateway's engine counts, and `item_KIND`: what came out of it for Python."""
        totals: dict[str, int] = self._watched.call("counters")
        return totals

    def add_crowd(self, members: int) -> Crowd:
        """Let more clients connect to the gateway, all from one host beside it; returns when they have."""
        if self.crowd is None:
            gateway = self.lab.places["gateway"]
            place = self.lab.network.neighbour("crowd", gateway, public=_CROWD_NUMBER)
            self.crowd = self._stack.enter_context(Crowd(self.lab, place))
            self.crowd_outpost = self._stack.enter_context(Outpost(place.namespace))
        self.crowd.grow(members)
        return self.crowd

    def connect(self) -> dict[str, Any]:
        """A fresh connection, without keys, allocation, channel or mapping at a router; what the client says of it."""
        client = self.lab.client
        relays = client.renew()
        wait_until(lambda: client.status()["allocations"] == relays, timeout=_PATIENCE_S, what="new allocations")
        wait_until(self._is_disconnected, timeout=_PATIENCE_S, what="nothing else asks for a connection")
        for outpost, addresses in self._routers:
            outpost.forget(addresses)
        took = self.outpost.echoes(GATEWAY_SERVER, ECHO_PORT)[0]
        (link,) = client.status()["links"]
        return {**link, "reply_ms": took}

    def _is_disconnected(self) -> bool:
        """Disconnect; false when a late packet of an earlier measurement has connected again since."""
        self.lab.client.reset()
        time.sleep(_SETTLED_S)
        return not self.lab.client.status()["links"]

    def add_wireguard_go(self) -> str:
        """Run wireguard-go between client and gateway too, as direct as the gateway; returns its version."""
        lab = self.lab
        private = {end: KeyPair.generate(os.urandom) for end in _TUNNEL}
        devices = {}
        places = {"client": lab.places["client1"], "gateway": lab.places["gateway"]}
        for end, other in (("client", "gateway"), ("gateway", "client")):
            namespace = places[end].namespace
            device = wireguard_go.WireguardGo(tun=_TUN, prefix=namespace.prefix())
            self._stack.callback(device.close)
            devices[end] = device
            peer = places[other].public_ipv4
            device.set(
                f"private_key={private[end].private.reveal().hex()}",
                f"listen_port={_PORT}",
                f"public_key={private[other].public.hex()}",
                f"endpoint={peer}:{_PORT}",
                "persistent_keepalive_interval=1",
                "allowed_ip=0.0.0.0/0",
            )
            namespace.ip(
                f"address add {_TUNNEL[end]}/32 dev {_TUN}",
                f"link set {_TUN} mtu 1280 txqueuelen 10000 up",
                f"route add {_TUNNEL[other]}/32 dev {_TUN}",
            )
        if self.crowd is not None:
            self._add_neighbour(devices["gateway"], private["gateway"].public)
        self._add_resource(WIREGUARD_GO_SERVER, sources="10.67.0.0/24")
        lab.client.namespace.ip(f"route add {_network(WIREGUARD_GO_SERVER)} dev {_TUN}")
        for end, other in (("client", "gateway"), ("gateway", "client")):
            devices[end].handshake(private[other].public)
        self._serve(WIREGUARD_GO_SERVER, self._stack)
        self.programs.append(
            Program(
                WIREGUARD_GO,
                "direct",
                WIREGUARD_GO_SERVER,
                lambda: cost_of(devices["gateway"].process.pid),
                devices["gateway"].process.pid,
            )
        )
        modules = (wireguard_go.SOURCE / "go.mod").read_text()
        version = re.search(r"golang\.zx2c4\.com/wireguard (v\S+)", modules)
        assert version is not None
        return version[1]

    def _add_neighbour(self, gateway: wireguard_go.WireguardGo, public: bytes) -> None:
        """Another client of wireguard-go, where the crowd is."""
        assert self.crowd is not None
        namespace, own = self.crowd.place.namespace, KeyPair.generate(os.urandom)
        device = wireguard_go.WireguardGo(tun=_TUN, prefix=namespace.prefix())
        self._stack.callback(device.close)
        gateway.set(
            f"public_key={own.public.hex()}",
            f"endpoint={self.crowd.place.ipv4}:{_PORT}",
            f"allowed_ip={_NEIGHBOUR}/32",
        )
        device.set(
            f"private_key={own.private.reveal().hex()}",
            f"listen_port={_PORT}",
            f"public_key={public.hex()}",
            f"endpoint={self.lab.places['gateway'].ipv4}:{_PORT}",
            "persistent_keepalive_interval=1",
            "allowed_ip=0.0.0.0/0",
        )
        namespace.ip(
            f"address add {_NEIGHBOUR}/32 dev {_TUN}",
            f"link set {_TUN} mtu 1280 txqueuelen 10000 up",
            f"route add {_network(WIREGUARD_GO_SERVER)} dev {_TUN}",
        )
        self.lab.places["gateway"].namespace.ip(f"route add {_NEIGHBOUR}/32 dev {_TUN}")

    def add_routing(self) -> None:
        """Let the client reach a resource without any tunnel, through the same routers and translations."""
        lab = self.lab
        network = _network(ROUTED_SERVER)
        client, gateway = lab.places["client1"], lab.places["gateway"]
        assert client.router is not None
        assert gateway.router is not None
        client.router.ip(f"route add {network} via {gateway.public_ipv4}")
        gateway.router.ip(f"route add {network} via {gateway.ipv4}")
        gateway.router.nft(f'insert rule inet router forward iifname "internet" ip daddr {network} accept\n')
        self._add_resource(ROUTED_SERVER, sources=client.public_ipv4)
        self._serve(ROUTED_SERVER, self._stack)
        self.programs.append(Program(ROUTING, "", ROUTED_SERVER, None))

    def _add_resource(self, address: str, *, sources: str) -> None:
        """Another address of the resource, to which the gateway's host translates as it does for the gateway."""
        lab = self.lab
        gateway: Namespace = lab.places["gateway"].namespace
        lab.network.namespaces["resources"].ip(f"address add {address}/24 dev resources")
        gateway.ip(f"address add {address.rpartition('.')[0]}.254/24 dev resources")
        gateway.nft(
            f"table ip bench_{address.replace('.', '_')} {{ chain postrouting {{\n"
            "type nat hook postrouting priority srcnat; policy accept;\n"
            f'oifname "resources" ip saddr {sources} masquerade\n}}\n}}\n'
        )

    def _serve(self, address: str, stack: contextlib.ExitStack) -> None:
        """Run iperf3 on an address, and wait until the way there is open."""
        # Bound, since iperf3 answers UDP from whichever address the kernel likes best.
        process = Process(
            f"iperf3-{address}",
            ["iperf3", "-s", "-B", address, "--forceflush"],
            log=self.lab.directory / f"iperf3-{address}.log",
            prefix=self.lab.network.namespaces["resources"].prefix(),
        )
        stack.callback(process.stop)
        process.wait_for_log("Server listening")

        def answered() -> bool:
            with contextlib.suppress(RuntimeError):
                return bool(self.outpost.echoes(address, ECHO_PORT, timeout=0.5))
            return False

        wait_until(answered, timeout=_PATIENCE_S, what=f"{address} answers")


def _network(address: str) -> str:
    return address.rpartition(".")[0] + ".0/24"
