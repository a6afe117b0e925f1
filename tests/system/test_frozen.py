"""The shipped file: one executable that needs neither Python nor root."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gateway_process import TOKEN

from tests.lab.scripted_portal import wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(120, func_only=True),  # not counting the build, which the first test waits for
    pytest.mark.needs("namespaces", "tun", "ip", "nft", "setpriv", "setcap", "objdump", "strip"),
]

NOBODY = "65534"
CAP_NET_ADMIN = 1 << 12
ORDINARY_USER = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
AMBIENT = [*ORDINARY_USER, "--no-new-privs", "--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin"]


@pytest.mark.spec("OPS-4")
def test_the_version_is_exactly_one_line(frozen):
    done = subprocess.run([frozen, "--version"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("firezone-gateway 1.6.1\n", "")


@pytest.mark.spec("OPS-17")
def test_the_freezer_is_the_version_that_works_under_file_capabilities():
    import PyInstaller

    assert PyInstaller.__version__ == "6.22.2"


@pytest.mark.spec("OPS-16", "OPS-55")
@pytest.mark.parametrize("privilege", ["file capability", "ambient capability", "root"])
def test_it_does_its_work_with_each_way_of_privilege(namespace, portal, start, open_node, capable, plain, privilege):
    prefix = {"file capability": ORDINARY_USER, "ambient capability": AMBIENT, "root": []}[privilege]
    began = time.monotonic()
    gateway = start(portal=portal, prefix=prefix, command=[capable if privilege == "file capability" else plain])
    portal.connection(0).frame("set_snownet_capabilities")
    assert time.monotonic() - began < 5  # joined
    gateway.wait_ready()
    if privilege != "root":
        for pid in namespace.pids():
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            assert set(status["Uid"].split()) == {NOBODY}
            assert int(status["CapEff"], 16) == CAP_NET_ADMIN
    assert namespace.address("tun-firezone") == "100.71.4.9"
    assert namespace.address("tun-firezone", ipv6=True) == "fd00:2021:1111::a:17"
    assert "masquerade" in namespace.run("nft", "list", "ruleset").stdout
    for family in ("-4", "-6"):
        assert "not from all fwmark 0xfd002021" in namespace.run("ip", family, "rule").stdout
    assert namespace.run("cat", "/proc/sys/net/ipv4/ip_forward").stdout == "1\n"
    assert gateway.terminate() == 0
    assert gateway.levels() == {"INFO"}
    assert namespace.run("nft", "list", "ruleset").stdout == ""


@pytest.mark.spec("OPS-16", "OPS-51")
def test_it_works_where_no_memory_may_be_both_written_and_executed(namespace, portal, start, open_node, plain):
    """What MemoryDenyWriteExecute= of the unit asks for, by the kernel's own switch (Linux 6.3)."""
    deny = (
        "import ctypes, os, sys\n"
        "PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1\n"
        "if ctypes.CDLL(None).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0): sys.exit(99)\n"
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    gateway = start(portal=portal, prefix=[sys.executable, "-c", deny, *AMBIENT], command=[plain])
    wait_until(lambda: gateway.process.returncode is not None or gateway.lines, "a first line")
    if gateway.process.returncode == 99:
        pytest.skip("not applicable: the kernel has no PR_SET_MDWE")
    gateway.wait_ready()
    assert gateway.terminate() == 0
    assert gateway.levels() == {"INFO"}


@pytest.mark.spec("OPS-15")
def test_without_privilege_it_says_what_to_do_and_opens_nothing(namespace, portal, start, plain):
    gateway = start(portal=portal, prefix=ORDINARY_USER, command=[plain])
    assert gateway.ends() == 1
    first, second = gateway.lines
    assert "root" in first
    assert "CAP_NET_ADMIN" in first
    assert f"setcap cap_net_admin+eip {plain}" in second
    assert portal.requests == []


@pytest.mark.spec("OPS-15", "OPS-19")
def test_without_privilege_and_without_the_check_the_first_thing_that_needs_it_fails(portal, start, plain):
    gateway = start("--no-check", portal=portal, prefix=ORDINARY_USER, command=[plain])
    line = gateway.fails()
    assert "needs root or CAP_NET_ADMIN" in line


@pytest.mark.spec("OPS-19")
def test_a_node_that_only_root_may_open_is_told(namespace, portal, start, capable, shared_directory):
    node = shared_directory / namespace.name
    os.mknod(node, 0o600 | 0o020000, os.makedev(10, 200))
    namespace.bind("/dev/net/tun", node)
    line = start(portal=portal, prefix=ORDINARY_USER, command=[capable]).fails()
    assert "/dev/net/tun: no permission to open it" in line


def test_it_needs_nothing_of_the_host_but_the_c_library_and_zlib(namespace, portal, start, capable, shared_directory):
    """A file with capabilities does not get LD_LIBRARY_PATH, so its own libraries must be found in another way."""
    root = shared_directory / "root"
    for name in ("proc", "tmp", "dev/net", "etc"):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    os.mknod(root / "dev/net/tun", 0o666 | 0o020000, os.makedev(10, 200))
    (root / "dev/net/tun").chmod(0o666)
    listed = subprocess.run(["ldd", capable], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"(/\S+) \(0x", listed)
    folder = next(Path(path).parent for path in libraries if "libc.so" in path)
    for name in ("libm.so.6", "librt.so.1", "libutil.so.1", "libresolv.so.2"):
        libraries.append(str(folder / name))
    for path in libraries:
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.copy(capable, root)
    subprocess.run(["setcap", "cap_net_admin+eip", root / "firezone-gateway"], check=True)
    enter = f'mount -t proc proc {root}/proc && exec chroot --userspec={NOBODY}:{NOBODY} {root} "$@"'
    gateway = start(
        portal=portal,
        prefix=["unshare", "--mount", "sh", "-c", enter, "sh"],
        command=["/firezone-gateway"],
        SSL_CERT_FILE=None,
        SSL_CERT_DIR=None,
    )
    gateway.wait_ready()
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in namespace.pids())
    assert re.search(r"/tmp/_MEI\S+/libcrypto", maps)
    assert gateway.terminate() == 0
    assert "Traceback" not in gateway.output
    assert list((root / "tmp").glob("_MEI*")) == []


@pytest.mark.spec("OPS-56")
def test_where_the_temporary_directory_may_not_execute_another_can_be_named(frozen, tmp_path):
    mounted = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o noexec tmpfs {tmp_path} && exec "$@"', "sh", "env"]
    refused, done = (
        subprocess.run([*mounted, f"TMPDIR={place}", frozen, "--version"], capture_output=True, text=True, check=False)
        for place in (tmp_path, "/var/tmp")
    )
    assert refused.returncode != 0
    assert f"{tmp_path}/" in refused.stderr
    assert (done.returncode, done.stdout) == (0, "firezone-gateway 1.6.1\n")


def test_a_killed_launcher_takes_the_gateway_with_it(namespace, portal, start, plain):
    gateway = start(portal=portal, command=[plain])
    gateway.wait_ready()
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in namespace.pids())
    (unpacked,) = set(re.findall(r"/\S+/_MEI[^/]+", maps))
    gateway.process.send_signal(signal.SIGKILL)
    wait_until(lambda: namespace.pids() == [], "no process any more")
    assert not Path(unpacked).exists()
    assert namespace.run("nft", "list", "ruleset").stdout == ""
    again = start(portal=portal, command=[plain])
    again.wait_ready()


@pytest.mark.spec("OPS-5")
def test_a_token_given_as_argument_is_hidden_in_the_launcher_too(namespace, portal, start, plain):
    gateway = start(TOKEN, portal=portal, command=[plain], FIREZONE_TOKEN=None)
    gateway.wait_ready()
    pids = namespace.pids()
    assert len(pids) == 2
    for pid in pids:
        assert TOKEN.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.spec("OPS-27")
def test_an_interrupt_from_the_terminal_reaches_both_processes_and_is_one_shutdown(namespace, portal, start, plain):
    gateway = start(portal=portal, command=[plain])
    gateway.wait_ready()
    os.killpg(os.getpgid(gateway.pid), signal.SIGINT)
    assert gateway.ends() == 0
    assert gateway.levels() == {"INFO"}
