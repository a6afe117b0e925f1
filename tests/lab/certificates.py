"""A certificate authority of the lab's own, made with the openssl command."""

from __future__ import annotations

import ssl
import subprocess
from ipaddress import ip_address
from pathlib import Path

_DAYS = "30"


class Authority:
    """Keys and certificates in `directory`; an authority that stands there already is used again."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.certificate = self.directory / "ca.pem"
        self._key = self.directory / "ca.key"
        if not self.certificate.exists():
            _openssl(
                *_NEW_KEY, "-x509", "-days", _DAYS, "-subj", "/CN=Lab CA",
                "-keyout", self._key, "-out", self.certificate,
                "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
            )  # fmt: skip

    def issue(self, names: list[str]) -> tuple[Path, Path]:
        """A server certificate (chain file, key file) for these host names and addresses."""
        stem = self.directory / names[0].replace(":", "_")
        certificate, key, request = (stem.with_name(stem.name + suffix) for suffix in (".pem", ".key", ".csr"))
        alternatives = ",".join(("IP:" if _is_address(name) else "DNS:") + name for name in names)
        _openssl(
            *_NEW_KEY, "-subj", f"/CN={names[0]}", "-keyout", key, "-out", request,
            "-addext", f"subjectAltName={alternatives}", "-addext", "extendedKeyUsage=serverAuth",
        )  # fmt: skip
        subprocess.run(
            ["openssl", "x509", "-req", "-in", str(request), "-CA", str(self.certificate), "-CAkey", str(self._key),
             "-days", _DAYS, "-copy_extensions", "copy", "-out", str(certificate)],
            check=True, capture_output=True,
        )  # fmt: skip
        request.unlink()
        return certificate, key

    def server_context(self, names: list[str]) -> ssl.SSLContext:
        """A TLS context that serves under these names."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.issue(names))
        return context


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", "req", *map(str, arguments)], check=True, capture_output=True)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
