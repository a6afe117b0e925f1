"""What nobody asked for: `python -m tests.bench.strangers KIND PER_SECOND SECONDS HOST PORT GATEWAY_KEY`.

Sends at a steady rate from several ports and prints how many it were. Kinds: `handshakes` are initiations with a right
MAC1, as of anybody who knows the gateway's public key (hexadecimal); `junk` is neither STUN nor WireGuard.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from hashlib import blake2s

PORTS = 64
VARIETY = 5000
_SLICE_S = 0.002


def flood(datagrams: list[bytes], to: tuple[str, int], *, per_second: int, seconds: float) -> dict[str, float]:
    """Send in slices of 2 ms; what a full queue refuses is lost."""
    sockets = []
    for _ in range(PORTS):
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.setblocking(False)
        made.connect(to)
        sockets.append(made)
    began = at = time.monotonic()
    sent = 0
    while at < began + seconds:
        due = int((at - began) * per_second)
        for number in range(sent, due):
            with contextlib.suppress(OSError):
                sockets[number % PORTS].send(datagrams[number % len(datagrams)])
        sent = max(sent, due)
        time.sleep(_SLICE_S)
        at = time.monotonic()
    return {"sent": sent, "seconds": at - began}


def handshakes(gateway_key: bytes) -> list[bytes]:
    """Nothing but their MAC1 is true."""
    key = blake2s(b"mac1----" + gateway_key).digest()
    bodies = [b"\1\0\0\0" + os.urandom(112) for _ in range(VARIETY)]
    return [body + blake2s(body, key=key, digest_size=16).digest() + bytes(16) for body in bodies]


def junk() -> list[bytes]:
    """Of many lengths; some begin as if they were something."""
    heads = [b"", b"", b"\0\1\0\x2c\x21\x12\xa4\x42", b"\4\0\0\0", b"\1\0\0\0", b"\x40\1\0\x20", b"\2\0\0\0"]
    return [heads[n % len(heads)] + os.urandom(20 + n * 7 % 400) for n in range(VARIETY)]


if __name__ == "__main__":
    _, kind, per_second, seconds, host, port, key = sys.argv
    made = handshakes(bytes.fromhex(key)) if kind == "handshakes" else junk()
    print(json.dumps(flood(made, (host, int(port)), per_second=int(per_second), seconds=float(seconds))))
