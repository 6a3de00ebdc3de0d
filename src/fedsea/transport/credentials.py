"""Keys and certificates as configured: where they are, whether they can work, who they name.

Everything that can be wrong with this side's own files is found here, before anything connects:
a missing or unreadable file, an expired certificate, a key of another certificate, a certificate
made for the other role. The tenant is the certificate's URI `fedsea://tenant/<name>`.
"""

from __future__ import annotations

import hashlib
import logging
import re
import stat
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier

from fedsea.errors import CertificateError, ConfigError, Unauthenticated

TENANT_URI = "fedsea://tenant/"
TENANT_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
EXPIRY_WARNING = timedelta(days=14)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClientTLS:
    """A client's TLS files: the CA that signs servers, its own certificate and key.

    `token` is sent as a bearer token with each call. `server_name` is the name to find in the
    server's certificate when it is not the host that is dialled.
    """

    ca: Path
    certificate: Path
    key: Path
    token: str | None = field(default=None, repr=False)
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class ServerTLS:
    """A server's TLS files: the CA that signs clients, its own certificate and key."""

    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Plaintext:
    """No TLS; refused unless `allow_insecure` is set and the address is on loopback."""

    allow_insecure: bool = False
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class PemFiles:
    """The checked contents of a TLS configuration."""

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)


def check_tenant(name: str) -> str:
    """Return `name` when it can name a tenant; raises ConfigError otherwise."""
    if TENANT_NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{name!r} cannot name a tenant: use up to 63 of a-z, 0-9, '.', '_' and '-', "
            "with a letter or digit first and last"
        )
    return name


def load_client(tls: ClientTLS) -> PemFiles:
    """Read and check a client's files; raises CertificateError with the fix."""
    return _load(tls.ca, tls.certificate, tls.key, ExtendedKeyUsageOID.CLIENT_AUTH, "client")


def load_server(tls: ServerTLS) -> PemFiles:
    """Read and check a server's files; raises CertificateError with the fix."""
    return _load(tls.ca, tls.certificate, tls.key, ExtendedKeyUsageOID.SERVER_AUTH, "server")


def require_plaintext_allowed(credentials: Plaintext, host: str, *, is_loopback: bool) -> None:
    """Raise ConfigError unless plaintext was asked for by name and stays on this machine."""
    if not credentials.allow_insecure:
        raise ConfigError("plaintext needs its explicit flag: allow it, or configure certificates")
    if not is_loopback:
        raise ConfigError(f"plaintext is for loopback only, not {host}: configure certificates")


def tenant_of(certificate: x509.Certificate) -> str:
    """The tenant that a client certificate names; raises Unauthenticated without exactly one."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        uris = []
    tenants = [uri.removeprefix(TENANT_URI) for uri in uris if uri.startswith(TENANT_URI)]
    if len(tenants) != 1 or TENANT_NAME.fullmatch(tenants[0]) is None:
        raise Unauthenticated(
            "the client certificate names no tenant: issue one with `fedsea certs client`"
        )
    return tenants[0]


def fingerprint_of(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate in hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def key_fingerprint_of(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate's SubjectPublicKeyInfo in hex: the key, whatever is said of it."""
    key = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(key).hexdigest()


def parse_certificates(pem: bytes, path: Path) -> list[x509.Certificate]:
    """All certificates of a PEM file, at least one; raises CertificateError."""
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError:
        found = []
    if not found:
        raise CertificateError(f"{path} holds no PEM certificate: give the .pem file")
    return found


def parse_key(pem: bytes, path: Path) -> PrivateKeyTypes:
    """The private key of a PEM file; raises CertificateError."""
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise CertificateError(f"{path} is encrypted: give a key without a password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError(f"{path} holds no PEM private key: give the .key file") from None


def read(path: Path, what: str) -> bytes:
    """The contents of a credential file; raises CertificateError naming the file and the fix."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CertificateError(
            f"the {what} {path} does not exist: make one with `fedsea certs`, or fix the path"
        ) from None
    except OSError as error:
        raise CertificateError(f"the {what} {path} cannot be read ({error.strerror})") from error


def _load(ca: Path, certificate: Path, key: Path, usage: ObjectIdentifier, role: str) -> PemFiles:
    files = PemFiles(
        ca=read(ca, "CA certificate"),
        certificate=read(certificate, f"{role} certificate"),
        key=read(key, f"{role} key"),
    )
    for authority in parse_certificates(files.ca, ca):
        _check_dates(authority, ca)
    own = parse_certificates(files.certificate, certificate)[0]
    _check_dates(own, certificate)
    _check_usage(own, certificate, usage, role)
    if parse_key(files.key, key).public_key() != own.public_key():
        raise CertificateError(
            f"{key} is not the key of {certificate}: give the pair that was issued together"
        )
    _warn_if_exposed(key)
    return files


def _check_dates(certificate: x509.Certificate, path: Path) -> None:
    now = datetime.now(UTC)
    starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < starts:
        raise CertificateError(
            f"{path} is not valid before {starts:%Y-%m-%d %H:%M} UTC: check the clock"
        )
    if now >= ends:
        raise CertificateError(
            f"{path} expired on {ends:%Y-%m-%d}: issue a new one with `fedsea certs`"
        )
    if ends - now < EXPIRY_WARNING:
        _log.warning("%s expires on %s: issue a new one", path, f"{ends:%Y-%m-%d}")


def _check_usage(
    certificate: x509.Certificate, path: Path, usage: ObjectIdentifier, role: str
) -> None:
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return
    if usage not in usages:
        raise CertificateError(
            f"{path} is not a {role} certificate: issue one with `fedsea certs {role}`"
        )


def _warn_if_exposed(key: Path) -> None:
    if key.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        _log.warning("the key %s can be read by other users: run chmod 600 on it", key)
