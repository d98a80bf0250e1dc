"""How every identity stands: days left, due or not, revoked or not; the authority and its lists among them.

Read from files alone; no key is opened, so that a monitor needs no passphrase.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.certificate import Issued, fingerprint
from securesplit.pki.founding import retired_folders, trust_of
from securesplit.pki.grant import NEXT_KEY
from securesplit.pki.identity import AUTHORITY_NAME, Identity, identity_of
from securesplit.pki.publish import with_retired
from securesplit.pki.renew import due_at
from securesplit.pki.revocation import Lists, is_revoked
from securesplit.pki.store import leaf_of
from securesplit.pki.trust import Trust, domain_of

__all__ = ["Standing", "standings"]

Kind = Literal["client", "server", "authority", "list"]
State = Literal["good", "due", "expired", "revoked", "waiting"]


@dataclass(frozen=True, slots=True)
class Standing:
    """One identity's certificate, an authority's, or a revocation list.

    Attributes:
        kind, name: whose.
        issued: the certificate; of a list, its path and end, and its authority's identity.
        state: ``due`` past two thirds of its life or when its authority was exchanged; ``waiting`` for a request's answer.
        days_left: whole days until it ends; negative after it.
        why: what to do, when something is to be done.
    """

    kind: Kind
    name: str
    issued: Issued
    state: State
    days_left: int
    why: str = ""

    @property
    def needs_work(self) -> bool:
        """Whether somebody has to do something. Who is revoked stays revoked; that needs nothing."""
        return self.state in {"due", "expired"}


def standings(keys: Path, now: datetime) -> tuple[Standing, ...]:
    """Everything in a key folder, authorities first, then parties by name.

    Args:
        keys: the folder above ``ca/`` and the parties, or one party's own folder.
        now: the time of the look.

    Raises:
        InputError: SS-1812 when there is neither an authority nor a party.
    """
    alone = (keys / "cert.pem").exists()
    folders = [keys] if alone else sorted(e for e in keys.iterdir() if e.is_dir()) if keys.is_dir() else []
    authority = None if alone else keys / AUTHORITY_NAME
    rows: list[Standing] = []
    parties: dict[Identity, tuple[Path, x509.Certificate]] = {}
    held: list[x509.Certificate] = []
    lists: Lists | None = None
    current: x509.Certificate | None = None
    if authority is not None and (authority / "cert.pem").exists():
        current = x509.load_pem_x509_certificate((authority / "cert.pem").read_bytes())
        lists = _lists(authority / "crl.pem")
        rows += _authority_rows(authority, lists, now)
        for path in sorted((authority / "issued").glob("*.pem"), key=lambda p: (p.stat().st_mtime_ns, p)):
            _keep(parties, path, x509.load_pem_x509_certificate(path.read_bytes()))
        lists = None if lists is None else with_retired(authority, lists)
    for folder in folders:
        if folder.name == AUTHORITY_NAME or not (folder / "cert.pem").exists():
            if (folder / NEXT_KEY).exists():
                rows.append(_waiting(folder, now))
            continue
        with suppress(ConnectionFailed, ValueError):
            leaf = x509.load_der_x509_certificate(leaf_of(folder))
            held.append(leaf)
            _keep(parties, folder / "cert.pem", leaf)
            lists = lists or _lists(folder / "crl.pem")
    rows += [
        _party_row(identity, path, leaf, lists, current, now, stale=_is_stale(identity, leaf, held))
        for identity, (path, leaf) in sorted(parties.items(), key=lambda one: (one[0].name, one[0].role))
    ]
    if not rows:
        raise InputError("SS-1812", f"{keys} holds no certificate", hint="Name a key folder.")
    return tuple(rows)


def _keep(parties: dict[Identity, tuple[Path, x509.Certificate]], path: Path, leaf: x509.Certificate) -> None:
    identity = identity_of(leaf.public_bytes(serialization.Encoding.DER))
    known = parties.get(identity)
    # Of two that begin in the same second the record's order decides, and a folder's copy only where there is no record.
    later = known is not None and known[1].not_valid_before_utc < leaf.not_valid_before_utc
    tied = known is not None and known[1].not_valid_before_utc == leaf.not_valid_before_utc
    if known is None or later or (tied and path.parent.name == "issued"):
        parties[identity] = path, leaf


def _party_row(
    identity: Identity,
    path: Path,
    leaf: x509.Certificate,
    lists: Lists | None,
    current: x509.Certificate | None,
    now: datetime,
    *,
    stale: bool,
) -> Standing:
    state: State = "good"
    why = ""
    if lists is not None and is_revoked(leaf, lists):
        state = "revoked"
    elif now > leaf.not_valid_after_utc:
        state, why = "expired", f"renew it (certs renew {identity.name} --force), or revoke it if it has left"
    elif now >= due_at(leaf):
        state, why = "due", f"renew it: certs renew {identity.name}"
    elif current is not None and leaf.issuer != current.subject:
        state, why = "due", f"its authority was exchanged: certs renew {identity.name}"
    elif stale:
        state, why = "due", f"its folder here holds an older one: certs renew {identity.name}"
    return Standing(identity.role, identity.name, Issued.of(path, leaf, identity.uri), state, _days(leaf, now), why)


def _is_stale(identity: Identity, newest: x509.Certificate, held: list[x509.Certificate]) -> bool:
    own = [one for one in held if identity_of(one.public_bytes(serialization.Encoding.DER)) == identity]
    return bool(own) and newest not in own


def _authority_rows(folder: Path, lists: Lists | None, now: datetime) -> list[Standing]:
    rows = []
    retired = {fingerprint(_certificate(place)) for place in retired_folders(folder)}
    for one in Trust.parse(trust_of(folder)).authorities:
        issued = Issued.of(folder / "cert.pem", one, f"spiffe://{domain_of(one) or ''}")
        state: State = "good"
        why = ""
        if now > one.not_valid_after_utc:
            state, why = "expired", "make a new authority; nobody can be admitted by this one"
        elif fingerprint(one) in retired:
            state, why = "due", "renew every party, then finish the exchange: certs rotate-ca --finish"
        elif now >= due_at(one):
            state, why = "due", "exchange it: certs rotate-ca"
        name = one.subject.rfc4514_string().removeprefix("CN=")
        rows.append(Standing("authority", name, issued, state, _days(one, now), why))
        rows.append(_list_row(folder, lists, one, issued, name, now))
    return rows


def _list_row(
    folder: Path, lists: Lists | None, authority: x509.Certificate, issued: Issued, name: str, now: datetime
) -> Standing:
    found = None if lists is None else lists.of(authority)
    if found is None or found.next_update_utc is None:
        gone = Issued(folder / "crl.pem", "", now, issued.uri_san, "")
        return Standing(
            "list", name, gone, "expired", 0, "the list is missing: restore crl.pem from a backup or a party"
        )
    ends = found.next_update_utc
    own = Issued(folder / "crl.pem", "", ends, issued.uri_san, "")
    days = int((ends - now).total_seconds() // 86400)
    if now >= ends:
        return Standing("list", name, own, "expired", days, "publish it anew, nobody is admitted: certs crl")
    if now >= found.last_update_utc + (ends - found.last_update_utc) * 2 / 3:
        return Standing("list", name, own, "due", days, "publish it anew: certs crl (of a root above: with --root)")
    return Standing("list", name, own, "good", days)


def _waiting(folder: Path, now: datetime) -> Standing:
    nothing = Issued(folder / NEXT_KEY, "", now, "", "")
    return Standing("client", folder.name, nothing, "waiting", 0, "import the answer to its request: certs import")


def _lists(path: Path) -> Lists | None:
    with suppress(OSError, ConnectionFailed):
        return Lists.parse(path.read_bytes())
    return None


def _certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())


def _days(certificate: x509.Certificate, now: datetime) -> int:
    return int((certificate.not_valid_after_utc - now).total_seconds() // 86400)
