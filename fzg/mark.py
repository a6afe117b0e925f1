"""The mark of our own sockets, by which a policy rule keeps what they send out of the tunnel (spec tunnel 1.4, 9.5)."""

from __future__ import annotations

import socket
import struct
from typing import Final

SOCKET_MARK: Final = 0xFD002021


def mark_socket(marked: socket.socket, mark: int) -> None:
    """Set SO_MARK. Raises OSError where that is refused: it needs root or CAP_NET_ADMIN."""
    # Packed, as the value exceeds a C int.
    marked.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", mark))
