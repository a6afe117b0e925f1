"""TCP streams at a steady rate: `python -m tests.bench.load sink HOST PORT` and `... pour HOST PORT MBIT SOURCE...`.

The kernel paces them, so that they cost the machine little but what passes through the gateway. Each ends with its
standard input; a sink then prints how many bytes came in how many seconds, and from how many connections.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import time

_SO_MAX_PACING_RATE = 47  # <asm-generic/socket.h>
_IP_FREEBIND = 15
_CHUNK = bytes(1 << 15)


def sink(host: str, port: int) -> None:
    """Read from whoever connects."""
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    listener = socket.create_server((host, port), backlog=64)
    selector.register(listener, selectors.EVENT_READ)
    buffer, connections, total, began = bytearray(1 << 20), 0, 0, 0.0
    print("listening", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fd == 0:
                if not os.read(0, 100):
                    took = time.monotonic() - began if began else 0.0
                    print(json.dumps({"bytes": total, "seconds": took, "connections": connections}))
                    return
                total, began = 0, time.monotonic()  # any line starts the clock
            elif key.fileobj is listener:
                accepted, _ = listener.accept()
                connections += 1
                selector.register(accepted, selectors.EVENT_READ)
            elif isinstance(key.fileobj, socket.socket):
                size = key.fileobj.recv_into(buffer)
                total += size
                if not size:
                    selector.unregister(key.fileobj)


def pour(host: str, port: int, mbit: float, *sources: str) -> None:
    """Write from each of these addresses, each at this rate."""
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    for source in sources:
        stream = socket.socket()
        stream.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        stream.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, int(mbit * 1e6 / 8))
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        stream.bind((source, 0))
        stream.settimeout(20)
        stream.connect((host, port))
        stream.setblocking(False)
        selector.register(stream, selectors.EVENT_WRITE)
    print("connected", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fd == 0:
                return
            if isinstance(key.fileobj, socket.socket):
                try:
                    key.fileobj.send(_CHUNK)
                except OSError:  # the sink has seen enough
                    return


if __name__ == "__main__":
    _, mode, *arguments = sys.argv
    if mode == "sink":
        sink(arguments[0], int(arguments[1]))
    else:
        pour(arguments[0], int(arguments[1]), float(arguments[2]), *arguments[3:])
