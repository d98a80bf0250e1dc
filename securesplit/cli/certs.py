"""``securesplit certs``: make an authority, issue and revoke certificates, look at one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from securesplit.cli import certs_care, certs_site, passphrase
from securesplit.cli.certs_show import (
    KEYS,
    CaPassFd,
    CaPassFile,
    Encrypt,
    Keys,
    Kind,
    Name,
    Output,
    RootFolder,
    RootPassFd,
    RootPassFile,
    list_rows,
    printed,
    rows,
)
from securesplit.cli.passphrase import KeyPassFd, KeyPassFile

__all__ = ["app"]

app = typer.Typer(help="Certificates: who may take part.", no_args_is_help=True, add_completion=False)

_AUTHORITY = "the authority's key"


@app.command("init-ca")
def init_ca(
    keys: Keys = KEYS,
    *,
    domain: Annotated[str, typer.Option(help="Trust domain; it is part of every identity.")] = "securesplit.local",
    days: Annotated[int, typer.Option(help="Lifetime of the authority.")] = 3650,
    key_type: Kind = "p256",
    intermediate: Annotated[
        bool,
        typer.Option("--intermediate", help="A root that signs an intermediate; the root can then be kept offline."),
    ] = False,
    permit_dns: Annotated[
        list[str] | None, typer.Option(help="Servers may only have hosts under this DNS suffix; repeatable.")
    ] = None,
    permit_ip: Annotated[
        list[str] | None, typer.Option(help="Servers may only have addresses in this range; repeatable.")
    ] = None,
    root: RootFolder = None,
    encrypt_key: Encrypt = False,
    ca_pass_file: CaPassFile = None,
    ca_pass_fd: CaPassFd = None,
    root_pass_file: RootPassFile = None,
    root_pass_fd: RootPassFd = None,
    output: Output = "text",
) -> None:
    """Make a certificate authority and its first, empty revocation list. Never overwrites one.

    It may speak for its trust domain only. With --intermediate, --root is where the root's key goes, for example a medium that
    is taken out afterwards; keys/ca/root when absent.
    """
    from securesplit.pki.authority import Authority
    from securesplit.pki.founding import Plan
    from securesplit.pki.profile import Scope
    from securesplit.pki.request import authority_words

    if not intermediate and (root is not None or root_pass_file is not None or root_pass_fd is not None):
        raise typer.BadParameter("--root and its passphrase go with --intermediate")
    plan = Plan(
        Scope(domain, tuple(permit_dns or ()), tuple(permit_ip or ())),
        days,
        key_type,
        passphrase.new(_AUTHORITY, ca_pass_file, ca_pass_fd, asked_for=encrypt_key),
        intermediate,
        passphrase.new("the root's key", root_pass_file, root_pass_fd),
    )
    authority = Authority.create(keys, plan=plan, root_at=root)
    place = str(root or keys / "ca" / "root") if intermediate else None
    values = [
        *rows(authority.describe()),
        ("words", authority_words(authority.trust.roots[0])),
        ("encrypted", plan.passphrase is not None),
        ("root", place),
    ]
    printed(output, "made the certificate authority", values)


@app.command("issue")
def issue(
    name: Name,
    *,
    role: Annotated[
        Literal["client", "server"], typer.Option(help="What the certificate is good for; one of the two.")
    ],
    keys: Keys = KEYS,
    dns: Annotated[list[str] | None, typer.Option(help="Host name of a server; repeatable.")] = None,
    ip: Annotated[list[str] | None, typer.Option(help="Address of a server; repeatable.")] = None,
    days: Annotated[int | None, typer.Option(help="Lifetime; 30 for clients, 90 for servers when absent.")] = None,
    key_type: Kind = "p256",
    encrypt_key: Encrypt = False,
    key_pass_file: KeyPassFile = None,
    key_pass_fd: KeyPassFd = None,
    ca_pass_file: CaPassFile = None,
    ca_pass_fd: CaPassFd = None,
    output: Output = "text",
) -> None:
    """Make a key and a certificate for one party here; its folder is all that the party needs.

    Where the key must never leave the party's machine, use request there and approve here.
    """
    from securesplit.pki.authority import Authority

    authority = Authority.open(keys, passphrase=passphrase.existing(_AUTHORITY, ca_pass_file, ca_pass_fd))
    secret = passphrase.new(f"the key of {name}", key_pass_file, key_pass_fd, asked_for=encrypt_key)
    issued = authority.issue(name, role, dns=dns or (), ips=ip or (), days=days, key_type=key_type, passphrase=secret)
    printed(output, f"issued {name}", rows(issued))


@app.command("revoke")
def revoke(
    name: Name,
    keys: Keys = KEYS,
    ca_pass_file: CaPassFile = None,
    ca_pass_fd: CaPassFd = None,
    output: Output = "text",
) -> None:
    """Withdraw every certificate of a party. Running servers beside the authority notice within seconds."""
    from securesplit.pki.authority import Authority

    authority = Authority.open(keys, passphrase=passphrase.existing(_AUTHORITY, ca_pass_file, ca_pass_fd))
    printed(output, f"revoked {name}", list_rows(authority.revoke(name)))


@app.command("crl")
def crl(
    keys: Keys = KEYS,
    *,
    root: RootFolder = None,
    ca_pass_file: CaPassFile = None,
    ca_pass_fd: CaPassFd = None,
    root_pass_file: RootPassFile = None,
    root_pass_fd: RootPassFd = None,
    output: Output = "text",
) -> None:
    """Publish the revocation list anew, good for another 7 days. Run it daily.

    With --root, the list of the root above an intermediate, too; that one is good for a year.
    """
    from securesplit.pki.authority import Authority
    from securesplit.pki.founding import open_signer

    authority = Authority.open(keys, passphrase=passphrase.existing(_AUTHORITY, ca_pass_file, ca_pass_fd))
    above = None
    if root is not None:
        above = open_signer(root, passphrase.existing("the root's key", root_pass_file, root_pass_fd))
    printed(output, "published the revocation list", list_rows(authority.write_crl(root=above)))


@app.command("inspect")
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A certificate, or a folder with a cert.pem.")],
    output: Output = "text",
) -> None:
    """Show what a certificate says. Nothing is verified."""
    from securesplit.pki.certificate import read_issued
    from securesplit.pki.said import said_by

    said = said_by(path)
    values = [
        *rows(read_issued(path)),
        ("key_type", said.key_type),
        ("not_before", said.not_before),
        ("renew_from", said.renew_from),
        ("issuer", said.issuer),
        ("hosts", list(said.hosts)),
        ("purposes", list(said.purposes)),
        ("words", said.words),
    ]
    printed(output, "this certificate says (nothing is verified)", values)


certs_site.register(app)
certs_care.register(app)
