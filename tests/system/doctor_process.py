"""`firezone-gateway doctor` in a namespace, and what it found."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from typing import NamedTuple

from gateway_process import TOKEN

from tests.lab.process import lab_environment
from tests.lab.program import gateway_command
from tests.lab.scripted_portal import wait_until


class Finding(NamedTuple):
    """One check as the JSON has it."""

    name: str
    state: str
    seen: str
    remedy: str


class Diagnosis(NamedTuple):
    """A run: exit status, and the checks by name."""

    status: int
    checks: dict[str, Finding]
    text: str

    def __getitem__(self, name):
        return self.checks[name]

    def failed(self):
        return {name for name, check in self.checks.items() if check.state == "fail"}

    def not_ok(self):
        return {name: check.state for name, check in self.checks.items() if check.state != "ok"}


def doctor(namespace, *arguments, portal=None, before=(), prefix=(), command=(), control="", **environment):
    """Runs it; None as a value unsets a variable. Without `control` no gateway is asked."""
    variables = {
        "PATH": os.environ["PATH"],
        "FIREZONE_TOKEN": TOKEN,
        "FIREZONE_ID": "test-gateway",
        "HEALTH_CHECK_ADDR": "127.0.0.1:8080",
        "FIREZONE_CONTROL_SOCKET": str(control),
        **lab_environment(),
    }
    if portal is not None:
        variables["FIREZONE_API_URL"] = f"ws://127.0.0.1:{portal.port}"
    variables |= environment
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [*namespace.prefix(), *prefix, *(command or gateway_command()), *before, "doctor", "--json", *arguments],
            env={name: value for name, value in variables.items() if value is not None},
            stdout=out, stderr=err,
        )  # fmt: skip
        # The portal is in this thread's hub and has to answer meanwhile.
        wait_until(lambda: process.poll() is not None, "the end of doctor", 60)
        out.seek(0)
        err.seek(0)
        text, complaint = out.read(), err.read()
    assert "Traceback" not in complaint, complaint
    assert TOKEN not in text + complaint
    assert complaint == ""
    checks = {entry["name"]: Finding(**entry) for entry in json.loads(text)["checks"]}
    assert process.returncode == (1 if any(check.state == "fail" for check in checks.values()) else 0)
    return Diagnosis(process.returncode, checks, text)


def control_of(gateway):
    """The socket at which this gateway answers."""
    return gateway.process.environment["FIREZONE_CONTROL_SOCKET"]
