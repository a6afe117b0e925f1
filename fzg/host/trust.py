"""Which certificate authorities the portal's certificate is checked against (spec portal 1.4)."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import certifi

from fzg.host.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# A frozen executable carries an OpenSSL whose built-in paths are those of the machine that built it.
SYSTEM_BUNDLES: Final = (
    Path("/etc/ssl/certs/ca-certificates.crt"),  # Debian, Ubuntu, Alpine, Arch, NixOS
    Path("/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"),  # RHEL, Fedora
    Path("/etc/pki/tls/certs/ca-bundle.crt"),  # older RHEL
    Path("/etc/ssl/ca-bundle.pem"),  # SUSE
    Path("/var/lib/ca-certificates/ca-bundle.pem"),  # SUSE
    Path("/etc/ssl/cert.pem"),  # Alpine
)


class TrustStore(NamedTuple):
    """A client context for TLS 1.2 and later that checks names, and a sentence about whose authorities it trusts."""

    context: ssl.SSLContext
    description: str


def trust_store(environment: Mapping[str, str] | None = None, bundles: Sequence[Path] = SYSTEM_BUNDLES) -> TrustStore:
    """SSL_CERT_FILE and SSL_CERT_DIR if set, else the host's bundle, else the one that came with this program.

    Raises HostError when what the environment names cannot be used: falling back would widen what the operator trusts.
    """
    variables = os.environ if environment is None else environment
    file, directory = variables.get("SSL_CERT_FILE", ""), variables.get("SSL_CERT_DIR", "")
    if file or directory:
        return _from_environment(file, directory)
    for bundle in bundles:
        context = _context()
        try:
            context.load_verify_locations(cafile=bundle)
        except (OSError, ssl.SSLError):
            continue
        if _authorities(context):
            return TrustStore(context, f"Certificates are checked against {bundle}.")
    context = _context()
    context.load_verify_locations(cafile=certifi.where())
    return TrustStore(
        context,
        "Certificates are checked against the authorities that came with this program, since the host has no bundle.",
    )


def _from_environment(file: str, directory: str) -> TrustStore:
    context = _context()
    named = " and ".join(
        f"{variable}={value}" for variable, value in (("SSL_CERT_FILE", file), ("SSL_CERT_DIR", directory)) if value
    )
    try:
        context.load_verify_locations(cafile=file or None, capath=directory or None)
        if directory and not file and not Path(directory).is_dir():
            raise FileNotFoundError(2, os.strerror(2))
    except (OSError, ssl.SSLError) as error:
        raise HostError(
            f"The certificate authorities of {named} cannot be read ({error.strerror or error}). "
            "Correct the variable, or unset it to use those of the host."
        ) from error
    if file and not _authorities(context):
        raise HostError(
            f"{named} holds no certificate authority, so no portal can be trusted. "
            "Correct the variable, or unset it to use those of the host."
        )
    return TrustStore(context, f"Certificates are checked against {named}.")


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the chain and the host name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _authorities(context: ssl.SSLContext) -> int:
    return context.cert_store_stats()["x509_ca"]
