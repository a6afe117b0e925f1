"""What the tests of the shipped file have in common: its parts, users, and what its processes cost."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from PyInstaller.archive.readers import CArchiveReader

# What may come from the host: the C library's own parts, its loader, and zlib, which the launcher is linked with.
OF_THE_HOST = re.compile(
    r"(ld-linux[\w.-]*|ld64|libc|libm|libdl|libpthread|librt|libutil|libresolv|libnss_\w+|libanl|libz)\.so(\.[\d.]+)?"
    r"|ld-[\d.]+\.so|lib(c|m|dl|pthread|rt|util|resolv|nss_\w+)-[\d.]+\.so"
)
UNPACKED = re.compile(r"/\S*/_MEI[0-9a-f]{8}\w{6}")


def programs_in(file: Path) -> list[str]:
    """The names of all shared objects that the file carries."""
    return [
        name
        for name, (*_, kind) in CArchiveReader(str(file)).toc.items()
        if kind == "b" and re.search(r"\.so(\.\d+)*$", name)
    ]


def unpack(file: Path, folder: Path) -> list[Path]:
    """Its shared objects as files."""
    archive, unpacked = CArchiveReader(str(file)), []
    for name in programs_in(file):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(archive.extract(name))
        unpacked.append(target)
    return unpacked


def newest_glibc(objects: list[Path]) -> tuple[int, int]:
    """The newest version of the C library that a symbol of any of them asks for."""
    listed = subprocess.run(["objdump", "-T", *objects], capture_output=True, text=True, check=True).stdout
    return max((int(major), int(minor)) for major, minor in re.findall(r"\bGLIBC_(\d+)\.(\d+)", listed))


class NewUser:
    """A user that only commands in this namespace know, entered through `su` as an operator would."""

    name = "fz-newcomer"

    def __init__(self, namespace, directory: Path) -> None:
        copy = directory / "etc"
        shutil.copytree("/etc", copy, symlinks=True)
        # Before what the namespace has for single files in there.
        namespace._binds = {"/etc": copy, **namespace._binds}
        namespace.run("useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", self.name)
        self.uid = int(namespace.run("id", "-u", self.name).stdout)
        self.prefix = ["su", "--shell", "/bin/sh", "--command", 'exec "$@"', "--", self.name, "sh"]


def hide_libraries(namespace, file: Path, directory: Path) -> set[str]:
    """Let the host's copies of all libraries in the file be empty ones, in this namespace; returns their names."""
    carried = {name for name in programs_in(file) if "/" not in name and name.startswith("lib")}
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    empty = directory / "empty"
    empty.touch()
    hidden = set()
    for name, path in re.findall(r"^\s(\S+) .* => (/\S+)$", listed, re.MULTILINE):
        if name in carried:
            namespace.bind(str(Path(path).resolve()), empty)
            hidden.add(name)
    return hidden


def launcher_of(namespace, file: Path) -> int:
    """The process that was started, whatever it was started through."""
    (launcher,) = (pid for pid in processes_of(namespace, file) if parent(pid) not in processes_of(namespace, file))
    return launcher


def processes_of(namespace, file: Path) -> list[int]:
    return [pid for pid in namespace.pids() if _is(pid, file)]


def _is(pid: int, file: Path) -> bool:
    try:
        return os.path.samefile(f"/proc/{pid}/exe", file)
    except OSError:
        return False


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def status_of(pid: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


def programs_mapped(pid: int) -> set[str]:
    """The paths of all files that the process has mapped as code."""
    return {
        fields[5]
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if len(fields := line.split(maxsplit=5)) == 6 and "x" in fields[1] and fields[5].startswith("/")
    }


def resident_mib(pid: int) -> float:
    return int(status_of(pid)["VmRSS"].split()[0]) / 1024


def waited_for_a_processor(pid: int) -> float:
    """Seconds that the process was ready to run and others did; not the program's fault."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
