"""What the private CA issues, and what it refuses to."""

from __future__ import annotations

import stat
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import ClientVerifier, PolicyBuilder, ServerVerifier, Store

from fedsea.errors import CertificateError, ConfigError
from fedsea.transport.certificates import init_ca, issue_client, issue_server
from fedsea.transport.credentials import load_client, load_server, tenant_of


def load(path: Path) -> x509.Certificate:
    """The certificate in a file."""
    return x509.load_pem_x509_certificate(path.read_bytes())


def usages(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    """The roles that a certificate is for."""
    return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def life(certificate: x509.Certificate) -> timedelta:
    """How long a certificate is valid."""
    return certificate.not_valid_after_utc - certificate.not_valid_before_utc


def test_the_ca_signs_certificates_and_nothing_else(authority):
    """A CA for leaf certificates only, EC P-256, five years, its key private."""
    ca = load(authority / "ca.pem")
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature
    key = ca.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)
    assert timedelta(days=1824) < life(ca) < timedelta(days=1827)
    assert stat.S_IMODE((authority / "ca.key").stat().st_mode) == 0o600


def test_a_client_certificate_names_its_tenant(authority):
    """One role, one tenant, ninety days, a private key; standard verification accepts it."""
    tls = issue_client(authority, "tenant-1.x_y")
    certificate = load(tls.certificate)
    assert tenant_of(certificate) == "tenant-1.x_y"
    assert usages(certificate) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert timedelta(days=89) < life(certificate) < timedelta(days=91)
    assert stat.S_IMODE(tls.key.stat().st_mode) == 0o600
    verifier: ClientVerifier = (
        PolicyBuilder().store(Store([load(authority / "ca.pem")])).build_client_verifier()
    )
    verifier.verify(certificate, [])
    assert load_client(tls).certificate == tls.certificate.read_bytes()


def test_a_server_certificate_holds_its_names(authority, server_tls):
    """Names and addresses are in the alternative names, and verification accepts them."""
    certificate = load(server_tls.certificate)
    assert usages(certificate) == [ExtendedKeyUsageOID.SERVER_AUTH]
    verifier: ServerVerifier = (
        PolicyBuilder()
        .store(Store([load(authority / "ca.pem")]))
        .build_server_verifier(x509.DNSName("localhost"))
    )
    verifier.verify(certificate, [])
    assert load_server(server_tls).key == server_tls.key.read_bytes()


def test_nothing_is_overwritten_without_force(tmp_path):
    """A second CA or certificate in place of the first needs force."""
    init_ca(tmp_path)
    issue_client(tmp_path, "acme")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for make in (
        lambda: init_ca(tmp_path),
        lambda: issue_client(tmp_path, "acme"),
    ):
        with pytest.raises(ConfigError, match="exists"):
            make()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    issue_client(tmp_path, "acme", force=True)
    assert (tmp_path / "client-acme.pem").read_bytes() != before[tmp_path / "client-acme.pem"]


@pytest.mark.parametrize(
    "tenant", ["", "A", "a b", "../x", "a/b", "-a", "a.", "ü", "a" * 64, "a\n"]
)
def test_tenant_names_are_plain(authority, tenant):
    """A tenant name is safe in a file name, a URI and a log line."""
    with pytest.raises(ConfigError, match="cannot name a tenant"):
        issue_client(authority, tenant)


@pytest.mark.parametrize("name", ["", "a b", "http://x", "x:80", "-x", "*", "a..b", "x" * 300])
def test_server_names_are_host_names(authority, name):
    """A server certificate holds host names and IP addresses only."""
    with pytest.raises(ConfigError, match="neither a host name nor"):
        issue_server(authority, [name], force=True)


def test_a_server_needs_a_name(authority):
    """A certificate without names would match nothing."""
    with pytest.raises(ConfigError, match="needs a name"):
        issue_server(authority, [])


@pytest.mark.parametrize("days", [0, -3, 3651])
def test_validity_is_bounded(authority, days):
    """Certificates live from a day to ten years."""
    with pytest.raises(ConfigError, match="days"):
        issue_client(authority, "bounded", days=days)


def test_issuing_needs_a_ca(tmp_path):
    """Without a CA the message says how to make one."""
    with pytest.raises(CertificateError, match="fedsea certs init"):
        issue_client(tmp_path, "acme")


def test_the_ca_key_must_belong_to_the_ca(tmp_path, foreign):
    """A swapped key is found before it signs."""
    init_ca(tmp_path)
    (tmp_path / "ca.key").write_bytes((foreign / "ca.key").read_bytes())
    with pytest.raises(CertificateError, match="is not the key of"):
        issue_client(tmp_path, "acme")


def test_a_leaf_does_not_outlive_its_ca(tmp_path):
    """A certificate that the CA cannot vouch for would fail silently later."""
    init_ca(tmp_path, days=10)
    tls = issue_client(tmp_path, "acme", days=90)
    assert load(tls.certificate).not_valid_after_utc == load(tls.ca).not_valid_after_utc


def test_an_unusable_directory_is_named(tmp_path):
    """A file where the directory should be is a clear error."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be made"):
        init_ca(tmp_path / "file")
