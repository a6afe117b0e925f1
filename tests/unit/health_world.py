"""What tests of the health endpoint share: a gateway that says why it is not ready, and a thread that asks."""

from __future__ import annotations

import pytest
from gevent.threadpool import ThreadPool


class Gateway:
    reason: str | None = None

    def not_ready_because(self):
        return self.reason


@pytest.fixture(name="threads", scope="module")
def threads_fixture():
    return ThreadPool(1)
