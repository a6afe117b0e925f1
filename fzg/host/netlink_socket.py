"""A synchronous netlink socket. pyroute2 supplies the message formats; the transport is ours.

The kernel answers every request that is sent here before `sendmsg` returns, and continues a dump inside `recv`. So
nothing ever waits, and neither an event loop nor a thread is needed to keep requests apart. pyroute2's own sockets wait
for one acknowledgement per message, and wait for ever when the kernel refuses a whole nftables batch with one error.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NLM_F_REQUEST: Final = 0x0001
NLM_F_ACK: Final = 0x0004
NLM_F_DUMP: Final = 0x0300
NLM_F_REPLACE: Final = 0x0100
NLM_F_EXCL: Final = 0x0200
NLM_F_CREATE: Final = 0x0400
NLM_F_APPEND: Final = 0x0800

_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLM_F_DUMP_INTR: Final = 0x0010
_NLM_F_CAPPED: Final = 0x0100
_NLM_F_ACK_TLVS: Final = 0x0200
_NLMSGERR_ATTR_MSG: Final = 1

_SOL_NETLINK: Final = 270
_NETLINK_CAP_ACK: Final = 10  # an error need not carry the whole refused request
_NETLINK_EXT_ACK: Final = 11  # the kernel's own sentence about what is wrong
_NETLINK_GET_STRICT_CHK: Final = 12  # dumps honour the table asked for (Linux 4.20)

_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence number, port id
_ATTRIBUTE: Final = struct.Struct("=HH")  # length, type
_RECEIVE_BYTES: Final = 1 << 17  # the kernel fills at most 32 KiB per part of a dump
_DUMP_ATTEMPTS: Final = 5  # a dump that raced with a change is inconsistent and is taken again


class NetlinkError(OSError):
    """The kernel refused a request; `strerror` has its reason, in its own words where it gave some."""


class Message(Protocol):
    """What is used of pyroute2's `nlmsg` classes: dictionaries that encode to and decode from bytes."""

    data: Any

    def __init__(self, data: bytes | None = None) -> None: ...
    def __getitem__(self, key: str, /) -> Any: ...
    def __setitem__(self, key: str, value: Any, /) -> None: ...
    def get_attr(self, name: str, /) -> Any: ...  # noqa: D102 - named by pyroute2
    def reset(self) -> None: ...  # noqa: D102
    def encode(self) -> None: ...  # noqa: D102
    def decode(self) -> None: ...  # noqa: D102


class NetlinkSocket:
    """One netlink socket. Not shared between threads; `protocol` is a `NETLINK_` number."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.settimeout(0)
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
            try:
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            except OSError:  # an older kernel: errors are less wordy, dumps less filtered
                continue
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the socket; idempotent."""
        self._socket.close()

    def request(self, message: Message, message_type: int, flags: int = 0) -> None:
        """Carry out one change; raises `NetlinkError` when the kernel refuses it."""
        self.batch([(message, message_type, flags | NLM_F_ACK)])

    def batch(self, messages: Iterable[tuple[Message, int, int]]) -> None:
        """Send (message, type, flags) in one datagram, an nftables transaction; raises the first refusal."""
        datagram = bytearray()
        for message, message_type, flags in messages:
            datagram += self._encode(message, message_type, flags | NLM_F_REQUEST)
        self._socket.send(datagram)
        refusal: NetlinkError | None = None
        while (part := self._receive()) is not None:
            for kind, flags, body in _split(part):
                if kind == _NLMSG_ERROR and refusal is None:
                    refusal = _error(body, flags)
        if refusal is not None:
            raise refusal

    def dump(self, message: Message, message_type: int, *, containing: Sequence[bytes] = ()) -> list[Any]:
        """All objects of one kind, decoded with the class of `message`, whose fields and attributes filter.

        Only those are decoded whose encoded form has one of `containing` in it: decoding takes about 30 us apiece, and
        hosts with a hundred thousand routes or chains exist.
        """
        for _ in range(_DUMP_ATTEMPTS):
            self._socket.send(self._encode(message, message_type, NLM_F_REQUEST | NLM_F_DUMP))
            objects, interrupted = self._collect(type(message), containing)
            if not interrupted:
                return objects
        raise NetlinkError(errno.EINTR, "the list changed each time it was read")

    def _collect(self, message_class: type[Message], containing: Sequence[bytes]) -> tuple[list[Any], bool]:
        objects: list[Any] = []
        interrupted = False
        while (part := self._receive()) is not None:
            for kind, flags, body in _split(part):
                interrupted = interrupted or bool(flags & _NLM_F_DUMP_INTR)
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    if (refusal := _error(body, flags)) is not None:
                        raise refusal
                    return objects, interrupted
                if containing and not any(pattern in body for pattern in containing):
                    continue
                message = message_class(_HEADER.pack(_HEADER.size + len(body), kind, flags, 0, 0) + body)
                message.decode()
                objects.append(message)
        return objects, interrupted

    def _encode(self, message: Message, message_type: int, flags: int) -> bytes:
        self._sequence += 1
        header = message["header"]
        header["type"], header["flags"], header["sequence_number"] = message_type, flags, self._sequence
        message.reset()  # a decoded message still refers to the bytes it came from
        message.encode()
        return bytes(message.data)

    def _receive(self) -> bytes | None:
        """The next part of an answer; None when the kernel has said all."""
        try:
            return self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return None


def _split(part: bytes) -> Iterable[tuple[int, int, bytes]]:
    offset = 0
    while offset + _HEADER.size <= len(part):
        length, kind, flags, _, _ = _HEADER.unpack_from(part, offset)
        if length < _HEADER.size:
            return
        body = part[offset + _HEADER.size : offset + length]
        yield kind, flags, body
        offset += (length + 3) & ~3


def _error(body: bytes, flags: int) -> NetlinkError | None:
    """The refusal in the body of an NLMSG_ERROR or NLMSG_DONE; None where it says success."""
    (code,) = struct.unpack_from("=i", body) if len(body) >= 4 else (0,)
    if code == 0:
        return None
    return NetlinkError(-code, _kernel_text(body, flags) or os.strerror(-code))


def _kernel_text(body: bytes, flags: int) -> str:
    if not flags & _NLM_F_ACK_TLVS or len(body) < 8:
        return ""
    (refused_length,) = struct.unpack_from("=I", body, 4)
    offset = 4 + (_HEADER.size if flags & _NLM_F_CAPPED else (refused_length + 3) & ~3)
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        if length < _ATTRIBUTE.size:
            break
        if kind == _NLMSGERR_ATTR_MSG:
            return body[offset + _ATTRIBUTE.size : offset + length].rstrip(b"\0").decode(errors="replace")
        offset += (length + 3) & ~3
    return ""
