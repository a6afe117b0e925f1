"""Who holds a port or the TUN device, as far as /proc shows it to this user."""

from __future__ import annotations

import contextlib
import os
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from fzg.host.tun import NODE

if TYPE_CHECKING:
    from collections.abc import Iterable

TABLE_BYTES: Final = 4 << 20
"""What is read of a table in /proc/net: some ten thousand lines."""

_TCP_LISTEN: Final = "0A"  # a state in /proc/net/tcp


class Process(NamedTuple):
    """Somebody who holds something."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


class Listener(NamedTuple):
    """A socket on a port; whose it is where that can be read."""

    address: str
    holder: Process | None


def udp_listeners(port: int) -> list[Listener]:
    """The UDP sockets on a port, of both families."""
    return _listeners("udp", port, state="")


def tcp_listeners(port: int) -> list[Listener]:
    """The listening TCP sockets on a port, of both families."""
    return _listeners("tcp", port, state=_TCP_LISTEN)


def is_elsewhere(pid: int) -> bool:
    """Whether this process is known to be in another network namespace than we are."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    return False


def _listeners(protocol: str, port: int, *, state: str) -> list[Listener]:
    found = list(_sockets(protocol, port, state))
    holders = _holders({inode for _, inode in found})
    return [Listener(address, holders.get(inode)) for address, inode in found]


def _sockets(protocol: str, port: int, state: str) -> Iterable[tuple[str, int]]:
    """Local address and inode of each socket on a port, in the given state unless that is empty."""
    for suffix in ("", "6"):
        with contextlib.suppress(OSError), Path(f"/proc/net/{protocol}{suffix}").open(encoding="ascii") as table:
            for line in table.read(TABLE_BYTES).splitlines()[1:]:
                fields = line.split()
                host, _, number = fields[1].partition(":")
                if int(number, 16) == port and state in ("", fields[3]):
                    yield _address(host), int(fields[9])


def _address(text: str) -> str:
    """As /proc/net writes them: 32-bit words in the host's byte order."""
    words = [int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8)]
    return str(ip_address(b"".join(words)))


def _processes() -> Iterable[tuple[int, Path]]:
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            yield int(directory.name), directory


def _descriptors(directory: Path) -> Iterable[tuple[str, str]]:
    """Number and target of each open file; none where they are not ours to read."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(directory / "fd"):
            with contextlib.suppress(OSError):
                yield entry.name, str(Path(entry.path).readlink())


def _process(pid: int, directory: Path) -> Process:
    with contextlib.suppress(OSError):
        return Process(pid, (directory / "comm").read_text(encoding="utf-8", errors="replace").strip())
    return Process(pid, "a process")


def _holders(inodes: set[int]) -> dict[int, Process]:
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, Process] = {}
    if wanted:
        for pid, directory in _processes():
            for _, target in _descriptors(directory):
                if target in wanted:
                    found.setdefault(wanted[target], _process(pid, directory))
    return found


def tun_holder(interface: str) -> Process | None:
    """The process that holds the TUN device of this name in this network namespace."""
    with contextlib.suppress(OSError):
        here = Path("/proc/self/ns/net").readlink()
        for pid, directory in _processes():
            for number, target in _descriptors(directory):
                if target != str(NODE):
                    continue
                with contextlib.suppress(OSError):
                    about = (directory / "fdinfo" / number).read_text(encoding="utf-8", errors="replace")
                    if f"iff:\t{interface}\n" in about and (directory / "ns/net").readlink() == here:
                        return _process(pid, directory)
    return None
