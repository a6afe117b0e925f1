"""Which engine runs."""

from __future__ import annotations

import builtins
import sys

import pytest

from fzg.dataplane.pure import PureEngine
from fzg.dataplane.select import EngineUnavailableError, make_engine
from tests.unit.dataplane_world import NativeEngine


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIREZONE_ENGINE", "FZG_REQUIRE_NATIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fzg.dataplane._native", None)


@pytest.mark.skipif(NativeEngine is None, reason="the native engine was not built")
def test_the_native_engine_runs_where_it_was_built(monkeypatch: pytest.MonkeyPatch):
    assert type(make_engine()) is NativeEngine
    monkeypatch.setenv("FIREZONE_ENGINE", "native")
    assert type(make_engine()) is NativeEngine


def test_the_engine_in_python_runs_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FIREZONE_ENGINE", "pure")
    monkeypatch.setenv("FZG_REQUIRE_NATIVE", "1")
    assert type(make_engine()) is PureEngine


@pytest.mark.usefixtures("not_built")
def test_without_a_native_engine_the_one_in_python_runs_and_that_is_said(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    assert type(make_engine()) is PureEngine
    assert "the native engine was not built" in caplog.text


def test_a_native_engine_that_cannot_be_loaded_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def without_libcrypto(name: str, *rest: object) -> object:
        if name == "fzg.dataplane._native":
            raise ImportError("no libcrypto 3.0 or later with ChaCha20 and Poly1305 was found")
        return genuine(name, *rest)

    genuine = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_libcrypto)
    caplog.set_level("INFO")
    assert type(make_engine()) is PureEngine
    assert "the native engine cannot run: no libcrypto 3.0 or later" in caplog.text


@pytest.mark.usefixtures("not_built")
@pytest.mark.parametrize(("name", "value"), [("FIREZONE_ENGINE", "native"), ("FZG_REQUIRE_NATIVE", "1")])
def test_a_missing_native_engine_that_must_be_there_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.setenv(name, value)
    with pytest.raises(EngineUnavailableError, match="native packet engine is not there"):
        make_engine()


def test_an_engine_that_nobody_knows_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FIREZONE_ENGINE", "nativ")
    with pytest.raises(EngineUnavailableError, match="FIREZONE_ENGINE is 'nativ'"):
        make_engine()
