"""coturn in a relay's place: a relay that nobody here wrote (spec turn.md 5.9). IPv4 only, as its version 4.6 is."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

from tests.lab import stun

if TYPE_CHECKING:
    from pathlib import Path

TURNSERVER = "turnserver"


def available() -> bool:
    """Whether coturn is installed."""
    return shutil.which(TURNSERVER) is not None and shutil.which("turnadmin") is not None


class Coturn:
    """A running turnserver with a user database, both in `directory`."""

    def __init__(
        self,
        directory: Path,
        *,
        ipv4: str,
        port: int = 3478,
        loopback_peers: bool = False,
        stale_nonce: int = 600,
    ) -> None:
        self.directory = directory
        self.address = (ipv4, port)
        directory.mkdir(parents=True, exist_ok=True)
        self._database = directory / "users.db"
        self._known: set[tuple[str, str]] = set()
        self.add_user("unused:unused", "unused")  # makes the database, so that the server finds it
        configuration = directory / "turnserver.conf"
        lines = [
            f"listening-port={port}", f"listening-ip={ipv4}", f"relay-ip={ipv4}", "min-port=49152", "max-port=65535",
            "lt-cred-mech", "realm=firezone", f"userdb={self._database}", f"stale-nonce={stale_nonce}",
            "no-tls", "no-dtls", "no-tcp", "no-tcp-relay", "no-cli", "no-stdout-log",
            f"log-file={directory / 'turnserver.log'}", "simple-log", "verbose",
            f"pidfile={directory / 'turnserver.pid'}",
        ]  # fmt: skip
        if loopback_peers:
            lines.append("allow-loopback-peers")
        configuration.write_text("\n".join(lines) + "\n")
        self._server = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", TURNSERVER, "-c", str(configuration)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._wait_until_serving()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._server.pid

    def add_user(self, username: str, password: str) -> None:
        """Let this user in from now on."""
        if (username, password) in self._known:
            return
        command = ["turnadmin", "-a", "-b", str(self._database), "-u", username, "-r", "firezone", "-p", password]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HOME": str(self.directory)})
        self._known.add((username, password))

    op_add_user = add_user

    def op_pid(self) -> int:
        """The server's process id."""
        return self.pid

    def op_pause(self, paused: bool = True) -> None:
        """Stop the server, or let it go on: a relay that does not answer."""
        self._server.send_signal(signal.SIGSTOP if paused else signal.SIGCONT)

    def close(self) -> None:
        """End the server."""
        if self._server.poll() is None:
            self._server.kill()
        self._server.wait()

    def _wait_until_serving(self) -> None:
        request = stun.encode(stun.BINDING, stun.REQUEST, os.urandom(12), [])
        deadline = time.monotonic() + 10
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(self.address)
            sock.settimeout(0.05)
            while True:
                try:
                    sock.send(request)
                    if sock.recv(2000):
                        return
                except OSError:
                    pass  # not yet listening
                if self._server.poll() is not None or time.monotonic() > deadline:
                    log = self.directory / "turnserver.log"
                    raise RuntimeError(f"coturn does not answer: {log.read_text() if log.exists() else ''}")
                time.sleep(0.02)
