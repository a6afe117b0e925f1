"""The package and the installer on a Debian of its own under systemd: a client passes through the gateway, for life."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys

import machine as machines
import pytest

from tests.lab.certificates import Authority
from tests.lab.portal_client import TOKEN
from tests.lab.process import REPOSITORY, Process, wait_until
from tests.lab.scenario import NAMED, PORTAL_NAME, PORTAL_PORT, Lab

pytestmark = [
    pytest.mark.root,
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.needs("namespaces", "tun", "ip", "nft", "mmdebstrap", "dpkg-deb", "objdump", "strip"),
]

MACHINE_ID = "0123456789abcdef0123456789abcdef"
EXTERNAL_ID = "05c3f2f2c55836a4376ca0c0154d5d2d4898644c2366c64c2cc13ca6302dc701"  # operations 1.3
CAP_NET_ADMIN = 1 << 12
UNIT = "firezone-gateway.service"
DOWNLOADS = "downloads.test"
_SERVER = """
import functools, http.server, ssl, sys
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
server = http.server.ThreadingHTTPServer(("0.0.0.0", 443), handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[2], sys.argv[3])
server.socket = context.wrap_socket(server.socket, server_side=True)
print("serving", flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def packages(frozen, tmp_path_factory):
    """The same tree twice, the first with a lower number."""
    directory = tmp_path_factory.mktemp("packages")
    for version in ("1.6.0", "1.6.1"):
        build = REPOSITORY / "packaging" / "debian" / "build"
        subprocess.run([build, sys.executable, frozen, directory, version], check=True, cwd=REPOSITORY)
    return sorted(directory.iterdir())


@pytest.fixture
def scenario():
    return NAMED["direct"]


@pytest.fixture
def lab(scenario):
    if reason := machines.cannot_boot():
        pytest.skip(f"not applicable: {reason}")
    with Lab(scenario, tls=True, start_gateway=False) as lab:
        yield lab


@pytest.fixture
def machine(lab, tmp_path):
    """A Debian where the lab's gateway stands, which trusts the lab's authority."""
    place = lab.places["gateway"].namespace
    with machines.debian(tmp_path, prefix=place.prefix(binds=False), machine_id=MACHINE_ID) as machine:
        for target in ("/etc/hosts", "/etc/resolv.conf"):
            machine.path(target).unlink(missing_ok=True)
            machine.path(target).write_text(place.run("cat", target).stdout)
        with machine.path("/etc/hosts").open("a") as hosts:
            hosts.write(f"{lab.places['portal'].public_ipv4} {DOWNLOADS}\n")
        with machine.path("/etc/ssl/certs/ca-certificates.crt").open("a") as trusted:
            trusted.write(lab.portal.ca_file.read_text())
        yield machine
        print(journal(machine))  # shown if the test failed


def journal(machine):
    return machine.run("journalctl", "--no-pager", "-o", "cat", "-u", "firezone-gateway", check=False).stdout


def command(machine, *words):
    """One of the program's, as an operator has to run it where /tmp is mounted noexec."""
    return machine.run("firezone-gateway", *words, TMP="/var/tmp")


def show(machine, *names):
    """Properties of the unit."""
    done = machine.run("systemctl", "show", UNIT, *(f"--property={name}" for name in names))
    values = dict(line.split("=", 1) for line in done.stdout.splitlines())
    return [values[name] for name in names]


def processes(machine):
    """The unit's, as directories of /proc in the machine."""
    done = machine.run("cat", f"/sys/fs/cgroup/system.slice/{UNIT}/cgroup.procs", check=False)
    return [machine.path(f"/proc/{pid}") for pid in done.stdout.split()]


def wait_active(machine, *, other_than):
    """Until the unit is active with another main process; returns that."""

    def restarted():
        state, pid = show(machine, "ActiveState", "MainPID")
        return pid if state == "active" and pid not in {other_than, "0"} else None

    return wait_until(restarted, timeout=30, what=f"the unit is active again; {journal(machine)}")


def gateways(lab):
    return list(lab.portal.state()["gateways"].values())


def assert_confined(machine):
    """Both processes have one capability, no privilege to gain and a filter; neither shows the token."""
    found = processes(machine)
    assert len(found) == 2  # the launcher and the program
    user = machine.run("id", "-u", "firezone").stdout.strip()
    for process in found:
        status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
        assert set(status["Uid"].split()) == {user}
        assert {int(status[name], 16) for name in ("CapEff", "CapBnd", "CapAmb")} == {CAP_NET_ADMIN}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert TOKEN.encode() not in (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        maps = (process / "maps").read_text()
    assert "/run/firezone-gateway/unpacked/_MEI" in maps
    assert TOKEN not in journal(machine)


def assert_clean(machine):
    """No process, device, table or rule of a gateway is left."""
    assert processes(machine) == []
    assert "tun-firezone" not in machine.run("ip", "link").stdout
    assert machine.run("nft", "list", "ruleset").stdout == ""


def put(machine, file):
    shutil.copy(file, machine.path("/root"))
    return f"/root/{file.name}"


def set_up(machine, package):
    """What an operator does, up to a gateway that serves."""
    machine.run("dpkg", "-i", package)
    machine.run("firezone", "gateway", "authenticate", stdin=TOKEN)
    settings = machine.path("/etc/firezone/gateway-env")
    settings.write_text(f"FIREZONE_API_URL=wss://{PORTAL_NAME}:{PORTAL_PORT}\nFIREZONE_NAME=bureau\n")
    machine.run("firezone", "gateway", "enable-service", timeout=90)


@pytest.mark.spec("OPS-16", "OPS-50", "OPS-51", "OPS-52", "OPS-54", "OPS-56")
def test_a_package_serves_clients_under_systemd_through_upgrade_fault_and_drain_and_goes_without_trace(
    lab, machine, packages
):
    older, newer = (put(machine, package) for package in packages)
    before = machine.changed()
    set_up(machine, older)
    assert machine.run("sh", "-c", "command -v python3", check=False).stdout == ""
    assert_confined(machine)
    assert machine.run("stat", "-c", "%a %U", "/var/lib/firezone", "/run/firezone-gateway").stdout.split("\n")[:2] == [
        "750 firezone",
        "700 firezone",
    ]
    (gateway,) = gateways(lab)
    assert (gateway["external_id"], gateway["name"]) == (EXTERNAL_ID, "bureau")
    client = lab.start_client(0)
    assert client.curl("http://web.test/get").ok
    assert client.curl("http://10.20.0.100/get").ok
    assert machine.run("cat", "/proc/sys/net/ipv4/ip_forward").stdout == "1\n"
    assert command(machine, "ready").stdout == "ready\n"
    assert command(machine, "status").returncode == 0
    assert " WARN " not in journal(machine)
    assert "SYSCALL" not in machine.run("journalctl", "--no-pager", check=False).stdout

    (first,) = show(machine, "MainPID")
    machine.run("dpkg", "-i", newer)
    second = wait_active(machine, other_than=first)
    (gateway,) = gateways(lab)
    assert gateway["external_id"] == EXTERNAL_ID
    assert client.curl("http://10.20.0.100/get").ok

    # A gateway that hangs is started anew.
    dropin = machine.path(f"/etc/systemd/system/{UNIT}.d")
    dropin.mkdir(parents=True)
    (dropin / "test.conf").write_text("[Service]\nWatchdogSec=2s\nRestartSec=100ms\nTimeoutAbortSec=1s\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", UNIT)
    third = wait_active(machine, other_than=second)
    machine.run("kill", "-STOP", *(process.name for process in processes(machine)))
    wait_active(machine, other_than=third)
    assert "Watchdog timeout" in machine.run("journalctl", "--no-pager", "-u", UNIT).stdout
    assert show(machine, "NRestarts") == ["1"]
    assert client.curl("http://10.20.0.100/get").ok

    # One that was drained is not.
    command(machine, "drain", "--timeout", "5")
    wait_until(lambda: show(machine, "ActiveState") == ["inactive"], timeout=15, what="the drained gateway's end")
    assert show(machine, "Result") == ["success"]
    assert_clean(machine)

    machine.run("systemctl", "start", UNIT)
    shutil.rmtree(dropin)
    machine.run("dpkg", "-r", "firezone-gateway")
    assert_clean(machine)
    assert machine.path("/etc/firezone/gateway-token").exists()
    machine.run("dpkg", "-P", "firezone-gateway")
    left = {path for path in machine.changed() - before if "firezone" in path}
    assert left == set()


@pytest.mark.spec("OPS-51")
@pytest.mark.parametrize("scenario", [NAMED["relay-relay"], NAMED["no-ipv6"]], ids=["relay-relay", "no-ipv6"])
def test_under_the_unit_clients_get_through_on_other_ways_and_while_the_portal_is_away(lab, machine, packages):
    set_up(machine, put(machine, packages[1]))
    client = lab.start_client(0)
    for url in ("http://10.20.0.100/bytes?num=10000000", "http://download.httpbin/bytes?num=10000000"):
        fetched = client.download(url)
        assert (fetched.ok, fetched.bytes) == (True, 10_000_000)
    lab.processes["portal"].stop()
    assert client.curl("http://10.20.0.100/get").ok
    machine.run("systemctl", "stop", UNIT)  # within TimeoutStopSec, without a portal
    assert show(machine, "Result") == ["success"]
    assert_clean(machine)
    assert " ERROR " not in journal(machine)


# Says what the unit lets it do. The shipped file may need a newer C library than the oldest systemd's Debian has.
WITNESS = """#!/bin/bash
[ "$*" != "--version --verbose" ] || { echo "C library: glibc 2.31, 2.31 or newer needed"; exit; }
cp /bin/true "$TEMP/true" && "$TEMP/true" && echo "unpacks in $TEMP"
[ "$(cat "$CREDENTIALS_DIRECTORY/FIREZONE_TOKEN")" = secret ] && echo "has the token"
echo 1 >/proc/sys/net/ipv4/ip_forward && echo "forwards"
exec 5<>/dev/net/tun && echo "opens the TUN device"
touch "$STATE_DIRECTORY/x" && echo "keeps state"
touch "${RUNTIME_DIRECTORY%%:*}/x" && echo "has a place for its socket"
systemd-notify --ready --status=fine
while sleep 1; do systemd-notify WATCHDOG=1; done
"""


@pytest.mark.spec("OPS-51")
@pytest.mark.parametrize("suite", [machines.OLDEST_DEBIAN, machines.DEBIAN])
def test_the_unit_gives_what_the_gateway_needs_with_the_oldest_systemd_too(tmp_path, suite):
    if reason := machines.cannot_boot():
        pytest.skip(f"not applicable: {reason}")
    witness = tmp_path / "witness"
    witness.write_text(WITNESS)
    witness.chmod(0o755)
    build = REPOSITORY / "packaging" / "debian" / "build"
    subprocess.run([build, sys.executable, witness, tmp_path / "dist", "1.6.1"], check=True, cwd=REPOSITORY)
    (package,) = (tmp_path / "dist").iterdir()
    alone = ["unshare", "--net"]
    with machines.debian(tmp_path / "machine", prefix=alone, machine_id=MACHINE_ID, suite=suite) as machine:
        machine.run("dpkg", "-i", put(machine, package))
        machine.run("firezone", "gateway", "authenticate", stdin="secret")
        machine.run("firezone", "gateway", "enable-service")
        assert show(machine, "ActiveState", "StatusText") == ["active", "fine"]
        said = journal(machine)
        print(said)
        for line in (
            "unpacks in /run/firezone-gateway/unpacked",
            "has the token",
            "forwards",
            "opens the TUN device",
            "keeps state",
            "has a place for its socket",
        ):
            assert f"{line}\n" in said
        assert "Unknown key" not in machine.run("journalctl", "--no-pager").stdout


@pytest.mark.spec("OPS-50", "OPS-53")
def test_the_installer_downloads_the_released_file_and_the_service_joins(lab, machine, frozen, tmp_path):
    """From a server of its own, over TLS; once more with nothing given, as for an upgrade."""
    release = tmp_path / "release"
    architecture = os.uname().machine
    target = release / "dl" / "firezone-gateway" / "1.6.1" / architecture
    target.parent.mkdir(parents=True)
    shutil.copy(frozen, target)
    sums = frozen.with_name("SHA256SUMS")
    script = subprocess.run(
        [sys.executable, REPOSITORY / "packaging" / "make-installer", "1.6.1", f"https://{DOWNLOADS}", sums],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    machine.path("/root/install.sh").write_text(script)
    settings = {"FIREZONE_API_URL": f"wss://{PORTAL_NAME}:{PORTAL_PORT}", "FIREZONE_NAME": 'a "100 %" bureau'}
    with https_server(lab, release):
        machine.run("bash", "/root/install.sh", FIREZONE_ID="first", FIREZONE_TOKEN=TOKEN, **settings, timeout=120)
    program = "/opt/firezone/bin/firezone-gateway"
    assert machine.run("stat", "-c", "%A %U:%G", program).stdout == "-rwxr-x--- root:firezone\n"
    assert_confined(machine)
    (gateway,) = gateways(lab)
    assert (gateway["external_id"], gateway["name"]) == ("first", 'a "100 %" bureau')
    client = lab.start_client(0)
    assert client.curl("http://10.20.0.100/get").ok

    (before,) = show(machine, "MainPID")
    machine.run("bash", "/root/install.sh", timeout=120)  # the server is gone: what is there already is not fetched
    wait_active(machine, other_than=before)
    (gateway,) = gateways(lab)
    assert (gateway["external_id"], gateway["name"]) == ("first", 'a "100 %" bureau')
    assert client.curl("http://10.20.0.100/get").ok


@contextlib.contextmanager
def https_server(lab, directory):
    """Serves a directory at DOWNLOADS, where the lab's portal stands."""
    certificate, key = Authority(lab.portal.ca_file.parent).issue([DOWNLOADS])
    process = Process(
        "downloads",
        [sys.executable, "-c", _SERVER, directory, certificate, key],
        log=directory.parent / "downloads.log",
        prefix=lab.places["portal"].namespace.prefix(),
    )
    try:
        process.wait_for_log("serving")
        yield process
    finally:
        process.stop()
