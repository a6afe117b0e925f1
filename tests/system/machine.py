"""A whole machine in namespaces: this host's files, or a Debian of its own, under an overlay that is thrown away."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import time
from pathlib import Path

from tests.lab.process import REPOSITORY, Process, wait_until

DEBIAN = "bookworm"
OLDEST_DEBIAN = "bullseye"  # with systemd 247, the first that knows credentials
# What the package asks for, and what the tests look with.
DEBIAN_PACKAGES = ("systemd", "iproute2", "nftables", "procps", "curl", "ca-certificates")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_SET_UP = r"""
set -e
lower=$1 work=$2 init=$3
if [ -n "$4" ]; then echo $$ >"$4/cgroup.procs"; fi
exec unshare --mount --pid --fork --kill-child --ipc --uts --cgroup --propagation private sh -ec '
lower=$1 work=$2 init=$3 cgroups=$4
mount -t tmpfs -o mode=0755 tmpfs "$work"
mkdir "$work/upper" "$work/work" "$work/root"
mount -t overlay -o "lowerdir=$lower,upperdir=$work/upper,workdir=$work/work" overlay "$work/root"
cd "$work/root"
mkdir -p proc sys dev run tmp old-root
mount -t proc proc proc
mount -t sysfs sysfs sys
[ -z "$cgroups" ] || mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=0755 tmpfs dev
mkdir dev/pts dev/shm dev/net
for name in null zero full random urandom tty; do
    touch dev/$name
    mount --bind /dev/$name dev/$name
done
mknod -m 666 dev/net/tun c 10 200
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mkdir dev/changes
mount --bind "$work/upper" dev/changes
mount -t tmpfs -o mode=0755 tmpfs run
mount -t tmpfs -o mode=1777,noexec tmpfs tmp
pivot_root . old-root
umount -l /old-root
rmdir /old-root
mount --make-rshared /  # systemd leaves that to whoever makes a container; credentials come by propagation
exec env -i container=test PATH=$PATH $init
' sh "$lower" "$work" "$init" "$4"
"""


class Machine:
    """Runs until closed. `files` is its root directory as seen from here; /tmp is mounted noexec, /run is empty."""

    def __init__(self, directory: Path, *, lower: Path | str, init: str, prefix=(), boots: bool = False):
        self.directory = directory
        self._stack = contextlib.ExitStack()
        directory.mkdir(parents=True, exist_ok=True)
        work = directory / "work"
        work.mkdir()
        cgroup = self._stack.enter_context(_cgroup()) if boots else ""
        self._process = Process(
            "machine",
            ["sh", "-c", _SET_UP, "sh", str(lower), str(work), init, str(cgroup)],
            log=directory / "machine.log",
            prefix=list(prefix),
            environment={"PATH": PATH},
        )
        try:
            self.pid = wait_until(self._first_process, timeout=20, what=f"the machine's init; {self.log}")
        except BaseException:
            self.close()
            raise
        self.files = Path(f"/proc/{self.pid}/root")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    @property
    def log(self) -> str:
        return self._process.log_text()

    def path(self, name: str) -> Path:
        """A file of the machine, for this process to open."""
        return self.files / name.lstrip("/")

    def run(self, *command, check=True, timeout=60, **environment) -> subprocess.CompletedProcess[str]:
        """Run a command there as root, standard input and variables as given."""
        stdin = environment.pop("stdin", None)
        variables = [f"{name}={value}" for name, value in {"PATH": PATH, "LC_ALL": "C.UTF-8", **environment}.items()]
        done = subprocess.run(
            ["nsenter", f"--target={self.pid}", "--all", "env", "-i", "-C", "/", *variables, *map(str, command)],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def changed(self) -> set[str]:
        """Files that it has and did not start with, or that differ; those of /run, /tmp and /dev apart."""
        upper = self.path("/dev/changes")
        found = (Path(folder) / name for folder, _, names in os.walk(upper) for name in names)
        return {f"/{path.relative_to(upper)}" for path in found if not path.is_char_device()}  # those are removals

    def close(self) -> None:
        self._process.stop(timeout=0)
        self._stack.close()

    def _first_process(self) -> int | None:
        """Its init, once that has taken the place of the shell which set it up."""
        assert self._process.running, self.log
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        with contextlib.suppress(OSError, IndexError):
            if Path(f"/proc/{children[0]}/comm").read_text().strip() not in {"sh", "unshare", "env"}:
                return int(children[0])
        return None


@contextlib.contextmanager
def scratch_host(directory: Path, **options):
    """This host's own files, to install things on."""
    with Machine(directory, lower=Path("/"), init="sleep infinity", **options) as machine:
        yield machine


@contextlib.contextmanager
def debian(directory: Path, *, machine_id: str, suite: str = DEBIAN, **options):
    """A freshly installed Debian with systemd as its first process, booted."""
    init = f"/lib/systemd/systemd --machine-id={machine_id}"
    with Machine(directory, lower=debian_root(suite), init=init, boots=True, **options) as machine:
        wait_until(
            lambda: (
                machine.run("systemctl", "is-system-running", check=False).stdout.strip() in {"running", "degraded"}
            ),
            timeout=30,
            what=f"the machine is up; {machine.log}",
        )
        yield machine


def debian_root(suite: str = DEBIAN) -> Path:
    """A minimal Debian, made once by mmdebstrap and kept in .cache."""
    cache = REPOSITORY / ".cache"
    cache.mkdir(exist_ok=True)
    root = cache / f"debian-{suite}"
    with (cache / f"debian-{suite}.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        made_of = f"{suite} {' '.join(DEBIAN_PACKAGES)}"
        note = root / ".made-of"
        if not note.exists() or note.read_text() != made_of:
            shutil.rmtree(root, ignore_errors=True)
            subprocess.run(
                ["mmdebstrap", "--quiet", "--variant=apt", f"--include={','.join(DEBIAN_PACKAGES)}", suite, root],
                check=True,
            )
            note.write_text(made_of)
    return root


def cannot_boot() -> str | None:
    """Why no systemd can be started as a first process here, or None."""
    return None if _cgroup2() else "no cgroup2 hierarchy is mounted"


def _cgroup2() -> Path | None:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2" and os.access(place, os.W_OK):
            return Path(place)
    return None


@contextlib.contextmanager
def _cgroup():
    """A group of processes for one machine, gone afterwards with all that it made below."""
    root = _cgroup2()
    assert root is not None
    own = root / f"fzlab-machine-{os.getpid()}-{time.monotonic_ns()}"
    own.mkdir()
    try:
        yield own
    finally:
        (own / "cgroup.kill").write_text("1")
        wait_until(lambda: "populated 0" in (own / "cgroup.events").read_text(), timeout=10, what=f"{own} is empty")
        for path, _, _ in os.walk(own, topdown=False):
            os.rmdir(path)
