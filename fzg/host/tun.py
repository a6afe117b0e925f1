"""The TUN device (spec tunnel 9.1): opening and attaching. Addresses, routes and queue length are netlink's."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import NamedTuple

# Specification constants (tunnel 9.1), <linux/if_tun.h>.
DEVICE_NAME = "tun-firezone"
NODE = Path("/dev/net/tun")
MISC = Path("/proc/misc")
_NODE_NUMBER = os.makedev(10, 200)
_NODE_MODE = stat.S_IFCHR | 0o600
_DIRECTORY_MODE = 0o751
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_TUN_F_CSUM = 0x01
_TUN_F_TSO4 = 0x02
_TUN_F_TSO6 = 0x04
_TUN_F_USO4 = 0x20
_TUN_F_USO6 = 0x40
_OFFLOADS = _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6 | _TUN_F_USO4 | _TUN_F_USO6

REMEDY = (
    "as root: modprobe tun; mkdir -p /dev/net; mknod -m 0666 /dev/net/tun c 10 200; a container has to be given it"
    " (firezone-gateway doctor says how)"
)

_MAX_NAME = 15  # IFNAMSIZ without its zero byte
_IFREQ = struct.Struct("=16sH22x")


class TunError(Exception):
    """The device cannot be had; the message says why, and what to do about it."""


class TunDevice(NamedTuple):
    """An attached, non-blocking device. Reads and writes carry the virtio header whether or not it takes offloads."""

    descriptor: int
    name: str
    offloads: bool


def open_tun(name: str = DEVICE_NAME, *, offloads: bool = True, node: Path = NODE) -> TunDevice:
    """Create or attach to the device, alone; raises `TunError`."""
    if not 0 < len(name.encode()) <= _MAX_NAME:
        raise TunError(f"{name!r} is not a device name of 1 to {_MAX_NAME} bytes")
    descriptor = _open_node(node)
    try:
        _attach(descriptor, name, node)
        return TunDevice(descriptor, name, offloads and _enable_offloads(descriptor))
    except BaseException:
        os.close(descriptor)
        raise


def has_driver(misc: Path = MISC) -> bool:
    """Whether the kernel has the TUN driver, built in or loaded."""
    with contextlib.suppress(OSError):
        return any(line.split()[1:] == ["tun"] for line in misc.read_text("utf-8", "replace").splitlines())
    return False


def _open_node(node: Path) -> int:
    try:
        return os.open(node, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise TunError(_explain(node, error)) from error
    try:
        node.parent.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        os.mknod(node, _NODE_MODE, _NODE_NUMBER)
        return os.open(node, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise TunError(f"{node} is missing and cannot be made: {error.strerror}; {REMEDY}") from error


def _explain(node: Path, error: OSError) -> str:
    if error.errno in (errno.ENODEV, errno.ENXIO):
        return f"{node}: the kernel has no TUN driver (modprobe tun)"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{node}: no permission to open it; as root: chmod 0666 {node}, or in a container: {REMEDY}"
    return f"{node}: {error.strerror}"


def _attach(descriptor: int, name: str, node: Path) -> None:
    """Without multi-queue flag, so that a second process cannot attach and steal packets."""
    request = _IFREQ.pack(name.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR)
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, request)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise TunError(
                f"TUN device {name} is in use by another process; a gateway runs here already, so stop that one first"
                " (as root, firezone-gateway doctor names it)"
            ) from error
        if error.errno in (errno.ENOTTY, errno.EBADFD):
            raise TunError(f"{node} is not the TUN driver's node") from error
        if error.errno == errno.EPERM:
            raise TunError(f"TUN device {name}: needs root or CAP_NET_ADMIN") from error
        if error.errno == errno.EINVAL:
            raise TunError(
                f"TUN device {name}: an interface of this name and another kind exists; as root: ip link delete {name}"
            ) from error
        raise TunError(f"TUN device {name}: {error.strerror}") from error


def _enable_offloads(descriptor: int) -> bool:
    """All or nothing; USO needs Linux 6.2."""
    try:
        fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _OFFLOADS)
    except OSError:
        return False
    return True
