"""The shipped file on hosts of all kinds: whose user it is, what is missing, where nothing may be written or run."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from frozen_world import (
    OF_THE_HOST,
    UNPACKED,
    NewUser,
    hide_libraries,
    launcher_of,
    processes_of,
    programs_mapped,
    status_of,
)
from test_host_network import DOCKER

from tests.lab.scripted_portal import wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(120, func_only=True),  # not counting the build, which the first test waits for
    pytest.mark.needs("namespaces", "tun", "ip", "nft", "setpriv", "setcap", "objdump", "strip", "su", "useradd"),
]

CAP_NET_ADMIN = 1 << 12
VERSION_LINE = "firezone-gateway 1.6.1\n"
OLD_S = 3600.0


@pytest.fixture
def own(namespace, shared_directory):
    """A directory of the test's own that every user may enter."""
    path = shared_directory / namespace.name
    path.mkdir()
    path.chmod(0o755)
    return path


@pytest.fixture
def newcomer(namespace, own):
    """A user made just now, on a host where every user may open the TUN device and no gateway ever ran."""
    user = NewUser(namespace, own)
    state = own / "var-lib"
    state.mkdir()
    namespace.bind("/var/lib", state)
    node = own / "tun"
    os.mknod(node, 0o666 | 0o020000, os.makedev(10, 200))
    node.chmod(0o666)
    namespace.bind("/dev/net/tun", node)
    return user


def end(namespace, gateway, file):
    """Ask the launcher to end, not `su`, which would kill what takes longer than two seconds."""
    os.kill(launcher_of(namespace, file), signal.SIGTERM)
    return gateway.ends()


@pytest.mark.spec("OPS-16", "OPS-17", "OPS-50")
def test_as_a_new_user_with_the_file_capability_it_works_where_the_host_has_none_of_its_libraries(
    namespace, portal, start, capable, newcomer, own
):
    hidden = hide_libraries(namespace, capable, own)
    assert {"libcrypto.so.3", "libssl.so.3"} & hidden or not Path("/usr/bin/openssl").exists()
    gateway = start(portal=portal, prefix=newcomer.prefix, command=[capable], SSL_CERT_FILE=None)
    gateway.wait_ready()
    pids = processes_of(namespace, capable)
    assert len(pids) == 2
    for pid in pids:
        status = status_of(pid)
        assert set(status["Uid"].split()) == {str(newcomer.uid)}
        assert {int(status[name], 16) for name in ("CapEff", "CapPrm")} == {CAP_NET_ADMIN}
    mapped = set().union(*map(programs_mapped, pids))
    unpacked = {path for path in mapped if UNPACKED.match(path)}
    foreign = {Path(path).name for path in mapped - unpacked - {str(capable)}}
    assert {name for name in foreign if not OF_THE_HOST.fullmatch(name)} == set()
    names = {Path(path).name.split(".so")[0].split(".cpython")[0] for path in unpacked}
    assert {"libcrypto", "libssl", "_native"} <= names
    assert end(namespace, gateway, capable) == 0
    assert gateway.levels() == {"INFO"}
    assert not [path for path in unpacked if Path(path).exists()]


@pytest.mark.spec("OPS-18")
def test_its_child_works_with_the_capability_and_no_other_process_is_ever_made(
    namespace, portal, start, capable, newcomer
):
    gateway = start(portal=portal, prefix=newcomer.prefix, command=[capable])
    gateway.wait_ready()
    launcher = launcher_of(namespace, capable)
    (child,) = set(processes_of(namespace, capable)) - {launcher}
    assert Path(f"/proc/{child}/task/{child}/children").read_text() == ""
    assert int(status_of(child)["CapEff"], 16) == CAP_NET_ADMIN
    assert "masquerade" in namespace.run("nft", "list", "ruleset").stdout
    assert end(namespace, gateway, capable) == 0


@pytest.mark.spec("OPS-45", "OPS-47", "OPS-48")
def test_with_the_capability_alone_it_sets_the_host_up_as_specified(namespace, portal, start, capable, newcomer):
    namespace.ip("link add lan0 type bridge", "link set lan0 up", "address add 192.0.2.1/24 dev lan0")
    namespace.ip("route add default via 192.0.2.254")
    namespace.sysctl(ipv4__ip_forward=0, ipv4__conf__all__src_valid_mark=0, ipv6__conf__all__forwarding=0)
    namespace.nft(DOCKER)
    gateway = start(portal=portal, prefix=newcomer.prefix, command=[capable])
    gateway.wait_ready()
    show = lambda *words: json.loads(namespace.run("ip", "-d", "-j", *words).stdout)
    (device,) = show("address", "show", "dev", "tun-firezone")
    assert (device["mtu"], device["txqlen"]) == (1280, 10_000)
    assert device["linkinfo"]["info_data"]["type"] == "tun"
    assert [(each["local"], each["prefixlen"]) for each in device["addr_info"]] == [
        ("100.71.4.9", 32),
        ("fd00:2021:1111::a:17", 128),
    ]
    for family, network in (("-4", "100.64.0.0/11"), ("-6", "fd00:2021:1111::/107")):
        (rule,) = [rule for rule in show(family, "rule") if rule["priority"] == 100]
        assert (rule["not"], rule["fwmark"], rule["protocol"]) == (None, "0xfd002021", "kernel")
        routes = show(family, "route", "show", "table", str(0x2021FD00))
        assert [(route["dst"], route["dev"]) for route in routes] == [(network, "tun-firezone")]
        assert int(rule["table"]) == 0x2021FD00
    way = lambda *words: show("route", "get", *words)[0]["dev"]
    assert (way("100.64.5.5"), way("100.64.5.5", "mark", "0xfd002021")) == ("tun-firezone", "lan0")
    assert (way("192.0.2.9"), way("198.51.100.1")) == ("lan0", "lan0")
    rules = namespace.run("nft", "list", "ruleset").stdout
    for network in ("ip saddr 100.64.0.0/11", "ip6 saddr fd00:2021:1111::/107"):
        assert f'{network} oifname != "tun-firezone" masquerade' in rules
    first = re.findall(r"chain FORWARD {\n.*\n\t\t(.*)\n\t\t(.*)", rules)
    assert first == [('iifname "tun-firezone" accept comment "firezone-gateway"',
                      'oifname "tun-firezone" accept comment "firezone-gateway"')] * 2  # fmt: skip
    forwarding = ("ipv4/ip_forward", "ipv4/conf/all/src_valid_mark", "ipv6/conf/all/forwarding")
    assert namespace.run("cat", *(f"/proc/sys/net/{name}" for name in forwarding)).stdout.split() == ["1"] * 3
    assert end(namespace, gateway, capable) == 0
    assert namespace.run("nft", "list", "ruleset").stdout.count("firezone") == 0


class TestTemporaryDirectories:
    """A program with capabilities does not get TMPDIR; TEMP and TMP it does."""

    def run(self, namespace, newcomer, capable, mounts, *variables):
        """`--version` as the new user, after these mounts."""
        command = [*newcomer.prefix, "env", *variables, capable, "--version"]
        script = f'{mounts} && exec "$@"'
        words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *command]
        return namespace.run(*words, check=False)

    @pytest.mark.spec("OPS-56")
    @pytest.mark.parametrize("variable", ["TEMP", "TMP"])
    def test_where_tmp_may_not_execute_another_can_be_named(self, namespace, newcomer, capable, own, variable):
        place = own / "place"
        place.mkdir()
        place.chmod(0o1777)
        noexec = "mount -t tmpfs -o noexec,mode=1777 tmpfs /tmp && mount -t tmpfs -o noexec,mode=1777 tmpfs /var/tmp"
        mounts = f"mount --bind {own.parent} /mnt && {noexec}"  # it lies in /tmp itself, which is covered
        reachable = Path("/mnt") / capable.relative_to(own.parent)
        refused = self.run(namespace, newcomer, reachable, mounts)
        assert refused.returncode != 0
        assert re.search(r"/tmp/_MEI\S+: failed to map segment from shared object", refused.stderr)
        place = Path("/mnt") / place.relative_to(own.parent)
        done = self.run(namespace, newcomer, reachable, mounts, f"{variable}={place}")
        assert (done.returncode, done.stdout, done.stderr) == (0, VERSION_LINE, "")

    def test_on_a_read_only_root_a_directory_in_memory_can_be_named(self, namespace, newcomer, capable, own):
        covered = " && ".join(f"mount -t tmpfs -o ro tmpfs {place}" for place in ("/tmp", "/var/tmp"))
        mounts = (
            "mount -t tmpfs tmpfs /mnt && mkdir /mnt/memory /mnt/file && "
            "mount -t tmpfs -o mode=1777 tmpfs /mnt/memory && "
            f"mount --bind {own.parent} /mnt/file && {covered} && mount -o remount,ro,bind /mnt"
        )
        reachable = Path("/mnt/file") / capable.relative_to(own.parent)
        refused = self.run(namespace, newcomer, reachable, mounts)
        assert refused.returncode != 0
        assert "Could not create temporary directory" in refused.stderr
        done = self.run(namespace, newcomer, reachable, mounts, "TEMP=/mnt/memory")
        assert (done.returncode, done.stdout, done.stderr) == (0, VERSION_LINE, "")

    def test_on_a_full_disk_it_ends_and_the_next_start_removes_what_it_had_unpacked(
        self, namespace, newcomer, capable, own
    ):
        place = own / "small"
        place.mkdir()
        start = shlex.join([*newcomer.prefix, "env", f"TEMP={place}", str(capable), "--version"])
        script = f"""
            mount -t tmpfs -o size=4m,mode=1777 tmpfs {place}
            {start}
            echo "status $?, folders: $(ls -A {place} | wc -l)"
            mount -o remount,size=64m {place}
            touch --date '1 hour ago' {place}/_MEI*
            {start}
            echo "status $?, folders: $(ls -A {place} | wc -l)"
        """
        done = namespace.run("unshare", "--mount", "--propagation", "private", "sh", "-c", script, check=False)
        assert "Failed to extract" in done.stderr
        assert done.stdout == f"status 255, folders: 1\n{VERSION_LINE}status 0, folders: 0\n"


class TestLeftovers:
    """The unpacked files of a gateway whose two processes were both killed."""

    @pytest.fixture
    def place(self, own):
        path = own / "place"
        path.mkdir()
        path.chmod(0o1777)
        return path

    @pytest.fixture
    def begin(self, start, portal, newcomer, capable, place):
        def one(**variables):
            gateway = start(portal=portal, prefix=newcomer.prefix, command=[capable], TEMP=str(place), **variables)
            gateway.wait_ready()
            return gateway

        return one

    @staticmethod
    def kill(namespace, file):
        pids = processes_of(namespace, file)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: processes_of(namespace, file) == [], "no process any more")

    @staticmethod
    def make_old(path):
        os.utime(path, (time.time() - OLD_S,) * 2)

    def test_a_killed_launcher_takes_a_child_with_capabilities_with_it(self, namespace, begin, capable, place):
        begin()
        os.kill(launcher_of(namespace, capable), signal.SIGKILL)
        wait_until(lambda: processes_of(namespace, capable) == [], "no process any more")
        assert list(place.iterdir()) == []
        assert namespace.run("nft", "list", "ruleset").stdout == ""

    @pytest.mark.spec("OPS-46")
    def test_the_next_start_removes_what_a_killed_one_left(self, namespace, begin, capable, place):
        killed = begin()
        self.kill(namespace, capable)
        os.kill(killed.process.pid, signal.SIGCONT)  # `su` stops with what it runs, and hears of no end then
        killed.ends()
        (left,) = place.iterdir()
        self.make_old(left)
        gateway = begin()
        assert not left.exists()
        (_mine,) = place.iterdir()
        assert namespace.run("ip", "rule").stdout.count("fwmark 0xfd002021") == 1
        assert namespace.run("nft", "list", "ruleset").stdout.count("chain postrouting") == 2
        assert end(namespace, gateway, capable) == 0
        assert list(place.iterdir()) == []

    def test_what_is_in_use_or_young_or_not_ours_stays(self, namespace, begin, capable, place, newcomer):
        gateway = begin()
        (in_use,) = place.iterdir()
        self.make_old(in_use)
        gone = max(processes_of(namespace, capable)) + 100_000  # no such process: ids end at 2**22
        others = {
            "without our mark": place / f"_MEI{gone:08x}abcdef",
            "young": place / f"_MEI{gone:08x}bcdefg",
            "of another user": place / f"_MEI{gone:08x}cdefgh",
            "of a launcher that lives": place / f"_MEI{os.getpid():08x}defghi",
            "a link": place / f"_MEI{gone:08x}efghij",
            "of another name": place / "_MEIabcdef",
        }
        target = place.parent / "target"
        for what, path in others.items():
            folder = target if what == "a link" else path
            folder.mkdir()
            if what == "a link":
                path.symlink_to(target)
            if what != "without our mark":
                (folder / ".firezone-gateway.json").write_text("{}")
            for each in (folder, *folder.iterdir()):
                os.chown(each, *((0, 0) if what == "of another user" else (newcomer.uid, newcomer.uid)))
            if what != "young":
                self.make_old(folder)
            if what == "a link":
                os.chown(path, newcomer.uid, newcomer.uid, follow_symlinks=False)
        ours = place / f"_MEI{gone:08x}fghijk"
        ours.mkdir()
        (ours / ".firezone-gateway.json").write_text("{}")
        for each in (ours, *ours.iterdir()):
            os.chown(each, newcomer.uid, newcomer.uid)
        self.make_old(ours)
        command = [*newcomer.prefix, "env", f"TEMP={place}", capable, "--version"]
        assert namespace.run(*command).stdout == VERSION_LINE
        assert not ours.exists()
        assert set(place.iterdir()) == {in_use, *others.values()}
        assert (target / ".firezone-gateway.json").exists()
        assert end(namespace, gateway, capable) == 0

    def test_in_a_container_that_starts_again_its_own_number_is_no_sign_of_life(self, capable, place):
        left = place / "_MEI00000001abcdef"
        left.mkdir()
        (left / ".firezone-gateway.json").write_text("{}")
        self.make_old(left)
        first_of_its_kind = ["unshare", "--pid", "--fork", "--mount-proc", "env", f"TEMP={place}", capable, "--version"]
        done = subprocess.run(first_of_its_kind, capture_output=True, text=True, check=True)
        assert done.stdout == VERSION_LINE
        assert list(place.iterdir()) == []
