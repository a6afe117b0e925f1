"""The test relay and coturn as processes on any address, and their controls."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.lab.control import Control
from tests.lab.process import Process, lab_command, lab_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class RelayProcess:
    """A relay of its own process; orders of `relay.Relay` are methods: `relay.drop_next(method="allocate")`.

    `program` is `relay` (the test relay) or `coturn` (whose only orders are `pause` and `add_user`).
    """

    def __init__(
        self,
        *,
        program: str = "relay",
        name: str = "relay",
        ipv4: str | None = "127.0.0.1",
        ipv6: str | None = None,
        port: int = 3478,
        portal_url: str | None = None,
        token: str = "lab-token",
        ca_file: Path | None = None,
        directory: Path | None = None,
        prefix: Sequence[str] = (),
        loopback_peers: bool = False,
    ) -> None:
        self._own = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="fzlab-relay-"))
        self.program = program
        self.name = name
        self.ipv4, self.ipv6 = ipv4, ipv6
        arguments: list[str | Path] = [
            "--control",
            self.directory / f"{name}.sock",
            "--name",
            name,
            "--port",
            str(port),
        ]
        arguments += ["--ipv4", ipv4] if ipv4 else []
        arguments += ["--ipv6", ipv6] if ipv6 and program == "relay" else []
        arguments += ["--portal-url", portal_url, "--token", token] if portal_url else []
        arguments += ["--ca", ca_file] if ca_file else []
        if program == "coturn":
            arguments += ["--directory", self.directory / f"{name}.coturn"]
            arguments += ["--loopback-peers"] if loopback_peers else []
        self._control = Control(self.directory / f"{name}.sock")
        self.process = Process(
            name,
            lab_command(program, *arguments),
            log=self.directory / f"{name}.log",
            prefix=prefix,
            environment=lab_environment(),
            ready=20.0,
        )

    @property
    def id(self) -> str:
        """The id that the portal gave it at its start (`restart` returns the next one)."""
        return str(self.process.facts["relay_id"])

    @property
    def secret(self) -> str:
        """The stamp_secret it started with."""
        return str(self.process.facts["secret"])

    @property
    def port(self) -> int:
        """The UDP port it serves."""
        return int(self.process.facts["port"])

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda **arguments: self._control.call(name, **arguments)

    def allocations_of(self, salt: str) -> int:
        """How many allocations the device with this salt in its user name has (or, with coturn, has made so far)."""
        if self.program == "relay":
            return sum(salt in allocation["username"] for allocation in self.allocations())
        log = self.directory / f"{self.name}.coturn" / "turnserver.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return sum(salt in line and "ALLOCATE processed, success" in line for line in lines)

    def close(self) -> None:
        """End the process and remove its files, if they were made here."""
        self.process.stop()
        if self._own:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
