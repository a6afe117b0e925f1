"""Namespaces for tests that run the whole program, and the frozen file."""

from __future__ import annotations

import pytest
from gateway_process import Gateway, portal_in

from tests.lab.namespaces import Network


@pytest.fixture(scope="module")
def lab_network():
    with Network() as network:
        yield network


@pytest.fixture
def namespace(lab_network):
    """A namespace that is connected to nothing."""
    return lab_network.namespace(f"n{len(lab_network.namespaces)}")


@pytest.fixture
def portal(namespace):
    with portal_in(namespace) as scripted:
        yield scripted


@pytest.fixture
def start(namespace):
    """Starts gateways in the namespace."""
    started = []

    def gateway(*arguments, **options):
        started.append(Gateway(namespace, *arguments, **options))
        return started[-1]

    yield gateway
    for one in started:
        one.stop()
