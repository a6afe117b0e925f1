"""The operator's socket: who may ask, what happens where there is no gateway, and whose the place is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest
from gateway_process import Gateway

from tests.lab.process import REPOSITORY, lab_environment
from tests.lab.program import gateway_command
from tests.lab.scripted_portal import wait_until

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.needs("namespaces", "tun", "ip", "nft", "setpriv")]

VARIABLE = "FIREZONE_CONTROL_SOCKET"
PATH = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")


def place(gateway) -> Path:
    return Path(gateway.process.environment.get(VARIABLE, "/nowhere"))


def operator(gateway, *words, prefix=(), command=(), text=True, **environment):
    """Runs a command in the gateway's namespace; the variable names its socket unless the test says otherwise."""
    variables = lab_environment() | {VARIABLE: str(place(gateway))} | environment
    return subprocess.run(
        [*gateway.namespace.prefix(), *prefix, *(command or gateway_command()), *words],
        check=False,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        | {name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=text,
        timeout=60,
    )


@pytest.fixture
def gateway(portal, start):
    running = start(portal=portal)
    running.wait_ready()
    return running


def ask(path, line, *, patience=10.0):
    """What the socket answers to raw bytes; None if it hangs up without a word."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(patience)
        connection.connect(str(path))
        connection.sendall(line)
        answer = connection.makefile("rb").readline()
    return json.loads(answer) if answer else None


def test_status_tells_of_the_portal_and_of_the_process(gateway):
    done = operator(gateway, "status", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["ready"] is True
    assert shown["not_ready_because"] is None
    assert shown["pid"] == gateway.pid
    assert shown["portal"]["host"] == "127.0.0.1"
    assert shown["portal"]["state"] == "connected"
    assert shown["portal"]["connected_for"] >= 0
    assert shown["nat"]["kind"] == "unknown"
    assert shown["clients"] == []


def test_status_tells_of_a_portal_that_is_gone(gateway, portal):
    portal.stop()

    def away():
        shown = json.loads(operator(gateway, "status", "--json").stdout)["portal"]
        return shown["state"] == "connecting" and shown["last_error"] and shown

    shown = wait_until(away, "the loss of the portal in status", 15)
    assert shown["connected_for"] is None
    assert shown["partition_age"] > 0
    assert "No relays" in operator(gateway, "status").stdout


@pytest.mark.parametrize("words", [["--json", "--watch", "0.2"], ["--watch=0.2"]])
def test_watch_refreshes_until_it_is_interrupted(gateway, words):
    """Lines for programs; for people a screen, seen here by a terminal."""
    ours, its = os.openpty()
    command = [*gateway.namespace.prefix(), "env", "--default-signal=INT", *gateway_command(), "status", *words]
    environment = os.environ | lab_environment() | {VARIABLE: str(place(gateway)), "TERM": "xterm"}
    with subprocess.Popen(
        command, stdout=its, stderr=subprocess.PIPE, env=environment, start_new_session=True
    ) as watch:
        os.close(its)
        sign = b'"uptime"' if "--json" in words else b"Portal"
        seen = b""
        while seen.count(sign) < 3:
            seen += os.read(ours, 65536)
        os.killpg(watch.pid, signal.SIGINT)
        with contextlib.suppress(OSError):  # how a terminal says that the other side is closed
            while os.read(ours, 65536):
                pass
        errors = watch.communicate(timeout=10)[1]
    os.close(ours)
    assert watch.returncode == 0
    assert errors == b""


# -- who may ask


def test_the_socket_is_for_its_owner_alone(gateway):
    assert stat.S_IMODE(place(gateway).stat().st_mode) == 0o600
    done = operator(gateway, "status", prefix=NOBODY)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "is not yours to use: ask as root or as the user that runs the gateway" in done.stderr


@pytest.mark.parametrize("command", [["status"], ["drain"], ["trace", "tcp", "100.64.0.1", "10.0.0.1:1"]])
def test_a_stranger_who_gets_past_the_file_mode_is_refused_by_the_gateway(gateway, command):
    for directory in [place(gateway).parent, *place(gateway).parent.parents]:
        if directory.stat().st_mode & 0o005 != 0o005 and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o011)
    place(gateway).chmod(0o666)
    done = operator(gateway, *command, prefix=NOBODY)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "firezone-gateway: only root and the user that runs the gateway (uid 0) may ask it\n"
    assert gateway.process.running


# -- whose the place is


def test_the_socket_of_a_gateway_that_died_is_replaced(gateway, portal, start):
    os.kill(gateway.pid, signal.SIGKILL)
    gateway.ends()
    assert place(gateway).is_socket()
    successor = start(portal=portal)
    successor.wait_ready()
    assert json.loads(operator(successor, "status", "--json").stdout)["pid"] == successor.pid
    assert successor.levels() == {"INFO"}


def test_the_socket_of_a_living_gateway_is_left_alone(gateway, portal, lab_network):
    """The second gateway has a network of its own, and the same file system."""
    other = lab_network.namespace(f"n{len(lab_network.namespaces)}")
    variables = {VARIABLE: str(place(gateway)), "FIREZONE_API_URL": "ws://127.0.0.1:1"}
    second = Gateway(other, **variables)
    try:
        second.says(r" INFO \S+ Another gateway answers the operator here, this one does not")
        assert json.loads(operator(gateway, "status", "--json").stdout)["pid"] == gateway.pid
    finally:
        second.stop()
    assert place(gateway).is_socket()
    assert json.loads(operator(gateway, "status", "--json").stdout)["pid"] == gateway.pid


def test_a_gateway_that_ends_takes_its_socket_along(gateway):
    assert gateway.terminate() == 0
    assert not place(gateway).exists()
    done = operator(gateway, "status")
    assert done.returncode == 1
    assert done.stderr.startswith(f"firezone-gateway: no gateway is running here (no one answers at {place(gateway)})")


def test_where_no_socket_can_be_made_the_gateway_runs_on_with_one_warning(portal, start, tmp_path):
    (tmp_path / "file").write_text("")
    gateway = start(portal=portal, FIREZONE_CONTROL_SOCKET=str(tmp_path / "file" / "control.sock"))
    gateway.wait_ready()
    warnings = [line for line in gateway.lines if " WARN " in line]
    assert len(warnings) == 1
    assert "Not a directory" in warnings[0]
    assert VARIABLE in warnings[0]


def test_a_file_that_is_no_socket_is_not_replaced(portal, start, tmp_path):
    (tmp_path / "notes").write_text("mine")
    gateway = start(portal=portal, FIREZONE_CONTROL_SOCKET=str(tmp_path / "notes"))
    gateway.wait_ready()
    gateway.says("WARN .*it exists and is no socket")
    assert (tmp_path / "notes").read_text() == "mine"


def test_an_empty_variable_means_no_socket_and_no_word_about_it(portal, start):
    gateway = start(portal=portal, FIREZONE_CONTROL_SOCKET="")
    gateway.wait_ready()
    assert gateway.levels() == {"INFO"}
    done = operator(gateway, "status", FIREZONE_CONTROL_SOCKET="")
    assert done.returncode == 1
    assert "FIREZONE_CONTROL_SOCKET is empty" in done.stderr


def test_an_operator_finds_the_socket_that_systemd_placed(portal, start, namespace, tmp_path, request):
    """Who asks has no RUNTIME_DIRECTORY, which systemd makes /run/firezone-gateway."""
    directory = Path("/run/firezone-gateway")
    if not directory.exists():
        directory.mkdir()
        request.addfinalizer(directory.rmdir)
    namespace.bind("/run/firezone-gateway", tmp_path)
    gateway = start(portal=portal, FIREZONE_CONTROL_SOCKET=None, RUNTIME_DIRECTORY="/run/firezone-gateway")
    gateway.process.environment.setdefault(VARIABLE, "")
    gateway.wait_ready()
    assert (tmp_path / "control.sock").is_socket()
    done = operator(gateway, "status", "--json", FIREZONE_CONTROL_SOCKET=None)
    assert json.loads(done.stdout)["pid"] == gateway.pid


@pytest.mark.skipif(REPOSITORY.is_relative_to("/tmp"), reason="it covers /tmp, where this checkout lies")
def test_root_finds_the_gateway_of_an_ordinary_user_who_asks_it_without_more_words(portal, start, namespace, tmp_path):
    """Where nothing but /tmp may be written."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    node = tmp_path / "tun"
    os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(10, 200))
    node.chmod(0o666)
    namespace.bind("/dev/net/tun", node)
    namespace.bind("/tmp", temporary)
    capable = [*NOBODY, "--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin"]
    gateway = start(portal=portal, prefix=capable, XDG_RUNTIME_DIR=None)
    gateway.wait_ready()
    assert VARIABLE not in gateway.output, "that it could not listen"
    directory = temporary / "firezone-gateway-65534"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for prefix in (NOBODY, ()):
        done = operator(gateway, "status", "--json", prefix=prefix, FIREZONE_CONTROL_SOCKET=None)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["uid"] == 65534
    other = ("setpriv", "--reuid", "65533", "--regid", "65533", "--clear-groups")
    done = operator(gateway, "status", prefix=other, FIREZONE_CONTROL_SOCKET=None)
    assert done.returncode == 1
    assert "no gateway is running here" in done.stderr


@pytest.mark.parametrize("words", [["status"], ["status", "--json"], ["id", "--json"], ["bundle", "--output", "-"]])
def test_output_that_nobody_takes_is_no_traceback(gateway, words):
    """A full disk is told in one line; a reader that left, as `head` does, in none."""
    program = " ".join([*gateway_command(), *words])
    full = operator(gateway, *words, prefix=["sh", "-c", f"exec {program} > /dev/full", "--"])
    assert full.returncode == 1
    assert full.stderr == "firezone-gateway: the output cannot be written: No space left on device\n"
    left = operator(gateway, *words, prefix=["sh", "-c", f"{{ sleep 0.1; {program}; echo $? >&2; }} | true", "--"])
    assert left.stderr == "1\n"


# -- caps


def test_nonsense_is_answered_by_a_sentence(gateway):
    assert ask(place(gateway), b"hello\n") == {"error": "the request is not JSON"}
    assert ask(place(gateway), b"[" * 2000 + b"\n") == {"error": "the request is not JSON"}
    assert ask(place(gateway), b"[1]\n") == {"error": "the request is not a JSON object"}
    assert ask(place(gateway), b'{"request":"reboot"}\n')["error"].startswith("this gateway knows no request 'reboot'")
    assert ask(place(gateway), b'{"request":["status"]}\n')["error"].startswith("this gateway knows no request")
    assert ask(place(gateway), b"x" * 5000) == {"error": "the request is longer than 4096 bytes"}
    assert ask(place(gateway), b'{"request":"drain","timeout":"soon"}\n')["error"].startswith(
        "timeout must be a number"
    )
    assert gateway.levels() == {"INFO"}


def test_connections_that_say_nothing_give_their_places_back(gateway):
    idle = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(16)]
    try:
        for each in idle:
            each.connect(str(place(gateway)))
        began = time.monotonic()
        assert ask(place(gateway), b'{"request":"status"}\n', patience=20)["ready"] is True
        assert 3 < time.monotonic() - began < 15
    finally:
        for each in idle:
            each.close()


# -- what is a command


@pytest.mark.parametrize(
    ("words", "is_command"),
    [
        (["status"], True),
        (["--no-telemetry", "status"], True),
        (["-n", "name", "--log-format", "json", "status", "--json"], True),
        (["--", "status"], False),
        (["statuses"], False),
        (["status.SFMyNTY.x"], False),
        (["Status"], False),
        (["-n", "status", "token"], False),
    ],
)
def test_only_a_first_argument_that_is_exactly_a_command_is_one(namespace, words, is_command):
    """Without a token's rights the gateway ends at the check for capabilities; a command at the missing socket."""
    done = subprocess.run(
        [*namespace.prefix(), *NOBODY, *gateway_command(), *words],
        check=False,
        env={"PATH": os.environ["PATH"], VARIABLE: "/nowhere/control.sock"} | lab_environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    if is_command:
        assert "no gateway is running here" in done.stderr
    else:
        assert "CAP_NET_ADMIN" in done.stderr


@pytest.mark.parametrize("name", ["status", "drain", "trace", "bundle", "capture", "id"])
def test_each_command_has_help_of_its_own_and_refuses_what_it_does_not_know(namespace, name):
    def run(*words):
        environment = {"PATH": os.environ["PATH"]} | lab_environment()
        return subprocess.run(
            [*namespace.prefix(), *gateway_command(), name, *words],
            check=False,
            env=environment,
            capture_output=True,
            text=True,
        )

    helped = run("--help")
    assert helped.returncode == 0
    assert helped.stdout.startswith(f"Usage: firezone-gateway {name}")
    assert "--json" in helped.stdout
    refused = run("--surprise")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "--surprise" in refused.stderr
