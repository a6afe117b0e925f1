"""The release: the same file for hosts with an older C library, built in a root of such a host."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from frozen_world import newest_glibc, unpack

from tests.lab.process import REPOSITORY
from tests.lab.scenario import Lab

ROOT = REPOSITORY / "build" / "release" / "root"
FILE = REPOSITORY / "dist" / "release" / "firezone-gateway"
MEGABYTE = 10**6

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.needs("root", "mmdebstrap", "unshare", "git", "objdump"),
]


@pytest.fixture(scope="module")
def release():
    subprocess.run([REPOSITORY / "packaging" / "release"], check=True)
    return FILE


def documented():
    """The oldest C library that the documentation promises to run with."""
    page = (REPOSITORY / "docs" / "install.md").read_text()
    (version,) = re.findall(r"`make release`[^.\n]*\bglibc (\d+)\.(\d+)", page)
    return tuple(map(int, version))


def test_no_object_in_it_needs_a_newer_c_library_than_the_documentation_says(release, tmp_path):
    needed = newest_glibc([release, *unpack(release, tmp_path)])
    assert needed <= documented() == (2, 31)


@pytest.mark.spec("OPS-50")
def test_it_is_as_small_as_the_other_file_and_has_its_sum_beside_it(release):
    assert release.stat().st_size <= 20 * MEGABYTE
    digest = hashlib.sha256(release.read_bytes()).hexdigest()
    assert (release.parent / "SHA256SUMS").read_text() == f"{digest}  firezone-gateway\n"


def c_library(root):
    """The paths of the C library's parts in this root, and of zlib, as the file asks for them."""
    listed = subprocess.run(
        ["chroot", root, "ldd", "/opt/python/bin/python3.11"], capture_output=True, text=True, check=True
    )
    paths = re.findall(r"(/lib\S+) \(0x", listed.stdout)
    folder = next(Path(path).parent for path in paths if "libc.so" in path)
    others = ("libdl.so.2", "libm.so.6", "libpthread.so.0", "libresolv.so.2", "librt.so.1", "libutil.so.1", "libz.so.1")
    return {*(path for path in paths if "python" not in path), *(str(folder / name) for name in others)}


@pytest.fixture
def old_host(release, tmp_path):
    """A root with nothing but the C library of that age and zlib; call it to run a file in there."""
    for library in c_library(ROOT):
        target = tmp_path / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        file = subprocess.run(["chroot", ROOT, "readlink", "-f", library], capture_output=True, text=True, check=True)
        shutil.copy(ROOT / file.stdout.strip().lstrip("/"), target)
    (tmp_path / "tmp").mkdir()

    def run(file, *arguments):
        shutil.copy(file, tmp_path / "firezone-gateway")
        command = ["chroot", tmp_path, "/firezone-gateway", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.mark.spec("OPS-50")
def test_it_runs_where_the_c_library_is_that_old_and_there_is_no_python(release, old_host):
    done = old_host(release, "--version", "--verbose")
    assert (done.returncode, done.stderr) == (0, "")
    assert "engine: native" in done.stdout
    assert "C library: glibc 2.31, " in done.stdout


def test_a_file_that_needs_a_newer_one_says_which(frozen, old_host, tmp_path_factory):
    major, minor = newest_glibc([frozen, *unpack(frozen, tmp_path_factory.mktemp("unpacked"))])
    if (major, minor) <= (2, 31):
        pytest.skip("not applicable: this machine is as old itself")
    done = old_host(frozen, "--version")
    assert done.returncode != 0
    assert re.search(r"version `GLIBC_2\.\d+' not found", done.stderr)


@pytest.mark.needs("namespaces", "tun", "ip", "nft", "setpriv", "curl")
def test_a_client_reaches_a_resource_through_it(release):
    with Lab("direct", gateway_command=(release,)) as lab:
        assert lab.client.curl("http://10.20.0.100/get").ok
        assert lab.client.paths() == ["PeerToPeer"]
        assert lab.warnings() == []


def test_built_again_it_is_the_same_file(release):
    before = release.read_bytes()
    subprocess.run([REPOSITORY / "packaging" / "release"], check=True)
    assert release.read_bytes() == before
