"""The whole program in a namespace of its own, facing a portal that the test holds in its hands."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from tests.lab.process import Process, chain_of, lab_environment
from tests.lab.program import gateway_command
from tests.lab.scripted_portal import ScriptedPortal, wait_until
from tests.lab.secrets import WATCH

TOKEN = ".SFMyNTY.c2VjcmV0.c2lnbmF0dXJl"
HUMAN = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (TRACE|DEBUG| INFO| WARN|ERROR) [\w:]+: ")
INIT = {
    "interface": {"ipv4": "100.71.4.9", "ipv6": "fd00:2021:1111::a:17"},
    "config": {"ipv4_masquerade_enabled": True, "ipv6_masquerade_enabled": True},
    "account_slug": "lab",
    "authorizations": [],
    "relays": [],
}
# Generous: the machine may be busy. Nothing waits that long when all is well.
PATIENCE_S = 20.0


@contextlib.contextmanager
def inside(namespace):
    """This thread in the namespace: sockets that are made meanwhile stay there."""
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newnet = 0x40000000
    with Path("/proc/thread-self/ns/net").open() as home, namespace.path.open() as there:
        assert libc.setns(there.fileno(), clone_newnet) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(home.fileno(), clone_newnet) == 0, os.strerror(ctypes.get_errno())


def portal_in(namespace, **faults):
    """A scripted portal that listens on the namespace's loopback and sends `init` after each join."""
    with inside(namespace):
        portal = ScriptedPortal()
    portal.push_after_join = [("init", INIT)]
    for name, value in faults.items():
        setattr(portal, name, value)
    return portal


class Gateway:
    """A gateway process. Without `portal` the variable FIREZONE_API_URL is up to the test; None as value unsets one."""

    def __init__(self, namespace, *arguments, portal=None, command=(), prefix=(), **environment):
        self.namespace = namespace
        variables = {
            "FIREZONE_TOKEN": TOKEN,
            "FIREZONE_ID": "test-gateway",
            "HEALTH_CHECK_ADDR": "127.0.0.1:8080",
            **lab_environment(),
        }
        if portal is not None:
            variables["FIREZONE_API_URL"] = f"ws://127.0.0.1:{portal.port}"
        if not prefix:  # another user could not write there
            variables["FIREZONE_CONTROL_SOCKET"] = str(namespace_files(namespace) / "control.sock")
        variables |= environment
        WATCH.add(variables["FIREZONE_TOKEN"] or "", "token")
        unset = [part for name, value in variables.items() if value is None for part in ("-u", name)]
        handle, path = tempfile.mkstemp(prefix="gateway-", suffix=".log", dir=namespace_files(namespace))
        os.close(handle)
        self.process = Process(
            "gateway",
            [*(command or gateway_command()), *arguments],
            log=Path(path),
            prefix=[*namespace.prefix(), "env", *unset, *prefix],
            environment={name: value for name, value in variables.items() if value is not None},
        )

    @property
    def output(self) -> str:
        return self.process.log_text()

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()

    @property
    def pid(self) -> int:
        """The gateway itself: in the one-file form the launcher's child, or the launcher as long as it unpacks."""
        return chain_of(self.process.pid)[-1]

    def says(self, pattern: str, patience: float = PATIENCE_S) -> re.Match:
        """The first match in the output, waited for."""

        def found():
            match = re.search(pattern, self.output)
            assert match or self.process.running, (
                f"ended with {self.process.returncode} without {pattern!r}:\n{self.output}"
            )
            return match

        return wait_until(found, f"{pattern!r} in\n{self.output}", patience)

    def wait_ready(self) -> None:
        def ready():
            assert self.process.running, f"ended with {self.process.returncode}:\n{self.output}"
            return self.http("/readyz")[0] == 200

        wait_until(ready, "200 from /readyz", PATIENCE_S)

    def http(self, path: str, port: int = 8080) -> tuple[int, str]:
        """Status and body; 0 when nothing listens."""
        with inside(self.namespace):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()
            except OSError:
                return 0, ""

    def ends(self, patience: float = PATIENCE_S) -> int:
        """The exit status, waited for."""
        wait_until(lambda: not self.process.running, f"the end; so far:\n{self.output}", patience)
        return self.process.returncode

    def fails(self, status: int = 1, patience: float = PATIENCE_S) -> str:
        """Waits for the end with this status and returns its one line at ERROR; a traceback fails the test."""
        assert self.ends(patience) == status, self.output
        assert "Traceback" not in self.output, self.output
        errors = [line for line in self.lines if re.match(r"^\S+ ERROR ", line)]
        assert len(errors) == 1, self.output
        return errors[0]

    def terminate(self, number: int = signal.SIGTERM) -> int:
        """Signals it and returns its exit status."""
        self.process.send_signal(number)
        return self.ends()

    def stop(self) -> None:
        self.process.stop(timeout=5)

    def levels(self) -> set[str]:
        """The levels of all lines; a line of another form fails the test."""
        odd = [line for line in self.lines if not HUMAN.match(line)]
        assert odd == []
        return {HUMAN.match(line)[1].strip() for line in self.lines}

    def entries(self) -> list[dict]:
        """All lines as JSON."""
        return [json.loads(line) for line in self.lines]


def namespace_files(namespace) -> Path:
    """A directory that lives as long as the namespace."""
    return namespace._files
