"""Checks of the keys that check users' tokens: a JWK Set (RFC 7517) of public keys."""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode
from pathlib import PurePath
from typing import Any

SHORTEST_RSA_BITS = 2048
KINDS = "RSA, EC on P-256, P-384 or P-521, and Ed25519"


def token_key_problems(where: str, path: str, texts: dict[str, str]) -> list[str]:
    """What is wrong with a file of keys, one sentence each; ``texts`` has the text of each file that exists."""
    if not PurePath(path).is_absolute():
        return [f"{where} {path} is no absolute path on the controller."]
    if path not in texts:
        return [f"{where} {path} is no file on the controller."]
    try:
        keys = json.loads(texts[path])["keys"]
    except (ValueError, TypeError, KeyError):
        keys = None
    if not isinstance(keys, list) or not keys or not all(isinstance(key, dict) for key in keys):
        return [f'{where} {path} is no JWK Set with keys: {{"keys": [...]}}.']
    problems = [(number, _problem(key)) for number, key in enumerate(keys, start=1)]
    return [f"{where} {path}: key {number} {problem}." for number, problem in problems if problem]


def _problem(key: dict[str, Any]) -> str:
    """What is wrong with a key; empty if it can check tokens, and do nothing else."""
    if "d" in key:
        return "is a private one, which would be in a file on every edge: give the public keys"
    if key.get("kty") == "oct":
        return "is symmetric: who can check tokens with it can sign them too. Give public keys"
    try:
        return _load(key)
    except (ValueError, TypeError, KeyError):
        return f"is not valid: there are {KINDS}"


def _load(key: dict[str, Any]) -> str:
    """What is wrong with the strength of a public key; ValueError, TypeError or KeyError if it is none."""
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, SECP521R1, EllipticCurvePublicNumbers
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers

    if key["kty"] == "RSA":
        bits = RSAPublicNumbers(_number(key["e"]), _number(key["n"])).public_key().key_size
        return "" if bits >= SHORTEST_RSA_BITS else f"has {bits} bits: {SHORTEST_RSA_BITS} or more are needed"
    if key["kty"] == "EC":
        curve = {"P-256": SECP256R1(), "P-384": SECP384R1(), "P-521": SECP521R1()}[key["crv"]]
        EllipticCurvePublicNumbers(_number(key["x"]), _number(key["y"]), curve).public_key()
    elif (key["kty"], key["crv"]) == ("OKP", "Ed25519"):
        Ed25519PublicKey.from_public_bytes(_bytes(key["x"]))
    else:
        raise ValueError(key["kty"])
    return ""


def _bytes(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _number(text: str) -> int:
    return int.from_bytes(_bytes(text))
