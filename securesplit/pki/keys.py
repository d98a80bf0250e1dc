"""The two kinds of keys that parties and authorities have: ECDSA on P-256, and Ed25519.

P-256 is the default because every scanner, security module and FIPS build knows it. RSA and other curves are accepted from
nobody as a party's key; an authority outside of this package may have any that its own checks allow (trust.py).

A key file is PKCS #8 PEM. An encrypted one is AES-256-CBC under PBKDF2 with 2048 rounds, which is what OpenSSL writes and
every tool reads; so few rounds do not slow a guesser down, and the strength has to come from the passphrase.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from securesplit.errors import ConnectionFailed
from securesplit.pki.passphrase import Passphrase

__all__ = [
    "KeyType",
    "PrivateKey",
    "PublicKey",
    "generate_key",
    "is_encrypted",
    "key_pem",
    "key_type",
    "load_key",
    "sign_bytes",
    "signature_hash",
    "verify_bytes",
]

KeyType = Literal["p256", "ed25519"]
PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


def generate_key(kind: KeyType = "p256") -> PrivateKey:
    """A new key from the operating system's generator."""
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(ec.SECP256R1())


def key_type(key: object) -> KeyType | None:
    """Which of the two kinds a private or public key is; None for any other."""
    if isinstance(key, ed25519.Ed25519PrivateKey | ed25519.Ed25519PublicKey):
        return "ed25519"
    if isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return "p256"
    return None


def signature_hash(key: PrivateKey) -> hashes.SHA256 | None:
    """The hash that X.509 signatures by this key name; Ed25519 has its own inside."""
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()


def sign_bytes(key: PrivateKey, data: bytes) -> bytes:
    """ECDSA with SHA-256, DER-encoded (r, s), or 64 bytes of Ed25519. Proves neither purpose nor freshness by itself."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(data)
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


def verify_bytes(key: PublicKey, signature: bytes, data: bytes) -> None:
    """The inverse of :func:`sign_bytes`. Raises cryptography's InvalidSignature."""
    if isinstance(key, ed25519.Ed25519PublicKey):
        key.verify(signature, data)
    else:
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))


def key_pem(key: PrivateKey, passphrase: bytes | None = None) -> bytes:
    """PKCS #8 PEM, encrypted when there is a passphrase."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def is_encrypted(pem: bytes) -> bool:
    """Whether a key file needs a passphrase."""
    return b"ENCRYPTED" in pem


def load_key(pem: bytes, path: Path, passphrase: Passphrase | None) -> tuple[PrivateKey, bytes | None]:
    """Read a key file.

    Args:
        pem: its content.
        path: where it lies, for messages.
        passphrase: asked only when the key is encrypted.

    Returns:
        The key, and the passphrase that opened it; None for a key that is not encrypted.

    Raises:
        ConnectionFailed: SS-3102 no such key, SS-3104 encrypted and no passphrase, SS-3105 a wrong one, SS-3215 a key of
            another kind.
    """
    secret = None
    if is_encrypted(pem):
        if passphrase is None:
            raise ConnectionFailed(
                "SS-3104",
                f"{path} is encrypted and no passphrase was given",
                hint="Name a file (mode 0600) with --key-pass-file, a descriptor with --key-pass-fd, or use a terminal.",
            )
        secret = passphrase()
    try:
        key = serialization.load_pem_private_key(pem, secret)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        if secret is not None:
            raise ConnectionFailed(
                "SS-3105", f"the passphrase does not open {path}", hint="Give the one that it was made with."
            ) from None
        raise ConnectionFailed(
            "SS-3102", f"{path} holds no private key", hint="Issue the party anew or restore the file."
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) or key_type(key) is None:
        raise ConnectionFailed(
            "SS-3215", f"{path} holds a key that is neither P-256 nor Ed25519", hint="Make a new key and certificate."
        )
    return key, secret
