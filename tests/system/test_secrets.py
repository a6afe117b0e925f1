"""The most talkative gateway there is, through a whole life: no secret of anybody is in what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from gateway_process import TOKEN
from virtual_client import invite

from tests.lab.process import wait_until
from tests.lab.scenario import Lab
from tests.lab.scripted_portal import Refusal
from tests.lab.secrets import Watch

pytestmark = [pytest.mark.needs("root", "ip", "nft", "setpriv", "unshare", "curl", "tun"), pytest.mark.slow]

PROBLEM = {"Content-Type": "application/problem+json"}
ARGUMENT_TOKEN = "an-argument-that-is-a-token"


@pytest.mark.spec("OPS-5", "OPS-35")
@pytest.mark.parametrize("form", ["human", "json"])
def test_at_trace_everything_is_said_but_secrets(form):
    environment = {"RUST_LOG": "trace,wire=trace", "FIREZONE_LOG_FORMAT": form, "FIREZONE_FLOW_LOGS": "true"}
    with Lab(gateway_environment=environment) as lab:
        for url in ("http://10.20.0.100/get", "http://web.test/get"):
            assert lab.client.curl(url, timeout=15).ok, lab.tails()
        invite(lab.portal)
        mark = lab.portal.mark()
        lab.portal.drop(kind="gateway")
        lab.portal.wait_for(since=mark, kind="gateway", direction="in", event="phx_join")
        process = lab.gateway.process
        assert lab.portal.token not in _everything_visible_of(process.pid)
        process.stop()
        log = process.log_text()
        lab.portal.stop()
        lab.portal.process.stop()

        watch = Watch()
        watch.add_ledger(lab.portal.directory / "ledger.jsonl")
        assert set(watch.secrets.values()) >= {"token", "password", "preshared_key"}
        assert len(watch.secrets) > 10
        assert len(watch.public_keys) == 1
        watch.hear("the log", log)
        assert watch.leaks() == []

    targets = {"net::send", "net::recv", "turn::send", "turn::recv", "dev::send", "dev::recv", "api::send", "api::recv"}
    for target in (*targets, "dns::res"):
        assert f"wire::{target}" in log, "it did say everything"
    assert '"password":"***"' in log.replace('\\"', '"')
    if form == "json":
        assert all(json.loads(line)["target"] for line in log.splitlines())


@pytest.mark.spec("OPS-5", "PORTAL-11")
@pytest.mark.parametrize("form", ["human", "json"])
def test_a_token_that_a_proxy_or_the_portal_echoes_is_in_no_line(portal, start, form):
    said = f"you sent Bearer {TOKEN} to us"
    portal.refusals = [Refusal(502, said), Refusal(403, f'{{"code":"{TOKEN}","detail":"{said}"}}', PROBLEM)]
    gateway = start(portal=portal, RUST_LOG="trace", FIREZONE_LOG_FORMAT=form)
    gateway.says("Connected to the portal")
    portal.connection(0).push(TOKEN, {"event": said})
    portal.connection(0).close(1001, said)
    portal.join_answer = {"status": "error", "response": {"reason": said}}
    assert gateway.ends() == 1
    assert TOKEN not in gateway.output
    assert gateway.output.count("you sent Bearer *** to us") == 7


def test_a_token_that_was_an_argument_is_nowhere_to_be_seen(portal, start):
    gateway = start(ARGUMENT_TOKEN, portal=portal, RUST_LOG="trace")
    gateway.wait_ready()
    assert ARGUMENT_TOKEN not in gateway.output
    pid = gateway.pid
    wait_until(lambda: ARGUMENT_TOKEN not in _everything_visible_of(pid), timeout=5, what="it is hidden")
    assert re.search(r"token=\*\*\*", gateway.output)
    assert gateway.terminate() == 0


def _everything_visible_of(pid: int) -> str:
    """What every user of the host may read of a process."""
    return "".join(Path(f"/proc/{pid}/{name}").read_text(errors="replace") for name in ("cmdline", "comm", "status"))
