from __future__ import annotations

import errno
import socket

import pytest
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from fzg.host.netlink_socket import NetlinkError, NetlinkSocket

RTM_NEWLINK, RTM_GETLINK, RTM_GETADDR = 16, 18, 22
NO_SUCH_INDEX = 0x7FFFFFFF


@pytest.fixture
def netlink():
    with NetlinkSocket(socket.NETLINK_ROUTE) as opened:
        yield opened


def test_a_dump_lists_all_objects(netlink):
    names = {link.get_attr("IFLA_IFNAME") for link in netlink.dump(ifinfmsg(), RTM_GETLINK)}
    assert names == {name for _, name in socket.if_nameindex()}


def test_a_dump_may_be_narrowed_to_what_contains_some_bytes(netlink):
    links = netlink.dump(ifinfmsg(), RTM_GETLINK, containing=(b"lo\0",))
    assert "lo" in {link.get_attr("IFLA_IFNAME") for link in links}
    assert netlink.dump(ifinfmsg(), RTM_GETLINK, containing=(b"no such interface",)) == []


def test_a_dump_honours_the_filter_of_its_message(netlink):
    query = ifaddrmsg()
    query["family"], query["index"] = socket.AF_INET, socket.if_nametoindex("lo")
    assert {address["index"] for address in netlink.dump(query, RTM_GETADDR)} <= {query["index"]}


def test_a_refusal_raises_the_kernels_reason(netlink):
    link = ifinfmsg()
    link["index"] = NO_SUCH_INDEX
    with pytest.raises(NetlinkError) as refused:
        netlink.request(link, RTM_NEWLINK)
    assert refused.value.errno in (errno.ENODEV, errno.EPERM)
    assert refused.value.strerror


def test_the_socket_stays_usable_after_a_refusal(netlink):
    link = ifinfmsg()
    link["index"] = NO_SUCH_INDEX
    for _ in range(3):
        with pytest.raises(NetlinkError):
            netlink.request(link, RTM_NEWLINK)
        assert netlink.dump(ifinfmsg(), RTM_GETLINK)
