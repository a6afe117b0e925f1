"""What a gateway needs in order to start at all: kernel, privilege, TUN, token, identity, ports, disks."""

from __future__ import annotations

import errno
import os
import re
from typing import TYPE_CHECKING, Final

from fzg.host import capabilities
from fzg.host.facts import MACHINE_ID, TOKEN_FILE, Unreadable
from fzg.ops.doctor.check import Check, State
from fzg.portal import remedy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fzg.host.facts import HostFacts
    from fzg.host.holders import Process
    from fzg.ops.doctor.check import Seen

# Masquerading by nftables came with 3.18; beside the NAT of iptables it works since 4.18.
_OLDEST_KERNEL: Final = (3, 18)
_SOUND_KERNEL: Final = (4, 18)
_OFFLOADING_KERNEL: Final = (6, 2)

# The identity takes a few bytes; the records of flows that wait for their upload, some megabytes.
_ENOUGH_STATE: Final = 1 << 20
# The one-file form unpacks 25 MB, and a command does so beside the gateway.
_ENOUGH_TEMPORARY: Final = 64 << 20
_ENOUGH_INODES: Final = 200

# Cloned hosts get new SSH keys at their first start; a day separates that from the minutes of an installation.
_CLONED_AFTER: Final = 86_400.0


def checks(seen: Seen) -> Iterator[Check]:
    """In the order of a start."""
    yield kernel(seen.host)
    yield privilege(seen)
    yield tun_device(seen)
    yield interface(seen)
    yield token(seen)
    yield identity(seen)
    yield udp_port(seen)
    yield health_port(seen)
    yield state_directory(seen)
    yield temporary_directory(seen)


def kernel(host: HostFacts) -> Check:
    """Old ones lack nftables NAT."""
    found = re.match(r"(\d+)\.(\d+)", host.kernel)
    if found is None:
        return Check("kernel", State.UNKNOWN, f"Linux {host.kernel}")
    version = (int(found[1]), int(found[2]))
    if version < _OLDEST_KERNEL:
        return Check(
            "kernel", State.FAIL, f"Linux {host.kernel} cannot masquerade by nftables", "run Linux 4.18 or later"
        )
    if version < _SOUND_KERNEL:
        seen = f"Linux {host.kernel} cannot masquerade by nftables and iptables at the same time"
        return Check("kernel", State.WARN, seen, "run Linux 4.18 or later, or keep iptables' nat table empty")
    note = "" if version >= _OFFLOADING_KERNEL else ", without segmentation offload for the TUN (Linux 6.2)"
    return Check("kernel", State.OK, f"Linux {host.kernel}{note}")


def privilege(seen: Seen) -> Check:
    """Root or CAP_NET_ADMIN, and the ways in which a file capability comes to nothing."""
    host = seen.host
    if host.uid == 0 and host.capabilities >> capabilities.CAP_NET_ADMIN & 1:
        return Check("privilege", State.OK, "root")
    if host.uid == 0:
        where = f"container ({host.container})" if host.container else "sandbox"
        return Check(
            "privilege", State.FAIL, f"root without CAP_NET_ADMIN in this {where}", _container_remedy(host, "NET_ADMIN")
        )
    if host.capabilities >> capabilities.CAP_NET_ADMIN & 1:
        return Check("privilege", State.OK, f"uid {host.uid} with CAP_NET_ADMIN")
    grant = f"sudo setcap cap_net_admin+eip {host.executable}"
    if seen.running:
        return Check(
            "privilege", State.UNKNOWN, f"uid {host.uid} asks without CAP_NET_ADMIN; the gateway that runs has it"
        )
    if host.nosuid:
        what = f"uid {host.uid} has no CAP_NET_ADMIN, and {host.executable} is on a file system mounted nosuid"
        return Check("privilege", State.FAIL, what, f"move the file to one that is not, then: {grant}")
    if host.no_new_privileges:
        what = f"uid {host.uid} has no CAP_NET_ADMIN and cannot gain it here (no_new_privs)"
        return Check("privilege", State.FAIL, what, "AmbientCapabilities=CAP_NET_ADMIN in the unit")
    what = f"uid {host.uid} is neither root nor has CAP_NET_ADMIN"
    return Check("privilege", State.FAIL, what, f"{grant} (or start it with sudo)")


def tun_device(seen: Seen) -> Check:
    """/dev/net/tun, which containers have to be given."""
    host, name, node = seen.host, "tun-device", "/dev/net/tun"
    if not host.tun.error:
        return Check(name, State.OK, f"{node} can be opened")
    if host.tun.can_make:
        return Check(name, State.WARN, f"{node} is missing; the gateway makes it when it starts", _MKNOD)
    if host.tun.error == errno.ENOENT:
        return Check(name, State.FAIL, f"{node} is missing", _node_remedy(host))
    if host.tun.error in (errno.ENODEV, errno.ENXIO):
        return Check(name, State.FAIL, f"{node} is there, but the kernel has no TUN driver", "sudo modprobe tun")
    if host.tun.error in (errno.EACCES, errno.EPERM):
        if seen.running:
            return Check(name, State.UNKNOWN, f"uid {host.uid} may not open {node}; the gateway that runs has it open")
        # A device cgroup refuses with EPERM, the node's mode with EACCES.
        advice = _node_remedy(host) if host.tun.error == errno.EPERM else f"sudo chmod 0666 {node}"
        return Check(name, State.FAIL, f"{node} may not be opened by uid {host.uid}", advice)
    return Check(name, State.FAIL, f"{node} cannot be opened: {os.strerror(host.tun.error)}", _node_remedy(host))


_MKNOD: Final = "sudo mkdir -p /dev/net && sudo mknod -m 0666 /dev/net/tun c 10 200"
_LXC: Final = (
    "on the LXC or Proxmox host, add to the container's configuration and restart it: "
    "lxc.cgroup2.devices.allow: c 10:200 rwm; lxc.mount.entry: /dev/net/tun dev/net/tun none bind,create=file"
)


def _node_remedy(host: HostFacts) -> str:
    if host.container:
        return _container_remedy(host, "NET_ADMIN")
    return _MKNOD if host.tun.driver else f"sudo modprobe tun && ({_MKNOD})"


def _container_remedy(host: HostFacts, capability: str) -> str:
    if host.container in ("docker", "podman"):
        return f"start the container with --cap-add {capability} --device /dev/net/tun"
    return _LXC


def interface(seen: Seen) -> Check:
    """Our device must be free, or the gateway's that runs."""
    host, name = seen.host, "tun-interface"
    if host.link is None:
        if seen.running:
            what = (
                f"the gateway that answers has no {host.interface} here: it was deleted, or was never the gateway's own"
            )
            return Check(name, State.WARN, what, "restart the gateway, unless it was started with --tun-fd")
        return Check(name, State.OK, f"{host.interface} is free")
    holder = host.tun_holder
    if seen.live is not None:
        return Check(name, State.OK, f"{host.interface} is the running gateway's, pid {seen.live.pid}")
    if host.link != "tun":
        what = f"{host.interface} exists and is an interface of another kind ({host.link or 'a device'})"
        return Check(name, State.FAIL, what, f"sudo ip link delete {host.interface}")
    if holder is not None:
        what = f"{host.interface} is held by {holder}, so no second gateway can start here"
        return Check(name, State.WARN, what, f"to start another one, stop it first: sudo kill {holder.pid}")
    if host.uid != 0:
        return Check(name, State.UNKNOWN, f"{host.interface} exists; only root sees who holds it", "ask as root")
    what = f"{host.interface} exists, and no process of this host's holds it"
    return Check(name, State.WARN, what, f"if no other container does either: sudo ip link delete {host.interface}")


def token(seen: Seen) -> Check:
    """There is one; whether the portal takes it only a gateway finds out, see `portal-login`."""
    plan, found = seen.plan, seen.host.token_file
    if plan.token_source:
        return Check("token", State.OK, f"given by {plan.token_source}")
    if plan.token_problem:
        return Check("token", State.FAIL, plan.token_problem, remedy.TOKEN)
    if seen.running:
        return Check("token", State.OK, "none given to this command; the gateway that runs has one")
    if isinstance(found, Unreadable):
        return Check("token", State.UNKNOWN, f"none given to this command; {TOKEN_FILE}: {found.reason}", "ask as root")
    if found:
        return Check("token", State.OK, f"none given to this command; the service takes it from {TOKEN_FILE}")
    what = "there is no token as argument, in the variable FIREZONE_TOKEN or as the systemd credential FIREZONE_TOKEN"
    if found == 0:
        what += f", and {TOKEN_FILE} is empty"
    return Check("token", State.FAIL, what, remedy.TOKEN)


def identity(seen: Seen) -> Check:
    """Where the identity comes from, and whether another host may have the same."""
    plan, host, name = seen.plan, seen.host, "identity"
    shown = f"{plan.identity[:8]}…" if len(plan.identity) > 12 else plan.identity
    if seen.live is not None and _is_duplicate(seen.live.portal_error):
        return Check(
            name, State.FAIL, "the portal says that another gateway with this identity is online", remedy.IDENTITY
        )
    if plan.identity_source != str(MACHINE_ID):
        if plan.identity_source:
            return Check(name, State.OK, f"{shown} from {plan.identity_source}")
        what = f"none yet: there is no usable {MACHINE_ID}, so one is made at the start and kept in /var/lib/firezone"
        return Check(name, State.OK, what)
    derived = f"{shown} derived from {MACHINE_ID}"
    if host.container:
        what = f"{derived}, which all containers of one image share"
        return Check(name, State.WARN, what, remedy.IDENTITY)
    if host.machine_id_age is not None and host.machine_id_age > _CLONED_AFTER:
        what = (
            f"{derived}, which is {host.machine_id_age / 86_400:.0f} days older than the host's SSH keys, as in a clone"
        )
        advice = f"if this host is a clone: sudo rm {MACHINE_ID} && sudo systemd-machine-id-setup, or set FIREZONE_ID"
        return Check(name, State.WARN, what, advice)
    return Check(name, State.OK, derived)


def _is_duplicate(error: str) -> bool:
    return "gateway_already_connected" in error or "HTTP 409" in error


def udp_port(seen: Seen) -> Check:
    """The port that routers may forward."""
    name, port, holders = "udp-port", seen.plan.udp_port, seen.host.udp
    if not holders:
        return Check(name, State.OK, f"UDP port {port} is free")
    who = next((listener.holder for listener in holders if listener.holder is not None), None)
    if _is_ours(seen, who):
        return Check(name, State.OK, f"UDP port {port} is the running gateway's")
    if seen.running and who is None:
        return Check(name, State.UNKNOWN, f"UDP port {port} is in use; only root sees by whom", "ask as root")
    what = f"UDP port {port} is taken by {who or 'a process that only root may see'}; the gateway uses another one"
    return Check(name, State.WARN, what, _port_remedy(port, "stop that program, or forward another port"))


def _is_ours(seen: Seen, who: Process | None) -> bool:
    """Whether this process is the running gateway."""
    if who is None:
        return False
    return who == seen.host.tun_holder or (seen.live is not None and who.pid == seen.live.pid)


def _port_remedy(port: int, what: str) -> str:
    return f"only a port forwarding needs it: sudo ss -lunp 'sport = :{port}' shows who has it; {what}"


def health_port(seen: Seen) -> Check:
    """Where /healthz and /readyz answer."""
    plan, name = seen.plan, "health-port"
    address = f"[{plan.health_address}]" if ":" in plan.health_address else plan.health_address
    shown = f"TCP {address}:{plan.health_port}"
    taken = [each for each in seen.host.health if _clashes(each.address, plan.health_address)]
    if not taken:
        if seen.running:
            what = f"nothing listens on {shown}"
            return Check(
                name,
                State.WARN,
                what,
                "if the gateway's log says nothing else, it was started with another --health-check-addr",
            )
        return Check(name, State.OK, f"{shown} is free")
    who = taken[0].holder
    if _is_ours(seen, who):
        return Check(name, State.OK, f"{shown} answers for the running gateway")
    if seen.running and who is None:
        return Check(name, State.UNKNOWN, f"{shown} is in use; only root sees by whom", "ask as root")
    what = (
        f"{shown} is taken by {who or 'a process that only root may see'}; the gateway would run without health checks"
    )
    return Check(name, State.WARN, what, "choose another with --health-check-addr or HEALTH_CHECK_ADDR=127.0.0.1:8090")


def _clashes(one: str, other: str) -> bool:
    wildcards = {"0.0.0.0", "::"}  # noqa: S104 - compared, not bound
    return one == other or one in wildcards or other in wildcards


def state_directory(seen: Seen) -> Check:
    """Where a made identity and flow records wait; whether the start depends on it."""
    disk, name = seen.host.disks["state"], "state-directory"
    needed = not seen.plan.identity and not seen.running
    bad = State.FAIL if needed else State.WARN
    uses = "the identity cannot be kept" if needed else "flow records cannot wait there for their upload"
    if disk.read_only:
        what = f"{disk.path} is on a read-only file system, so {uses}"
        return Check(name, bad, what, f"mount a writable one at {disk.path}, or set FIREZONE_ID")
    if disk.free < _ENOUGH_STATE:
        what = f"the disk of {disk.path} is full ({disk.free // 1024} KiB left), so {uses}"
        return Check(name, bad, what, f"free space: sudo du -xh {disk.path} | sort -h | tail; or set FIREZONE_ID")
    if disk.inodes is not None and disk.inodes < _ENOUGH_INODES:
        what = f"the file system of {disk.path} has {disk.inodes} inodes left, so {uses}"
        return Check(name, bad, what, f"delete files: sudo du --inodes -x {disk.path} | sort -n | tail")
    room = f"{disk.path} has {disk.free >> 20} MiB free"
    if not disk.writable:
        if seen.host.uid != 0 and not needed:
            return Check(name, State.UNKNOWN, f"{room}; uid {seen.host.uid} may not write there")
        advice = f"sudo install -d -m 0750 -o USER {disk.path} (the user that runs the gateway), or set FIREZONE_ID"
        return Check(name, bad, f"uid {seen.host.uid} may not write to {disk.path}, so {uses}", advice)
    return Check(name, State.OK, room)


def temporary_directory(seen: Seen) -> Check:
    """Where the one-file form unpacks itself."""
    disk, name = seen.host.disks["temporary"], "temporary-directory"
    other = "start it with TEMP=/var/tmp, or another directory that is writable and not mounted noexec (/run mostly is)"
    relevant = State.FAIL if seen.host.frozen else State.OK
    if disk.no_exec:
        what = f"{disk.path} is mounted noexec, so the one-file program cannot load what it unpacks there"
        return Check(name, relevant, what, other if seen.host.frozen else "")
    if disk.free < _ENOUGH_TEMPORARY:
        what = f"the disk of {disk.path} is nearly full ({disk.free >> 20} MiB left); the one-file program needs 64 MiB"
        return Check(name, State.WARN if seen.host.frozen else State.OK, what, other if seen.host.frozen else "")
    return Check(name, State.OK, f"{disk.path} has {disk.free >> 20} MiB free")
