"""A certificate authority of the tests' own."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HOSTS = ("localhost", "127.0.0.1")
# As every certificate names a place that lists what is revoked; nobody asks there.
_LIST = x509.DistributionPoint([x509.UniformResourceIdentifier("http://localhost/ca.crl")], None, None, None)


class Authority:
    """Issues certificates for servers of this machine.

    Args:
        folder: its own certificate lies there as `ca.pem`.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "ca.pem"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of the tests")])
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        own = self._builder(self._name, self._key, days=2)
        own = own.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        own = own.add_extension(usage, critical=True)
        self.file.write_bytes(own.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def issue(
        self, *, days: float = 2, hosts: tuple[str, ...] = HOSTS, key: PrivateKeyTypes | None = None
    ) -> tuple[bytes, bytes]:
        """A new certificate and its key, in PEM, good for some days from now."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "eightfold")])
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        built = self._builder(name, key, days)
        for extension, critical in (
            (x509.SubjectAlternativeName([_host(host) for host in hosts]), False),
            (x509.CRLDistributionPoints([_LIST]), False),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (usage, True),
        ):
            built = built.add_extension(extension, critical)
        signed = built.sign(self._key, hashes.SHA256())
        form = PrivateFormat.PKCS8, NoEncryption()
        return signed.public_bytes(Encoding.PEM), key.private_bytes(Encoding.PEM, *form)

    def _builder(self, name: x509.Name, key: PrivateKeyTypes, days: float) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())  # type: ignore[arg-type]
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=3))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)  # type: ignore[arg-type]
            .add_extension(authority, critical=False)
        )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
