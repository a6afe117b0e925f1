"""Networks of namespaces: hosts, bridges, NAT routers. Nothing outside them is touched.

Names are `fzlab-<pid>.<start time>.<n>-<role>`; what a dead process left is removed by the next that makes a network.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from tests.lab.process import lab_environment

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

NETNS = Path("/run/netns")
_PREFIX = "fzlab-"
_CORE_NUMBER = 254
_QUEUE = "100000"  # transmit queue of every interface (spec operations.md 5.1)
_serial = itertools.count(1)
BOTH = (4, 6)


class Nat(StrEnum):
    """What stands between a party and the internet (spec operations.md 5.1)."""

    NONE = "none"
    """Nothing: the party has public addresses."""
    CONE = "cone"
    """Port-preserving source NAT that only lets answers in: hole punching works."""
    SYMMETRIC = "symmetric"
    """A random source port for each flow: hole punching fails."""
    DOUBLE = "double"
    """Two port-preserving ones in a row, as where a provider has one of its own."""
    MOBILE = "mobile"
    """Symmetric for IPv4; public IPv6 addresses behind a firewall that only lets answers in."""


class Namespace:
    """One network namespace with its own loopback; `prefix` runs commands in it."""

    def __init__(self, name: str, files: Path) -> None:
        self.name = name
        self.path = NETNS / name
        self._files = files
        self._binds: dict[str, Path] = {}
        run("ip", "netns", "add", name)
        self.ip("link set lo up")
        self.sysctl(ipv6__conf__default__accept_dad=0, ipv6__conf__default__accept_ra=0)

    def ip(self, *lines: str) -> None:
        """Run lines of `ip -batch`, e.g. `link set eth0 up`."""
        run("ip", "-n", self.name, "-batch", "-", stdin="\n".join(lines) + "\n")

    def nft(self, script: str) -> None:
        """Load an nftables script."""
        run(*self.prefix(binds=False), "nft", "-f", "-", stdin=script)

    def sysctl(self, **values: int) -> None:
        """Set keys below /proc/sys/net, written with `__` for the slash: `ipv4__ip_forward=1`."""
        script = ";".join(f"echo {value} > /proc/sys/net/{key.replace('__', '/')}" for key, value in values.items())
        run(*self.prefix(binds=False), "sh", "-ec", script)

    def file(self, target: str, text: str) -> None:
        """Let commands see this text at `target`, which must exist outside; nothing is written there."""
        source = self._files / f"{self.name.rpartition('-')[2]}{target.replace('/', '_')}"
        source.write_text(text)
        self.bind(target, source)

    def bind(self, target: str, source: Path) -> None:
        """Let commands see `source`, a file or a directory, at `target`, which must exist outside."""
        self._binds[target] = source

    def prefix(self, *, binds: bool = True) -> list[str]:
        """What to put before a command so that it runs here; the process id stays the same."""
        enter = ["nsenter", f"--net={self.path}", "--"]
        if not (binds and self._binds):
            return enter
        mounts = " && ".join(f"mount --bind {source} {target}" for target, source in self._binds.items())
        script = f'{mounts} && exec "$@"'
        return [*enter, "unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]

    def run(self, *command: str | Path, timeout: float = 60.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command here to its end."""
        environment = dict(os.environ) | lab_environment()
        arguments = [*self.prefix(), *map(str, command)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
        if check and done.returncode != 0:
            raise RuntimeError(f"{command} in {self.name}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def python(self, source: str, *arguments: str, timeout: float = 60.0) -> str:
        """Run Python source here and return what it prints."""
        return self.run(sys.executable, "-c", source, *arguments, timeout=timeout).stdout

    def has_interface(self, name: str) -> bool:
        """Whether an interface of this name exists and is up."""
        shown = subprocess.run(
            ["ip", "-n", self.name, "-o", "link", "show", "dev", name], capture_output=True, text=True, check=False
        )
        return shown.returncode == 0 and ("UP" in shown.stdout.partition("<")[2].partition(">")[0].split(","))

    def address(self, name: str, *, ipv6: bool = False) -> str | None:
        """The first global address of an interface."""
        family = "-6" if ipv6 else "-4"
        shown = subprocess.run(
            ["ip", "-n", self.name, family, "-o", "address", "show", "dev", name, "scope", "global"],
            capture_output=True,
            text=True,
            check=False,
        )
        words = shown.stdout.split()
        return words[3].partition("/")[0] if len(words) > 3 else None

    def flush_conntrack(self, *, peers_only: bool = False) -> None:
        """Forget the connections that are tracked here: all, or those that lead neither to portal nor to relays."""
        self.run(sys.executable, "-m", "tests.lab.conntrack", "peers" if peers_only else "all")

    def snmp(self) -> dict[str, int]:
        """Counters such as `Udp.RcvbufErrors`, as `nstat` reads them."""
        values: dict[str, int] = {}
        lines = self.run("cat", "/proc/net/snmp").stdout.splitlines()
        for names, numbers in zip(lines[::2], lines[1::2], strict=True):
            group, *keys = names.replace(":", ".").split()
            values |= {group + key: int(number) for key, number in zip(keys, numbers.split()[1:], strict=True)}
        for line in self.run("cat", "/proc/net/snmp6").stdout.splitlines():
            key, number = line.split()
            values[key] = int(number)
        return values

    def pids(self) -> list[int]:
        """The processes in here."""
        return [int(pid) for pid in run("ip", "netns", "pids", self.name).split()]


@dataclass(frozen=True)
class Attachment:
    """A party's place: its namespace, its own addresses, its router (None without NAT) and the public addresses."""

    namespace: Namespace
    ipv4: str
    ipv6: str
    router: Namespace | None
    public_ipv4: str
    public_ipv6: str
    families: Collection[int] = BOTH
    """The IP versions it has; the addresses of another one are not in use."""


@dataclass(frozen=True)
class _Lan:
    """The network between a party and its router, which others may join."""

    router: Namespace
    nat: Nat
    private: int
    ipv6_addresses: Iterator[str]
    """Public ones to give away behind a `Nat.MOBILE`."""


class Network:
    """An `internet` bridge and what hangs on it. A context manager; also cleaned up at exit and after a crash."""

    def __init__(self) -> None:
        remove_stale()
        NETNS.mkdir(parents=True, exist_ok=True)
        self._label = f"{_PREFIX}{os.getpid()}.{_start_time(os.getpid())}.{next(_serial)}-"
        self._directory = tempfile.TemporaryDirectory(prefix=self._label, ignore_cleanup_errors=True)
        self.directory = Path(self._directory.name)
        self.namespaces: dict[str, Namespace] = {}
        self._interfaces = itertools.count(1)
        self._ports: dict[str, str] = {}
        self._lans: dict[str, _Lan] = {}
        atexit.register(self.close)
        try:
            self.internet = self.namespace("internet")
            # The bridge's own address is everybody's default route and forwards nothing: packets to private addresses
            # vanish there as on the internet. A missing route would be a local error, over which coturn ends sessions.
            ipv4, ipv6 = public_addresses(_CORE_NUMBER)
            self.internet.ip(
                "link add br0 type bridge forward_delay 0 mcast_snooping 0",
                "link set br0 up",
                f"address add {ipv4}/24 dev br0",
                f"address add {ipv6}/64 dev br0 nodad",
            )
            self.internet.sysctl(ipv4__ip_forward=0, ipv6__conf__all__forwarding=0)
        except BaseException:
            self.close()
            raise

    def namespace(self, role: str) -> Namespace:
        """A new namespace that is connected to nothing."""
        made = Namespace(self._label + role, self.directory)
        self.namespaces[role] = made
        return made

    def link(self, one: Namespace, name: str, other: Namespace, other_name: str) -> None:
        """Connect two namespaces by a pair of interfaces, both up."""
        one.ip(
            f"link add {name} txqueuelen {_QUEUE} type veth peer name {other_name} netns {other.name}",
            f"link set {name} up",
        )
        other.ip(f"link set {other_name} txqueuelen {_QUEUE} up")

    def attach_public(
        self, namespace: Namespace, number: int, *, interface: str = "internet", families: Collection[int] = BOTH
    ) -> None:
        """Put a namespace on the internet as 203.0.113.`number` and 203:0:113::`number`."""
        port = f"port{next(self._interfaces)}"
        self.link(namespace, interface, self.internet, port)
        self.internet.ip(f"link set {port} master br0")
        self._ports[namespace.name] = port
        own, core = public_addresses(number), public_addresses(_CORE_NUMBER)
        for family, prefix, ipv4_or_6, gate in zip((4, 6), (24, 64), own, core, strict=True):
            if family in families:
                nodad = " nodad" if family == 6 else ""
                namespace.ip(
                    f"address add {ipv4_or_6}/{prefix} dev {interface}{nodad}", f"route add default via {gate}"
                )

    def party(self, role: str, nat: Nat, *, public: int, private: int, families: Collection[int] = BOTH) -> Attachment:
        """A host behind a router of this kind; its private network is 172.`private`.0.0/24 and 172:`private`:0::/64."""
        ipv4, ipv6 = public_addresses(public)
        if nat is Nat.NONE:
            host = self.namespace(role)
            self.attach_public(host, public, interface="eth0", families=families)
            return Attachment(host, ipv4, ipv6, None, ipv4, ipv6, families)
        router = self.namespace(f"{role}_router")
        self.attach_public(router, public)
        network = _private_network(172, private)
        lan_router = router
        if nat is Nat.DOUBLE:
            lan_router = self.namespace(f"{role}_inner_router")
            outer = _private_network(192, private)
            self.link(lan_router, "internet", router, "internal")
            router.ip(*_addresses(outer.router, "internal"))
            lan_router.ip(*_addresses(outer.host(100), "internet"), *_default_routes(outer.router))
            _route(lan_router, Nat.CONE, network)
            _route(router, Nat.CONE, outer)
        else:
            _route(router, nat, network)
        # A bridge, so that others can join.
        lan_router.ip(
            "link add internal type bridge forward_delay 0 mcast_snooping 0",
            "link set internal up",
            *_addresses(network.router, "internal"),
        )
        public_ipv6 = (public_addresses(public + offset)[1] for offset in itertools.count(1000, 100))
        lan = _Lan(lan_router, nat, private, public_ipv6)
        host = self._join(role, lan, number=100, families=families)
        return self._attachment(host, lan, 100, router, (ipv4, ipv6), families)

    def neighbour(self, role: str, of: Attachment, *, public: int, families: Collection[int] = BOTH) -> Attachment:
        """A host on the same local network as another party; `public` is its number where that is the internet."""
        lan = self._lans.get(of.namespace.name)
        if lan is None:
            return self.party(role, Nat.NONE, public=public, private=0, families=families)
        number = 101
        host = self._join(role, lan, number=number, families=families)
        return self._attachment(host, lan, number, of.router, (of.public_ipv4, of.public_ipv6), families)

    def _join(self, role: str, lan: _Lan, *, number: int, families: Collection[int]) -> Namespace:
        host = self.namespace(role)
        port = f"lan{number}"
        self.link(host, "eth0", lan.router, port)
        lan.router.ip(f"link set {port} master internal")
        network = _private_network(172, lan.private)
        ipv4, ipv6 = network.host(number)
        if 4 in families:
            host.ip(f"address add {ipv4} dev eth0", f"route add default via {network.router[0].ip}")
        if 6 in families and lan.nat is not Nat.MOBILE:
            host.ip(f"address add {ipv6} dev eth0 nodad", f"route add default via {network.router[1].ip}")
        self._lans[host.name] = lan
        return host

    def _attachment(
        self,
        host: Namespace,
        lan: _Lan,
        number: int,
        router: Namespace | None,
        public: tuple[str, str],
        families: Collection[int],
    ) -> Attachment:
        ipv4, ipv6 = (str(interface.ip) for interface in _private_network(172, lan.private).host(number))
        if lan.nat is not Nat.MOBILE:
            return Attachment(host, ipv4, ipv6, router, *public, families)
        # A public address needs no prefix of its own: the router answers for it.
        ipv6 = next(lan.ipv6_addresses)
        gate = _private_network(172, lan.private).router[1].ip
        lan.router.ip(f"route add {ipv6}/128 dev internal", f"neighbour add proxy {ipv6} dev internet")
        if 6 in families:
            host.ip(
                f"address add {ipv6}/128 dev eth0 nodad",
                f"route add {gate}/128 dev eth0",
                f"route add default via {gate}",
            )
        return Attachment(host, ipv4, ipv6, router, public[0], ipv6, families)

    def block(self, one: Attachment, other: Attachment, *, blocked: bool = True) -> None:
        """Drop all packets between two parties at the router of `one`, or stop doing so."""
        place = one.router or one.namespace
        table = f"blocked_{other.public_ipv4.replace('.', '_')}"
        if not blocked:
            place.nft(f"delete table inet {table}\n")
            return
        addresses = (("ip", other.public_ipv4), ("ip6", other.public_ipv6))
        incoming = "; ".join(f"{family} saddr {address} drop" for family, address in addresses)
        outgoing = "; ".join(f"{family} daddr {address} drop" for family, address in addresses)
        place.nft(
            f"table inet {table} {{\n"
            f"chain incoming {{ type filter hook prerouting priority raw; {incoming}; }}\n"
            f"chain outgoing {{ type filter hook postrouting priority filter; {outgoing}; }}\n}}\n"
        )

    def cut(self, party: Attachment, *, cut: bool = True) -> None:
        """Unplug a party (its router, if it has one) from the internet, or plug it in again; addresses stay."""
        port = self._ports[(party.router or party.namespace).name]
        self.internet.ip(f"link set {port} {'down' if cut else 'up'}")

    def move(self, party: Attachment, public: int) -> Attachment:
        """Give a party's router another public address, with nothing known of earlier connections: roaming."""
        assert party.router is not None, "a party without a router has no address to change"
        old, new = (party.public_ipv4, party.public_ipv6), public_addresses(public)
        core4, core6 = public_addresses(_CORE_NUMBER)
        party.router.ip(
            f"address delete {old[0]}/24 dev internet",
            f"address delete {old[1]}/64 dev internet",
            f"address add {new[0]}/24 dev internet",
            f"address add {new[1]}/64 dev internet nodad",
            f"route replace default via {core4}",
            f"route replace default via {core6}",
        )
        party.router.flush_conntrack()
        return replace(party, public_ipv4=new[0], public_ipv6=new[1])

    def flush_conntrack(self) -> None:
        """Let every router forget the paths between peers, so that the next connection starts from nothing."""
        for role, namespace in self.namespaces.items():
            if role.endswith("_router"):
                namespace.flush_conntrack(peers_only=True)

    def close(self) -> None:
        """Kill what still runs inside and remove the namespaces. Idempotent."""
        atexit.unregister(self.close)
        namespaces, self.namespaces = self.namespaces, {}
        for namespace in namespaces.values():
            _remove(namespace.name)
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def public_addresses(number: int) -> tuple[str, str]:
    """The internet's addresses with this host number, written decimally in both families (203:0:113::101 as in 5.1)."""
    return f"203.0.113.{number}", f"203:0:113::{number}"


def remove_stale() -> None:
    """Remove the namespaces and directories of processes that are gone."""
    for path in [*NETNS.glob(_PREFIX + "*"), *Path(tempfile.gettempdir()).glob(_PREFIX + "*")]:
        pid, _, rest = path.name.removeprefix(_PREFIX).partition(".")
        start = rest.partition(".")[0]
        if not (pid.isdigit() and start.isdigit() and _start_time(int(pid)) != int(start)):
            continue
        if path.parent == NETNS:
            _remove(path.name)
        else:
            shutil.rmtree(path, ignore_errors=True)


def run(*command: str, stdin: str | None = None) -> str:
    """Run a command outside; its output, or RuntimeError with what it said."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{stdin or ''}\n{done.stdout}{done.stderr}")
    return done.stdout


def can_make_namespaces() -> bool:
    """Whether this process may; if not, `user_namespace_command` may help."""
    return os.geteuid() == 0 and not subprocess.run(["unshare", "--net", "true"], check=False).returncode


def can_use_user_namespace() -> bool:
    """Whether an ordinary user may build a lab in a user namespace: the kernel lets it, and the TUN node is open."""
    if os.geteuid() == 0 or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return False
    attempt = ["unshare", "--user", "--map-root-user", "--mount", "--net", "true"]
    return not subprocess.run(attempt, check=False, capture_output=True).returncode


def user_namespace_command(*command: str | Path) -> list[str]:
    """The command, run as root of a fresh user namespace with a `/run` of its own: an ordinary user may build networks.

    /dev/net/tun must be open to the caller, and iproute2, nftables and util-linux installed.
    """
    script = 'mount -t tmpfs tmpfs /run && exec "$@"'
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--propagation", "private"]
    return [*unshare, "sh", "-ec", script, "sh", *map(str, command)]


class _Subnet(NamedTuple):
    """A private network of both families."""

    ipv4: IPv4Network
    ipv6: IPv6Network

    def host(self, number: int) -> tuple[IPv4Interface, IPv6Interface]:
        """The addresses of a host, whose number is written decimally in both families."""
        return (
            IPv4Interface(f"{self.ipv4.network_address + number}/{self.ipv4.prefixlen}"),
            IPv6Interface(f"{self.ipv6.network_address}{number}/{self.ipv6.prefixlen}"),
        )

    @property
    def router(self) -> tuple[IPv4Interface, IPv6Interface]:
        """The addresses of its router."""
        return self.host(254)


def _private_network(first: int, second: int) -> _Subnet:
    third = 168 if first == 192 else second
    ipv4 = f"192.168.{second}.0/24" if first == 192 else f"{first}.{second}.0.0/24"
    ipv6 = f"{first}:{third}:{second}::/64" if first == 192 else f"{first}:{second}::/64"
    return _Subnet(IPv4Network(ipv4), IPv6Network(ipv6))


def _addresses(pair: tuple[IPv4Interface, IPv6Interface], interface: str) -> tuple[str, str]:
    return f"address add {pair[0]} dev {interface}", f"address add {pair[1]} dev {interface} nodad"


def _default_routes(gate: tuple[IPv4Interface, IPv6Interface]) -> tuple[str, str]:
    return f"route add default via {gate[0].ip}", f"route add default via {gate[1].ip}"


def _route(router: Namespace, nat: Nat, network: _Subnet) -> None:
    """Make a router of a namespace whose interface `internet` leads out."""
    router.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
    if nat is Nat.MOBILE:
        router.sysctl(ipv6__conf__internet__proxy_ndp=1, ipv6__neigh__internet__proxy_delay=0)
    router.nft(_router_rules(nat, network))


def _router_rules(nat: Nat, network: _Subnet) -> str:
    # The input filter matters: without it an unsolicited packet is confirmed in conntrack and occupies the port that a
    # later outbound packet would get, so that hole punching never succeeds.
    flag = " random" if nat in {Nat.SYMMETRIC, Nat.MOBILE} else ""
    masquerade6 = "" if nat is Nat.MOBILE else f'oifname "internet" ip6 saddr {network.ipv6} masquerade{flag}'
    return f"""
table inet router {{
    chain input {{
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        iifname "lo" accept
        meta l4proto {{ icmp, ipv6-icmp }} accept
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname "internet" ct state new drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "internet" ip saddr {network.ipv4} masquerade{flag}
        {masquerade6}
    }}
}}
"""


def _remove(name: str) -> None:
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    pids = [int(pid) for pid in listed.stdout.split() if int(pid) != os.getpid()]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while any(_start_time(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _start_time(pid: int) -> int:
    """The kernel's start time of a process in ticks, 0 if there is none (or only its zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])
