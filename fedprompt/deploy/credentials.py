"""Certificates of the server and keys of the nodes: the only module that creates or reads them.

Runs on the administrator's terminal. The federation has its own certificate authority. A node
authenticates the server with the authority's certificate; the authority's key is needed again only
to issue another server certificate. The server authenticates a node by a key pair (P-384 in OpenSSH
format, which Flower reads), of which it holds the public key. Private keys are written unencrypted,
with mode 0600.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedprompt.errors import UserError
from fedprompt.files import write_bytes

CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
CERTIFICATE, KEY = "server.crt", "server.key"
NODE_KEY, NODE_PUBLIC = "node.key", "node.pub"
MAX_DAYS = 36500
"""Longest time for which a certificate is issued, 100 years; dates end with the year 9999."""
SKEW = datetime.timedelta(hours=1)
"""Certificates are valid from an hour ago, because the clocks of two machines differ."""


def check_days(days: int) -> None:
    """Check how long a certificate is to be valid.

    Raises:
        UserError: it is no day at all, or longer than `MAX_DAYS`.
    """
    if not 1 <= days <= MAX_DAYS:
        raise UserError(f"--days is {days}; it must be from 1 to {MAX_DAYS}.")


def write_authority(folder: Path, days: int) -> None:
    """Create a certificate authority, `ca.crt` and `ca.key`, that is valid for `days` days.

    Args:
        folder: where both files are written; it is created if it does not exist.
        days: how long the certificate is valid.

    Raises:
        UserError: the folder cannot be written.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    _write(folder / CA_KEY, _pem(key), mode=0o600)
    _write_ca_certificate(folder, key, days)


def renew_authority(folder: Path, days: int) -> None:
    """Issue the authority's certificate again, with its present key and new dates.

    Certificates that it has issued stay valid. Nodes and the server need the new `ca.crt`.

    Args:
        folder: folder with the authority's `ca.crt` and `ca.key`.
        days: how long the certificate is valid.

    Raises:
        UserError: the authority is missing or damaged, or the folder cannot be written.
    """
    _, key = _read_authority(folder)
    _write_ca_certificate(folder, key, days)


def _write_ca_certificate(folder: Path, key: ec.EllipticCurvePrivateKey, days: int) -> None:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedprompt federation")])
    public = key.public_key()
    certificate = (
        _dated(x509.CertificateBuilder(), days)
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        # `path_length=0`: the authority may issue certificates of servers but no further
        # authorities.
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(folder / CA_CERTIFICATE, certificate.public_bytes(Encoding.PEM))


def write_server_certificate(
    authority: Path, folder: Path, hosts: Sequence[str], days: int
) -> None:
    """Issue a server certificate; writes `server.crt`, `server.key` and a copy of `ca.crt`.

    Args:
        authority: folder with the authority's `ca.crt` and `ca.key`.
        folder: the server's folder, which is created if it does not exist.
        hosts: names and IP addresses by which the server is reached; nodes accept no other.
        days: how long the certificate is valid.

    Raises:
        UserError: the authority is missing or damaged, or the folder cannot be written.
    """
    issuer, issuer_key = _read_authority(authority)
    key = ec.generate_private_key(ec.SECP256R1())
    public, ca_public = key.public_key(), issuer_key.public_key()
    # X.509 allows at most 64 characters here. TLS clients compare the alternative names instead.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    names = x509.SubjectAlternativeName([_alternative(host) for host in hosts])
    certificate = (
        _dated(x509.CertificateBuilder(), days)
        .subject_name(name)
        .issuer_name(issuer.subject)
        .public_key(public)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_public), critical=False
        )
        .sign(issuer_key, hashes.SHA256())
    )
    _write(folder / KEY, _pem(key), mode=0o600)
    _write(folder / CERTIFICATE, certificate.public_bytes(Encoding.PEM))
    _write(folder / CA_CERTIFICATE, issuer.public_bytes(Encoding.PEM))


def validity(path: Path) -> tuple[datetime.datetime, datetime.datetime]:
    """From when and until when a certificate is valid.

    Raises:
        UserError: the file cannot be read, or holds no certificate.
    """
    certificate = _read_certificate(path)
    return certificate.not_valid_before_utc, certificate.not_valid_after_utc


def hosts_of(path: Path) -> list[str]:
    """The names and IP addresses that a server's certificate was issued for, in their order.

    Raises:
        UserError: the file cannot be read, or holds no such certificate.
    """
    try:
        names = _read_certificate(path).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
    except x509.ExtensionNotFound:
        raise UserError(f"{path} is not the certificate of a server.") from None
    return [str(name.value) for name in names.value]


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise UserError(f"cannot read the certificate {path}: {reason}.") from None


def write_node_key(folder: Path) -> None:
    """Create a node's key pair: `node.key` stays on the node, `node.pub` goes to the server.

    Raises:
        UserError: the folder cannot be written.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    _write(folder / NODE_KEY, private, mode=0o600)
    _write(folder / NODE_PUBLIC, public + b"\n")


def read_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """Read a node's public key, `node.pub`.

    Raises:
        UserError: the file cannot be read, or holds no elliptic-curve key.
    """
    try:
        return parse_public_key(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"cannot read the public key {path}: {error.strerror}.") from None


def parse_public_key(text: bytes, path: Path) -> ec.EllipticCurvePublicKey:
    """A node's public key in OpenSSH's format.

    Args:
        text: the key; it may come from a peer.
        path: the file that it is from, for messages.

    Raises:
        UserError: it is no elliptic-curve key.
    """
    try:
        key = load_ssh_public_key(text)
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"cannot read the public key {path}: it is damaged.") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UserError(f"{path} is not an elliptic-curve key; 'deploy init' did not create it.")
    return key


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a node's private key, `node.key`.

    Raises:
        UserError: the file cannot be read, or holds no elliptic-curve key.
    """
    return _private_key(path, lambda content: load_ssh_private_key(content, None))


def read_server_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the key of the server's certificate, `server.key`.

    Raises:
        UserError: the file cannot be read, or holds no elliptic-curve key.
    """
    return _private_key(path, lambda content: load_pem_private_key(content, None))


def _private_key(path: Path, load: Callable[[bytes], object]) -> ec.EllipticCurvePrivateKey:
    try:
        key = load(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise UserError(f"cannot read the private key {path}: {reason}.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{path} is not an elliptic-curve key.")
    return key


def certificate_key(certificate: bytes, authority: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a server's certificate, if the authority has issued it.

    Args:
        certificate: the server's certificate, PEM; it is untrusted.
        authority: the authority's certificate, PEM; it is untrusted as well.

    Raises:
        UserError: one is damaged, or the authority has not issued the other.
    """
    try:
        issued, issuer = map(x509.load_pem_x509_certificate, (certificate, authority))
        issued.verify_directly_issued_by(issuer)
        key = issued.public_key()
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UserError("the server's certificate is not one of the authority beside it.")
    return key


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key, in hexadecimal."""
    return hashlib.sha256(key_to_pem(key)).hexdigest()


def key_to_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key in the form in which Flower's SuperNode sends it."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def key_to_ssh(key: ec.EllipticCurvePublicKey) -> str:
    """A public key in OpenSSH's format, without a comment."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def has_signed(key: ec.EllipticCurvePublicKey, text: bytes, signature: bytes) -> bool:
    """Whether the owner of a public key has signed a text as Flower's SuperNode signs it."""
    try:
        key.verify(signature, text, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _read_authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate((folder / CA_CERTIFICATE).read_bytes())
        key = load_pem_private_key((folder / CA_KEY).read_bytes(), password=None)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"cannot read the certificate authority in {folder}: {reason}.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(
            f"{folder / CA_KEY} is not an elliptic-curve key; 'fedprompt deploy init' did not "
            "create it."
        )
    return certificate, key


def _dated(builder: x509.CertificateBuilder, days: int) -> x509.CertificateBuilder:
    start = datetime.datetime.now(datetime.UTC) - SKEW
    return (
        builder.serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + SKEW + datetime.timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        # The server's key signs TLS handshakes, and the authority's key signs certificates only.
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        # TLS clients compare an IP address with entries of this type only, never with names.
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    try:
        os.makedirs(path.parent, exist_ok=True)
        write_bytes(path, content, mode=mode)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from None
