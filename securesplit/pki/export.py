"""A party's key and certificates as one PKCS #12 file under a passphrase, for a browser, a proxy or a security module.

What this does not protect against: whoever has the file and guesses the passphrase. The key leaves its folder in it, which
is the only command that lets it; a site that never needs such a file had better make none.
"""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import PrivateFormat, pkcs12

from securesplit.errors import InputError
from securesplit.pki.certificate import Issued
from securesplit.pki.files import require_private, write_atomically
from securesplit.pki.identity import identity_of
from securesplit.pki.passphrase import Passphrase, require_strong
from securesplit.pki.store import leaf_of, open_pair

__all__ = ["export_p12"]

_ROUNDS = 600_000


def export_p12(folder: Path, out: Path, secret: bytes, *, passphrase: Passphrase | None = None) -> Issued:
    """Write a PKCS #12 file, mode 0600: AES-256 under PBKDF2 with 600 000 rounds, integrity by HMAC-SHA256.

    Args:
        folder: the party's.
        out: the file to write; one that exists is not replaced.
        secret: the file's passphrase.
        passphrase: asked when the party's key is encrypted.

    Raises:
        InputError: SS-1804 not writable or there is one already, SS-1814, SS-1815 an unusable passphrase.
        ConnectionFailed: SS-3100 to SS-3105 as :meth:`securesplit.pki.store.KeyFolder.open`.
    """
    require_strong(secret)
    require_private(folder)
    if out.exists():
        raise InputError("SS-1804", f"{out} exists already", hint="Name another file, or delete that one.")
    der = leaf_of(folder)
    leaf = x509.load_der_x509_certificate(der)
    _, key, _ = open_pair(folder, leaf, passphrase)
    identity = identity_of(der)
    above = [one for one in x509.load_pem_x509_certificates((folder / "chain.pem").read_bytes()) if one != leaf]
    encryption = (
        PrivateFormat.PKCS12.encryption_builder()
        .kdf_rounds(_ROUNDS)
        .key_cert_algorithm(pkcs12.PBES.PBESv2SHA256AndAES256CBC)
        .hmac_hash(hashes.SHA256())
        .build(secret)
    )
    data = pkcs12.serialize_key_and_certificates(identity.name.encode(), key, leaf, above, encryption)
    write_atomically(out, data, mode=0o600)
    return Issued.of(out, leaf, identity.uri)
