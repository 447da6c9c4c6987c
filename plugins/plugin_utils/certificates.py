"""Checks of the certificate and the private key of a server."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import PurePath

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key


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


def _addresses_of(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return [*map(str, names.value.get_values_for_type(x509.IPAddress))]
