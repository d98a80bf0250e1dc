"""``securesplit certs request``, ``approve``, ``import`` and ``export-p12``: what crosses between a site and its authority.

The key never does. A request and the answer to it are public; what has to be compared are words, over the telephone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from securesplit.cli import passphrase
from securesplit.cli.certs_show import KEYS, CaPassFd, CaPassFile, Encrypt, Keys, Kind, Name, Output, printed, rows
from securesplit.cli.passphrase import KeyPassFd, KeyPassFile

if TYPE_CHECKING:
    from securesplit.pki.bring import Newcomer
    from securesplit.pki.request import Request

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("request")(request)
    app.command("approve")(approve)
    app.command("import")(import_)
    app.command("export-p12")(export_p12)


def request(
    name: Name,
    *,
    role: Annotated[Literal["client", "server"], typer.Option(help="What the certificate shall be good for.")],
    keys: Keys = KEYS,
    domain: Annotated[str, typer.Option(help="The authority's trust domain.")] = "securesplit.local",
    dns: Annotated[list[str] | None, typer.Option(help="Host name of a server; repeatable.")] = None,
    ip: Annotated[list[str] | None, typer.Option(help="Address of a server; repeatable.")] = None,
    key_type: Kind = "p256",
    encrypt_key: Encrypt = False,
    key_pass_file: KeyPassFile = None,
    key_pass_fd: KeyPassFd = None,
    output: Output = "text",
) -> None:
    """On the site: make a key, which stays here, and a request to carry to the authority. Read the words out to its operator."""
    from securesplit.pki.grant import NEXT_KEY
    from securesplit.pki.identity import Identity
    from securesplit.pki.profile import host_names
    from securesplit.pki.request import make_request

    identity = Identity(domain=domain, role=role, name=name)
    hosts = host_names(role, dns or (), ip or ())
    folder = keys / name
    waits = (folder / NEXT_KEY).exists()
    made = make_request(
        folder,
        identity,
        hosts,
        kind=key_type,
        new_passphrase=None
        if waits
        else passphrase.new(f"the key of {name}", key_pass_file, key_pass_fd, asked_for=encrypt_key),
        passphrase=passphrase.existing(f"the key of {name}", key_pass_file, key_pass_fd),
    )
    printed(
        output, f"carry this to the authority, and read the words out to its operator\n  {made.words}", _asked(made)
    )


def approve(
    file: Annotated[Path, typer.Argument(metavar="REQUEST", help="A request that a site made.")],
    *,
    keys: Keys = KEYS,
    words: Annotated[
        str | None, typer.Option(help="The words that the site's operator reads out; asked at a terminal when absent.")
    ] = None,
    days: Annotated[int | None, typer.Option(help="Lifetime; 30 for clients, 90 for servers when absent.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="The party has a certificate for another key; give it one for this.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the answer goes; NAME.signed.pem beside the request when absent.")
    ] = None,
    ca_pass_file: CaPassFile = None,
    ca_pass_fd: CaPassFd = None,
    output: Output = "text",
) -> None:
    """At the authority: sign what a request names, once its words are confirmed. Carry the answer back; nothing in it is secret."""
    from securesplit.pki.authority import Authority
    from securesplit.pki.certificate import Issued
    from securesplit.pki.files import write_atomically
    from securesplit.pki.request import approve as sign
    from securesplit.pki.request import authority_words, read_request

    asked = read_request(file)
    authority = Authority.open(keys, passphrase=passphrase.existing("the authority's key", ca_pass_file, ca_pass_fd))
    grant = sign(authority, asked, words if words is not None else _compared, days=days, again=again)
    place = out or file.with_name(f"{asked.identity.name}.signed.pem")
    write_atomically(place, grant.parcel())
    values = [
        *rows(Issued.of(place, grant.leaf, asked.identity.uri)),
        ("words", asked.words),
        ("authority_words", authority_words(grant.path[-1])),
    ]
    printed(output, f"signed {asked.identity.name}; carry the answer back, and read out the authority's words", values)


def import_(
    name: Name,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="The answer; or an outside authority's certificates and lists, in any order."
        ),
    ],
    *,
    keys: Keys = KEYS,
    authority: Annotated[
        str | None, typer.Option(help="The authority's words, or its root's SHA-256, as its operator reads them out.")
    ] = None,
    key_pass_file: KeyPassFile = None,
    key_pass_fd: KeyPassFd = None,
    output: Output = "text",
) -> None:
    """On the site: take in the certificate for this site's own key, from our authority or an outside one. Checked before a file changes."""
    from datetime import UTC, datetime

    from securesplit.pki.bring import bring_in, confirmed_by
    from securesplit.pki.grant import read_parcel
    from securesplit.pki.identity import require_name

    require_name(name)
    brought = bring_in(
        keys / name,
        read_parcel(files),
        _pinned if authority is None else confirmed_by(authority),
        datetime.now(UTC),
        passphrase=passphrase.existing(f"the key of {name}", key_pass_file, key_pass_fd),
    )
    values = [
        *rows(brought.issued),
        ("authority_words", brought.words),
        ("new_key", brought.new_key),
        ("pinned", list(brought.pinned)),
    ]
    printed(output, f"imported {name}", values)


def export_p12(
    name: Name,
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write; it must not exist.")],
    *,
    keys: Keys = KEYS,
    pass_file: Annotated[
        Path | None, typer.Option("--pass-file", help="File, mode 0600, with the new file's passphrase.")
    ] = None,
    pass_fd: Annotated[
        int | None, typer.Option("--pass-fd", help="Descriptor to read the new file's passphrase from.")
    ] = None,
    key_pass_file: KeyPassFile = None,
    key_pass_fd: KeyPassFd = None,
    output: Output = "text",
) -> None:
    """Write a party's key and certificates into one PKCS #12 file under a passphrase. The only command that lets a key leave its folder."""
    from securesplit.pki.export import export_p12 as export
    from securesplit.pki.identity import require_name

    require_name(name)
    secret = passphrase.new(str(out), pass_file, pass_fd, asked_for=True)
    assert secret is not None
    issued = export(
        keys / name, out, secret, passphrase=passphrase.existing(f"the key of {name}", key_pass_file, key_pass_fd)
    )
    printed(output, f"exported {name}", rows(issued))


def _asked(made: Request) -> list[tuple[str, str | int | bool | list[str] | None]]:
    hosts = [*made.hosts.dns, *map(str, made.hosts.ips)]
    return [
        ("path", str(made.path)),
        ("serial", None),
        ("not_after", None),
        ("uri_san", made.identity.uri),
        ("fingerprint", None),
        ("words", made.words),
        ("hosts", hosts),
    ]


def _compared(made: Request) -> bool:
    if not sys.stdin.isatty():
        return False
    typer.echo(
        f"{made.identity.uri}\n  hosts {', '.join([*made.hosts.dns, *map(str, made.hosts.ips)]) or 'none'}", err=True
    )
    typer.echo(f"  words {made.words}", err=True)
    return typer.confirm("Did the site's operator read out the same words?", default=False, err=True)


def _pinned(newcomer: Newcomer) -> bool:
    if not sys.stdin.isatty():
        return False
    typer.echo(f"An authority that is not pinned here yet:\n  words {newcomer.words}", err=True)
    typer.echo(f"  fingerprint {newcomer.fingerprint}", err=True)
    return typer.confirm("Did its operator read out the same words?", default=False, err=True)
