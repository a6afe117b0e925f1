"""The kernel's ceilings for socket buffers, which only the machine's own network namespace has; here they are files."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.needs("namespaces", "tun", "ip", "nft")]

WANTED = {"rmem_max": 16 * 1024 * 1024, "wmem_max": 2 * 1024 * 1024}


@pytest.mark.spec("OPS-44")
@pytest.mark.parametrize(
    ("present", "arguments", "expected"),
    [
        ({"rmem_max": 212_992, "wmem_max": 212_992}, (), WANTED),
        ({"rmem_max": 134_217_728, "wmem_max": 16_777_216}, (), {"rmem_max": 134_217_728, "wmem_max": 16_777_216}),
        ({"rmem_max": 212_992, "wmem_max": 4_194_304}, (), WANTED | {"wmem_max": 4_194_304}),
        ({"rmem_max": 212_992, "wmem_max": 212_992}, ("--no-inc-buf",), {"rmem_max": 212_992, "wmem_max": 212_992}),
    ],
    ids=["low", "high", "one of each", "not wanted"],
)
def test_ceilings_are_raised_and_never_lowered(namespace, portal, start, tmp_path, present, arguments, expected):
    for name, value in present.items():
        (tmp_path / name).write_text(f"{value}\n")
        namespace.bind(f"/proc/sys/net/core/{name}", tmp_path / name)
    gateway = start(*arguments, portal=portal)
    gateway.wait_ready()
    assert {name: int((tmp_path / name).read_text()) for name in present} == expected
    assert gateway.terminate() == 0
    assert {name: int((tmp_path / name).read_text()) for name in present} == expected
    said = [line for line in gateway.lines if "net.core." in line]
    assert len(said) == sum(expected[name] != present[name] for name in present)
    assert all(" INFO " in line and "Raised" in line for line in said)


@pytest.mark.spec("OPS-44")
def test_ceilings_that_may_not_be_raised_are_no_warning(namespace, portal, start, tmp_path):
    (tmp_path / "rmem_max").write_text("212992\n")
    namespace.bind("/proc/sys/net/core/rmem_max", tmp_path / "rmem_max")
    script = 'mount -o remount,bind,ro /proc/sys/net/core/rmem_max; exec "$@"'
    read_only = ("unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh")
    gateway = start(portal=portal, prefix=read_only)
    gateway.wait_ready()
    assert "net.core.rmem_max stays at 212992 bytes" in gateway.output
    assert gateway.terminate() == 0
    assert gateway.levels() == {"INFO"}
