"""A whole deployment in namespaces: resources, portal, relays, gateway, clients, behind chosen NATs (operations.md 5).

    with Lab(Scenario(client_nat=Nat.SYMMETRIC)) as lab:
        assert lab.client.curl("http://web.test/get").ok

Nothing sleeps: each step waits for what it needs and says what was missing. Logs are in `lab.directory`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tests.lab import derivations
from tests.lab.control import Control
from tests.lab.namespaces import Attachment, Namespace, Nat, Network
from tests.lab.portal_client import TOKEN, PortalProcess
from tests.lab.process import Process, lab_command, lab_environment, wait_until
from tests.lab.program import gateway_command
from tests.lab.relay_client import RelayProcess

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Collection, Mapping, Sequence

PORTAL_PORT = 8081
PORTAL_NAME = "portal.test"
TUN = "tun-firezone"
NAME_SERVER = "172.21.0.53"
SENTINEL = "100.100.111.1"  # where a client's stub resolver listens
RESOURCE_ADDRESSES = ("10.20.0.100/24", "10.20.0.110/24", "10:20::100/64", "10:20::110/64")
DNS_RESOURCE_ADDRESSES = ("172.21.0.100/24", "172.21.0.101/24", f"{NAME_SERVER}/24")
RESOURCES = ("cidr=10.20.0.0/16", "cidr=10:20::/64", "dns=**.httpbin", "dns=**.httpbin.search.test", "dns=*.test")
IPERF3_SERVER = "10.20.0.110"

_CLIENT_NUMBERS = (30, 32)  # private networks 172.30.0.0/24 and 172.32.0.0/24, public host numbers alike
_GATEWAY_NUMBER = 31
_RELAY_NUMBERS = (101, 102)
_NOISE = re.compile(r"I/O error \(os error 5\)")


@dataclass(frozen=True)
class Scenario:
    """What to build. `relays` names programs: `relay` (the test relay, both families) or `coturn` (IPv4)."""

    gateway_nat: Nat = Nat.CONE
    client_nat: Nat = Nat.CONE
    relays: Sequence[str] = ("relay", "relay")
    clients: int = 1
    tls: bool = False
    gateway_families: Collection[int] = (4, 6)
    client_families: Collection[int] = (4, 6)
    """The IP versions of their way to the internet."""
    same_lan: bool = False
    """The clients are on the gateway's local network, whatever `client_nat` says."""
    gateway_ipv6: bool = True
    """Whether the gateway's kernel has IPv6 at all."""
    blocked: bool = False
    """Packets between client and gateway are dropped, so that only relays connect them."""
    resources: Sequence[str] = RESOURCES
    iperf3: bool = False
    gateway_command: Sequence[str | Path] = ()
    """Empty: `tests.lab.program` knows."""
    gateway_wrapper: Sequence[str] = ()
    """Put before the command, inside the namespace: `setpriv …`, `taskset …`."""
    gateway_environment: Mapping[str, str] = field(default_factory=dict)
    gateway_id: str | None = "lab-gateway"
    """FIREZONE_ID; with None the gateway makes one and keeps it in its /var/lib, which is the lab's."""
    client_environment: Mapping[str, str] = field(default_factory=dict)
    start_gateway: bool = True
    start_clients: bool = True


NAMED = {
    "direct": Scenario(),
    "public": Scenario(gateway_nat=Nat.NONE, client_nat=Nat.NONE),
    "relayed": Scenario(client_nat=Nat.SYMMETRIC),
    "relay-relay": Scenario(gateway_nat=Nat.SYMMETRIC, client_nat=Nat.SYMMETRIC),
    "one-relay": Scenario(gateway_nat=Nat.SYMMETRIC, client_nat=Nat.SYMMETRIC, relays=("relay",)),
    "blocked": Scenario(blocked=True),
    "coturn": Scenario(client_nat=Nat.SYMMETRIC, relays=("coturn", "coturn")),
    "tls": Scenario(tls=True),
    "no-ipv6": Scenario(gateway_ipv6=False),
    "two-clients": Scenario(clients=2),
}


class Fetched(NamedTuple):
    """What curl made of a URL."""

    status: int
    body: str
    error: str
    seconds: float
    bytes: int

    @property
    def ok(self) -> bool:
        """Whether it got a 200."""
        return self.status == 200 and not self.error


class Host:
    """A party with a namespace, where commands can be run."""

    def __init__(self, name: str, place: Attachment) -> None:
        self.name = name
        self.place = place

    @property
    def namespace(self) -> Namespace:
        """Its namespace."""
        return self.place.namespace

    def run(self, *command: str, timeout: float = 60.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command there."""
        return self.namespace.run(*command, timeout=timeout, check=check)

    def curl(self, url: str, *options: str, timeout: float = 20.0) -> Fetched:
        """Fetch a URL; never raises for what the network does. Bodies above 64 kB are counted only."""
        report = "\\n%{http_code} %{time_total} %{size_download}"
        small = [] if "-o" in options else ["--max-time", f"{timeout:g}"]
        done = self.run("curl", "-gsS", *small, "-w", report, *options, url, timeout=timeout + 10, check=False)
        body, _, last = done.stdout.rpartition("\n")
        status, seconds, size = last.split() if last else ("0", "0", "0")
        return Fetched(int(status), body, done.stderr.strip() if done.returncode else "", float(seconds), int(size))

    def download(self, url: str, *, timeout: float = 60.0) -> Fetched:
        """Fetch a URL and throw the body away; `bytes` says how much came."""
        return self.curl(url, "-o", "/dev/null", "--max-time", f"{timeout:g}", timeout=timeout)

    def ping(self, host: str, *, timeout: float = 30.0) -> bool:
        """Whether an echo request to `host` is answered within `timeout`, asking each 200 ms."""
        source = (
            "import sys; from tests.lab.ping import ping; sys.exit(0 if ping(sys.argv[1], float(sys.argv[2])) else 1)"
        )
        command = (sys.executable, "-c", source, host, f"{timeout:g}")
        return self.run(*command, timeout=timeout + 10, check=False).returncode == 0

    def iperf3(self, *options: str, server: str = IPERF3_SERVER, seconds: int = 5) -> dict[str, Any]:
        """Run `iperf3 -c` there and return its JSON report; RuntimeError with its complaint if it failed."""
        command = ("iperf3", "-J", "-c", server, "-t", str(seconds), *options)

        def measured() -> dict[str, Any] | None:
            done = self.run(*command, timeout=seconds + 30, check=False)
            report: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {"error": done.stderr}
            # The server may still be at the end of the test before.
            return None if "server is busy" in report.get("error", "") else report

        report = wait_until(measured, timeout=5, what="the iperf3 server is free")
        if "error" in report:
            raise RuntimeError(f"iperf3 {options}: {report['error']}")
        return dict(report)


class Gateway(Host):
    """The gateway under test. `process` is its process; `id` its id at the portal once it joined."""

    def __init__(
        self, place: Attachment, process: Process, portal: PortalProcess, command: Sequence[str | Path]
    ) -> None:
        super().__init__("gateway", place)
        self.process = process
        self._portal = portal
        self._command = command

    @property
    def id(self) -> str:
        """The id that the portal gave it."""
        return self._portal.wait_gateway()

    def command(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """One of the operator's commands, asked of this gateway."""
        socket = self.process.environment.get("FIREZONE_CONTROL_SOCKET")
        variables = lab_environment() | ({"FIREZONE_CONTROL_SOCKET": socket} if socket else {})
        assignments = [f"{name}={value}" for name, value in variables.items()]
        return self.run("env", *assignments, *map(str, self._command), *words, check=check)

    @property
    def tunnel_ipv4(self) -> str | None:
        """The address on its TUN."""
        return self.namespace.address(TUN)


class Client(Host):
    """A lab client. Orders of `client.Client` are methods: `status()`, `resolve(name=…)`, `reset()`, `log()`."""

    def __init__(self, name: str, place: Attachment, process: Process, control: Path) -> None:
        super().__init__(name, place)
        self.process = process
        self._control = Control(control)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda **arguments: self._control.call(name, **arguments)

    def paths(self) -> list[str | None]:
        """The kind of path to each gateway it is connected to."""
        return [link["path"] for link in self.status()["links"]]

    def wait_path(self, kind: str, *, timeout: float = 10.0) -> None:
        """Until the path to some gateway is of this kind: `PeerToPeer`, `RelayToPeer` and so on."""
        wait_until(lambda: kind in self.paths(), timeout=timeout, what=f"{self.name} has a {kind} path")


class Lab:
    """A running deployment; a context manager. `up` may be called piecemeal instead: each `start_` is public."""

    def __init__(self, scenario: Scenario | str = "direct", *, directory: Path | None = None, **changes: Any) -> None:
        self.scenario = replace(NAMED[scenario] if isinstance(scenario, str) else scenario, **changes)
        self._wanted_directory = directory
        self._stack = contextlib.ExitStack()
        self.network: Network
        self.directory: Path
        self.portal: PortalProcess
        self.resources: Control
        self.relays: list[RelayProcess] = []
        self.gateway: Gateway
        self.clients: list[Client] = []
        self.processes: dict[str, Process] = {}
        self.places: dict[str, Attachment] = {}

    @property
    def client(self) -> Client:
        """The first client."""
        return self.clients[0]

    @property
    def portal_url(self) -> str:
        """What devices get as the portal's URL."""
        return self._portal_url_at("gateway")

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *exception: object) -> None:
        self.down()

    def up(self) -> None:
        """Build everything in the start order of spec operations.md 5.1; cleans up if it fails."""
        try:
            self.build()
            self.start_resources()
            self.start_portal()
            for number in range(len(self.scenario.relays)):
                self.start_relay(number)
            if self.scenario.start_gateway:
                self.start_gateway()
                if self.scenario.start_clients:
                    for number in range(self.scenario.clients):
                        self.start_client(number)
        except BaseException as error:
            with contextlib.suppress(Exception):
                error.add_note(self.tails())
            self.down()
            raise

    def down(self) -> None:
        """Stop the gateway first, so that it can say goodbye, then everything else."""
        if "gateway" in self.processes:
            with contextlib.suppress(Exception):
                self.processes["gateway"].stop(timeout=15)
        self._stack.close()

    # --- the network ---

    def build(self) -> None:
        """Namespaces, routers, links."""
        scenario = self.scenario
        self.network = self._stack.enter_context(Network())
        self.directory = self._wanted_directory or self.network.directory / "run"
        self.directory.mkdir(parents=True, exist_ok=True)
        party = self.network.party
        self.places["portal"] = party("portal", Nat.NONE, public=10, private=28)
        for index, number in enumerate(_RELAY_NUMBERS[: len(scenario.relays)]):
            self.places[f"relay{index + 1}"] = party(f"relay{index + 1}", Nat.NONE, public=number, private=29)
        number = _GATEWAY_NUMBER
        families = scenario.gateway_families
        gateway = party("gateway", scenario.gateway_nat, public=number, private=number, families=families)
        self.places["gateway"] = gateway
        for index, number in enumerate(_CLIENT_NUMBERS[: scenario.clients]):
            name, families = f"client{index + 1}", scenario.client_families
            if scenario.same_lan:
                place = self.network.neighbour(name, gateway, public=number, families=families)
            else:
                place = party(name, scenario.client_nat, public=number, private=number, families=families)
            self.places[name] = place
            self._set_up_files(place.namespace, SENTINEL)
            if scenario.blocked:
                self.network.block(place, gateway)
        self._set_up_files(gateway.namespace, NAME_SERVER)
        self._attach_resources(gateway.namespace)
        if not scenario.gateway_ipv6:
            gateway.namespace.sysctl(ipv6__conf__all__disable_ipv6=1, ipv6__conf__default__disable_ipv6=1)

    def _attach_resources(self, gateway: Namespace) -> None:
        resources = self.network.namespace("resources")
        for interface, addresses, own in (
            ("resources", RESOURCE_ADDRESSES, ("10.20.0.254/24", "10:20::254/64")),
            ("dns_resources", DNS_RESOURCE_ADDRESSES, ("172.21.0.254/24",)),
        ):
            self.network.link(gateway, interface, resources, interface)
            resources.ip(*(_add(address, interface) for address in addresses))
            gateway.ip(*(_add(address, interface) for address in own))

    def _set_up_files(self, namespace: Namespace, name_server: str) -> None:
        namespace.file("/etc/resolv.conf", f"nameserver {name_server}\noptions timeout:2 attempts:3\n")
        portal = self.places["portal"]
        hosts = "127.0.0.1 localhost\n::1 localhost\n"
        hosts += f"{portal.public_ipv4} {PORTAL_NAME}\n{portal.public_ipv6} {PORTAL_NAME}\n"
        namespace.file("/etc/hosts", hosts)

    # --- the parties ---

    def start_resources(self) -> None:
        """Web, echo and name servers, and iperf3 if asked for."""
        namespace = self.network.namespaces["resources"]
        socket_path = self.directory / "resources.sock"
        self._spawn("resources", lab_command("resources", "--control", socket_path), namespace, ready=15.0)
        self.resources = Control(socket_path)
        if self.scenario.iperf3:
            self.start_iperf3(namespace)

    def start_iperf3(self, namespace: Namespace, *, port: int = 5201) -> Process:
        """An iperf3 server on all addresses of a namespace."""
        process = self._spawn(f"iperf3-{port}", ["iperf3", "-s", "-p", str(port), "--forceflush"], namespace)
        process.wait_for_log("Server listening")
        return process

    def start_portal(self) -> None:
        """The portal on its public addresses."""
        place = self.places["portal"]
        self.portal = PortalProcess(
            resources=self.scenario.resources,
            listen=[f"{place.public_ipv4}:{PORTAL_PORT}", f"[{place.public_ipv6}]:{PORTAL_PORT}"],
            tls_names=[PORTAL_NAME, place.public_ipv4, place.public_ipv6] if self.scenario.tls else [],
            directory=self.directory,
            prefix=place.namespace.prefix(),
        )
        self._stack.callback(self.portal.close)
        self.processes["portal"] = self.portal.process

    def start_relay(self, number: int, *, program: str | None = None) -> RelayProcess:
        """Relay `number` (from 0), once it has joined and serves; one that the scenario does not have gets a place."""
        name = f"relay{number + 1}"
        if name not in self.places:
            public = _RELAY_NUMBERS[0] + number
            self.places[name] = self.network.party(name, Nat.NONE, public=public, private=29)
        place = self.places[name]
        # A relay has no name server; it must find the portal by address.
        url = f"{'wss' if self.scenario.tls else 'ws'}://{self.places['portal'].public_ipv4}:{PORTAL_PORT}"
        relay = RelayProcess(
            program=program or self.scenario.relays[number],
            name=name,
            ipv4=place.public_ipv4,
            ipv6=place.public_ipv6,
            portal_url=url,
            ca_file=self.portal.ca_file,
            directory=self.directory,
            prefix=place.namespace.prefix(),
        )
        self._stack.callback(relay.close)
        self.relays.append(relay)
        self.processes[name] = relay.process
        return relay

    def start_gateway(self, *, wait: bool = True) -> Gateway:
        """The gateway; with `wait`, returns once `gateway_ready`."""
        scenario = self.scenario
        place = self.places["gateway"]
        environment = {
            "FIREZONE_API_URL": self._portal_url_at("gateway"),
            "FIREZONE_TOKEN": TOKEN,
            "FIREZONE_NAME": "lab-gateway",
            "RUST_LOG": "debug",
            "HEALTH_CHECK_ADDR": "127.0.0.1:8080",
        }
        if scenario.gateway_id is not None:
            environment["FIREZONE_ID"] = scenario.gateway_id
        state = self.directory / "gateway-var-lib"
        state.mkdir(exist_ok=True)
        place.namespace.bind("/var/lib", state)
        if self.portal.ca_file is not None:
            environment["SSL_CERT_FILE"] = str(self.portal.ca_file)
        command = [*scenario.gateway_wrapper, *(scenario.gateway_command or gateway_command())]
        if not scenario.gateway_wrapper:  # other users cannot write here; they have their own default
            environment["FIREZONE_CONTROL_SOCKET"] = str(self.directory / "control.sock")
        environment |= scenario.gateway_environment
        process = self._spawn("gateway", command, place.namespace, environment)
        self.gateway = Gateway(place, process, self.portal, command)
        if wait:
            self.wait_gateway_ready()
        return self.gateway

    def start_client(self, number: int, *, wait: bool = True) -> Client:
        """Client `number` (from 0): `python -m tests.lab.client` in its namespace; with `wait`, until it is ready."""
        name = f"client{number + 1}"
        place = self.places[name]
        control = self.directory / f"{name}.sock"
        arguments: list[str | Path] = [
            "--portal-url",
            self._portal_url_at(name),
            "--token",
            TOKEN,
            "--external-id",
            f"lab-{name}",
        ]
        arguments += ["--name", name, "--control", control]
        arguments += ["--ca", self.portal.ca_file] if self.portal.ca_file else []
        command = [sys.executable, "-m", "tests.lab.client", *arguments]
        ready = 20.0 if wait else None
        process = self._spawn(name, command, place.namespace, self.scenario.client_environment, ready=ready)
        client = Client(name, place, process, control)
        self.clients.append(client)
        return client

    def wait_gateway_ready(self, *, timeout: float = 20.0) -> None:
        """Until it is joined, has its TUN with addresses, and every relay that serves has an allocation for it."""
        process = self.gateway.process
        self._wait(process, lambda: self._gateway_state() is not None, "the gateway joins the portal", timeout=timeout)
        state = self._gateway_state()
        assert state is not None
        address = state["ipv4"]
        self._wait(process, lambda: self.gateway.tunnel_ipv4 == address, f"{TUN} gets {address}", timeout=timeout)
        salt = derivations.turn_salt(state["public_key"])
        for relay in self.relays:
            if relay.process.running:
                done = lambda relay=relay: relay.allocations_of(salt) > 0
                self._wait(process, done, f"the gateway allocates on {relay.name}", timeout=timeout)

    def _portal_url_at(self, name: str) -> str:
        """The portal as a party can reach it."""
        if self.scenario.tls:
            return f"wss://{PORTAL_NAME}:{PORTAL_PORT}"
        portal = self.places["portal"]
        host = portal.public_ipv4 if 4 in self.places[name].families else f"[{portal.public_ipv6}]"
        return f"ws://{host}:{PORTAL_PORT}"

    def _gateway_state(self) -> dict[str, Any] | None:
        gateways: dict[str, dict[str, Any]] = self.portal.state()["gateways"]
        return next(iter(gateways.values()), None)

    def _spawn(
        self,
        name: str,
        command: Sequence[str | Path],
        namespace: Namespace,
        environment: Mapping[str, str] | None = None,
        *,
        ready: float | None = None,
    ) -> Process:
        process = Process(
            name,
            command,
            log=self.directory / f"{name}.log",
            prefix=namespace.prefix(),
            environment=lab_environment() | dict(environment or {}),
            ready=ready,
        )
        self._stack.callback(process.stop)
        self.processes[name] = process
        return process

    def _wait(self, process: Process, condition: Any, what: str, *, timeout: float = 20.0) -> None:
        def checked() -> Any:
            if not process.running:
                raise RuntimeError(f"{process.name} ended ({process.returncode}) before {what}:\n{process.tail(40)}")
            return condition()

        wait_until(checked, timeout=timeout, what=what)

    # --- while it runs ---

    def restart_gateway(self) -> None:
        """Stop the gateway, start it again and wait until it is ready."""
        self.gateway.process.stop(timeout=15)
        self.portal.wait_for(lambda _: not self.portal.state()["gateways"], since=max(self.portal.mark() - 1, 0))
        self.gateway.process.start()
        self.wait_gateway_ready()

    def roam(self, name: str = "client1", *, public: int = 77) -> None:
        """Let a party behind a router appear under another public address."""
        self.places[name] = self.network.move(self.places[name], public)

    def cut(self, name: str, *, cut: bool = True) -> None:
        """Unplug a party from the internet, or plug it in again."""
        self.network.cut(self.places[name], cut=cut)

    def warnings(self) -> list[str]:
        """Lines at WARN or ERROR of gateway and clients, without the known exceptions (spec operations.md 5.4)."""
        found = []
        for name, process in self.processes.items():
            if name == "gateway" or name.startswith("client"):
                lines = process.log_text().splitlines()
                found += [f"{name}: {line}" for line in lines if re.search(r" (WARN|ERROR) ", line)]
        return [line for line in found if not _NOISE.search(line)]

    def tails(self, lines: int = 30) -> str:
        """The ends of all logs and of the portal's ledger, for a failure message."""
        parts = [f"--- {name} ---\n{process.tail(lines)}" for name, process in self.processes.items()]
        return "\n".join(parts)

    def collect(self, destination: Path) -> None:
        """Copy logs, ledger and portal store, for an artefact."""
        shutil.copytree(
            self.directory,
            destination,
            dirs_exist_ok=True,
            ignore=lambda folder, names: [n for n in names if (Path(folder) / n).is_socket() or n.endswith(".key")],
        )


def available() -> str | None:
    """Why a lab cannot be built here, or None if it can."""
    from tests.lab.namespaces import can_make_namespaces

    missing = [tool for tool in ("ip", "nft", "nsenter", "unshare", "setpriv", "curl") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if not can_make_namespaces():
        return "needs root for network namespaces"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "needs /dev/net/tun"
    return None


def run_until_interrupted(lab: Lab) -> None:
    """Keep a lab up, saying where things are, until Ctrl-C."""
    with lab:
        print(f"portal   {lab.portal_url}  (orders: {lab.directory}/portal.sock)")
        for name, process in lab.processes.items():
            namespace = lab.places[name].namespace.name if name in lab.places else "resources"
            print(f"{name:10} pid {process.pid:<8} {namespace:40} {process.log}")
        with contextlib.suppress(KeyboardInterrupt):
            print("a shell in a place: nsenter --net=/run/netns/NAME; Ctrl-C ends everything", flush=True)
            while all(process.running for process in lab.processes.values()):
                time.sleep(0.5)
            ended = [name for name, process in lab.processes.items() if not process.running]
            print(f"ended by itself: {', '.join(ended)}\n{lab.tails()}")


def _add(address: str, interface: str) -> str:
    return f"address add {address} dev {interface}" + (" nodad" if ":" in address else "")
