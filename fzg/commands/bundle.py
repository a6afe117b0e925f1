"""`firezone-gateway bundle`: everything that support needs, in one archive, without what identifies people."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import sys
import tarfile
import time
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

import click

from fzg import commands
from fzg.commands.connection import DeniedError, NoGatewayError, RefusedError, ask
from fzg.commands.status import fetch
from fzg.ops import about
from fzg.ops.anonymise import Anonymiser, without_credentials
from fzg.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable

_README = """\
A support archive of firezone-gateway {version}, made {made}.

{how}

status.json     portal, relays and clients of the running gateway
settings.json   its options, secrets masked
log.txt         its last log lines
doctor.json     what `firezone-gateway doctor` says
network.json    links, addresses, routes and rules of this host
sysctl.json     kernel parameters that matter to the gateway
machine.json    kernel, processor, C library
host/           files that every user of the host may read
problems.txt    what could not be found out, and why

Tokens, keys and passwords are in no file. Look through the files before you give them away.
"""
_ANONYMOUS = """\
Addresses, names, ids and keys are replaced: the same one has the same pseudonym in all files of this archive, and none
in another. Lines of the flow log and of the wire trace are left out."""
_FULL = "It was made with --no-anonymise: it holds addresses, names and ids of users and of this network."
# What users did, line by line: of no use for support, and hard to make anonymous.
_PRIVATE_LINES = re.compile(r"flow_logs|(?:\s|\")wire::")


@click.command(
    short_help="Pack an anonymous archive for support.", context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "--output",
    metavar="FILE",
    help="Where to write the archive; - is standard output. Default: a new file in this directory.",
)
@click.option("--no-anonymise", is_flag=True, help="Keep addresses, names and ids. Secrets are left out all the same.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object about the archive.")
@click.pass_obj
def command(options: dict[str, Any], *, output: str | None, no_anonymise: bool, as_json: bool) -> None:
    """Collect what support needs into a tar.gz: status, settings, recent log lines, doctor, network facts.

    Without a running gateway it holds what can be found out about the host. Run it as root or as the gateway's user.
    """
    now = time.time()
    made = time.gmtime(now)
    content = _collect(options, anonymous=not no_anonymise)
    how = _FULL if no_anonymise else _ANONYMOUS
    content["README.txt"] = _README.format(version=VERSION, made=time.strftime("%Y-%m-%d %H:%M UTC", made), how=how)
    path = output or time.strftime("firezone-gateway-%Y%m%d-%H%M%S.tar.gz", made)
    archive = _packed(content, int(now))
    if path == "-":
        sys.stdout.buffer.write(archive)
        sys.stdout.buffer.flush()
        return
    _write(path, archive, replace=output is not None)
    problems = content["problems.txt"].splitlines()
    if as_json:
        click.echo(json.dumps({"file": path, "anonymous": not no_anonymise, "problems": problems}))
        return
    click.echo(f"{path}: {len(archive) // 1024 + 1} KiB, {'as it is' if no_anonymise else 'anonymous'}")
    for problem in problems:
        click.echo(f"left out: {problem}")


def _collect(options: dict[str, Any], *, anonymous: bool) -> dict[str, str]:
    """The files by name."""
    problems: list[str] = []
    names: dict[str, list[str]] = {"host": [socket.gethostname()]}
    parts: dict[str, Any] = {}

    def attempt(name: str, find: Callable[[], Any]) -> Any:
        """One part; whatever goes wrong with it must not cost the others."""
        try:
            return find()
        except (NoGatewayError, DeniedError, RefusedError) as error:
            problems.append(f"{name}: {error.message}")
        except Exception as error:  # noqa: BLE001 - said in the archive
            problems.append(f"{name}: {type(error).__name__}: {error}")
        return None

    from fzg.host import survey

    status = parts["status.json"] = attempt("status", fetch)
    given = attempt("settings and log", _ask_gateway) or {}
    parts["settings.json"] = given.get("settings")
    for kind, texts in given.get("names", {}).items():
        names.setdefault(kind, []).extend(texts)
    settings = given.get("settings") or {}
    if status is not None and not _is_public(status["portal"]["host"]):
        names["host"].append(status["portal"]["host"])
    names["host"] += [str(settings[each]) for each in ("name", "firezone_id") if settings.get(each)]
    parts["doctor.json"] = attempt("doctor", lambda: _doctor(options))
    parts["network.json"] = attempt("network", survey.network)
    parts["sysctl.json"] = attempt("kernel parameters", survey.sysctls)
    parts["machine.json"] = attempt("machine", lambda: survey.machine() | {"parts": about.lines()})
    lines = given.get("log")
    if anonymous and lines is not None:
        lines = [line for line in lines if not _PRIVATE_LINES.search(line)]
    anonymiser = Anonymiser(names)
    shown: Callable[[str], str] = anonymiser.text if anonymous else without_credentials
    files = {}
    for name, part in parts.items():
        if part is not None:
            # One text at a time, so that what is found in a text cannot break the JSON around it.
            value = json.loads(json.dumps(part, default=_plain))
            files[name] = json.dumps(_texts(value, shown), indent=2, ensure_ascii=False) + "\n"
    if lines is not None:
        files["log.txt"] = "".join(shown(line) + "\n" for line in lines)
    for name, text in (attempt("files", survey.files) or {}).items():
        files["host" + name] = shown(text)
    files["problems.txt"] = "".join(shown(problem) + "\n" for problem in problems)
    return files


def _is_public(host: str) -> bool:
    """Whether it is the vendor's portal, or an address, which is replaced as such."""
    return host.endswith("firezone.dev") or ":" in host or host.replace(".", "").isdigit()


def _ask_gateway() -> dict[str, Any]:
    """Settings, names and log of the running gateway, put together."""
    whole: dict[str, Any] = {"log": []}
    for answer in ask("bundle"):
        whole["log"] += answer.pop("log", [])
        whole |= answer
    return whole


def _doctor(options: dict[str, Any]) -> Any:
    """The command's own output: no second way to make it."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        commands.run("doctor", ["--json", "--offline"], options)
    return json.loads(output.getvalue())


def _texts(value: Any, shown: Callable[[str], str]) -> Any:
    match value:
        case str():
            return shown(value)
        case dict():
            return {shown(key): _texts(item, shown) for key, item in value.items()}
        case list():
            return [_texts(item, shown) for item in value]
        case _:
            return value


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _packed(content: dict[str, str], moment: int) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in sorted(content):
            data = content[name].encode("utf-8", "replace")
            member = tarfile.TarInfo(f"firezone-gateway/{name}")
            member.size, member.mtime, member.mode = len(data), moment, 0o600
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def _write(path: str, data: bytes, *, replace: bool) -> None:
    """For its owner only; a file that the user did not name is never overwritten."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if replace else os.O_EXCL)
    try:
        descriptor = os.open(path, flags, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}; name another with --output") from error
