"""What to do about a portal that cannot be reached: one clause for each cause that an operator meets."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from fzg.portal.problem import Rejection

# X509_V_ERR_* of <openssl/x509_vfy.h>.
_NOT_YET_VALID: Final = 9
_EXPIRED: Final = 10
_UNKNOWN_ISSUER: Final = frozenset({2, 18, 19, 20, 21})
_WRONG_NAME: Final = frozenset({62, 64})

SET_CLOCK: Final = "sudo timedatectl set-ntp true"
TOKEN: Final = "make a new token for the site in the portal and set FIREZONE_TOKEN to it"  # noqa: S105 - an advice
REFUSED: Final = "check FIREZONE_API_URL and any proxy, for it may not be the portal that answers; then the token"
IDENTITY: Final = "give each gateway its own FIREZONE_ID (firezone-gateway id --new makes one)"
NAME: Final = "check the nameservers in /etc/resolv.conf and the host name in FIREZONE_API_URL"


def for_connection(port: int) -> str:
    """TCP is refused or swallowed."""
    return f"let this host reach TCP port {port} there, or name an HTTP proxy in HTTPS_PROXY"


def for_rejection(rejection: Rejection) -> str:
    """The upgrade was refused; empty where only the portal's own words help."""
    if rejection.status == 409:
        return (
            "another gateway with this identity is online, or the portal still waits for a connection that died "
            f"(up to 37 s): {IDENTITY}"
        )
    if rejection.status == 403:
        if rejection.code == "account_disabled":
            return "the portal's administrator has to enable the account"
        return (
            "check FIREZONE_API_URL and any proxy, for it may not be the portal that answers; else the portal's "
            "administrator knows why this host, or the country it is in, is refused"
        )
    if rejection.status in (301, 302, 303, 307, 308, 404):
        return "check FIREZONE_API_URL, which leads to another server than a portal"
    return ""


def for_tls(error: ssl.SSLError, wall: float) -> str:
    """The handshake failed while our clock said `wall` (unix time)."""
    if not isinstance(error, ssl.SSLCertVerificationError):
        return "something other than the portal's TLS answers there: check the port in FIREZONE_API_URL, and any proxy"
    clock = f"this host's clock says {date(wall)}"
    if error.verify_code == _NOT_YET_VALID:
        return f"{clock}; if that is wrong, set it: {SET_CLOCK}"
    if error.verify_code == _EXPIRED:
        return f"{clock}; if that is wrong, set it: {SET_CLOCK}; else the portal needs a new certificate"
    if error.verify_code in _UNKNOWN_ISSUER:
        return (
            "no authority that this host trusts has signed the certificate; name the one that has in "
            "SSL_CERT_FILE=/path/ca.pem, or keep a firewall that inspects TLS from this connection"
        )
    if error.verify_code in _WRONG_NAME:
        return "the certificate is for another name: check the host name in FIREZONE_API_URL"
    return "the portal needs another certificate, or this host another authority in SSL_CERT_FILE"


def date(wall: float) -> str:
    """A moment for people."""
    return f"{datetime.fromtimestamp(wall, UTC):%Y-%m-%d %H:%M:%S} UTC"
