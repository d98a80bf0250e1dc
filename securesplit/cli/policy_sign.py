"""``securesplit policy keygen``, ``sign`` and ``verify``: officers who vouch for a policy; and how commands hold to them."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securesplit.cli.output import Output, show

if TYPE_CHECKING:
    from securesplit.policy.schema import Policy

File = Annotated[Path, typer.Argument(metavar="FILE", help="A policy file.")]
Trusted = Annotated[
    list[Path] | None,
    typer.Option(
        "--policy-key",
        help="PEM file with officers' public keys, may be repeated: the policy must be signed by one of them. Without it, "
        "officers.pem in the key folder counts, where there is one.",
    ),
]
PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help="File of mode 0600 with the key's passphrase, on one line.")
]
Signatures = Annotated[
    Path | None, typer.Option("--signatures", help="File of signatures; FILE.sig beside the policy when absent.")
]


def trusted_policy(file: Path, officers: list[Path] | None, keys: Path | None) -> Policy:
    """A policy, held to the officers that were named or are pinned in a key folder. Who vouched for it goes to stderr."""
    from securesplit.policy.officer import load_signed

    policy, signature = load_signed(file, tuple(officers or ()), keys=keys, now=datetime.now(UTC))
    if signature is not None:
        sys.stderr.write(
            f"policy '{policy.name}' is signed by {signature.key[:16]}, until {signature.expires:%Y-%m-%d}\n"
        )
    return policy


def keygen(
    out: Annotated[Path, typer.Argument(metavar="KEY", help="Where the private key is written; KEY.pub beside it.")],
    passphrase_file: PassphraseFile = None,
    output: Output = "text",
) -> None:
    """Make an officer's key pair: Ed25519, mode 0600, encrypted when there is a passphrase. Nothing is overwritten."""
    from securesplit.policy.officer import make_officer

    mark = make_officer(out, passphrase=_passphrase(passphrase_file))
    public = out.with_name(out.name + ".pub")
    text = f"{out}: private key\n{public}: public key\nfingerprint {mark}\nSites pin {public.name} as officers.pem in their key folders."
    show(output, text, {"path": str(out), "public": str(public), "fingerprint": mark})


def sign(
    file: File,
    key: Annotated[Path, typer.Option(help="The officer's private key, of policy keygen.")],
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the signature counts.")] = 90,
    passphrase_file: PassphraseFile = None,
    signatures: Signatures = None,
    output: Output = "text",
) -> None:
    """Vouch for a policy. Prints what is being signed; the signature joins those of other officers in FILE.sig.

    The signature is over the policy's digest: comments and spacing may change, values may not.
    """
    from securesplit.policy.lint import at_least, lint
    from securesplit.policy.load import load_policy
    from securesplit.policy.officer import add_signature, read_private, signature_path
    from securesplit.policy.signature import sign_policy

    policy = load_policy(file)
    made = sign_policy(
        policy, read_private(key, passphrase=_passphrase(passphrase_file)), now=datetime.now(UTC), days=days
    )
    place = signatures or signature_path(file)
    kept = add_signature(policy, place, made)
    warnings = [finding.line() for finding in at_least(lint(policy), "warning")]
    lines = [
        f"signed '{policy.name}', digest {policy.digest}",
        f"for:  {policy.purpose}",
        f"key {made.key}, until {made.expires:%Y-%m-%d}; {len(kept.signatures)} signature(s) in {place}",
        *(f"warning: {line}" for line in warnings),
    ]
    value = {
        "path": str(place), "digest": policy.digest, "key": made.key, "expires": made.expires.isoformat(),
        "signatures": len(kept.signatures), "warnings": warnings,
    }  # fmt: skip
    show(output, "\n".join(lines), value)


def verify(
    file: File,
    key: Annotated[list[Path], typer.Option("--key", help="PEM file with trusted public keys; may be repeated.")],
    signatures: Signatures = None,
    output: Output = "text",
) -> None:
    """Is this policy, as it is, signed by a trusted officer? Exit 3 when it is unsigned, was changed, or the time is over."""
    from securesplit.policy.officer import load_signed

    policy, signature = load_signed(file, tuple(key), keys=None, now=datetime.now(UTC), signatures=signatures)
    assert signature is not None, "there are trusted keys"
    value = {
        "valid": True, "digest": policy.digest, "key": signature.key, "signed": signature.signed.isoformat(),
        "expires": signature.expires.isoformat(),
    }  # fmt: skip
    text = f"{file}: signed by {signature.key}, from {signature.signed:%Y-%m-%d} until {signature.expires:%Y-%m-%d}\ndigest {policy.digest}"
    show(output, text, value)


def _passphrase(file: Path | None) -> bytes | None:
    from securesplit.pki.passphrase import from_file

    return None if file is None else from_file(file)
