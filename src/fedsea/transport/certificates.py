"""A private certificate authority: one CA, short-lived server and client certificates.

EC P-256 keys, one role per certificate, names in the subject alternative name only where they
count. Keys are written with mode 0600 and never overwritten without `force`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from fedsea.errors import CertificateError, ConfigError
from fedsea.transport.credentials import (
    TENANT_URI,
    ClientTLS,
    ServerTLS,
    check_tenant,
    parse_certificates,
    parse_key,
    read,
)
from fedsea.transport.files import PRIVATE, PUBLIC, write_atomically

CA_DAYS = 5 * 365
LEAF_DAYS = 90
CLOCK_SKEW = timedelta(minutes=5)
CA_CERTIFICATE = "ca.pem"
CA_KEY = "ca.key"

_DNS_NAME = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*", re.IGNORECASE)
_SIGNATURE_ONLY = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
_SIGNS_CERTIFICATES = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA's certificate and signing key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def init_ca(directory: Path, *, days: int = CA_DAYS, force: bool = False) -> Path:
    """Make a CA in `directory` and return the path of its certificate.

    Raises ConfigError when one is there already and `force` is false.
    """
    _make_directory(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("fedsea private CA")
    builder = (
        _builder(name, name, key.public_key(), _period(days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_SIGNS_CERTIFICATES, critical=True)
    )
    certificate = builder.sign(key, hashes.SHA256())
    path = directory / CA_CERTIFICATE
    _write_pair(path, directory / CA_KEY, certificate, key, force=force)
    return path


def issue_server(
    directory: Path, names: Sequence[str], *, days: int = LEAF_DAYS, force: bool = False
) -> ServerTLS:
    """Issue a server certificate for DNS names and IP addresses, as `server.pem` and `.key`."""
    if not names:
        raise ConfigError("a server certificate needs a name: give host names or IP addresses")
    subject_names = [_host_name(name) for name in names]
    certificate, key = _issue(
        directory,
        "server",
        subject_names,
        ExtendedKeyUsageOID.SERVER_AUTH,
        days=days,
        force=force,
    )
    return ServerTLS(directory / CA_CERTIFICATE, certificate, key)


def issue_client(
    directory: Path, tenant: str, *, days: int = LEAF_DAYS, force: bool = False
) -> ClientTLS:
    """Issue a client certificate for `tenant`, as `client-<tenant>.pem` and `.key`."""
    uri = x509.UniformResourceIdentifier(TENANT_URI + check_tenant(tenant))
    certificate, key = _issue(
        directory,
        f"client-{tenant}",
        [uri],
        ExtendedKeyUsageOID.CLIENT_AUTH,
        days=days,
        force=force,
    )
    return ClientTLS(directory / CA_CERTIFICATE, certificate, key)


def load_authority(directory: Path) -> Authority:
    """The CA in `directory`; raises CertificateError when there is none to sign with."""
    path, key_path = directory / CA_CERTIFICATE, directory / CA_KEY
    if not path.exists():
        raise CertificateError(f"no CA in {directory}: make one with `fedsea certs init`")
    certificate = parse_certificates(read(path, "CA certificate"), path)[0]
    key = parse_key(read(key_path, "CA key"), key_path)
    if (
        not isinstance(key, ec.EllipticCurvePrivateKey)
        or key.public_key() != certificate.public_key()
    ):
        raise CertificateError(f"{key_path} is not the key of {path}: restore the pair")
    return Authority(certificate, key)


def _issue(
    directory: Path,
    stem: str,
    subject_names: Sequence[x509.GeneralName],
    usage: ObjectIdentifier,
    *,
    days: int,
    force: bool,
) -> tuple[Path, Path]:
    authority = load_authority(directory)
    starts, ends = _period(days)
    ends = min(ends, authority.certificate.not_valid_after_utc)
    if ends <= datetime.now(UTC):
        raise CertificateError(f"the CA in {directory} has expired: make a new one with force")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(f"fedsea {stem}"[:64])
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = (
        _builder(subject, authority.certificate.subject, key.public_key(), (starts, ends))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_SIGNATURE_ONLY, critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(subject_names), critical=False)
        .add_extension(issuer_key, critical=False)
    )
    path, key_path = directory / f"{stem}.pem", directory / f"{stem}.key"
    certificate = builder.sign(authority.key, hashes.SHA256())
    _write_pair(path, key_path, certificate, key, force=force)
    return path, key_path


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    period: tuple[datetime, datetime],
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(period[0])
        .not_valid_after(period[1])
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _period(days: int) -> tuple[datetime, datetime]:
    if not 1 <= days <= 3650:
        raise ConfigError(f"a certificate cannot be valid for {days} days: use 1 to 3650")
    now = datetime.now(UTC)
    return now - CLOCK_SKEW, now + timedelta(days=days)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _host_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if len(name) > 253 or _DNS_NAME.fullmatch(name.removeprefix("*.")) is None:
        raise ConfigError(f"{name!r} is neither a host name nor an IP address")
    return x509.DNSName(name)


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be made ({error.strerror}): choose another"
        ) from error


def _write_pair(
    path: Path,
    key_path: Path,
    certificate: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    *,
    force: bool,
) -> None:
    for target in (path, key_path):
        if target.exists() and not force:
            raise ConfigError(f"{target} exists: remove it, or overwrite it with force")
    key_pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    certificate_pem = certificate.public_bytes(serialization.Encoding.PEM)
    write_atomically(key_path, key_pem, mode=PRIVATE, overwrite=force)
    write_atomically(path, certificate_pem, mode=PUBLIC, overwrite=force)
