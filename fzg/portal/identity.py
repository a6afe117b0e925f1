"""Who this gateway is: its id, what the portal sees of it, its name and its token
(spec portal 1.2, operations 1.3, 1.4).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from fzg.portal.uuids import canonical_uuid
from fzg.secret import Secret

if TYPE_CHECKING:
    from fzg.sansio import Random

_LOG = logging.getLogger(__name__)

STATE_DIRECTORY = Path("/var/lib/firezone")
MACHINE_ID = Path("/etc/machine-id")

_ID_FILE = "gateway_id"
_DIRECTORY_MODE = 0o770
_FILE_MODE = 0o640

# Spec portal 1.2: the HMAC key under which a machine id becomes a gateway id. Not a secret.
_APPLICATION_ID = b"753b38f9f96947ef8083802d5909a372"

MAX_NAME_LENGTH = 255
"""The portal refuses longer names with HTTP 400 (1.2)."""

MAX_ID_LENGTH = 255
"""The longest id that a file may hold; a larger or binary file is somebody else's."""


class IdentityError(Exception):
    """The gateway cannot say who it is; the message names what the operator can do."""


def firezone_id(
    configured: str | None,
    *,
    state_directory: Path = STATE_DIRECTORY,
    machine_id: Path = MACHINE_ID,
    random: Random = os.urandom,
) -> str:
    """The stable id: configured, stored, derived from the machine, or made and stored now. Raises IdentityError."""
    if configured:
        return configured
    stored = _read_stored(state_directory / _ID_FILE)
    if stored is not None:
        return stored
    derived = _derived_id(machine_id)
    if derived is not None:
        return derived
    generated = hashlib.sha256(str(uuid.UUID(bytes=random(16), version=4)).encode()).hexdigest()
    return _store(state_directory, generated)


def peek(
    configured: str | None, *, state_directory: Path = STATE_DIRECTORY, machine_id: Path = MACHINE_ID
) -> tuple[str, str]:
    """The id that `firezone_id` would return and where it comes from, without a change; empty for one made anew."""
    if configured:
        return configured, "FIREZONE_ID"
    path = state_directory / _ID_FILE
    with contextlib.suppress(OSError):
        stored = _parse_stored(path.read_bytes())
        if stored is not None:
            return stored, str(path)
    derived = _derived_id(machine_id)
    return (derived, str(machine_id)) if derived is not None else ("", "")


def external_id(ident: str) -> str:
    """What the portal sees: the SHA-256 of an id that reads as a UUID in any of its textual forms, else the id."""
    return ident if canonical_uuid(ident) is None else hashlib.sha256(ident.encode()).hexdigest()


def gateway_name(configured: str | None, host_name: str | None, *, random: Random = os.urandom) -> str:
    """The display name: configured, else the host's, else random; trimmed to what the portal accepts."""
    for name in (configured, host_name):
        if name and name.strip():
            return name.strip()[:MAX_NAME_LENGTH]
    return str(uuid.UUID(bytes=random(16), version=4))


def find_token(argument: str | None, variable: str | None, credentials_directory: Path | None) -> Secret[str]:
    """The token from argument, FIREZONE_TOKEN or systemd credential, without white space. Raises IdentityError."""
    for token in (argument, variable):
        if token is not None:
            return _without_whitespace(token)
    sources = "give it as argument, in the variable FIREZONE_TOKEN, or as the systemd credential FIREZONE_TOKEN"
    if credentials_directory is None:
        raise IdentityError(f"there is no token: {sources} (CREDENTIALS_DIRECTORY is not set)")
    try:
        return _without_whitespace((credentials_directory / "FIREZONE_TOKEN").read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityError(f"there is no token: {sources} (the credential could not be read)") from error


def _without_whitespace(token: str) -> Secret[str]:
    token = "".join(token.split())
    if not (token.isascii() and token.isprintable()):
        raise IdentityError("the token has characters that no token has; copy it again from the portal")
    return Secret(token)


class _StoredId(msgspec.Struct):
    id: str


def _read_stored(path: Path) -> str | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _LOG.debug("The stored gateway id cannot be read: %s", error)
        return None
    ident = _parse_stored(content)
    if ident is None:
        _LOG.info("%s does not hold a gateway id and is ignored", path)
        return None
    _restrict(path.parent, _DIRECTORY_MODE)
    _restrict(path, _FILE_MODE)
    return ident


def _parse_stored(content: bytes) -> str | None:
    """The id of `{"id": "..."}`, or the bare single-line id that gateways of 2024 stored."""
    try:
        ident = msgspec.json.decode(content, type=_StoredId).id
    except (msgspec.MsgspecError, ValueError, RecursionError):
        bare = content.strip()
        if len(bare.split()) != 1 or bare[:1] in b'{["':
            return None
        try:
            ident = bare.decode("ascii")
        except UnicodeDecodeError:
            return None
    usable = len(ident.strip()) > 0 and len(ident) <= MAX_ID_LENGTH and ident.isprintable()
    return ident if usable else None


def _derived_id(machine_id: Path) -> str | None:
    try:
        content = machine_id.read_bytes()
    except OSError:
        return None
    # Images are shipped with an empty or "uninitialized" file: every host made from one would get the same id.
    if content.strip() in (b"", b"uninitialized"):
        return None
    return hmac.new(_APPLICATION_ID, content, hashlib.sha256).hexdigest()


def _store(directory: Path, ident: str) -> str:
    path = directory / _ID_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _restrict(directory, _DIRECTORY_MODE)
        _write_new(path, msgspec.json.encode({"id": ident}))
    except FileExistsError as error:
        stored = _read_stored(path)  # another start of this gateway was faster
        if stored is not None:
            return stored
        raise IdentityError(f"{path} does not hold a gateway id; remove it or set FIREZONE_ID") from error
    except OSError as error:
        raise IdentityError(
            f"FIREZONE_ID could not be read or stored; set FIREZONE_ID or give write access to {directory}"
        ) from error
    return ident


def _write_new(path: Path, content: bytes) -> None:
    """Creates `path` with all of `content` or not at all; raises FileExistsError rather than replace it."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, _FILE_MODE)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.link(temporary, path)
    finally:
        Path(temporary).unlink()


def _restrict(path: Path, mode: int) -> None:
    # An id that can be read is usable whoever owns the file.
    with contextlib.suppress(OSError):
        path.chmod(mode)
