"""Maintenance: clients are sent away until they are silent, and nobody is let in meanwhile."""

from __future__ import annotations

from types import SimpleNamespace

import gevent

from fzg.ops.drain import Drain
from fzg.portal import messages
from tests.unit.gateway_world import CLIENT_ID, close_worlds, udp, world  # noqa: F401

GOODBYE = bytes.fromhex(
    "600000000008ff0000000000000000000000000000000000000000000000000000000000000000000200000000000000"
)


def connected(**kinds):
    w = world(**kinds).start()
    w.connect()
    assert w.traffic_flows()
    w.net.run(1.5)
    return w


def drain(w):
    left = w.gateway.core.drain(w.net.now)
    w.gateway.drain()
    w.net.run(1.0)
    return left


def goodbyes(w):
    return w.client.received.count(GOODBYE)


def test_a_client_is_told_once_and_forgotten_when_it_is_silent():
    w = connected()
    assert drain(w) == 1
    assert goodbyes(w) == 1
    w.client.node.drop("gateway")
    assert drain(w) == 1
    assert drain(w) == 0
    assert goodbyes(w) == 1
    assert w.gateway.core.tunnel.client(CLIENT_ID) is None
    assert w.gateway.core.node.connection(CLIENT_ID) is None


def test_a_client_that_goes_on_sending_lost_the_goodbye_and_is_told_again():
    w = connected()
    w.net.lose = lambda source, destination, payload: source.ip in w.gateway.addresses
    assert drain(w) == 1
    assert goodbyes(w) == 0
    w.net.lose = lambda source, destination, payload: False
    w.client.send(udp(source=w.client.ipv4))
    w.net.run(0.1)
    assert drain(w) == 1
    assert goodbyes(w) == 1


def test_while_draining_an_authorization_is_neither_acknowledged_nor_kept():
    w = connected()
    w.reject()
    w.net.run(0.1)
    assert drain(w) == 0
    before = len(w.gateway.said(messages.AuthorizationCreated))
    w.authorize()
    w.net.run(2.0)
    assert len(w.gateway.said(messages.AuthorizationCreated)) == before
    assert w.gateway.core.client_ids == []
    assert w.gateway.core.node.connection(CLIENT_ID) is None


def test_an_authorization_that_waited_for_a_relay_is_dropped():
    w = world(relays=1)
    w.net.lose = lambda source, destination, payload: True
    w.start(settle=0.0)
    w.authorize()
    assert drain(w) == 0
    w.net.lose = lambda source, destination, payload: False
    w.net.run(3.0)
    assert w.gateway.core.client_ids == []


def test_a_client_without_a_path_is_forgotten_at_once():
    w = world().start()
    w.net.lose = lambda source, destination, payload: source.ip in w.client.addresses
    w.authorize()
    w.net.run(0.2)
    assert w.gateway.core.client_ids == [CLIENT_ID]
    assert drain(w) == 0


# -- the process's side


class Steps:
    """A gateway whose clients go when told, and a portal, which note what is asked of them."""

    def __init__(self, clients):
        self.log = []
        self.left = clients
        self.going = True

    def make(self):
        gateway = SimpleNamespace(
            drain=self.drain, handle_portal_disconnected=lambda now: self.log.append("held"), client_ids=self.left
        )
        portal = SimpleNamespace(close=lambda wait: self.log.append("portal left"))
        return Drain(
            gateway, portal, settle=lambda: self.log.append("sent"), finished=lambda: self.log.append("finished")
        )

    def drain(self, now):
        self.log.append("goodbyes")
        if self.going:
            self.left.clear()
        return len(self.left)


def test_the_portal_is_left_before_the_first_goodbye_and_the_end_comes_last():
    steps = Steps(["a", "b"])
    drain = steps.make()
    assert not drain.is_under_way
    assert drain.start(10.0)
    assert drain.is_under_way
    assert drain.done.wait(5)
    assert steps.log == ["portal left", "held", "goodbyes", "sent"]
    gevent.sleep(0.3)
    assert steps.log[-1] == "finished"


def test_clients_that_do_not_go_hold_nobody_up_longer_than_the_timeout():
    steps = Steps(["a"])
    steps.going = False
    drain = steps.make()
    drain.start(0.05)
    assert drain.done.wait(2)
    assert drain.remaining == 1


def test_a_second_start_changes_nothing():
    steps = Steps([])
    drain = steps.make()
    assert drain.start(10.0)
    assert not drain.start(0.0)
    assert drain.done.wait(2)
    assert steps.log.count("portal left") == 1
