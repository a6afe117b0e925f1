from __future__ import annotations

import ssl
from pathlib import Path

import certifi
import pytest

from fzg.host.errors import HostError
from fzg.host.trust import trust_store


@pytest.fixture
def bundle(tmp_path):
    """One authority out of certifi's bundle."""
    text = Path(certifi.where()).read_text(encoding="utf-8")
    end = "-----END CERTIFICATE-----\n"
    path = tmp_path / "bundle.pem"
    path.write_text(text[text.index("-----BEGIN") : text.index(end) + len(end)])
    return path


def authorities(store):
    return store.context.cert_store_stats()["x509_ca"]


def test_the_first_bundle_of_the_host_that_has_authorities_is_used(tmp_path, bundle):
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    store = trust_store({}, [tmp_path / "absent.pem", empty, bundle])
    assert authorities(store) == 1
    assert str(bundle) in store.description


def test_a_host_without_a_bundle_uses_the_one_that_came_along(tmp_path):
    store = trust_store({}, [tmp_path / "absent.pem"])
    assert authorities(store) > 50
    assert "came with this program" in store.description


def test_the_environment_comes_before_the_bundles_of_the_host(tmp_path, bundle):
    store = trust_store({"SSL_CERT_FILE": str(bundle)}, [certifi.where()])
    assert authorities(store) == 1
    assert f"SSL_CERT_FILE={bundle}" in store.description


def test_a_directory_of_authorities_may_be_named(tmp_path):
    store = trust_store({"SSL_CERT_DIR": str(tmp_path)}, [])
    assert f"SSL_CERT_DIR={tmp_path}" in store.description


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_what_the_environment_names_but_cannot_be_read_is_an_error_rather_than_wider_trust(tmp_path, variable, bundle):
    with pytest.raises(HostError, match=f"{variable}=.*absent.*unset it"):
        trust_store({variable: str(tmp_path / "absent")}, [bundle])


def test_a_file_without_authorities_is_an_error(tmp_path):
    (tmp_path / "empty.pem").write_text("nothing\n")
    with pytest.raises(HostError, match="SSL_CERT_FILE"):
        trust_store({"SSL_CERT_FILE": str(tmp_path / "empty.pem")}, [])


def test_chain_and_name_are_checked_from_tls_1_2_on(bundle):
    context = trust_store({}, [bundle]).context
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
