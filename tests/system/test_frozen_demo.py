"""What `make demo` shows, shown by the shipped file in the hands of a new user."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from io import StringIO

import pytest
from frozen_world import NewUser, hide_libraries, launcher_of, processes_of, programs_mapped, status_of
from rich.console import Console

from tests.lab import demo
from tests.lab.scenario import Lab

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(120, func_only=True),  # not counting the build, which the first test waits for
    pytest.mark.needs(
        "namespaces", "tun", "ip", "nft", "turnserver", "curl", "openssl", "setpriv", "setcap", "objdump", "strip"
    ),
    pytest.mark.needs("su", "useradd"),
]

CAP_NET_ADMIN = 1 << 12


@pytest.mark.spec("OPS-16", "OPS-50")
@pytest.mark.parametrize(("tour", "path"), [("direct", "PeerToPeer"), ("relayed", "RelayTo")])
def test_with_the_capability_file_a_new_user_serves_clients(frozen, tour, path):
    lab = Lab(
        demo.TOURS[tour][0],
        tls=True,
        relays=("relay", "coturn"),
        resources=demo.RESOURCES,
        start_gateway=False,
        start_clients=False,
    )
    with lab:
        # The new user must come to the file and to the portal's certificate.
        for folder in (lab.directory.parent, lab.directory, lab.portal.ca_file.parent):
            folder.chmod(0o755)
        lab.portal.ca_file.chmod(0o644)
        namespace = lab.places["gateway"].namespace
        file = lab.directory / "firezone-gateway"
        shutil.copy(frozen, file)
        subprocess.run(["setcap", "cap_net_admin+eip", file], check=True)
        node = lab.directory / "tun"
        os.mknod(node, 0o666 | 0o020000, os.makedev(10, 200))
        node.chmod(0o666)
        user = NewUser(namespace, lab.directory)
        namespace.bind("/dev/net/tun", node)
        hide_libraries(namespace, file, lab.directory)

        lab.scenario = replace(lab.scenario, gateway_command=(file,), gateway_wrapper=user.prefix)
        lab.start_gateway()
        lab.start_client(0)
        row = demo._Tour(lab, Console(file=StringIO())).run(last=tour == "relayed")

        assert (row.path.startswith(path), row.checksum) == (True, "right")
        (child,) = set(processes_of(namespace, file)) - {launcher_of(namespace, file)}
        status = status_of(child)
        assert set(status["Uid"].split()) == {str(user.uid)}
        assert int(status["CapEff"], 16) == CAP_NET_ADMIN
        assert any(re.search(r"/_MEI\w+/fzg/dataplane/_native\.", mapped) for mapped in programs_mapped(child))
        assert lab.warnings() == []
