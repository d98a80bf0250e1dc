"""``securesplit certs``: make an authority, issue and revoke certificates, look at one.

With ``--output json`` each command prints exactly one object with ``path, serial, not_after, uri_san, fingerprint``;
what a command has no value for is null.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from securesplit.pki.authority import Revoked
    from securesplit.pki.certificate import Issued

__all__ = ["app"]

app = typer.Typer(help="Certificates: who may take part.", no_args_is_help=True, add_completion=False)

Keys = Annotated[Path, typer.Option("--keys", help="Folder that holds ca/ and one folder per party.")]
Output = Annotated[Literal["text", "json"], typer.Option("--output", help="text, or one JSON object.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and hyphens.")]

_KEYS = Path("keys")

# One row of output: a name and its value.
Row = tuple[str, "str | int | list[str] | None"]


@app.command("init-ca")
def init_ca(
    keys: Keys = _KEYS,
    domain: Annotated[str, typer.Option(help="Trust domain; it is part of every identity.")] = "securesplit.local",
    days: Annotated[int, typer.Option(help="Lifetime of the authority.")] = 3650,
    output: Output = "text",
) -> None:
    """Make a certificate authority and its first, empty revocation list. Never overwrites one."""
    from securesplit.pki.authority import Authority

    authority = Authority.create(keys, domain=domain, days=days)
    _print(output, "made the certificate authority", _rows(authority.describe()))


@app.command("issue")
def issue(
    name: Name,
    *,
    role: Annotated[
        Literal["client", "server"], typer.Option(help="What the certificate is good for; one of the two.")
    ],
    keys: Keys = _KEYS,
    dns: Annotated[list[str] | None, typer.Option(help="Host name of a server; repeatable.")] = None,
    ip: Annotated[list[str] | None, typer.Option(help="Address of a server; repeatable.")] = None,
    days: Annotated[int | None, typer.Option(help="Lifetime; 30 for clients, 90 for servers when absent.")] = None,
    output: Output = "text",
) -> None:
    """Make a key and a certificate for one party; its folder is all that the party needs."""
    from securesplit.pki.authority import Authority

    issued = Authority.open(keys).issue(name, role, dns=dns or (), ips=ip or (), days=days)
    _print(output, f"issued {name}", _rows(issued))


@app.command("revoke")
def revoke(name: Name, keys: Keys = _KEYS, output: Output = "text") -> None:
    """Withdraw every certificate of a party. Running servers beside the authority notice within seconds."""
    from securesplit.pki.authority import Authority

    _print(output, f"revoked {name}", _list_rows(Authority.open(keys).revoke(name)))


@app.command("crl")
def crl(keys: Keys = _KEYS, output: Output = "text") -> None:
    """Publish the revocation list anew, good for another 7 days. Run it daily."""
    from securesplit.pki.authority import Authority

    _print(output, "published the revocation list", _list_rows(Authority.open(keys).write_crl()))


@app.command("inspect")
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A certificate, or a folder with a cert.pem.")],
    output: Output = "text",
) -> None:
    """Show what a certificate says. Nothing is verified."""
    from securesplit.pki.certificate import read_issued

    _print(output, "this certificate says (nothing is verified)", _rows(read_issued(path)))


def _rows(issued: Issued) -> list[Row]:
    return [
        ("path", str(issued.path)),
        ("serial", issued.serial),
        ("not_after", _instant(issued.not_after.isoformat())),
        ("uri_san", issued.uri_san),
        ("fingerprint", issued.fingerprint),
    ]


def _list_rows(revoked: Revoked) -> list[Row]:
    return [
        ("path", str(revoked.path)),
        ("serial", revoked.serials[-1] if revoked.serials else None),
        ("not_after", _instant(revoked.next_update.isoformat())),
        ("uri_san", None),
        ("fingerprint", None),
        ("revoked_now", list(revoked.serials)),
        ("revoked_total", revoked.total),
        ("copies_not_replaced", [str(folder) for folder in revoked.stale]),
    ]


def _instant(text: str) -> str:
    return text.replace("+00:00", "Z")


def _print(output: str, title: str, rows: list[Row]) -> None:
    if output == "json":
        typer.echo(json.dumps(dict(rows)))
        return
    typer.echo(title)
    for key, value in rows:
        shown = ", ".join(value) if isinstance(value, list) else value
        if shown not in {None, ""}:
            typer.echo(f"  {key:<20} {shown}")
