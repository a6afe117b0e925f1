"""`host-setup` in a namespace whose /etc is a directory of the test's."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from gateway_process import TOKEN

from tests.lab.process import lab_environment
from tests.lab.program import gateway_command

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.needs("namespaces", "ip", "setpriv")]

PARAMETERS = (
    "ipv4/ip_forward", "ipv4/conf/all/src_valid_mark", "ipv6/conf/all/disable_ipv6", "ipv6/conf/all/forwarding",
    "ipv6/conf/default/forwarding", "ipv6/conf/lan0/accept_ra", "ipv6/conf/lan0/forwarding",
)  # fmt: skip
FRESH = ["0", "0", "0", "0", "0", "1", "0"]
SET_UP = ["1", "1", "0", "1", "1", "2", "1"]
OWN_MOUNTS = ("unshare", "--mount", "--propagation", "private")
NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")


class Host:
    """A namespace with an interface that learns from routers, and files of its own."""

    def __init__(self, namespace, directory):
        self.namespace = namespace
        self.etc = directory / "etc"
        self.etc.mkdir()
        for name in ("passwd", "group", "nsswitch.conf", "ld.so.cache"):
            if Path("/etc", name).exists():
                shutil.copy(Path("/etc", name), self.etc)
        (self.etc / "sysctl.d").mkdir()
        (self.etc / "sysctl.d" / "10-own.conf").write_text("net.ipv4.ip_forward = 0\n")
        namespace.bind("/etc", self.etc)
        namespace.ip("link add lan0 type bridge")
        namespace.sysctl(
            ipv4__ip_forward=0, ipv4__conf__all__src_valid_mark=0, ipv6__conf__all__forwarding=0,
            ipv6__conf__lan0__accept_ra=1,
        )  # fmt: skip

    def run(self, *arguments, before=(), prefix=()):
        done = subprocess.run(
            [*self.namespace.prefix(), *prefix, *gateway_command(), *before, "host-setup", *arguments],
            env={"PATH": os.environ["PATH"], "FIREZONE_TOKEN": TOKEN, **lab_environment()},
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done.returncode, done.stdout, done.stderr

    def values(self):
        files = [f"/proc/sys/net/{name}" for name in PARAMETERS]
        return self.namespace.run("cat", *files).stdout.split()

    def files(self):
        """Every file of /etc with its content."""
        return {str(path.relative_to(self.etc)): path.read_bytes() for path in self.etc.rglob("*") if path.is_file()}


@pytest.fixture
def host(namespace, tmp_path):
    return Host(namespace, tmp_path)


@pytest.mark.spec("OPS-47")
def test_the_five_sysctls_are_in_force_and_in_a_file_and_a_second_run_does_nothing(host):
    before = host.files()
    assert host.values() == FRESH
    status, out, err = host.run()
    assert (status, err) == (0, "")
    assert host.values() == SET_UP
    files = host.files()
    assert {name: text for name, text in files.items() if name in before} == before
    assert set(files) - set(before) == {"sysctl.d/60-firezone-gateway.conf", "modules-load.d/firezone-gateway.conf"}
    lines = files["sysctl.d/60-firezone-gateway.conf"].decode().splitlines()
    for name in PARAMETERS[:-1]:
        assert f"-net.{name.replace('/', '.')} = {SET_UP[PARAMETERS.index(name)]}" in lines
    assert files["modules-load.d/firezone-gateway.conf"].decode().splitlines()[-1] == "tun"
    assert "set net.ipv4.ip_forward=1" in out.splitlines()
    assert host.run() == (0, "All is set up already.\n", "")
    assert host.files() == files


def test_what_remove_takes_back_is_what_was_made_and_nothing_else(host):
    before, directories = host.files(), set(host.etc.rglob("*/"))
    host.namespace.sysctl(ipv4__conf__all__src_valid_mark=1)  # somebody else's already
    host.run()
    host.run()
    status, out, err = host.run("--remove")
    assert (status, err) == (0, "")
    assert host.values() == [FRESH[0], "1", *FRESH[2:]]
    assert host.files() == before
    assert set(host.etc.rglob("*/")) == directories
    assert "src_valid_mark" not in out
    assert host.run("--remove") == (0, "There is nothing to take back.\n", "")


def test_what_somebody_changed_since_stays(host):
    host.run()
    host.namespace.sysctl(ipv6__conf__lan0__accept_ra=0)
    (host.etc / "modules-load.d" / "own.conf").write_text("dummy\n")
    host.run("--remove")
    assert host.values()[:5] == FRESH[:5]
    assert host.values()[5] == "0"
    assert (host.etc / "modules-load.d" / "own.conf").exists()


def test_a_file_of_that_name_that_is_not_ours_is_left_alone(host):
    (host.etc / "sysctl.d" / "60-firezone-gateway.conf").write_text("kernel.printk = 3\n")
    before = host.files()
    status, out, err = host.run()
    assert (status, out) == (1, "")
    assert err == (
        "firezone-gateway: /etc/sysctl.d/60-firezone-gateway.conf exists and was not made by this command;"
        " move it away, then run this again\n"
    )
    assert host.run("--remove") == (0, "There is nothing to take back.\n", "")
    assert (host.files(), host.values()) == (before, FRESH)


@pytest.mark.needs("sysctl")
@pytest.mark.parametrize("arguments", [(), ("--remove",)])
def test_a_dry_run_changes_nothing_and_its_output_is_a_script_that_does_the_same(host, arguments):
    if arguments:
        host.run()
    before = host.files(), host.values()
    status, script, err = host.run(*arguments, "--dry-run", prefix=NOBODY)
    assert (status, err) == (0, "")
    assert (host.files(), host.values()) == before
    host.namespace.run("sh", "-ec", script)
    by_script = host.files(), host.values()
    assert by_script != before
    host.run(*arguments)
    assert (host.files(), host.values()) == by_script
    if not arguments:
        assert host.run() == (0, "All is set up already.\n", "")


def test_an_ordinary_user_is_told_the_command(host):
    status, out, err = host.run("--remove", prefix=NOBODY)
    assert (status, out, err) == (0, "There is nothing to take back.\n", "")
    status, out, err = host.run(prefix=NOBODY)
    assert (status, out) == (1, "")
    assert err == (
        "firezone-gateway: this needs root: sudo firezone-gateway host-setup (--dry-run shows what it would do)\n"
    )
    assert host.values() == FRESH


def test_ipv6_that_is_switched_off_stays_off_unless_masquerading_is_required(host):
    host.namespace.sysctl(ipv6__conf__all__disable_ipv6=1)
    host.run()
    assert host.values()[2] == "1"
    assert "disable_ipv6" not in (host.etc / "sysctl.d" / "60-firezone-gateway.conf").read_text()
    host.run(before=("--masquerade", "on"))
    assert host.values()[2] == "0"
    host.run("--remove")
    assert host.values()[2] == "1"


def test_a_read_only_proc_is_one_line(host):
    status, _, err = host.run(
        prefix=(*OWN_MOUNTS, "sh", "-ec", 'mount -o bind,ro /proc/sys /proc/sys; exec "$@"', "sh")
    )
    assert status == 1
    assert err.count("\n") == 1
    assert "could not be set (Read-only file system); in a container this is for the host to do" in err


def test_an_etc_that_cannot_be_written_is_one_line(host):
    status, _, err = host.run(prefix=(*OWN_MOUNTS, "sh", "-ec", 'mount -o remount,bind,ro /etc; exec "$@"', "sh"))
    assert status == 1
    assert err.count("\n") == 1
    assert "Read-only file system" in err
    assert host.values() == FRESH
