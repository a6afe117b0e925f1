"""The portal as a process, and the tests' grip on it."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.lab.control import Control
from tests.lab.process import Process, lab_command, lab_environment
from tests.lab.secrets import WATCH

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Entry = dict[str, Any]
TOKEN = "lab-token"


class PortalControl:
    """Orders to a portal and its ledger. Each order of `portal_orders.Orders` is a method: `drop(kind="gateway")`."""

    def __init__(self, path: str | Path) -> None:
        self._control = Control(path)
        self.ledger: list[Entry] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda **arguments: self._control.call(name, **arguments)

    def entries(self, **wanted: Any) -> list[Entry]:
        """All ledger entries so far with these fields, e.g. `kind="gateway", direction="in", event="phx_join"`."""
        self._fetch(0)
        return [entry for entry in self.ledger if _matches(entry, wanted)]

    def mark(self) -> int:
        """A position in the ledger, for `wait_for(since=…)`."""
        self._fetch(0)
        return len(self.ledger)

    def wait_for(
        self,
        predicate: Callable[[Entry], bool] | None = None,
        *,
        since: int = 0,
        timeout: float = 10.0,
        count: int = 1,
        **wanted: Any,
    ) -> Entry:
        """The `count`-th entry at or after `since` with these fields that also fulfils `predicate`; waits for it."""
        deadline = time.monotonic() + timeout
        position, seen = since, 0
        while True:
            while position < len(self.ledger):
                entry = self.ledger[position]
                position += 1
                if _matches(entry, wanted) and (predicate is None or predicate(entry)):
                    seen += 1
                    if seen == count:
                        return entry
            left = deadline - time.monotonic()
            if left <= 0:
                said = "\n".join(map(_brief, self.ledger[since:][-30:]))
                raise TimeoutError(
                    f"no {wanted} ({predicate}) in the ledger within {timeout:g} s; since {since}:\n{said}"
                )
            self._fetch(left)

    def message(self, event: str, *, since: int = 0, timeout: float = 10.0, **wanted: Any) -> Any:
        """The payload of the next message of this name from a gateway (or `kind=`), waiting for it."""
        fields = {"kind": "gateway", "direction": "in"} | wanted
        return self.wait_for(since=since, timeout=timeout, event=event, **fields)["payload"]

    def wait_gateway(self, *, count: int = 1, timeout: float = 15.0) -> str:
        """The id of a gateway, once `count` are joined."""
        return self._wait_state("gateways", count, timeout)[0]

    def wait_client(self, *, count: int = 1, timeout: float = 15.0) -> str:
        """The id of a client, once `count` are joined."""
        return self._wait_state("clients", count, timeout)[0]

    def wait_relays(self, count: int, *, timeout: float = 15.0) -> list[str]:
        """The relay ids, once `count` are joined."""
        return self._wait_state("relays", count, timeout)

    def _wait_state(self, what: str, count: int, timeout: float) -> list[str]:
        deadline = time.monotonic() + timeout
        while True:
            position = self.mark()
            found = list(self.state()[what])
            if len(found) >= count:
                return found
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{len(found)} of {count} {what} joined the portal within {timeout:g} s")
            self._control.call("ledger", since=position, timeout=min(left, 5.0), wait=left + 10)

    def _fetch(self, timeout: float) -> None:
        timeout = min(timeout, 5.0)
        self.ledger += self._control.call("ledger", since=len(self.ledger), timeout=timeout, wait=timeout + 10)


class PortalProcess(PortalControl):
    """A portal of its own process on loopback (or in a namespace, with `prefix` and `listen`). A context manager."""

    def __init__(
        self,
        *,
        resources: Sequence[str] = (),
        tokens: Sequence[str] = (TOKEN,),
        listen: Sequence[str] = ("127.0.0.1:0",),
        tls_names: Sequence[str] = (),
        directory: Path | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self._own = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="fzlab-portal-"))
        self.token = tokens[0] if tokens else ""
        self.ca_file = self.directory / "tls" / "ca.pem" if tls_names else None
        arguments: list[str | Path] = [
            "--control",
            self.directory / "portal.sock",
            "--store",
            self.directory / "store.json",
        ]
        arguments += ["--ledger", self.directory / "ledger.jsonl"]
        for option, values in (
            ("--listen", listen),
            ("--resource", resources),
            ("--token", tokens),
            ("--tls-name", tls_names),
        ):
            for value in values:
                arguments += [option, value]
        if tls_names:
            arguments += ["--tls-dir", self.directory / "tls"]
        super().__init__(self.directory / "portal.sock")
        self.process = Process(
            "portal",
            lab_command("portal", *arguments),
            log=self.directory / "portal.log",
            prefix=prefix,
            environment=lab_environment(),
            ready=15.0,
        )

    @property
    def port(self) -> int:
        """The TCP port of the first address listened on."""
        return int(self.process.facts["ports"][0])

    @property
    def url(self) -> str:
        """The base URL on loopback, as FIREZONE_API_URL wants it."""
        return f"{'wss' if self.ca_file else 'ws'}://127.0.0.1:{self.port}"

    def close(self) -> None:
        """End the process and remove its files, if they were made here."""
        self.process.stop()
        WATCH.add_ledger(self.directory / "ledger.jsonl")
        if self._own:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _matches(entry: Entry, wanted: dict[str, Any]) -> bool:
    return all(entry.get(key) == value for key, value in wanted.items())


def _brief(entry: Entry) -> str:
    what = entry.get("event") or entry.get("path") or entry.get("raw") or entry.get("reason")
    return f"{entry['n']:5} {entry['direction']:8} {entry.get('kind')} #{entry.get('connection')} {what}"
