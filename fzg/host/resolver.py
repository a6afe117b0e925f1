"""Names of DNS resources to addresses, by the host's own resolver configuration (spec tunnel 7.2, operations 1.11)."""

from __future__ import annotations

import socket
import time
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final

import dns.exception
import dns.name
import dns.query
import dns.rdatatype
import dns.resolver
import gevent

from fzg.mark import mark_socket
from fzg.tunnel.ranges import is_peer, is_proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Address = IPv4Address | IPv6Address

RESOLV_CONF: Final = Path("/etc/resolv.conf")
HOSTS: Final = Path("/etc/hosts")

# Specification (tunnel 7.2).
CACHE_ENTRIES: Final = 512
LIMIT_SECONDS: Final = 10.0

# Both lookups end a little before the limit, so that one that answered is not lost with one that did not.
_LOOKUP_SECONDS: Final = LIMIT_SECONDS - 0.5
# Once one family has addresses, the other is waited for no longer than this: some servers never answer AAAA.
_GRACE_SECONDS: Final = 3.0
# dnspython's default, kept as the ceiling: resolv.conf's 5 s would leave no time for a third nameserver.
_TRY_SECONDS: Final = 2.0
# Files are compared by their metadata at most this often, however many names are asked for.
_RECHECK_SECONDS: Final = 1.0
_HOSTS_BYTES: Final = 16 * 1024 * 1024  # block lists of a few MB are common; more is no hosts file

_TYPES: Final = (dns.rdatatype.A, dns.rdatatype.AAAA)


class Resolver:
    """Resolves absolute names; safe to call from many greenlets at a time. Follows changes of both files."""

    def __init__(
        self,
        *,
        resolv_conf: Path = RESOLV_CONF,
        hosts: Path = HOSTS,
        nameservers: Iterable[str] = (),
        port: int = 53,
        mark: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Explicit `nameservers` take the place of those in `resolv_conf`. `mark` keeps queries out of the tunnel."""
        self._resolv_conf = resolv_conf
        self._hosts_file = hosts
        self._fixed = list(nameservers)
        self._port = port
        self._clock = clock
        self._cache = dns.resolver.LRUCache(CACHE_ENTRIES)
        self._resolver = dns.resolver.Resolver(configure=False)
        if mark is not None:
            dns.query.socket_factory = _marked(mark)  # the one way dnspython offers, and for the whole process
        self._hosts: dict[str, list[Address]] = {}
        self._checked_at = float("-inf")
        self._seen: dict[Path, tuple[int, ...] | None] = {}
        self._problem = ""
        self._refresh()

    @property
    def nameservers(self) -> list[str]:
        """Addresses of the host's nameservers, in the order of the file; empty when there are none."""
        self._refresh()
        return [str(server) for server in self._resolver.nameservers]

    @property
    def problem(self) -> str:
        """A sentence when no name can be resolved by DNS, else empty."""
        self._refresh()
        return self._problem

    def resolve(self, domain: str) -> list[Address] | None:
        """All addresses of `domain`, sorted, IPv4 first; empty when it has none or is no name; None on timeout."""
        self._refresh()
        name = _absolute(domain)
        if name is None:
            return []
        known = self._hosts.get(str(name).rstrip(".").lower(), [])
        missing = [kind for kind in _TYPES if not any(_kind(address) == kind for address in known)]
        lookups = [gevent.spawn(self._lookup, name, kind) for kind in missing]
        first = gevent.joinall(lookups, timeout=LIMIT_SECONDS, count=0 if known else 1)
        has_one = bool(known) or any(lookup.value for lookup in first)
        gevent.joinall(lookups, timeout=_GRACE_SECONDS if has_one else LIMIT_SECONDS)
        answers = [lookup.value for lookup in lookups if isinstance(lookup.value, list)]
        gevent.killall(lookups, block=False)
        if lookups and not known and not answers:
            return None
        addresses = {*known, *(address for answer in answers for address in answer)}
        return sorted(filter(_is_usable, addresses), key=lambda a: (a.version, int(a)))

    def _lookup(self, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> list[Address] | None:
        """The addresses of one family; empty after any error of DNS; None when no nameserver answered in time."""
        resolver = self._resolver
        if not resolver.nameservers:
            return []
        try:
            answer = resolver.resolve(name, kind, raise_on_no_answer=False, search=False, lifetime=_LOOKUP_SECONDS)
        except dns.resolver.LifetimeTimeout:
            return None
        except (dns.exception.DNSException, OSError):
            return []
        self._prefer(resolver, answer.nameserver)
        if answer.rrset is None:
            return []
        return [ip_address(record.address) for record in answer.rrset if record.rdtype == kind]

    def _prefer(self, resolver: dns.resolver.Resolver, answered: str | None) -> None:
        """Ask the nameserver that answered first next time, so that a dead one costs its timeout only once."""
        servers = [str(server) for server in resolver.nameservers]
        if answered in servers and servers[0] != answered and not resolver.rotate:
            servers.remove(answered)
            resolver.nameservers = [answered, *servers]

    def _refresh(self) -> None:
        """Read what changed since the last look."""
        now = self._clock()
        if now - self._checked_at < _RECHECK_SECONDS:
            return
        self._checked_at = now
        if self._has_changed(self._resolv_conf):
            self._read_resolv_conf()
        if self._has_changed(self._hosts_file):
            self._hosts = _read_hosts(self._hosts_file)

    def _has_changed(self, path: Path) -> bool:
        try:
            status = path.stat()
            identity: tuple[int, ...] | None = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        except OSError:
            identity = None
        changed = path not in self._seen or self._seen[path] != identity
        self._seen[path] = identity
        return changed

    def _read_resolv_conf(self) -> None:
        resolver = dns.resolver.Resolver(configure=False)
        self._problem = ""
        try:
            resolver.read_resolv_conf(self._resolv_conf)
        except (dns.exception.DNSException, OSError, ValueError) as error:
            if not self._fixed:
                resolver.nameservers = []
                self._problem = (
                    f"{self._resolv_conf} names no usable nameserver ({error}), so DNS resources cannot be resolved. "
                    "Add a line such as: nameserver 192.0.2.53"
                )
        if self._fixed:
            resolver.nameservers = list(self._fixed)
        resolver.port = self._port
        resolver.timeout = min(resolver.timeout, _TRY_SECONDS, _LOOKUP_SECONDS / max(len(resolver.nameservers), 1))
        self._cache.flush()
        resolver.cache = self._cache
        self._resolver = resolver


def _marked(mark: int) -> Callable[[int, int, int], socket.socket]:
    def factory(family: int, kind: int, protocol: int) -> socket.socket:
        made = socket.socket(family, kind, protocol)
        try:
            mark_socket(made, mark)
        except OSError:
            made.close()
            raise
        return made

    return factory


def _absolute(domain: str) -> dns.name.Name | None:
    try:
        return dns.name.from_text(domain, dns.name.root)
    except (dns.exception.DNSException, UnicodeError, ValueError):
        return None


def _kind(address: Address) -> dns.rdatatype.RdataType:
    return dns.rdatatype.A if address.version == 4 else dns.rdatatype.AAAA


def _is_usable(address: Address) -> bool:
    """Whether a translated packet can go there, and not back into the tunnel (spec tunnel 1.1)."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return False  # no packet of IPv6 can have such a destination
    return not is_peer(address.packed) and not is_proxy(address.packed)


def _read_hosts(path: Path) -> dict[str, list[Address]]:
    """Lower-case names to their addresses; empty without a readable file."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_HOSTS_BYTES)
    except OSError:
        return {}
    names: dict[str, list[Address]] = {}
    for line in text.split("\n"):
        fields = line.partition("#")[0].split()
        if len(fields) < 2:
            continue
        try:
            address = ip_address(fields[0].partition("%")[0])
        except ValueError:
            continue
        for name in fields[1:]:
            names.setdefault(name.rstrip(".").lower(), []).append(address)
    return names
