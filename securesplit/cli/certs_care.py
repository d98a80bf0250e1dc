"""``securesplit certs renew``, ``rotate-ca``, ``status`` and ``lint``: keeping certificates good, and telling when they are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from securesplit.cli import passphrase
from securesplit.cli.certs_show import (
    KEYS,
    CaPassFd,
    CaPassFile,
    Keys,
    Output,
    RootFolder,
    RootPassFd,
    RootPassFile,
    Row,
    instant,
    printed,
    rows,
)
from securesplit.cli.passphrase import KeyPassFd, KeyPassFile

if TYPE_CHECKING:
    from securesplit.pki.profile import Signer
    from securesplit.pki.renew import Renewal

__all__ = ["register"]

_AUTHORITY = "the authority's key"
_NOTHING: list[Row] = [("path", None), ("serial", None), ("not_after", None), ("uri_san", None), ("fingerprint", None)]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("renew")(renew)
    app.command("rotate-ca")(rotate_ca)
    app.command("status")(status)
    app.command("lint")(lint)


def renew(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The party; absent with --all.")] = None,
    *,
    keys: Keys = KEYS,
    every: Annotated[
        bool, typer.Option("--all", help="Every party that is due; who is revoked or has expired stays out.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also when it is not due; and, by name, when it has expired.")
    ] = False,
    days: Annotated[int | None, typer.Option(help="Lifetime; 30 for clients, 90 for servers when absent.")] = None,
    new_key: Annotated[
        Literal["p256", "ed25519"] | None,
        typer.Option(
            "--new-key", help="Make a new key of this type, too; the client's privacy ledger then has to be adopted."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the parcel for the site here, for certs import.")] = None,
    key_pass_file: KeyPassFile = None,
    key_pass_fd: KeyPassFd = None,
    ca_pass_file: CaPassFile = None,
    ca_pass_fd: CaPassFd = None,
    output: Output = "text",
) -> None:
    """At the authority: another certificate for the same party, hosts and key, once two thirds of the old one's life are over.

    The site's key file stays as it is. Where the party's folder is not here, the answer is written to keys/NAME.signed.pem.
    """
    from securesplit.pki.authority import Authority
    from securesplit.pki.renew import renew as renew_one
    from securesplit.pki.renew import renew_all

    if (name is None) == (not every):
        raise typer.BadParameter("name a party, or give --all")
    if every and (days is not None or new_key is not None or out is not None):
        raise typer.BadParameter("--days, --new-key and --out are for one party")
    authority = Authority.open(keys, passphrase=passphrase.existing(_AUTHORITY, ca_pass_file, ca_pass_fd))
    if name is None:
        done = renew_all(authority, force=force)
        made = [one for one in done if one.renewed]
        title = f"renewed {len(made)} of {len(done)}"
        each = [dict(_renewal(one)) for one in done]
        values: list[Row] = [*_NOTHING, ("renewed", [one.issued.uri_san for one in made])]
        printed(output, title, values, parties=each)
        return
    secret = None
    if new_key is not None:
        secret = passphrase.new(f"the new key of {name}", key_pass_file, key_pass_fd)
    one = renew_one(authority, name, force=force, days=days, new_key=new_key, secret=secret, out=out)
    title = (
        f"renewed {name}"
        if one.renewed
        else f"{name} is not due before {instant(one.due.isoformat())}; nothing was done"
    )
    printed(output, title, _renewal(one))


def rotate_ca(
    *,
    keys: Keys = KEYS,
    finish: Annotated[
        bool, typer.Option("--finish", help="Let the old authority go. Refused while certificates of it are in use.")
    ] = False,
    days: Annotated[int, typer.Option(help="Lifetime of the new root.")] = 3650,
    key_type: Annotated[
        Literal["p256", "ed25519"] | None,
        typer.Option("--key-type", help="Of the new keys; the old one's when absent."),
    ] = None,
    keep_root: Annotated[
        bool, typer.Option("--keep-root", help="Exchange the intermediate only; needs --root.")
    ] = False,
    root: RootFolder = None,
    new_root: Annotated[
        Path | None, typer.Option("--new-root", metavar="DIR", help="Where a new root above an intermediate goes.")
    ] = None,
    ca_pass_file: CaPassFile = None,
    ca_pass_fd: CaPassFd = None,
    root_pass_file: RootPassFile = None,
    root_pass_fd: RootPassFd = None,
    output: Output = "text",
) -> None:
    """Exchange the authority: first both count; renew everybody (certs renew --all); then --finish.

    Parties beside the authority are brought up to date here. Others take the new one in with their next certs import.
    """
    from securesplit.pki.authority import Authority
    from securesplit.pki.rotate import begin_rotation, finish_rotation

    source = passphrase.existing(_AUTHORITY, ca_pass_file, ca_pass_fd)
    authority = Authority.open(keys, passphrase=source)
    if finish:
        done = finish_rotation(authority)
        title = "the old authority counts no more"
    else:
        old_root, secret = _root(root, passphrase.existing("the root's key", root_pass_file, root_pass_fd))
        done = begin_rotation(
            authority,
            passphrase=source,
            days=days,
            kind=key_type,
            root=old_root,
            keep_root=keep_root,
            root_at=new_root,
            root_secret=secret,
        )
        title = "old and new authority count side by side; now renew everybody, then --finish"
    values: list[Row] = [
        *rows(done.issued),
        ("old", list(done.old)),
        ("waiting", list(done.waiting)),
        ("vouched", done.vouched),
        ("copies_not_replaced", [str(folder) for folder in done.stale]),
        ("finished", finish),
    ]
    printed(output, title, values)


def _root(folder: Path | None, ask: Callable[[], bytes] | None) -> tuple[Signer | None, bytes | None]:
    """The old root and the passphrase of its key; a new root's key is protected as the old one's was."""
    from securesplit.pki.founding import open_signer
    from securesplit.pki.keys import is_encrypted

    if folder is None:
        return None, None
    signer = open_signer(folder, ask)
    encrypted = ask is not None and is_encrypted((folder / "key.pem").read_bytes())
    return signer, ask() if encrypted and ask is not None else None


def status(
    keys: Keys = KEYS,
    output: Output = "text",
) -> None:
    """Every identity, authority and list: days left, due, revoked. Exit 1 when something is to be done; no key is opened."""
    from datetime import UTC, datetime

    from securesplit.errors import CheckFailed
    from securesplit.pki.status import standings

    found = standings(keys, datetime.now(UTC))
    each = [
        {**dict(rows(one.issued)), "kind": one.kind, "name": one.name, "state": one.state, "days_left": one.days_left, "due": one.needs_work, "why": one.why}
        for one in found
    ]  # fmt: skip
    work = [one for one in found if one.needs_work]
    if output == "json":
        values: list[Row] = [("path", str(keys)), *_NOTHING[1:], ("due", len(work))]
        printed(output, "", values, identities=each)
    else:
        for one in found:
            typer.echo(f"{one.state:<8} {one.days_left:>5} d  {one.kind:<9} {one.name:<24} {one.why}".rstrip())
    if work:
        raise CheckFailed(
            "SS-1826",
            f"{len(work)} of {len(found)} need attention",
            hint="Do what the lines say; `securesplit certs renew --all` renews every party that is due.",
        )


def lint(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A PEM file, a party's folder, or the whole key folder.")
    ],
    output: Output = "text",
) -> None:
    """Everything that is wrong with certificates, keys and lists, at once. Exit 1 when there is an error; warnings alone pass."""
    from datetime import UTC, datetime

    from securesplit.errors import CheckFailed
    from securesplit.pki.lint import lint as look

    found = look(path, datetime.now(UTC))
    errors = [one for one in found if one.finding.severity == "error"]
    each = [
        {
            "path": str(one.path),
            "severity": one.finding.severity,
            "rule": one.finding.rule,
            "message": one.finding.message,
        }
        for one in found
    ]
    if output == "json":
        values: list[Row] = [
            ("path", str(path)),
            *_NOTHING[1:],
            ("errors", len(errors)),
            ("warnings", len(found) - len(errors)),
        ]
        printed(output, "", values, findings=each)
    else:
        for one in found:
            typer.echo(f"{one.finding.severity:<8} {one.path}: {one.finding.message} ({one.finding.rule})")
        typer.echo(f"{len(errors)} errors, {len(found) - len(errors)} warnings")
    if errors:
        raise CheckFailed(
            "SS-1826",
            f"{len(errors)} errors in {path}",
            hint="Correct what the lines say; `securesplit certs issue` and `certs renew` make certificates without faults.",
        )


def _renewal(one: Renewal) -> list[Row]:
    return [
        *rows(one.issued),
        ("renewed", one.renewed),
        ("due", instant(one.due.replace(microsecond=0).isoformat())),
        ("new_key", one.new_key),
        ("parcel", None if one.parcel is None else str(one.parcel)),
    ]
