"""The operator's socket: who may ask, what happens where there is no gateway, and whose the place is."""

from __future__ import annotations

import json
import subprocess

import pytest
from gateway_process import SOURCE

from tests.lab.process import lab_environment

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.needs("namespaces", "tun", "ip", "nft")]

NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")


def operator(gateway, *words, prefix=(), **environment):
    """Runs a command in the gateway's namespace; the variable names its socket unless the test says otherwise."""
    variables = lab_environment() | {"FIREZONE_CONTROL_SOCKET": gateway.process.environment["FIREZONE_CONTROL_SOCKET"]}
    return subprocess.run(
        [*gateway.namespace.prefix(), *prefix, *SOURCE, *words],
        check=False,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"} | variables | environment,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_status_tells_of_the_portal_and_of_the_process(portal, start):
    gateway = start(portal=portal)
    gateway.wait_ready()
    done = operator(gateway, "status", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["ready"] is True
    assert shown["portal"]["host"] == "127.0.0.1"
    assert shown["portal"]["state"] == "connected"
    assert shown["portal"]["connected_for"] >= 0
    assert shown["clients"] == []
