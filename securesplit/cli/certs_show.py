"""What the certs commands have in common: their options, and how they print.

With ``--output json`` each command prints exactly one object with ``path, serial, not_after, uri_san, fingerprint`` and more; what
a command has no value for is null.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from securesplit.pki.certificate import Issued
    from securesplit.pki.publish import Revoked

__all__ = [
    "KEYS",
    "CaPassFd",
    "CaPassFile",
    "Encrypt",
    "Keys",
    "Kind",
    "Name",
    "Output",
    "RootFolder",
    "RootPassFd",
    "RootPassFile",
    "Row",
    "instant",
    "list_rows",
    "printed",
    "rows",
]

Keys = Annotated[Path, typer.Option("--keys", help="Folder that holds ca/ and one folder per party.")]
Output = Annotated[Literal["text", "json"], typer.Option("--output", help="text, or one JSON object.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and hyphens.")]
Kind = Annotated[
    Literal["p256", "ed25519"], typer.Option("--key-type", help="Of the new key: ECDSA P-256, or Ed25519.")
]
Encrypt = Annotated[bool, typer.Option("--encrypt-key", help="Encrypt the new key; the passphrase is typed.")]
CaPassFile = Annotated[
    Path | None, typer.Option("--ca-pass-file", help="File, mode 0600, with the passphrase of the authority's key.")
]
CaPassFd = Annotated[
    int | None, typer.Option("--ca-pass-fd", help="Descriptor to read the passphrase of the authority's key from.")
]
RootFolder = Annotated[
    Path | None, typer.Option("--root", metavar="DIR", help="Folder of the root above an intermediate.")
]
RootPassFile = Annotated[
    Path | None, typer.Option("--root-pass-file", help="File, mode 0600, with the passphrase of the root's key.")
]
RootPassFd = Annotated[
    int | None, typer.Option("--root-pass-fd", help="Descriptor to read the passphrase of the root's key from.")
]

KEYS = Path("keys")

# One row of output: a name and its value.
Row = tuple[str, "str | int | bool | list[str] | None"]


def rows(issued: Issued) -> list[Row]:
    """A certificate's five values."""
    return [
        ("path", str(issued.path)),
        ("serial", issued.serial),
        ("not_after", instant(issued.not_after.isoformat())),
        ("uri_san", issued.uri_san),
        ("fingerprint", issued.fingerprint),
    ]


def list_rows(revoked: Revoked) -> list[Row]:
    """A revocation list's."""
    return [
        ("path", str(revoked.path)),
        ("serial", revoked.serials[-1] if revoked.serials else None),
        ("not_after", instant(revoked.next_update.isoformat())),
        ("uri_san", None),
        ("fingerprint", None),
        ("revoked_now", list(revoked.serials)),
        ("revoked_total", revoked.total),
        ("copies_not_replaced", [str(folder) for folder in revoked.stale]),
    ]


def instant(text: str) -> str:
    """A moment in ISO 8601, with Z for UTC."""
    return text.replace("+00:00", "Z")


def printed(output: str, title: str, values: list[Row], **more: object) -> None:
    """Print one JSON object, with ``more`` in it, or a title and a line per value."""
    if output == "json":
        typer.echo(json.dumps({**dict(values), **more}))
        return
    typer.echo(title)
    for key, value in values:
        shown = ", ".join(value) if isinstance(value, list) else str(value).lower() if value is True else value
        if shown not in {None, "", False}:
            typer.echo(f"  {key:<20} {shown}")
