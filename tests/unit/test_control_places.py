"""Where the operator's socket is: the order of places, and what is refused as one."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import gevent
import gevent.event
import gevent.socket
import pytest

from fzg.commands import connection
from fzg.ops import control
from fzg.ops.control import ControlServer, Refused, places

UID = os.getuid()


def test_systemd_s_directory_is_before_the_system_s_the_session_s_and_our_own():
    environment = {"RUNTIME_DIRECTORY": "/run/other:/run/second", "XDG_RUNTIME_DIR": "/run/user/7"}
    assert [str(each) for each in places(environment)][:4] == [
        "/run/other/control.sock",
        "/run/firezone-gateway/control.sock",
        "/run/user/7/firezone-gateway.sock",
        f"/tmp/firezone-gateway-{UID}/control.sock",
    ]


def test_without_anything_there_is_the_system_s_and_our_own():
    assert [str(each) for each in places({})][:2] == [
        "/run/firezone-gateway/control.sock",
        f"/tmp/firezone-gateway-{UID}/control.sock",
    ]


@pytest.mark.parametrize(("value", "wanted"), [("/x/y", ["/x/y"]), ("", [])])
def test_the_variable_decides_alone(value, wanted):
    environment = {"FIREZONE_CONTROL_SOCKET": value, "RUNTIME_DIRECTORY": "/run/other"}
    assert [str(each) for each in places(environment)] == wanted


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Stands for /tmp/firezone-gateway-UID; not made yet."""
    directory = tmp_path / f"firezone-gateway-{UID}"
    monkeypatch.setattr(control, "private_directories", lambda uid: [directory])
    return directory


@pytest.fixture
def serve():
    started = []

    def server(*where, **handlers):
        started.append(ControlServer([Path(each) for each in where], handlers))
        started[-1].start()
        return started[-1]

    yield server
    for one in started:
        one.stop()


def ask(path, name):
    """The command's side, in a thread, since its sockets block here."""
    os.environ["FIREZONE_CONTROL_SOCKET"] = str(path)
    try:
        return gevent.get_hub().threadpool.apply(lambda: list(connection.ask(name)))
    finally:
        del os.environ["FIREZONE_CONTROL_SOCKET"]


def test_our_own_directory_is_made_for_us_alone(own, serve):
    server = serve(own / "control.sock")
    assert server.path == own / "control.sock"
    assert own.stat().st_mode & 0o777 == 0o700
    assert server.path.stat().st_mode & 0o777 == 0o600


def test_a_directory_that_others_may_enter_is_not_ours_and_the_next_place_is_taken(own, serve, tmp_path):
    own.mkdir(mode=0o777)
    own.chmod(0o755)
    server = serve(own / "control.sock", tmp_path / "next.sock")
    assert server.path == tmp_path / "next.sock"
    assert list(own.iterdir()) == []


def test_a_link_in_the_place_of_our_directory_is_not_followed(own, serve, tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    own.symlink_to(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        assert serve(own / "control.sock").path is None
    assert len(caplog.records) == 1
    assert "not a directory of this user alone" in caplog.records[0].tried


def test_a_path_that_no_socket_address_holds_is_one_warning(serve, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert serve(tmp_path / ("x" * 120)).path is None
    assert "File name too long" in caplog.records[0].tried


def test_no_place_at_all_is_silence(serve, caplog):
    assert serve().path is None
    assert caplog.records == []


def test_a_socket_that_nobody_listens_at_is_replaced_and_leaves_no_other_file(serve, tmp_path):
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert serve(path, hello=lambda request: [{"hello": 1}]).path == path
    assert ask(path, "hello") == [{"hello": 1}]
    assert [each.name for each in tmp_path.iterdir()] == ["control.sock"]


def test_who_was_replaced_does_not_remove_the_successor_s_socket(serve, tmp_path):
    path = tmp_path / "control.sock"
    first = serve(path)
    path.unlink()
    second = serve(path, hello=lambda request: [{"hello": 2}])
    first.stop()
    assert path.is_socket()
    second.stop()
    assert not path.exists()


# -- answers


def test_a_handler_that_fails_is_logged_and_told_in_one_sentence(serve, tmp_path, caplog):
    def broken(request):
        yield {"first": True}
        raise ZeroDivisionError("secret detail")

    serve(tmp_path / "s", broken=broken)
    with pytest.raises(connection.RefusedError, match="the gateway failed to answer; its log says why"):
        ask(tmp_path / "s", "broken")
    assert "A request of the operator failed" in caplog.text


def test_what_a_handler_refuses_reaches_the_operator_without_control_characters(serve, tmp_path):
    def refusing(request):
        raise Refused("no \x1b[31mclient")

    serve(tmp_path / "s", refusing=refusing)
    with pytest.raises(connection.RefusedError) as caught:
        ask(tmp_path / "s", "refusing")
    assert "\x1b" not in caught.value.message


def test_work_for_an_asker_that_hung_up_is_stopped(serve, tmp_path):
    closed = gevent.event.Event()

    def endless(request):
        try:
            yield {"begun": True}
            gevent.event.Event().wait()
        finally:
            closed.set()

    serve(tmp_path / "s", endless=endless)
    with socket.socket(socket.AF_UNIX) as asker:
        asker.connect(str(tmp_path / "s"))
        asker.sendall(b'{"request":"endless"}\n')
        gevent.sleep(0.05)
    assert closed.wait(5)


def test_requests_of_several_askers_run_side_by_side(serve, tmp_path):
    meeting = gevent.event.Event()
    waiting = []

    def meet(request):
        waiting.append(request)
        if len(waiting) == 3:
            meeting.set()
        meeting.wait(5)
        yield {"met": meeting.is_set()}

    serve(tmp_path / "s", meet=meet)

    def one():
        with gevent.socket.socket(socket.AF_UNIX) as asker:
            asker.connect(str(tmp_path / "s"))
            asker.sendall(b'{"request":"meet"}\n')
            return asker.makefile("rb").readline()

    askers = [gevent.spawn(one) for _ in range(3)]
    assert [each.get(timeout=5) for each in askers] == [b'{"met":true}\n'] * 3
