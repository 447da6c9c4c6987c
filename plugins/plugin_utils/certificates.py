"""Checks of the certificate and the private key of a server.

Whoever uses any filter of the collection loads this, so what reads keys is imported where it is used.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography import x509

# Of an account's key: the name in cryptography, and that in RFC 7518.
CURVES = {"secp256r1": "P-256", "secp384r1": "P-384"}


def certificate_problems(where: str, paths: Mapping[str, str], pems: Mapping[str, str], address: str = "") -> list[str]:
    """What is wrong with a server's certificate and its key, one sentence each.

    where: what comes before the names in the sentences; paths: on the controller, of `certificate` and `key`; pems: the
    text of each file that exists; address: the IP address for which the certificate has to be valid, if any.
    """
    problems = []
    for kind in ("certificate", "key"):
        if not PurePath(paths[kind]).is_absolute():
            problems.append(f"{where}{kind} {paths[kind]} is no absolute path on the controller.")
        elif paths[kind] not in pems:
            problems.append(f"{where}{kind} {paths[kind]} is no file on the controller.")
    if problems:
        return problems
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    try:
        certificate = x509.load_pem_x509_certificates(pems[paths["certificate"]].encode())[0]
    except ValueError:
        return [f"{where}certificate {paths['certificate']} has no certificate in PEM."]
    if certificate.not_valid_after_utc < datetime.now(UTC):
        problems.append(f"{where}certificate {paths['certificate']} expired on {certificate.not_valid_after_utc:%F}.")
    if address and str(ipaddress.ip_address(address)) not in _addresses_of(certificate):
        problems.append(f"{where}certificate {paths['certificate']} has no subjectAltName IP:{address}.")
    try:
        key = load_pem_private_key(pems[paths["key"]].encode(), password=None)
    except TypeError:
        return [*problems, f"{where}key {paths['key']} is encrypted; the server has no password for it."]
    except ValueError:
        return [*problems, f"{where}key {paths['key']} is no private key in PEM."]
    public = (
        one.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        for one in (certificate.public_key(), key.public_key())
    )
    if len(set(public)) > 1:
        problems.append(
            f"{where}key {paths['key']} does not fit the first certificate of {paths['certificate']}, which must be the"
            " server's own."
        )
    return problems


def acme_thumbprint(account_key: str) -> str:
    """The thumbprint of an ACME account, from its private key in PEM; ValueError for another text."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        public = load_pem_private_key(account_key.encode(), password=None).public_key()
    except TypeError as error:
        raise ValueError("it is encrypted") from error
    return jwk_thumbprint(public)


def jwk_thumbprint(public: object) -> str:
    """The thumbprint (RFC 7638) of a public key on P-256 or P-384, or of RSA; ValueError for another one."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    numbers: dict[str, int]
    if isinstance(public, EllipticCurvePublicKey) and public.curve.name in CURVES:
        point = public.public_numbers()
        size, numbers = public.key_size // 8, {"x": point.x, "y": point.y}
        named = {"kty": "EC", "crv": CURVES[public.curve.name]}
    elif isinstance(public, RSAPublicKey):
        rsa = public.public_numbers()
        size, numbers, named = 0, {"e": rsa.e, "n": rsa.n}, {"kty": "RSA"}
    else:
        raise ValueError("it is no key on P-256 or P-384, and none of RSA")
    texts = {name: _base64(number.to_bytes(size or (number.bit_length() + 7) // 8)) for name, number in numbers.items()}
    key = json.dumps(named | texts, sort_keys=True, separators=(",", ":"))
    return _base64(hashlib.sha256(key.encode()).digest())


def _base64(value: bytes) -> str:
    return urlsafe_b64encode(value).decode().rstrip("=")


def _addresses_of(certificate: x509.Certificate) -> list[str]:
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return [*map(str, names.value.get_values_for_type(x509.IPAddress))]
