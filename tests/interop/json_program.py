"""A program that takes orders and tells events, one JSON object a line each."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class JsonProgram:
    """The running program; `events` holds all that it told. End of input must end it."""

    def __init__(self, find: Callable[[], Path]) -> None:
        self.events: list[dict[str, Any]] = []
        self._find = find
        self._news = asyncio.Condition()

    async def start(self) -> None:
        """Run it; `follow` must then run until `close`."""
        self._process = await asyncio.create_subprocess_exec(
            await asyncio.to_thread(self._find), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )

    async def follow(self) -> None:
        """Take its events until it ends."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            async with self._news:
                self.events.append(json.loads(line))
                self.note(self.events[-1])
                self._news.notify_all()

    def note(self, event: dict[str, Any]) -> None:
        """For subclasses that do more with an event than keep it."""

    def order(self, do: str, **details: Any) -> None:
        """Tell it what to do."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do} | details).encode() + b"\n")

    def all(self, event: str, *, since: int = 0) -> list[dict[str, Any]]:
        """What it told under this name so far."""
        return [known for known in self.events[since:] if known["event"] == event]

    async def until(self, event: str, *, since: int = 0, timeout: float, **wanted: Any) -> dict[str, Any]:
        """The first event of this name with these details at or after position `since`."""

        def found() -> dict[str, Any] | None:
            return next((known for known in self.all(event, since=since) if wanted.items() <= known.items()), None)

        try:
            async with asyncio.timeout(timeout), self._news:
                told = await self._news.wait_for(found)
        except TimeoutError:
            raise TimeoutError(f"no {event} {wanted} within {timeout:g} s; told since: {self.events[since:]}") from None
        assert told is not None
        return told

    async def close(self) -> None:
        """End it; it must do so by itself, and without complaint."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(5):
                status = await self._process.wait()
        except TimeoutError:
            self._process.kill()
            status = await self._process.wait()
        assert status == 0, f"the program ended with {status}"
