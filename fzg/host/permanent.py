"""What root makes permanent for a gateway: kernel parameters and the TUN module at each boot (spec operations 2.2).

The file of parameters remembers, in comments, what each was before, so that the removal restores that and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from fzg.host import sysctl, tun
from fzg.host.errors import HostError
from fzg.host.sysctl import Setting

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SYSCTL_FILE: Final = Path("sysctl.d/60-firezone-gateway.conf")
MODULES_FILE: Final = Path("modules-load.d/firezone-gateway.conf")
ETC: Final = Path("/etc")

_MARK: Final = "# Made by firezone-gateway host-setup; firezone-gateway host-setup --remove takes it back."
_MADE_DIRECTORY: Final = "# The directory was made too."
_BEFORE: Final = re.compile(r"^# before: (\S+)=(.*)$")
_FILE_MODE: Final = 0o644


class File(NamedTuple):
    """A file to be written."""

    path: Path
    text: str
    makes_directory: bool


class Step(NamedTuple):
    """One change: a file, a parameter or a module; exactly one of them is set."""

    file: File | None = None
    setting: Setting | None = None
    delete: Path | None = None
    module: str = ""

    def __str__(self) -> str:
        """The shell commands that do the same."""
        if self.file is not None:
            made = f"mkdir -p {self.file.path.parent}\n" if self.file.makes_directory else ""
            return f"{made}cat > {self.file.path} <<'END'\n{self.file.text}END"
        if self.setting is not None:
            return f"sysctl -q -w {self.setting}"
        if self.delete is not None:
            return f"{'rmdir' if self.delete.is_dir() else 'rm'} {self.delete}"
        return f"modprobe {self.module}"

    def carry_out(self, root: Path = sysctl.PROC_SYS) -> None:
        """Do it. Raises HostError."""
        try:
            if self.file is not None:
                _write(self.file)
            elif self.setting is not None:
                if reason := sysctl.write(self.setting, root):
                    raise HostError(f"{reason}; in a container this is for the host to do, or for its --sysctl option")
            elif self.delete is not None:
                (self.delete.rmdir if self.delete.is_dir() else self.delete.unlink)()
            else:
                _load(self.module)
        except OSError as error:
            raise HostError(f"{error.filename or self}: {error.strerror or error}") from error


def to_set_up(*, enable_ipv6: bool, etc: Path = ETC, root: Path = sysctl.PROC_SYS, misc: Path = tun.MISC) -> list[Step]:
    """What is missing, in order; empty when all stands. Raises HostError when a file is somebody else's."""
    steps: list[Step] = []
    wanted, before = _parameters(enable_ipv6=enable_ipv6, etc=etc, root=root)
    # A minus: a boot without the parameter is no error.
    body = "".join(f"# before: {name}={value}\n" for name, value in before.items())
    body += "".join(f"-{setting.name} = {setting.value}\n" for setting in wanted)
    steps += _file(etc / SYSCTL_FILE, body)
    steps += _file(etc / MODULES_FILE, "tun\n")
    if not tun.has_driver(misc):
        steps.append(Step(module="tun"))
    steps += [Step(setting=setting) for setting in wanted if sysctl.read(setting.name, root) != setting.value]
    return steps


def to_remove(*, etc: Path = ETC, root: Path = sysctl.PROC_SYS) -> list[Step]:
    """What takes back what `to_set_up` did: parameters that still have our value, then the files."""
    path = etc / SYSCTL_FILE
    ours = _settings_of(path)
    steps = [
        Step(setting=Setting(name, value))
        for name, value in reversed(_before(path).items())
        if name in ours and value != ours[name] and sysctl.read(name, root) == ours[name]
    ]
    for name in (SYSCTL_FILE, MODULES_FILE):
        text = _text(etc / name)
        if text.startswith(_MARK):
            steps.append(Step(delete=etc / name))
            if _MADE_DIRECTORY in text and os.listdir((etc / name).parent) == [name.name]:  # noqa: PTH208 - names
                steps.append(Step(delete=(etc / name).parent))
    return steps


def _parameters(*, enable_ipv6: bool, etc: Path, root: Path) -> tuple[list[Setting], dict[str, str]]:
    """What the parameters must be, and what those were that we have changed or are about to."""
    known = _before(etc / SYSCTL_FILE)
    wanted = [Setting(name, "2") for name in known if name.endswith(".accept_ra")]
    wanted += [setting for setting in sysctl.router_advertisements(root) if setting not in wanted]
    off = sysctl.is_ipv6_disabled(root) and not enable_ipv6
    wanted += [
        setting
        for setting in sysctl.FORWARDING
        if sysctl.read(setting.name, root) and not (off and setting.name == sysctl.DISABLE_IPV6)
    ]
    for name, least in sysctl.CEILINGS:
        present = sysctl.read(name, root)
        if present.isdigit():
            wanted.append(Setting(name, str(max(int(present), least))))
    before = {setting.name: known.get(setting.name, sysctl.read(setting.name, root)) for setting in wanted}
    return wanted, before


def _file(path: Path, body: str) -> Iterator[Step]:
    present = _text(path)
    if present and not present.startswith(_MARK):
        raise HostError(f"{path} exists and was not made by this command; move it away, then run this again")
    makes = not path.parent.exists()
    note = f"{_MADE_DIRECTORY}\n" if makes or _MADE_DIRECTORY in present else ""
    text = f"{_MARK}\n{note}{body}"
    if present != text:
        yield Step(file=File(path, text, makes))


def _before(path: Path) -> dict[str, str]:
    text = _text(path)
    if not text.startswith(_MARK):
        return {}
    return {found[1]: found[2] for line in text.splitlines() if (found := _BEFORE.match(line))}


def _settings_of(path: Path) -> dict[str, str]:
    rows = [line.removeprefix("-").partition(" = ") for line in _text(path).splitlines() if line.startswith("-")]
    return {name: value for name, _, value in rows}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _write(file: File) -> None:
    """All of it or nothing."""
    file.path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.path.parent, prefix=f".{file.path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            os.fchmod(descriptor, _FILE_MODE)
            opened.write(file.text)
        Path(temporary).replace(file.path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def _load(module: str) -> None:
    done = _run(["modprobe", module])
    if done:
        raise HostError(f"modprobe {module} failed ({done}); in a container, load it on the host")


def _run(command: Sequence[str]) -> str:
    """Why it failed, or nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603 - ours
    except (OSError, subprocess.TimeoutExpired) as error:
        return getattr(error, "strerror", None) or str(error)
    return "" if done.returncode == 0 else " ".join(done.stderr.split()) or f"status {done.returncode}"
