"""New certificates and keys for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

JWK_ALGORITHMS: dict[Any, Any] = {
    (ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey): ECAlgorithm,
    (rsa.RSAPrivateKey, rsa.RSAPublicKey): RSAAlgorithm,
    Ed25519PublicKey: OKPAlgorithm,
}


@dataclass(frozen=True)
class Certificate:
    """A certificate with its key, as texts in PEM and as files with them."""

    chain: str
    key: str
    serial: int
    chain_path: Path
    key_path: Path

    @staticmethod
    def serial_of(der: bytes | None) -> int:
        assert der
        return x509.load_der_x509_certificate(der).serial_number


def private_pem(key: PrivateKeyTypes) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def make_key() -> str:
    """A private key on P-256 in PEM."""
    return private_pem(ec.generate_private_key(ec.SECP256R1()))


def make_certificate(folder: Path, days: int = 30, names: Sequence[str] = (), age: int = 1) -> Certificate:
    """A certificate for localhost and these names, which began `age` days ago, valid for so many days from then."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    begin = datetime.now(UTC) - timedelta(days=age)
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(min(begin, begin + timedelta(days=days - 1)))
        .not_valid_after(begin + timedelta(days=days))
    )
    if names:
        alternatives = x509.SubjectAlternativeName([x509.DNSName(one) for one in names])
        builder = builder.add_extension(alternatives, critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    chain = certificate.public_bytes(Encoding.PEM).decode()
    private = private_pem(key)
    (folder / "chain.pem").write_text(chain)
    (folder / "key.pem").write_text(private)
    return Certificate(chain, private, certificate.serial_number, folder / "chain.pem", folder / "key.pem")


def jwk(key: Any, **changes: str) -> dict[str, Any]:
    """A public or private key as a JWK, with changes."""
    (algorithm,) = (one for kinds, one in JWK_ALGORITHMS.items() if isinstance(key, kinds))
    found: dict[str, Any] = json.loads(algorithm.to_jwk(key))
    return found | changes
