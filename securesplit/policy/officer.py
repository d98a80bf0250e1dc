"""Officers' files: a private key that only its owner can read, public keys that a site pins, signatures beside policies.

A set of trusted keys is one PEM file with any number of public keys. ``officers.pem`` in a party's key folder binds that party
without an option on its command line: every policy that it is given must then be signed.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from pydantic import ValidationError

from securesplit.errors import InputError, PolicyDenied
from securesplit.policy.load import load_policy
from securesplit.policy.schema import Policy
from securesplit.policy.signature import Signature, SignatureFile, fingerprint, require_signed

__all__ = [
    "OFFICERS",
    "add_signature",
    "load_signed",
    "make_officer",
    "read_private",
    "read_signatures",
    "read_trusted",
    "signature_path",
]

OFFICERS = "officers.pem"
"""Name of the pinned set in a key folder."""

_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)
_MAX_BYTES = 1 << 20


def signature_path(policy: Path) -> Path:
    """Where the signatures on a policy lie: ``balanced.toml.sig`` beside ``balanced.toml``."""
    return policy.with_name(policy.name + ".sig")


def make_officer(path: Path, *, passphrase: bytes | None) -> str:
    """Make a key pair, ``path`` with mode 0600 and ``path.pub``; neither may exist.

    Args:
        path: of the private key, PKCS#8 PEM, encrypted when there is a passphrase.
        passphrase: not empty, or None.

    Returns:
        The public key's fingerprint.

    Raises:
        InputError: SS-1121 when a file exists or cannot be written.
    """
    key, public = Ed25519PrivateKey.generate(), path.with_name(path.name + ".pub")
    if path.exists() or public.exists():
        raise InputError("SS-1121", f"{path} or {public.name} exists; a key is not replaced", hint="Name another file.")
    sealed = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    _write_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, sealed), mode=0o600)
    _write_new(public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), mode=0o644)
    return fingerprint(key.public_key())


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, mode)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)
            file.write(data)
            file.flush()
            os.fsync(handle)
    except OSError as error:
        raise InputError(
            "SS-1121", f"cannot write {path}: {type(error).__name__}", hint="Check the folder and its mode."
        ) from None


def read_private(path: Path, *, passphrase: bytes | None) -> Ed25519PrivateKey:
    """An officer's private key.

    Raises:
        InputError: SS-1120 when it cannot be read, can be read by others, is not Ed25519, or the passphrase is wrong.
    """
    data = _read(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise InputError(
            "SS-1120", f"{path} can be used by others", hint=f"Run: chmod 600 {path}, or make a new key if they had it."
        )
    try:
        key = load_pem_private_key(data, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InputError(
            "SS-1120", f"{path} is no private key, or its passphrase is wrong", hint="Name it by --passphrase-file."
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError("SS-1120", f"{path} is no Ed25519 key", hint="Make one with: securesplit policy keygen")
    return key


def read_trusted(paths: tuple[Path, ...]) -> tuple[Ed25519PublicKey, ...]:
    """The public keys in PEM files.

    Raises:
        InputError: SS-1120 when a file cannot be read, holds no key, or one that is not Ed25519.
    """
    found: list[Ed25519PublicKey] = []
    for path in paths:
        blocks = _PEM.findall(_read(path))
        if not blocks:
            raise InputError("SS-1120", f"{path} holds no public key", hint="Name the .pub file of policy keygen.")
        for block in blocks:
            try:
                key = load_pem_public_key(block)
            except (ValueError, UnsupportedAlgorithm):
                key = None
            if not isinstance(key, Ed25519PublicKey):
                raise InputError("SS-1120", f"{path} holds a key that is not Ed25519", hint="See policy keygen.")
            found.append(key)
    return tuple(found)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(
            "SS-1120", f"cannot read {path}: {type(error).__name__}", hint="Check the path and its permissions."
        ) from None
    return data


def read_signatures(path: Path) -> SignatureFile:
    """The signatures on a policy.

    Raises:
        PolicyDenied: SS-2062 when there is no such file, SS-2063 when it is none.
    """
    try:
        text = path.read_bytes()[: _MAX_BYTES + 1]
    except OSError:
        raise PolicyDenied(
            "SS-2062",
            f"the policy is not signed: there is no {path.name} beside it",
            hint="See: securesplit policy sign",
        ) from None
    try:
        return SignatureFile.model_validate_json(text)
    except ValidationError:
        raise PolicyDenied(
            "SS-2063", f"{path.name} is no file of signatures", hint="Have the officer sign the policy anew."
        ) from None


def add_signature(policy: Policy, path: Path, signature: Signature) -> SignatureFile:
    """Put a signature beside those of other officers on the same policy; those on another one go.

    Args:
        policy: what was signed.
        path: of the signatures' file.
        signature: replaces an earlier one by the same key.

    Raises:
        InputError: SS-1121 when it cannot be written.
    """
    others: tuple[Signature, ...] = ()
    with suppress(PolicyDenied):
        known = read_signatures(path)
        others = known.signatures if known.digest == policy.digest else ()
    kept = (*(s for s in others if s.key != signature.key), signature)
    made = SignatureFile(policy=policy.name, digest=policy.digest, signatures=kept)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise InputError(
            "SS-1121", f"cannot write {path}: {type(error).__name__}", hint="Check the folder and its mode."
        ) from None
    return made


def load_signed(
    path: Path, trusted: tuple[Path, ...], *, keys: Path | None, now: datetime, signatures: Path | None = None
) -> tuple[Policy, Signature | None]:
    """Read a policy, and hold it to the officers whom this site trusts, where it trusts any.

    Args:
        path: of the policy.
        trusted: PEM files with public keys that were named; without any, ``officers.pem`` of ``keys`` counts.
        keys: the party's key folder, or None.
        now: with a time zone.
        signatures: of the policy; the file beside it when None.

    Returns:
        The policy, and whose signature counts; None where nobody was named and no set is pinned.

    Raises:
        InputError: SS-1100 to SS-1102 as :func:`load_policy`, SS-1120.
        PolicyDenied: SS-2062 unsigned, SS-2063 changed or signed by others, SS-2064 not valid now.
    """
    policy = load_policy(path)
    if not trusted and keys is not None and (pinned := keys / OFFICERS).exists():
        trusted = (pinned,)
    if not trusted:
        return policy, None
    officers = read_trusted(trusted)
    return policy, require_signed(policy, read_signatures(signatures or signature_path(path)), officers, now=now)
