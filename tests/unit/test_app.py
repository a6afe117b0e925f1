"""What the process does between its drivers and the core."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from unittest.mock import MagicMock

from fzg.app import GOODBYE_FLUSH, App, _as_fatal
from fzg.host import clock
from fzg.host.errors import HostError
from fzg.portal.messages import BroadcastIceCandidates, BroadcastInvalidatedIceCandidates

CLIENT = "11111111-2222-4333-8444-555555555555"


def test_a_full_collection_does_not_look_at_the_program_itself():
    app, frozen = MagicMock(), []
    app._stop.get.side_effect = lambda: frozen.append(gc.get_freeze_count())
    gc.unfreeze()
    try:
        App.run(app)
    finally:
        gc.unfreeze()
    assert frozen[0] > 10_000  # the objects of the imported modules


def test_unsent_candidates_go_back_newest_first():
    given = []
    app = SimpleNamespace(_gateway=SimpleNamespace(handle_unsent=given.append))
    older = BroadcastIceCandidates(client_ids=(CLIENT,), candidates=("candidate:1 1 udp 1 192.0.2.1 1 typ host",))
    newer = BroadcastInvalidatedIceCandidates(client_ids=(CLIENT,), candidates=older.candidates)
    App.on_unsent(app, [older, newer])
    assert given == [newer, older]


def test_a_task_that_ends_with_a_sentence_ends_the_process_with_that_sentence():
    assert str(_as_fatal("tun", HostError("the TUN device is gone"))) == "the TUN device is gone"


def test_a_task_that_ends_with_a_mistake_is_named():
    assert str(_as_fatal("timer", ValueError("no such thing"))) == "the timer task ended: no such thing"


def test_flows_end_when_the_goodbye_is_said_not_before_the_portal_was_left(monkeypatch):
    moments = [10.0]
    monkeypatch.setattr(clock, "now", lambda: moments[-1])
    app = MagicMock()
    app._portal.close.side_effect = lambda wait: moments.append(moments[-1] + wait)
    app._gateway.poll_transmit.return_value = None
    App._shut_down(app)
    app._gateway.shutdown.assert_called_once_with(10.0 + GOODBYE_FLUSH)
