"""The operator's commands in the shipped file: it asks and answers, as an ordinary user with a capability."""

from __future__ import annotations

import json
import os
import signal
import tarfile
import tempfile
from pathlib import Path

import pytest
from gateway_process import Gateway
from test_command_line import AUTHORIZATION, CLIENT, RELAY
from test_control_socket import operator
from test_frozen import ORDINARY_USER

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.needs("namespaces", "tun", "ip", "nft", "setpriv", "setcap", "objdump", "strip"),
]


@pytest.fixture
def private(shared_directory):
    """A directory of the ordinary user, for the socket and for files."""
    directory = Path(tempfile.mkdtemp(dir=shared_directory))
    os.chown(directory, 65534, 65534)
    return directory


def test_an_ordinary_user_asks_the_gateway_that_it_runs(namespace, portal, open_node, capable, private):
    init = portal.push_after_join[0][1] | {"relays": [RELAY]}
    portal.push_after_join = [("init", init)]
    socket = str(private / "control.sock")
    gateway = Gateway(
        namespace,
        portal=portal,
        command=[capable],
        prefix=ORDINARY_USER,
        FIREZONE_CONTROL_SOCKET=socket,
    )

    def ask(*words, prefix=ORDINARY_USER):
        return operator(gateway, *words, prefix=[*prefix, "env", "-C", str(private)], command=[capable])

    try:
        gateway.wait_ready()
        portal.connection(0).push("create_authorization", AUTHORIZATION)
        shown = json.loads(ask("status", "--json").stdout)
        assert shown["uid"] == 65534
        assert shown["engine"] == "native"
        assert shown["portal"]["state"] == "connected"
        assert "Portal" in ask("status").stdout
        refused = ask("trace", "tcp", "100.66.1.2", "10.0.0.1:1")
        assert refused.returncode == 1
        assert refused.stderr.startswith("firezone-gateway: ")
        assert CLIENT not in ask("capture", "--client", "77").stdout
        assert ask("bundle", "--output", "x.tar.gz").returncode == 0
        with tarfile.open(private / "x.tar.gz") as archive:
            problems = archive.extractfile("firezone-gateway/problems.txt").read()
        assert problems == b""
        assert json.loads(ask("status", "--json", prefix=()).stdout)["pid"] == shown["pid"], "root may ask too"
        assert json.loads(ask("drain", "--json").stdout)["left"] == 0
        assert gateway.ends() == 0
    finally:
        gateway.stop()


def test_the_signal_for_a_drain_reaches_the_gateway_through_its_launcher(portal, start, frozen):
    gateway = start(portal=portal, command=[frozen])
    gateway.wait_ready()
    assert gateway.terminate(signal.SIGUSR1) == 0
    gateway.says("Drained")
    assert portal.connection(0).closed_with == (1000, "")
