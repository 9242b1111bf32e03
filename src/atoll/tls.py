"""TLS on the one port: a certificate of this server's own, and whether to believe another's.

Enters: a directory, or files and a pin from a person. Leaves: what a server and a client need for a connection. A pin is the
SHA-256 of a certificate's public key (its SubjectPublicKeyInfo, as in RFC 7469), so it outlives the certificate. Rank 1.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import hmac
import ipaddress
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from atoll.errors import AtollError, StoreError
from atoll.keys import write_private

_YEARS = dt.timedelta(days=3650)
_SERVED = dt.timedelta(days=397)
_EARLIER = dt.timedelta(days=1)
"""How long a CA is good, how long a certificate (made anew at each start), and how far a clock may be behind."""


class Certificate(NamedTuple):
    """What a server shows: a PEM file of certificates, its key's file, and the pin that a client may hold it to."""

    chain: Path
    key: Path
    pin: str


def own(directory: Path, host: str) -> Certificate:
    """Return a server's certificate by a CA of its own; keys are made on first use and stay, so pin and CA do too.

    Args:
        directory: keeps `ca.pem` (for clients' --ca), `ca.key`, `server.pem` and `server.key`; keys by mode 0600.
        host: an address the server is reached by, beside this machine's names.

    Raises:
        StoreError: the files can't be kept there.
    """
    chain, key_file = directory / "server.pem", directory / "server.key"
    with _told(directory):
        ca_key, ca = _authority(directory)
        key = _key(key_file)
        chain.write_bytes(_signed(ca_key, "Atoll server", key, host) + ca)
    return Certificate(chain, key_file, _pin(key.public_key()))


def pair(directory: Path, name: str, to: Path, host: str | None = None) -> None:
    """Write a new key with a certificate for it by the CA of `own`, in one PEM file by mode 0600.

    Args:
        directory: as for `own`.
        name: whose it is.
        to: the file; one that is there goes.
        host: an address it serves at; None for a client.

    Raises:
        StoreError: it can't be written, or the CA's files can't be used.
    """
    with _told(directory):
        ca_key, ca = _authority(directory)
        key = ec.generate_private_key(ec.SECP256R1())
        to.unlink(missing_ok=True)
        write_private(to, _bare(key) + _signed(ca_key, name, key, host) + ca)


@contextlib.contextmanager
def _told(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{directory}: certificates can't be kept there ({error.strerror}); choose another --store") from error
    except ValueError as error:
        raise StoreError(f"{directory}: holds a key that is none ({error}); move the folder away for a new CA") from error


def _authority(directory: Path) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    """A directory's own CA: its key, and its certificate in PEM."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    key, file = _key(directory / "ca.key"), directory / "ca.pem"
    if not file.exists():
        made = _draft(_ca_name(key), _ca_name(key), key.public_key(), _YEARS, 0).sign(key, hashes.SHA256())
        file.write_bytes(made.public_bytes(Encoding.PEM))
    return key, file.read_bytes()


def _ca_name(key: ec.EllipticCurvePrivateKey) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Atoll CA {_pin(key.public_key())[:8]}")])


def _signed(ca: ec.EllipticCurvePrivateKey, name: str, key: ec.EllipticCurvePrivateKey, host: str | None) -> bytes:
    """A certificate in PEM: of who serves at a host, or of a client."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    draft = _draft(subject, _ca_name(ca), key.public_key(), _SERVED if host else _YEARS, None)
    draft = draft.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key()), critical=False)
    if host:
        draft = draft.add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
    return draft.sign(ca, hashes.SHA256()).public_bytes(Encoding.PEM)


def _bare(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def given(chain: Path, key: Path) -> Certificate:
    """Return a certificate that somebody else made.

    Raises:
        AtollError: the files can't be read, or don't belong together.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key, lambda: "")
        return Certificate(chain, key, _pin(x509.load_pem_x509_certificate(chain.read_bytes()).public_key()))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else error
        raise AtollError(f"--tls-cert {chain}, --tls-key {key}: no certificate in PEM with its bare key ({why})") from error


def required(tls: bool | tuple[Path, Path], directory: Path, host: str, *, insecure: bool) -> Certificate | None:
    """Return what a server shows to clients, or None where nobody asked for TLS and nobody needs it.

    Args:
        tls: a CA of our own, or (certificates, key) of somebody else's.
        directory: where our own is kept.
        host: the address to listen on.
        insecure: other machines may come in without TLS, as somebody said in so many words.

    Raises:
        AtollError: other machines could come in without TLS; or files can't be used.
    """
    if isinstance(tls, tuple):
        return given(*tls)
    if tls:
        return own(directory, host)
    if insecure or loopback(host):
        return None
    raise AtollError(
        f"--host {host} lets other machines in, and without TLS anybody on the way reads and alters what they say: add --tls; "
        "or --insecure, where something in front speaks TLS or the network is all yours"
    )


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    if not path.exists():
        write_private(path, _bare(ec.generate_private_key(ec.SECP256R1())))
    key = load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(path.name)  # noqa: TRY004  what is in the file is wrong, not what we do with it
    return key


def _draft(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, life: dt.timedelta, path_length: int | None
) -> x509.CertificateBuilder:
    """A certificate to be signed: of a CA where it has a path length."""
    now, ca = dt.datetime.now(dt.UTC), path_length is not None
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=ca, crl_sign=ca, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number(), now - _EARLIER, now + life)
        .add_extension(x509.BasicConstraints(ca, path_length), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _names(host: str) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for one in dict.fromkeys(("localhost", socket.gethostname(), "127.0.0.1", "::1", host)):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(one)))
        except ValueError:
            names.append(x509.DNSName(one))
    return names


def _pin(key: CertificatePublicKeyTypes) -> str:
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def pin_of(der: bytes) -> str:
    """Return the pin of a certificate: SHA-256 of its public key, in hex."""
    return _pin(x509.load_der_x509_certificate(der).public_key())


class OtherPinError(ssl.SSLCertVerificationError):
    """A server whose key has another pin than a person said; its text is one line for that person."""


class Trust(NamedTuple):
    """By what a client believes a server, and what it shows to it.

    Args:
        pin: of the server's key.
        ca: a file of CAs; where there is no pin either, the CAs of this machine are believed.
        certificate: a file with a key and its certificate, as `pair` writes it, for a server that asks for one.

    Raises (by its methods):
        AtollError: the pin is none, or a file holds no certificate.
    """

    pin: str | None = None
    ca: Path | None = None
    certificate: Path | None = None

    def check(self, url: str) -> None:
        """Refuse what can't be: a pin that is none, or one for an address without TLS."""
        if self.pin is not None and not re.fullmatch(r"[0-9a-f]{64}", self.pin):
            raise AtollError(f"--pin '{self.pin}' is none: it is 64 of the signs 0-9 and a-f, as `atoll serve --tls` prints it")
        if any(self) and not url.startswith("https://"):
            raise AtollError(f"{url}: --pin, --ca and --certificate are for an address with TLS; write it as https://…")

    def context(self, url: str) -> ssl.SSLContext:
        """Return a client's context, whose handshake fails with `OtherPinError` where the server has another pin."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except OSError as error:
            raise AtollError(f"--ca {self.ca}: holds no certificate in PEM ({error.strerror or error})") from error
        if self.pin is not None:
            if self.ca is None:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.sslobject_class, context.sslsocket_class = _pinned(self.pin, url)
        try:
            if self.certificate:
                context.load_cert_chain(self.certificate, password="")
        except OSError as error:
            why = error.strerror or error
            raise AtollError(f"--certificate {self.certificate}: no key with its certificate in PEM ({why})") from error
        return context


def _pinned(pin: str, url: str) -> tuple[type[ssl.SSLObject], type[ssl.SSLSocket]]:
    """The two kinds of connections, of asyncio and of plain sockets, whose handshake ends with a look at the pin."""

    def agree(der: bytes | None) -> None:
        if not (der and hmac.compare_digest(pin_of(der), pin)):
            found = pin_of(der)[:16] if der else "none"
            raise OtherPinError(
                1,
                f"{url}: its key has the pin {found}…, not {pin[:16]}…: another server answers there, or it has a new key; "
                "ask its operator for the pin before you go on",
            )

    class Object(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            agree(self.getpeercert(binary_form=True))

    class Socket(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:  # noqa: FBT002  as it is called
            super().do_handshake(block)
            agree(self.getpeercert(binary_form=True))

    return Object, Socket


def loopback(host: str) -> bool:
    """Say whether an address can be reached from this machine only."""
    try:
        return all(ipaddress.ip_address(found[4][0]).is_loopback for found in socket.getaddrinfo(host or "0.0.0.0", None))  # noqa: S104
    except (OSError, ValueError):
        return False  # no address at all: binding it will say so


def speaks_tls(host: str, port: int, patience: float = 3.0) -> bool:
    """Say whether a port answers in TLS: asked where plain words got no answer."""
    with contextlib.suppress(OSError), _greeted(host, port, patience):
        return True
    return False


def asks_for_a_certificate(host: str, port: int, patience: float = 3.0) -> bool:
    """Say whether a port lets in only clients that show a certificate.

    By TLS 1.3 such a server hangs up once a client's own handshake is through, and by 1.2 before. One that is only full doesn't.
    """
    try:
        with _greeted(host, port, patience) as line:
            if line.recv(1):
                return False
    except TimeoutError:
        return False
    except OSError:
        pass
    return speaks_tls(host, port, patience) and not _speaks_1_2(host, port, patience)


def _speaks_1_2(host: str, port: int, patience: float) -> bool:
    with contextlib.suppress(OSError), _greeted(host, port, patience, ssl.TLSVersion.TLSv1_2):
        return True
    return False


@contextlib.contextmanager
def _greeted(host: str, port: int, patience: float, newest: ssl.TLSVersion | None = None) -> Iterator[ssl.SSLSocket]:
    """A connection to a server, whoever it is, once the handshake is through."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if newest:
        context.maximum_version = newest
    with socket.create_connection((host, port), patience) as plain, context.wrap_socket(plain) as line:
        yield line


def authority(directory: Path) -> Path:
    """Return the file of the CA of `own`, made on first use.

    Raises:
        StoreError: see `own`.
    """
    with _told(directory):
        _authority(directory)
    return directory / "ca.pem"
