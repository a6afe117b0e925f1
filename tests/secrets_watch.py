"""A pytest plugin: no test passes during which a gateway said a secret, be it in a log, a record or an error.

Registered by tests/conftest.py. Texts are the logs of gateway processes that ended, and what pytest captured of the
test; secrets are what portals handed out, and every `fzg.secret.Secret` that a test made in this process.
"""

from __future__ import annotations

import functools

import pytest

from fzg.secret import Secret
from tests.lab.secrets import WATCH

_CAPTURED = ("Captured log", "Captured stdout", "Captured stderr")


def pytest_configure(config: pytest.Config) -> None:
    """Note each secret that is made in this process."""
    original = Secret.__init__
    if getattr(original, "is_watched", False):
        return

    @functools.wraps(original)
    def init(self, value):
        original(self, value)
        WATCH.add(value, "a Secret")

    init.is_watched = True
    Secret.__init__ = init


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Listen to what the test printed and logged."""
    report = yield
    for title, text in report.sections:
        if title.startswith(_CAPTURED) and title.endswith(call.when):
            WATCH.hear(f"{item.nodeid} ({title})", text)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item):
    """When all that the test started has ended, compare."""
    yield
    if leaks := WATCH.leaks():
        pytest.fail("secrets were said:\n" + "\n".join(map(str, leaks)), pytrace=False)
