"""A small process inside a namespace that the bench asks over its pipes: UDP echoes and forgotten NAT mappings.

Each line is a request `{"op": NAME, ...}` and gets an answer `{"ok": ...}` or `{"error": ...}`. It is there because
starting a program for each of these costs more than what is measured.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Self

from tests.lab.process import lab_environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.lab.namespaces import Namespace

# <linux/netlink.h>, <linux/netfilter/nfnetlink.h>, <linux/netfilter/nfnetlink_conntrack.h>.
NETLINK_NETFILTER = 12
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 1, 4, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
CT_GET, CT_DELETE = 0x101, 0x102
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY = 1, 2
_HEADER = struct.Struct("=IHHII")
_NFGEN = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")


class Outpost:
    """The bench's side of it."""

    def __init__(self, namespace: Namespace) -> None:
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *namespace.prefix(), sys.executable, "-m", "tests.bench.outpost"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ) | lab_environment(),
            text=True,
            start_new_session=True,  # Ctrl-C is the bench's
        )

    def echoes(self, host: str, port: int, *, count: int = 1, timeout: float = 5.0) -> list[float]:
        """Milliseconds from each datagram to its answer, one after the other; the next goes after the answer."""
        result: list[float] = self._ask("echoes", host=host, port=port, count=count, timeout=timeout)
        return result

    def forget(self, addresses: Sequence[str]) -> int:
        """Let this router forget all connections to or from these addresses; how many there were."""
        result: int = self._ask("forget", addresses=list(addresses))
        return result

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, op: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "it ended"}')
        if "error" in answer:
            raise RuntimeError(f"{op}: {answer['error']}")
        return answer["ok"]


def _op_echoes(host: str, port: int, count: int, timeout: float) -> list[float]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    took = []
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(timeout)
        sock.connect((host, port))
        for _ in range(count):
            began = time.perf_counter()
            sock.send(b"bench")
            sock.recv(100)
            took.append((time.perf_counter() - began) * 1000)
    return took


def _op_forget(addresses: list[str]) -> int:
    packed = [ip_address(address).packed for address in addresses]
    forgotten = 0
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as sock:
        sock.bind((0, 0))
        for family in (socket.AF_INET, socket.AF_INET6):
            for original, reply in list(_tracked(sock, family)):
                if any(address in original or address in reply for address in packed):
                    forgotten += _delete(sock, family, original)
    return forgotten


def _tracked(sock: socket.socket, family: int) -> Iterator[tuple[bytes, bytes]]:
    """The tuples of all connections, as the kernel writes them."""
    sock.send(_message(CT_GET, NLM_F_DUMP, family, b""))
    while True:
        data = sock.recv(1 << 17)
        while data:
            length, kind, *_ = _HEADER.unpack_from(data)
            if kind in {NLMSG_DONE, NLMSG_ERROR}:
                return
            attributes = dict(_attributes(data[_HEADER.size + _NFGEN.size : length]))
            yield attributes[CTA_TUPLE_ORIG], attributes[CTA_TUPLE_REPLY]
            data = data[length:]


def _delete(sock: socket.socket, family: int, original: bytes) -> bool:
    tuple_ = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(original), CTA_TUPLE_ORIG | 0x8000) + original
    sock.send(_message(CT_DELETE, NLM_F_ACK, family, tuple_))
    error: int = struct.unpack_from("=i", sock.recv(4096), _HEADER.size)[0]
    return error == 0


def _message(kind: int, flags: int, family: int, attributes: bytes) -> bytes:
    body = _NFGEN.pack(family, 0, 0) + attributes
    return _HEADER.pack(_HEADER.size + len(body), kind, flags | NLM_F_REQUEST, 0, 0) + body


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind & 0x3FFF, data[_ATTRIBUTE.size : length]
        data = data[length + 3 & ~3 :]


def _serve() -> None:
    operations: dict[str, Any] = {"echoes": _op_echoes, "forget": _op_forget}
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = {"ok": operations[arguments.pop("op")](**arguments)}
        except OSError as error:
            answer = {"error": repr(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
