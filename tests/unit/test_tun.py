"""What opening the TUN device says when the kernel refuses."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

import pytest

from fzg.host import tun

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0


class Kernel:
    """`fcntl.ioctl` on a descriptor of an ordinary file."""

    def __init__(self, refusals: dict[int, int]) -> None:
        self.refusals = refusals
        self.calls: list[tuple[int, object]] = []

    def ioctl(self, descriptor: int, request: int, argument: object) -> int:
        os.fstat(descriptor)
        self.calls.append((request, argument))
        if request in self.refusals:
            raise OSError(self.refusals[request], os.strerror(self.refusals[request]))
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Kernel]:
    def make(**refusals: int) -> Kernel:
        kernel = Kernel(
            {{"attach": TUNSETIFF, "offload": TUNSETOFFLOAD}[name]: code for name, code in refusals.items()}
        )
        monkeypatch.setattr(tun, "fcntl", kernel)
        return kernel

    return make


@pytest.fixture
def node(tmp_path: Path) -> Path:
    path = tmp_path / "tun"
    path.touch()
    return path


def test_the_requests_are_those_of_the_specification(kernel: Callable[..., Kernel], node: Path):
    asked = kernel()
    device = tun.open_tun(node=node)
    assert (device.name, device.offloads) == ("tun-firezone", True)
    (attach, request), (offload, features) = asked.calls
    assert (attach, offload, features) == (TUNSETIFF, TUNSETOFFLOAD, 0x67)
    assert isinstance(request, bytes)
    assert (len(request), request[:16].rstrip(b"\0"), struct.unpack_from("=H", request, 16)) == (
        40,
        b"tun-firezone",
        (0x5001,),
    )
    os.close(device.descriptor)


@pytest.mark.parametrize("why", ["switched off", "before 6.2"])
def test_offloads_are_all_or_nothing(kernel: Callable[..., Kernel], node: Path, why: str):
    asked = kernel(offload=errno.EINVAL) if why == "before 6.2" else kernel()
    device = tun.open_tun(node=node, offloads=why == "before 6.2")
    assert not device.offloads
    assert len(asked.calls) == (2 if why == "before 6.2" else 1)
    os.close(device.descriptor)


@pytest.mark.parametrize(("code", "message"), [
    (errno.EBUSY, "tun-firezone is in use by another process; a gateway runs here already"),
    (errno.EPERM, "needs root or CAP_NET_ADMIN"),
    (errno.EINVAL, "another kind"), (errno.ENOMEM, "Cannot allocate memory"),
])  # fmt: skip
def test_a_refused_attachment_is_explained_and_leaves_nothing_open(
    kernel: Callable[..., Kernel], node: Path, code: int, message: str
):
    kernel(attach=code)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(tun.TunError, match=message):
        tun.open_tun(node=node)
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize(("code", "message"), [
    (errno.ENODEV, "modprobe tun"), (errno.EACCES, "no permission"), (errno.EMFILE, "Too many open files"),
])  # fmt: skip
def test_a_node_that_cannot_be_opened_is_explained(
    monkeypatch: pytest.MonkeyPatch, node: Path, code: int, message: str
):
    def refuse(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tun.os, "open", refuse)
    with pytest.raises(tun.TunError, match=message):
        tun.open_tun(node=node)


def test_a_node_that_cannot_be_made_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(*arguments: object) -> None:
        assert arguments == (tmp_path / "net" / "tun", 0o020600, os.makedev(10, 200))
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(tun.os, "mknod", refuse)
    with pytest.raises(tun.TunError, match="is missing and cannot be made: Operation not permitted"):
        tun.open_tun(node=tmp_path / "net" / "tun")


@pytest.mark.parametrize("name", ["", "x" * 16])
def test_a_name_the_kernel_would_cut_is_refused(name: str):
    with pytest.raises(tun.TunError, match="1 to 15 bytes"):
        tun.open_tun(name)
