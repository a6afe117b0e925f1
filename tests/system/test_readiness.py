"""/readyz of the whole program, from before the first join to after the last (OPS-39, OPS-40)."""

from __future__ import annotations

import json
import subprocess
import urllib.request

import pytest
from gateway_process import inside

from tests.lab.program import gateway_command
from tests.lab.scripted_portal import Refusal, wait_until

pytestmark = [pytest.mark.needs("root", "ip", "setpriv", "unshare", "tun"), pytest.mark.slow]


def ready_command(gateway):
    """Exit status and output of `firezone-gateway ready` beside the gateway."""
    done = subprocess.run(
        [*gateway.namespace.prefix(), *gateway_command(), "ready"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env=gateway.process._environment,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(240)
@pytest.mark.spec("OPS-39", "OPS-40")
def test_a_gateway_is_ready_from_the_join_until_the_portal_has_been_away_for_too_long(portal, start):
    portal.answer_joins = False
    gateway = start(portal=portal, FIREZONE_MAX_PARTITION_TIME="4s")
    wait_until(lambda: gateway.http("/healthz")[0] == 200, "it listens", 20)
    assert gateway.http("/readyz") == (503, "the portal has not been joined yet\n")
    assert ready_command(gateway) == (1, "firezone-gateway: not ready: the portal has not been joined yet\n")

    portal.answer_joins = True
    gateway.wait_ready()
    assert ready_command(gateway) == (0, "ready\n")
    with inside(gateway.namespace):
        request = urllib.request.Request("http://127.0.0.1:8080/readyz", headers={"Accept": "application/json"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            assert json.load(answer) == {"ready": True}

    portal.refuse_always.append(Refusal(500))
    portal.connections[-1].drop()
    gateway.says("dialling again: .*HTTP 500")
    assert gateway.http("/readyz")[0] == 200, "it serves its clients on"
    answers = set()

    def ended():
        answers.add(gateway.http("/readyz")[0])
        return not gateway.process.running

    wait_until(ended, "it gives up", 60)
    assert gateway.process.returncode == 1
    assert answers <= {200, 503, 0}
    status, said = ready_command(gateway)
    assert status == 1
    assert "nothing answers at 127.0.0.1:8080 (Connection refused)" in said
