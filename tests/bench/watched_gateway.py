"""The gateway, with a control socket that tells what its engine counts: `python -m tests.bench.watched_gateway`.

It is the gateway as it is, but that `FZG_BENCH_CONTROL` names a socket for the order `counters`: the engine's totals,
and how many items of each kind came out of it for Python.
"""

from gevent import monkey

monkey.patch_all()

import os  # noqa: E402
from typing import Any  # noqa: E402

from fzg import app, cli  # noqa: E402
from tests.lab.control import ControlThread  # noqa: E402


def _watched(make_engine: Any) -> Any:
    def make() -> Any:
        engine = make_engine()

        class Watched(type(engine)):  # type: ignore[misc]
            def receive_udp(self, family: int, now: float) -> Any:
                return count(super().receive_udp(family, now))

            def receive_tun(self, now: float) -> Any:
                return count(super().receive_tun(now))

        totals: dict[str, int] = {}

        def count(items: Any) -> Any:
            for item in items:
                name = f"item_{type(item).__name__}"
                totals[name] = totals.get(name, 0) + 1
            return items

        class Party:
            def op_counters(self) -> dict[str, int]:
                return {**totals, **watched.counters()}

        watched = Watched()
        ControlThread(os.environ["FZG_BENCH_CONTROL"], Party())
        return watched

    return make


if __name__ == "__main__":
    app.make_engine = _watched(app.make_engine)
    cli.main()
