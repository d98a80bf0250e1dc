"""Who vouches for a policy: detached Ed25519 signatures over its digest, and the officers whose word counts.

What is signed is the policy's meaning, its canonical form, with a domain of its own, the time and an end; comments and spacing
are free. A signature says that a named key accepted these rules for that time. It does *not* say that they protect, nor that
they are the newest: an older policy stays signed until its signature ends, so give signatures short lives. Whoever holds an
officer's key, or may write the set of keys that a site trusts, decides what may leave that site.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import AwareDatetime, BaseModel, Field

from securesplit.errors import PolicyDenied
from securesplit.policy.schema import Policy
from securesplit.policy.table import STRICT

__all__ = ["DOMAIN", "Signature", "SignatureFile", "fingerprint", "require_signed", "sign_policy", "statement"]

DOMAIN = b"securesplit policy signature v1"
_SKEW = timedelta(minutes=10)  # Clocks of the officer's machine and of this one may differ.

Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Signature(BaseModel):
    """One officer's signature.

    Attributes:
        key: fingerprint of the public key, which names the signer and is signed as well.
        signed, expires: when, and until when it counts.
        value: 64 bytes, in hex.
    """

    model_config = STRICT
    key: Hex32
    signed: AwareDatetime
    expires: AwareDatetime
    value: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class SignatureFile(BaseModel):
    """The file beside a policy, JSON.

    Attributes:
        policy: name of what was signed, for people; digest: of its canonical form.
    """

    model_config = STRICT
    version: Literal[1] = 1
    algorithm: Literal["ed25519"] = "ed25519"
    policy: str
    digest: Hex32
    signatures: Annotated[tuple[Signature, ...], Field(min_length=1, max_length=64, strict=False)]


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 of the 32 raw bytes of a public key, in hex."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def statement(digest: str, key: str, signed: datetime, expires: datetime) -> bytes:
    """The bytes that an officer signs: each part behind its length in bytes as u64, so that no two statements are alike."""
    parts = (DOMAIN, bytes.fromhex(digest), bytes.fromhex(key), _stamp(signed), _stamp(expires))
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def _stamp(moment: datetime) -> bytes:
    return int(moment.timestamp()).to_bytes(8, "little", signed=True)


def sign_policy(policy: Policy, key: Ed25519PrivateKey, *, now: datetime, days: int) -> Signature:
    """One signature on a policy.

    Args:
        policy: what is accepted.
        key: the officer's.
        now: with a time zone; whole seconds are kept.
        days: how long it counts, 1 to 3650.
    """
    if not 1 <= days <= 3650:
        raise ValueError("a signature counts for 1 to 3650 days")
    own, signed = fingerprint(key.public_key()), now.replace(microsecond=0)
    expires = signed + timedelta(days=days)
    value = key.sign(statement(policy.digest, own, signed, expires))
    return Signature(key=own, signed=signed, expires=expires, value=value.hex())


def require_signed(
    policy: Policy, file: SignatureFile, trusted: Sequence[Ed25519PublicKey], *, now: datetime
) -> Signature:
    """The signature by which one of the trusted officers vouches for this very policy now.

    Args:
        policy: as it is about to be enforced.
        file: what lies beside it; nothing in it is believed that a trusted key did not sign.
        trusted: the pinned keys.
        now: with a time zone.

    Raises:
        PolicyDenied: SS-2063 when no trusted key signed this policy: it was changed after it was signed, or signed by somebody
            else. SS-2064 when one did, and its signature has ended or is from the future.
    """
    keys = {fingerprint(key): key for key in trusted}
    valid = [s for s in file.signatures if s.key in keys and _good(policy, s, keys[s.key])]
    if not valid:
        known = any(s.key in keys for s in file.signatures)
        raise PolicyDenied(
            "SS-2063",
            f"policy '{policy.name}' ({policy.digest[:16]}) is not what "
            + ("was signed: it was changed since, or its signature was" if known else "a trusted officer signed"),
            hint="Have the officer read and sign it anew: securesplit policy sign; do not loosen it by yourself.",
        )
    fresh = [s for s in valid if s.signed - _SKEW <= now < s.expires]
    if not fresh:
        last = max(valid, key=lambda s: s.expires)
        when = f"from {last.signed:%Y-%m-%d} to {last.expires:%Y-%m-%d}"
        raise PolicyDenied(
            "SS-2064",
            f"the signature on policy '{policy.name}' counts {when}, and not now",
            hint="Set the clock, or have the officer sign the policy anew.",
        )
    return max(fresh, key=lambda s: s.expires)


def _good(policy: Policy, signature: Signature, key: Ed25519PublicKey) -> bool:
    said = statement(policy.digest, signature.key, signature.signed, signature.expires)
    try:
        key.verify(bytes.fromhex(signature.value), said)
    except InvalidSignature:
        return False
    return True
