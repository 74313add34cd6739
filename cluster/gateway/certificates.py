"""The certificate of both protocols: read, judged, and served anew when its files change.

Whoever renews it replaces the files, or what a link leads to; within RELOAD_SECONDS new connections get the
new one. Open connections go on with theirs. What cannot be served is logged and counted; the old one stays.
"""

import asyncio
import logging
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from cluster.config import TlsSection
from cluster.gateway.metrics import Metrics
from model.errors import EightfoldError

RELOAD_SECONDS = 10.0
_READ_TRIES = 3  # files that change while they are read are read again
# Of TLS 1.2: forward secrecy and authenticated encryption only. Those of TLS 1.3 are all like that.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
_KINDS = RSAPublicKey, EllipticCurvePublicKey
_UNREADABLE = (
    ValueError, UnsupportedAlgorithm, x509.InvalidVersion, x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)  # fmt: skip

_log = logging.getLogger(__name__)


class CertificateError(EightfoldError):
    """A certificate or key that cannot be served.

    Args:
        file: the name of the file concerned.
        problem: what is wrong with it, and what would do.
    """

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(file, problem)
        self.file, self.problem = file, problem

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


@dataclass(frozen=True)
class Certificate:
    """A chain that goes with its key.

    Attributes:
        chain, key: PEM, the server's own certificate first.
        names: DNS names and addresses that it is for.
        expires: in seconds since 1970.
    """

    chain: bytes = field(repr=False)
    key: bytes = field(repr=False)
    names: tuple[str, ...]
    expires: float


def read_certificate(files: TlsSection) -> tuple[Certificate, ssl.SSLContext]:
    """What stands in the files, and a server's context that serves it.

    Raises:
        CertificateError: it cannot be served. Whether it has expired is for the caller to judge.
    """
    for _ in range(_READ_TRIES):
        before = _contents(files)
        problem: CertificateError | None = None
        try:
            certificate, context = _judge(files, *before), _context(files)
        except CertificateError as error:
            problem = error
        # OpenSSL reads the files itself: what was judged is what it read if they are still the same.
        if _contents(files) == before:
            if problem:
                raise problem
            return certificate, context
    raise CertificateError(files.certificate.name, "changes all the time while it is read")


def _contents(files: TlsSection) -> tuple[bytes, bytes]:
    def read(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise CertificateError(path.name, f"cannot be read: {error.strerror}") from None

    return read(files.certificate), read(files.key)


def _judge(files: TlsSection, chain: bytes, key: bytes) -> Certificate:
    try:
        own = x509.load_pem_x509_certificates(chain)[0]
        names, public = _names(own), own.public_key()
    except _UNREADABLE:
        raise CertificateError(files.certificate.name, "is no chain of certificates in PEM") from None
    try:
        private = load_pem_private_key(key, password=None)
    except TypeError:
        problem = "is encrypted; nobody can type a password here: store it decrypted"
        raise CertificateError(files.key.name, problem) from None
    except _UNREADABLE:
        raise CertificateError(files.key.name, "is no private key in PEM") from None
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if not isinstance(public, _KINDS):
        raise CertificateError(files.certificate.name, "is of no kind that all clients know: use RSA or EC")
    if public.public_bytes(*form) != private.public_key().public_bytes(*form):
        problem = f"is not the key of the first certificate in {files.certificate.name}"
        raise CertificateError(files.key.name, problem)
    return Certificate(chain, key, names, own.not_valid_after_utc.timestamp())


def _names(own: x509.Certificate) -> tuple[str, ...]:
    try:
        found = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    addresses = found.get_values_for_type(x509.IPAddress)
    return (*found.get_values_for_type(x509.DNSName), *map(str, addresses))


def _context(files: TlsSection) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    # No session tickets: their key would live as long as this process, and outlive certificates.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    try:
        context.load_cert_chain(files.certificate, files.key, password="")
    except (ssl.SSLError, OSError) as error:  # such as a key that is too short for OpenSSL
        reason = getattr(error, "reason", None) or error.strerror
        raise CertificateError(files.certificate.name, f"OpenSSL refuses it: {reason}") from None
    return context


class Certificates:
    """The one that is served, for as long as a gateway lives.

    Args:
        files: where it stands.
        metrics: where its expiry and its renewals are counted.

    Raises:
        CertificateError: it cannot be served.
    """

    def __init__(self, files: TlsSection, metrics: Metrics) -> None:
        self._files, self._metrics = files, metrics
        self._problem = ""
        self._serve(*self._read())
        # Asked before each handshake, whether or not the client names a host.
        self.http_context = self._context
        self.http_context.sni_callback = self._choose
        self._given = self._for_grpc
        self.grpc_credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            self._given, self._fetch
        )

    async def watch(self, period: float = RELOAD_SECONDS) -> None:
        """Looks at the files once a period, in seconds, until it is cancelled."""
        while True:
            await asyncio.sleep(period)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Looks at the files now."""
        try:
            certificate, context = self._read()
        except CertificateError as error:
            self._metrics.certificate_reloads.labels("failed").inc()
            if str(error) != self._problem:
                _log.error("the certificate is not renewed, the old one stays: %s", error)
            self._problem = str(error)
            return
        self._problem = ""
        if certificate != self._certificate:
            self._serve(certificate, context)
            self._metrics.certificate_reloads.labels("ok").inc()
            _log.info("serving a renewed certificate")

    def _read(self) -> tuple[Certificate, ssl.SSLContext]:
        certificate, context = read_certificate(self._files)
        if certificate.expires <= time.time():
            raise CertificateError(self._files.certificate.name, "has expired; renew it")
        return certificate, context

    def _serve(self, certificate: Certificate, context: ssl.SSLContext) -> None:
        self._certificate, self._context = certificate, context
        self._for_grpc = grpc.ssl_server_certificate_configuration([(certificate.key, certificate.chain)])
        self._metrics.certificate_expiry.labels(self._files.certificate.name).set(certificate.expires)

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._context

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC is to serve from now on; None for what it has. Called in threads of its own."""
        if self._given is self._for_grpc:
            return None
        self._given = self._for_grpc
        return self._given
