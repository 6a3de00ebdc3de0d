"""This side's own files, checked before anything connects."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsea.errors import CertificateError, ConfigError, Unauthenticated
from fedsea.transport.certificates import issue_client
from fedsea.transport.credentials import (
    ClientTLS,
    Plaintext,
    load_client,
    load_server,
    require_plaintext_allowed,
    tenant_of,
)


@pytest.mark.parametrize("field", ["ca", "certificate", "key"])
def test_a_missing_file_is_named(client_tls, tmp_path, field):
    """The message names the file and how to make one."""
    broken = replace(client_tls, **{field: tmp_path / "absent.pem"})
    with pytest.raises(CertificateError, match=r"absent.pem does not exist.*fedsea certs"):
        load_client(broken)


@pytest.mark.parametrize("field", ["ca", "certificate", "key"])
@pytest.mark.parametrize("content", [b"", b"not PEM", b"\xff\x00", b"-----BEGIN CERTIFICATE-----"])
def test_a_file_that_is_no_pem_is_named(client_tls, tmp_path, field, content):
    """Garbage is refused by name, whatever the role of the file."""
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(CertificateError, match="holds no PEM"):
        load_client(replace(client_tls, **{field: path}))


def test_a_directory_is_no_file(client_tls, tmp_path):
    """An unreadable path is our error, with the system's reason."""
    with pytest.raises(CertificateError, match="cannot be read"):
        load_client(replace(client_tls, ca=tmp_path))


def test_the_key_must_match(client_tls, authority):
    """A key of another certificate is found before connecting."""
    other = issue_client(authority, "other", force=True)
    with pytest.raises(CertificateError, match="is not the key of"):
        load_client(replace(client_tls, key=other.key))


def test_an_encrypted_key_is_refused(client_tls, tmp_path):
    """A key with a password would need a prompt that a server has not."""
    path = tmp_path / "encrypted.key"
    path.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    with pytest.raises(CertificateError, match="encrypted"):
        load_client(replace(client_tls, key=path))


def test_an_expired_certificate_is_refused(forge):
    """The message says when it expired."""
    with pytest.raises(CertificateError, match=r"expired on \d{4}-\d\d-\d\d"):
        load_server(forge(age=10, days=-1))


def test_a_certificate_of_the_future_is_refused(forge):
    """Usually the clock is wrong, and the message says to check it."""
    with pytest.raises(CertificateError, match="check the clock"):
        load_server(forge(age=-1, days=10))


def test_a_certificate_near_its_end_is_warned_about(forge, caplog):
    """Ten days before the end there is time to issue a new one."""
    load_server(forge(days=10))
    assert "issue a new one" in caplog.text


def test_roles_are_not_swapped(client_tls, server_tls):
    """A client certificate serves nothing, a server certificate dials nowhere."""
    with pytest.raises(CertificateError, match="is not a server certificate"):
        load_server(replace(server_tls, certificate=client_tls.certificate, key=client_tls.key))
    with pytest.raises(CertificateError, match="is not a client certificate"):
        load_client(ClientTLS(server_tls.ca, server_tls.certificate, server_tls.key))


def test_an_exposed_key_is_warned_about(forge, caplog):
    """A key that others can read works, with a warning that says what to run."""
    tls = forge()
    tls.key.chmod(0o644)
    load_server(tls)
    assert "chmod 600" in caplog.text


def uri(text: str) -> x509.GeneralName:
    """A URI as an alternative name."""
    return x509.UniformResourceIdentifier(text)


@pytest.mark.parametrize(
    "names",
    [
        (),
        (x509.DNSName("acme"),),
        (uri("https://tenant/acme"),),
        (uri("fedsea://tenant/"),),
        (uri("fedsea://tenant/A"),),
        (uri("fedsea://tenant/a/b"),),
        (uri("fedsea://tenant/a"), uri("fedsea://tenant/b")),
    ],
)
def test_only_one_valid_tenant_uri_is_an_identity(forge, names):
    """No tenant, two tenants or a malformed one: no identity."""
    tls = forge(server=False, names=names)
    certificate = x509.load_pem_x509_certificate(tls.certificate.read_bytes())
    with pytest.raises(Unauthenticated, match="names no tenant"):
        tenant_of(certificate)


def test_plaintext_needs_flag_and_loopback():
    """Plaintext is asked for by name and never leaves the machine."""
    with pytest.raises(ConfigError, match="explicit flag"):
        require_plaintext_allowed(Plaintext(), "127.0.0.1", is_loopback=True)
    allowed = Plaintext(allow_insecure=True)
    with pytest.raises(ConfigError, match=r"loopback only, not 10\.0\.0\.1"):
        require_plaintext_allowed(allowed, "10.0.0.1", is_loopback=False)
    require_plaintext_allowed(allowed, "127.0.0.1", is_loopback=True)


def test_secrets_are_not_printed(client_tls):
    """A token or key never shows in a repr, and so in no log or traceback."""
    secret = "very-secret"
    assert secret not in repr(replace(client_tls, token=secret))
    assert secret not in repr(Plaintext(token=secret))
    assert "PRIVATE" not in repr(load_client(client_tls))
