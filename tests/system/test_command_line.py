"""The program as an operator sees it: what it prints, what it answers on HTTP, how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
from pathlib import Path

import gevent
import pytest
from gateway_process import HUMAN, INIT, TOKEN

from tests.lab.program import gateway_command
from tests.lab.scripted_portal import wait_until

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.needs("namespaces", "tun", "ip", "nft")]

CLIENT = "11111111-2222-4333-8444-555555555555"
RESOURCE = "99999999-8888-4777-8666-555555555555"
SECRETS = (
    "dtQLwvW7CXikc+A1EmIJEaJAmluyzJ33YKcWJQKkxXU=",
    "latqe7iwpjyrccojsy4ywy",
    "up7vgqqtsogpiahklbaira",
    "4xl1v/gk",
)
AUTHORIZATION = {
    "ref": "opaque",
    "client": {
        "id": CLIENT,
        "public_key": "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=",
        "preshared_key": SECRETS[0],
        "ipv4": "100.66.1.2",
        "ipv6": "fd00:2021:1111::1:2",
    },
    "resource": {"type": "internet", "id": RESOURCE},
    "client_ice_credentials": {"username": "725z", "password": SECRETS[1]},
    "gateway_ice_credentials": {"username": "zzcf", "password": SECRETS[2]},
}
RELAY = {
    "id": "2a8abfa8-cb99-4629-8437-854193ca6bca",
    "type": "turn",
    "addr": "127.0.0.1:3478",
    "username": "2145916800:kF8o3vGOqsBa5vErLDRSdEr69ibaE0PVezlbVE4FGbY",
    "password": SECRETS[3],
    "expires_at": 2145916800,
}


@pytest.mark.spec("OPS-27", "OPS-33", "OPS-36")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_clean_run_logs_its_steps_without_warning_and_ends_with_status_0(portal, start, number):
    gateway = start(portal=portal)
    gateway.wait_ready()
    connection = portal.connection(0)
    assert gateway.terminate(number) == 0
    assert connection.closed_with == (1000, "")
    assert gateway.levels() == {"INFO"}
    assert "\x1b" not in gateway.output
    order = ["Logging started", "Connected to the portal", "Shutting down", "Goodbye"]
    found = [next(i for i, line in enumerate(gateway.lines) if text in line) for text in order]
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == len(gateway.lines) - 1


@pytest.mark.spec("OPS-27")
def test_more_signals_during_the_shutdown_change_nothing(portal, start):
    gateway = start(portal=portal)
    gateway.wait_ready()
    itself = gateway.pid  # a launcher that cleans up after it is a program of its own
    while gateway.process.running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(itself, signal.SIGTERM)
            os.kill(itself, signal.SIGINT)
        gevent.sleep(0.001)
    assert gateway.process.returncode == 0
    assert "Traceback" not in gateway.output
    gateway.levels()


@pytest.mark.spec("OPS-27")
def test_a_portal_that_does_not_answer_delays_the_end_by_seconds_at_most(namespace, portal, start):
    portal.silent = True
    gateway = start(portal=portal)
    wait_until(lambda: portal.accepted, "the dial")
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.ends(patience=5) == 0


@pytest.mark.spec("OPS-27")
def test_a_signal_during_the_start_ends_it_with_status_0_and_leaves_no_rules(namespace, portal, start):
    gateway = start(portal=portal)
    gateway.says("Logging started")
    wait_until(lambda: namespace.has_interface("tun-firezone") or "tun-firezone" in interfaces(namespace), "the device")
    assert gateway.terminate() == 0
    assert "Traceback" not in gateway.output
    assert namespace.run("nft", "list", "tables").stdout == ""


def interfaces(namespace):
    return namespace.run("ip", "link").stdout


@pytest.mark.spec("OPS-28")
def test_a_hangup_does_not_end_it(portal, start):
    gateway = start(portal=portal)
    gateway.wait_ready()
    for _ in range(3):
        gateway.process.send_signal(signal.SIGHUP)
    gevent.sleep(0.1)
    assert gateway.process.running
    assert gateway.http("/readyz")[0] == 200
    assert gateway.terminate() == 0


@pytest.mark.spec("OPS-34")
def test_json_lines_are_objects_with_the_four_names(portal, start):
    gateway = start("--log-format", "json", portal=portal, RUST_LOG="trace")
    gateway.wait_ready()
    assert gateway.terminate() == 0
    entries = gateway.entries()
    assert len(entries) > 4
    for entry in entries:
        assert {"timestamp", "level", "target", "message"} <= entry.keys()
    assert {"INFO", "TRACE"} <= {entry["level"] for entry in entries}


@pytest.mark.spec("OPS-5", "OPS-35")
def test_the_portal_is_traced_both_ways_and_no_secret_is_in_any_line(portal, start):
    portal.push_after_join = [("init", INIT | {"relays": [RELAY]}), ("create_authorization", AUTHORIZATION)]
    gateway = start(portal=portal, RUST_LOG="trace")
    gateway.says(r"TRACE wire::api::recv: .*\"event\":\"create_authorization\"")
    gateway.wait_ready()
    assert gateway.terminate() == 0
    assert re.search(r"TRACE wire::api::send: .*\"event\":\"phx_join\"", gateway.output)
    assert re.search(r"TRACE wire::api::recv: .*\"password\":\"\*\*\*\"", gateway.output)
    for secret in (TOKEN, "c2VjcmV0", *SECRETS):
        assert secret not in gateway.output
    gateway.levels()


@pytest.mark.spec("OPS-5")
def test_a_token_given_as_argument_is_not_left_in_what_ps_shows(portal, start):
    gateway = start("-n", "bureau", TOKEN, portal=portal, FIREZONE_TOKEN=None)
    gateway.wait_ready()
    shown = Path(f"/proc/{gateway.pid}/cmdline").read_bytes().split(b"\0")
    assert b"bureau" in shown
    assert b"*" * len(TOKEN) in shown
    assert TOKEN.encode() not in b" ".join(shown)
    assert portal.connection(0).request.headers["X-Authorization"] == f"Bearer {TOKEN}"


@pytest.mark.spec("OPS-13", "OPS-57", "OPS-58", "OPS-59")
def test_the_upgrade_carries_version_name_and_token_where_they_belong(namespace, portal, start, tmp_path):
    (tmp_path / "FIREZONE_TOKEN").write_text(f"{TOKEN[:9]} \n{TOKEN[9:]}\n")
    gateway = start(portal=portal, FIREZONE_TOKEN=None, CREDENTIALS_DIRECTORY=str(tmp_path))
    gateway.wait_ready()
    request = portal.connection(0).request
    headers = [(name.lower(), value) for name, value in request.headers.raw_items()]
    assert [name for name, value in headers if "c2VjcmV0" in value] == ["x-authorization"]
    assert dict(headers)["x-authorization"] == f"Bearer {TOKEN}"
    assert "c2VjcmV0" not in request.path
    assert f"name={socket.gethostname()}&" in request.path
    agent = dict(headers)["user-agent"]
    assert agent.isascii()
    assert re.search(r"(^| )gateway/1\.6\.\d+ ", agent)
    assert not any("c2VjcmV0" in json.dumps(frame) for frame in portal.connection(0).frames)


@pytest.mark.spec("OPS-39", "OPS-40", "OPS-41")
def test_healthz_comes_with_the_device_and_readyz_with_the_configured_portal(namespace, portal, start):
    portal.answer_joins = False
    gateway = start(portal=portal, HEALTH_CHECK_ADDR=None)
    portal.connection(0).frame("phx_join")
    assert "tun-firezone" in interfaces(namespace)
    assert gateway.http("/healthz") == (200, "")
    assert gateway.http("/readyz") == (503, "the portal has not been joined yet\n")
    assert "0.0.0.0:8080" in namespace.run("ss", "-Hltn").stdout
    portal.push_after_join = []
    connection = portal.connection(0)
    connection.reply(connection.frame("phx_join")["ref"], "ok", {})
    wait_until(lambda: gateway.http("/readyz") == (503, "the TUN device is not configured yet\n"), "the next reason")
    connection.push("init", INIT)
    gateway.wait_ready()
    assert namespace.address("tun-firezone") == "100.71.4.9"
    portal.stop()
    gateway.says("dialling again")
    assert gateway.http("/readyz")[0] == 200


@pytest.mark.spec("OPS-41")
def test_the_health_address_can_be_changed(namespace, portal, start):
    by_variable = start(portal=portal, HEALTH_CHECK_ADDR="127.0.0.1:9001")
    wait_until(lambda: by_variable.http("/healthz", 9001)[0] == 200, "an answer on the other port")
    assert by_variable.http("/healthz")[0] == 0
    by_variable.terminate()
    by_option = start("--health-check-addr", "127.0.0.1:9002", portal=portal, HEALTH_CHECK_ADDR="127.0.0.1:9001")
    wait_until(lambda: by_option.http("/healthz", 9002)[0] == 200, "an answer on the port of the option")


@pytest.mark.spec("OPS-18")
def test_it_has_no_child_processes(portal, start):
    gateway = start(portal=portal)
    gateway.wait_ready()
    for task in Path(f"/proc/{gateway.pid}/task").iterdir():
        assert (task / "children").read_text() == ""


def test_a_reader_that_goes_away_does_not_end_it(namespace, portal, start):
    """`firezone-gateway | head -1`."""
    gateway = start(portal=portal, prefix=["sh", "-c", '("$@"; echo status $? >&2) | head -1', "sh"])
    portal.connection(0)
    wait_until(lambda: gateway.http("/readyz")[0] == 200, "ready")
    for pid in namespace.pids():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
        if words == [os.fsencode(word) for word in gateway_command()]:
            os.kill(pid, signal.SIGTERM)
    gateway.says("status 0")
    assert "Traceback" not in gateway.output
    assert "Exception" not in gateway.output
    assert HUMAN.match(gateway.lines[0])
