"""Looks at a TLS handshake from outside gRPC, with the standard library.

gRPC reports every failed connection as "unavailable", and does not show the server's certificate.
`diagnose` repeats the connection once and says what is wrong; `server_certificate` fetches the
certificate; `accepts_tls12` checks that TLS 1.2 is refused. All block: call them in a thread.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress

from cryptography import x509

from fedsea.errors import CertificateError, FedseaError, SecurityError, Unreachable
from fedsea.transport.address import Address
from fedsea.transport.credentials import ClientTLS

_TLS_HANDSHAKE_RECORD = b"\x16"

# OpenSSL's X509_V_ERR_* numbers, which the ssl module passes on without names.
_EXPIRED = {9, 10}
_OTHER_NAME = {62, 64}
_WRONG_PURPOSE = {26}


def accepts_tls12(address: Address, timeout: float) -> bool:
    """Whether the server answers a TLS 1.2 ClientHello with a handshake of its own.

    Raises Unreachable when there is no connection.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent: only the first byte of the answer counts
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    hello = _client_hello(context)
    with _connect(address, timeout) as raw:
        try:
            raw.sendall(hello)
            return raw.recv(1) == _TLS_HANDSHAKE_RECORD
        except OSError:
            return False


def diagnose(address: Address, tls: ClientTLS | None, timeout: float) -> FedseaError | None:
    """Why no connection to `address` can be made; None when one can, as far as this can see."""
    try:
        with _connect(address, timeout) as raw:
            return None if tls is None else _diagnose_tls(address, tls, raw)
    except Unreachable as error:
        return error


def server_certificate(address: Address, tls: ClientTLS, timeout: float) -> x509.Certificate:
    """The certificate whose key a server proved to hold, after its chain and name were verified.

    Raises what is wrong with the connection, as `diagnose` returns it.
    """
    with _connect(address, timeout) as raw:
        found = _shake_hands(address, tls, raw)
    if isinstance(found, FedseaError):
        raise found
    return x509.load_der_x509_certificate(found)


def _diagnose_tls(address: Address, tls: ClientTLS, raw: socket.socket) -> FedseaError | None:
    found = _shake_hands(address, tls, raw)
    return found if isinstance(found, FedseaError) else None


def _shake_hands(address: Address, tls: ClientTLS, raw: socket.socket) -> bytes | FedseaError:
    """The server's certificate as DER, or what is wrong."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=tls.ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(tls.certificate, tls.key)
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(raw, server_hostname=tls.server_name or address.host) as wrapped:
            certificate = wrapped.getpeercert(binary_form=True)
            # The server's verdict on our certificate arrives after the handshake, instead of
            # the settings that every HTTP/2 server sends first.
            return certificate if wrapped.recv(1) and certificate else _rejected(address)
    except ssl.SSLCertVerificationError as error:
        return _unverified(address, tls, error)
    except ssl.SSLError as error:
        return _tls_failure(address, error)
    except TimeoutError:
        return Unreachable(f"{address} did not finish the TLS handshake: is it a fedsea server?")
    except OSError:
        return _rejected(address)


def _unverified(
    address: Address, tls: ClientTLS, error: ssl.SSLCertVerificationError
) -> CertificateError:
    if error.verify_code in _EXPIRED:
        return CertificateError(
            f"the certificate of {address} is expired or not yet valid: its operator must renew it"
        )
    if error.verify_code in _OTHER_NAME:
        wanted = tls.server_name or address.host
        return CertificateError(
            f"the certificate of {address} is not for {wanted}: dial a name that it holds, "
            "or set server_name"
        )
    if error.verify_code in _WRONG_PURPOSE:
        return CertificateError(
            f"the certificate of {address} is not a server certificate: its operator must issue "
            "one with `fedsea certs server`"
        )
    return CertificateError(
        f"the certificate of {address} was not issued by the CA in {tls.ca}: get the CA "
        "certificate of that server"
    )


def _tls_failure(address: Address, error: ssl.SSLError) -> FedseaError:
    reason = error.reason or ""
    if "ALERT" in reason and "VERSION" not in reason and "PROTOCOL" not in reason:
        return _rejected(address)
    if isinstance(error, ssl.SSLEOFError):
        return _rejected(address)
    return SecurityError(
        f"{address} does not speak TLS 1.3: check the port, or that the server runs with TLS"
    )


def _rejected(address: Address) -> CertificateError:
    return CertificateError(
        f"{address} rejected this client's certificate: have it issued by the server's CA, "
        "with `fedsea certs client`"
    )


def _connect(address: Address, timeout: float) -> socket.socket:
    try:
        return socket.create_connection((address.host, address.port), timeout)
    except socket.gaierror:
        message = f"the host name {address.host} cannot be resolved: check the address"
    except ConnectionRefusedError:
        message = f"{address} refused the connection: is the server running there?"
    except TimeoutError:
        message = f"{address} did not answer within {timeout:g} s: check address and firewall"
    except OSError as error:
        message = f"{address} cannot be reached ({error.strerror}): check address and network"
    raise Unreachable(message)


def _client_hello(context: ssl.SSLContext) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()
