"""`firezone-gateway ready` against the health endpoint itself."""

from __future__ import annotations

import socket

import click
import pytest
from gevent.threadpool import ThreadPool

from fzg import commands
from fzg.ops.health import Health
from fzg.wire.endpoint import Endpoint
from tests.lab.ports import free_port
from tests.unit.health_world import Gateway, threads_fixture  # noqa: F401


@pytest.fixture
def port():
    return free_port("127.0.0.1")


@pytest.fixture(params=["127.0.0.1", "0.0.0.0", "[::1]"])
def gateway(request, port):
    gateway = Gateway()
    gateway.address = Endpoint.parse(f"{request.param}:{port}")
    server = Health(gateway.address, gateway.not_ready_because)
    server.start()
    yield gateway
    server.stop()


def ask(threads, address):
    return threads.apply(commands.run, ("ready", [], {"health_check_addr": address}))


def test_it_is_0_when_the_gateway_is_ready(threads, gateway, capsys):
    assert ask(threads, gateway.address) == 0
    assert capsys.readouterr().out == "ready\n"


def test_it_fails_with_the_gateway_s_own_reason(threads, gateway):
    gateway.reason = "the portal has not been joined yet"
    with pytest.raises(click.ClickException, match=r"^not ready: the portal has not been joined yet$"):
        ask(threads, gateway.address)


def test_a_gateway_that_does_not_run_is_told_from_one_that_is_not_ready(threads, port):
    with pytest.raises(click.ClickException, match=rf"nothing answers at 127.0.0.1:{port} \(Connection refused\)"):
        ask(threads, Endpoint.parse(f"0.0.0.0:{port}"))


def test_another_program_at_that_port_is_no_gateway(threads):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            connection, _ = other.accept()
            connection.recv(1000)
            connection.sendall(b"SSH-2.0-\x1b[31m\r\n")
            connection.close()

        threads_of_other = ThreadPool(1)
        threads_of_other.spawn(answer)
        with pytest.raises(click.ClickException, match=r"^not ready: ") as failure:
            ask(threads, Endpoint.parse(f"127.0.0.1:{other.getsockname()[1]}"))
        assert "\x1b" not in failure.value.message
