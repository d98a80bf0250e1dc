"""A whole site from one file: its authority and every party that it shall have.

Minting is idempotent. What exists is left alone, byte for byte, also when it differs from the file, is revoked or has expired:
that is told, and somebody decides. So a party is added by a line, and nobody else notices.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from pydantic import AfterValidator, Field, ValidationError

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.authority import Authority
from securesplit.pki.founding import Plan
from securesplit.pki.identity import (
    AUTHORITY_NAME,
    DEFAULT_DOMAIN,
    Identity,
    Role,
    identity_of,
    require_domain,
    require_name,
)
from securesplit.pki.keys import KeyType
from securesplit.pki.passphrase import Passphrase
from securesplit.pki.profile import AUTHORITY_DAYS, MAX_LEAF_DAYS, Scope, host_names
from securesplit.pki.renew import hosts_of, newest
from securesplit.policy.table import Table, at

__all__ = ["Provided", "Roster", "load_roster", "parse_roster", "provision"]

_MOST_BYTES = 1 << 20


def _name(text: str) -> str:
    try:
        require_name(text)
    except InputError as error:
        raise ValueError(error.what) from None
    return text


def _domain(text: str) -> str:
    try:
        require_domain(text)
    except InputError as error:
        raise ValueError(error.what) from None
    return text


PartyName = Annotated[str, AfterValidator(_name)]


class ClientRow(Table):
    """``[[client]]``."""

    name: PartyName
    key_type: KeyType = "p256"
    days: Annotated[int, Field(ge=1, le=MAX_LEAF_DAYS)] | None = None


class ServerRow(ClientRow):
    """``[[server]]``; without hosts it is reached on this machine only."""

    dns: list[str] = Field(default_factory=list)
    ips: list[str] = Field(default_factory=list)

    @staticmethod
    def rules(table: object) -> Iterator[str]:
        """Hosts must be host names, addresses addresses."""
        dns, ips = at(table, "dns") or [], at(table, "ips") or []
        if isinstance(dns, list) and isinstance(ips, list) and all(isinstance(text, str) for text in (*dns, *ips)):
            try:
                host_names("server", dns, ips)
            except InputError as error:
                yield error.what


class AuthorityRow(Table):
    """``[authority]``: what kind of authority to make; without effect once there is one."""

    days: Annotated[int, Field(ge=1, le=36500)] = AUTHORITY_DAYS
    key_type: KeyType = "p256"
    intermediate: bool = False
    permit_dns: list[str] = Field(default_factory=list)
    permit_ips: list[str] = Field(default_factory=list)


class Roster(Table):
    """The whole file."""

    domain: Annotated[str, AfterValidator(_domain)] = DEFAULT_DOMAIN
    authority: AuthorityRow = AuthorityRow()
    server: list[ServerRow] = Field(default_factory=list)
    client: list[ClientRow] = Field(default_factory=list)

    @staticmethod
    def rules(table: object) -> Iterator[str]:
        """A name is one party's: its folder is."""
        rows = [row for kind in ("server", "client") for row in _rows(at(table, kind))]
        names = [name for row in rows if isinstance(name := at(row, "name"), str)]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"{name[:80]!r} is named {names.count(name)} times"


def _rows(found: object) -> list[object]:
    return found if isinstance(found, list) else []


def parse_roster(text: str, *, source: str = "roster") -> Roster:
    """Build a roster from TOML text.

    Raises:
        InputError: SS-1825 when it is not TOML, or with one detail per fault.
    """
    hint = "scripts/provision --help shows a whole roster."
    try:
        return Roster.model_validate(tomllib.loads(text))
    except ValidationError as error:
        details = tuple(
            f"{'.'.join(map(str, fault['loc'])) or 'roster'}: "
            + ("unknown key" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, "))
            for fault in error.errors(include_url=False, include_input=False)
        )
        raise InputError("SS-1825", f"{source} has {len(details)} fault(s)", hint=hint, details=details) from None
    except (ValueError, RecursionError) as error:
        raise InputError("SS-1825", f"{source} is not valid TOML ({type(error).__name__})", hint=hint) from None


def load_roster(path: Path) -> Roster:
    """Read a roster. Raises InputError SS-1825 as :func:`parse_roster`, and when the file cannot be read."""
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "SS-1825", f"the roster {path} cannot be read ({type(error).__name__})", hint="Name a TOML file."
        ) from None
    return parse_roster(text, source=str(path))


@dataclass(frozen=True, slots=True)
class Provided:
    """What became of one line of the roster.

    Attributes:
        uri: the identity.
        done: ``issued`` now, ``kept`` as it was, or kept although it ``differs``.
        why: what is to be noticed about one that was kept.
    """

    uri: str
    done: Literal["issued", "kept", "differs"]
    why: str = ""


def provision(
    keys: Path,
    roster: Roster,
    *,
    secret: bytes | None = None,
    passphrase: Passphrase | None = None,
    now: datetime | None = None,
) -> tuple[Provided, ...]:
    """Make the authority and the parties that are missing.

    Args:
        keys: the folder for ``ca/`` and one folder per party.
        roster: what shall be there.
        secret: encrypts the key of an authority that is made now.
        passphrase: asked when the key of one that exists is encrypted.
        now: the time of issue.

    Raises:
        InputError: SS-1813 a name belongs to another role, SS-1825 the authority is of another domain, or as
            :meth:`securesplit.pki.authority.Authority.create` and ``issue``.
        ConnectionFailed: as :meth:`securesplit.pki.authority.Authority.open`.
    """
    now = now or datetime.now(UTC)
    if (keys / AUTHORITY_NAME).exists():
        authority = Authority.open(keys, passphrase=passphrase)
    else:
        kind = roster.authority
        scope = Scope(roster.domain, tuple(kind.permit_dns), tuple(kind.permit_ips))
        plan = Plan(scope, kind.days, kind.key_type, secret, kind.intermediate)
        authority = Authority.create(keys, plan=plan, now=now)
    if authority.domain != roster.domain:
        raise InputError(
            "SS-1825",
            f"the roster is for the trust domain {roster.domain}, and the authority in {keys} is {authority.domain}'s",
            hint="Name another --keys folder, or correct the roster's domain.",
        )
    known = newest(authority)
    rows: list[tuple[Role, ClientRow]] = [("server", row) for row in roster.server]
    rows += [("client", row) for row in roster.client]
    for role, row in rows:
        _require_role(authority, known, role, row.name)
    return tuple(_provide(authority, known, role, row, now) for role, row in rows)


def _provide(
    authority: Authority, known: dict[Identity, x509.Certificate], role: Role, row: ClientRow, now: datetime
) -> Provided:
    identity = Identity(domain=authority.domain, role=role, name=row.name)
    dns, ips = (row.dns, row.ips) if isinstance(row, ServerRow) else ([], [])
    present = known.get(identity)
    folder = authority.keys / row.name
    # A folder without a certificate was being made when the process was killed; no folder at all was handed over.
    if present is None or (folder.exists() and not (folder / "cert.pem").exists()):
        authority.issue(row.name, role, dns=dns, ips=ips, days=row.days, key_type=row.key_type, now=now)
        return Provided(identity.uri, "issued")
    if hosts_of(present) != host_names(role, dns, ips):
        why = f"its hosts are others; revoke it, delete {row.name}/cert.pem and run this again"
        return Provided(identity.uri, "differs", why)
    with authority.locked() as lists:
        if authority.is_withdrawn(present, lists):
            # Whoever was shut out must not come back because somebody added a colleague.
            return Provided(identity.uri, "kept", "revoked")
    if now > present.not_valid_after_utc:
        return Provided(identity.uri, "kept", f"expired; securesplit certs renew {row.name} --force")
    return Provided(identity.uri, "kept")


def _require_role(authority: Authority, known: dict[Identity, x509.Certificate], role: Role, name: str) -> None:
    taken = {identity.role for identity in known if identity.name == name} - {role}
    file = authority.keys / name / "cert.pem"
    if file.exists():
        try:
            there = identity_of(
                x509.load_pem_x509_certificate(file.read_bytes()).public_bytes(serialization.Encoding.DER)
            )
        except (ValueError, ConnectionFailed):
            there = None
        if there is None or there != Identity(domain=authority.domain, role=role, name=name):
            raise InputError(
                "SS-1813", f"{file} is not {name}'s, a {role} of {authority.domain}", hint="Choose another name."
            )
    if taken:
        raise InputError("SS-1813", f"{name} is a {taken.pop()} here, not a {role}", hint="Choose another name.")
