"""The exchange of an authority for another, with a time in which both count.

:func:`begin_rotation` makes the successor and has parties pin both, so that old and new certificates are accepted side by side.
Then everybody is renewed (``securesplit certs renew --all``), and :func:`finish_rotation` lets the old one go. Nobody has to be
stopped in between; a running server takes each change within seconds.

What this does not protect against: the theft of the old authority's key. Whoever has it can speak for everybody until the
exchange is finished and has reached every party; then finish at once, and confirm the new authority's words at every site.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from securesplit.errors import CheckFailed, InputError
from securesplit.pki.authority import Authority
from securesplit.pki.certificate import Issued, serial_text
from securesplit.pki.constraints import constraints_of
from securesplit.pki.files import folder_in_one_step, write_atomically
from securesplit.pki.founding import (
    Founded,
    Plan,
    certificate_pem,
    found,
    promote,
    retired_folders,
    stage,
    trust_of,
    write_root,
)
from securesplit.pki.identity import Identity
from securesplit.pki.keys import KeyType, generate_key, is_encrypted, key_type
from securesplit.pki.passphrase import Passphrase
from securesplit.pki.profile import AUTHORITY_DAYS, Hosts, Scope, Signer, build_cross, build_leaf
from securesplit.pki.publish import spread
from securesplit.pki.renew import certificate_held, newest
from securesplit.pki.revocation import Lists
from securesplit.pki.trust import Trust, issued

__all__ = ["Rotation", "begin_rotation", "finish_rotation"]


@dataclass(frozen=True, slots=True)
class Rotation:
    """What an exchange has come to.

    Attributes:
        issued: the authority that signs parties now.
        old: serial numbers of its predecessors, which count as long as the exchange lasts.
        waiting: identities whose last certificate is still a predecessor's.
        vouched: whether the old root signed for the new one, so that sites may pin it without a telephone call.
        stale: party folders beside the authority whose copies could not be replaced.
    """

    issued: Issued
    old: tuple[str, ...]
    waiting: tuple[str, ...]
    vouched: bool
    stale: tuple[Path, ...]


def begin_rotation(
    authority: Authority,
    *,
    passphrase: Passphrase | None = None,
    days: int = AUTHORITY_DAYS,
    kind: KeyType | None = None,
    root: Signer | None = None,
    keep_root: bool = False,
    root_at: Path | None = None,
    root_secret: bytes | None = None,
    now: datetime | None = None,
) -> Rotation:
    """Make a successor of the same scope and have every party beside the authority pin both.

    Args:
        authority: the old one; open it again afterwards.
        passphrase: of its key, when that is encrypted; the successor's gets the same.
        days: lifetime of the new root.
        kind: of the new keys; the old one's when absent.
        root: the old root above an intermediate; to keep it, or to sign for its successor.
        keep_root: exchange the intermediate only.
        root_at, root_secret: where a new root above an intermediate goes, and the passphrase of its key.
        now: the time of issue.

    Raises:
        InputError: SS-1804 not writable, SS-1805 ``root_at`` is taken, SS-1806 bad lifetime, SS-1811 a list is lost, SS-1820
            exchanged meanwhile, SS-1821 ``root`` is not this authority's or is missing, SS-1823 an exchange is under way.
    """
    now = now or datetime.now(UTC)
    folder = authority.path
    below = authority.certificate not in authority.trust.roots
    _require_root(authority, root, keep_root=keep_root)
    encrypted = is_encrypted((folder / "key.pem").read_bytes())
    secret = passphrase() if encrypted and passphrase is not None else None
    kind = kind or key_type(authority.signer.key) or "p256"
    plan = Plan(_scope(authority), days, kind, secret, below, root_secret or secret)
    with authority.locked() as lists:
        if retired_folders(folder):
            raise InputError(
                "SS-1823",
                "an exchange of the authority is under way",
                hint="Finish it with 'certs rotate-ca --finish'.",
            )
        old_root = root if below else authority.signer
        made = found(plan, now, root=root if keep_root else None, root_list=lists if keep_root else None)
        trust = _together(made, authority.trust)
        every = lists.joined(made.lists(now).lists, trust.authorities)
        cross = None if old_root is None or keep_root else build_cross(made.root.certificate, old_root, now)
        _cross_check(authority, made, trust, lists, cross, old_root, now)
        if below and not keep_root:
            _place_root(folder, made, plan, root_at)
        stage(folder, made, plan, every, trust, cross)
        promote(folder)
        stale = spread(authority.keys, trust, every)
    return Rotation(
        issued=Issued.of(folder / "cert.pem", made.issuing.certificate, f"spiffe://{authority.domain}"),
        old=(serial_text(authority.certificate.serial_number),),
        waiting=tuple(identity.uri for identity, _ in _live(authority, lists, now)),
        vouched=cross is not None or keep_root,
        stale=stale,
    )


def finish_rotation(authority: Authority, *, now: datetime | None = None) -> Rotation:
    """Let the predecessor go: nobody pins it any more, and its key is deleted. Its certificate and last list are kept.

    Raises:
        CheckFailed: SS-1824 naming everybody whose certificate is still the old one's.
        InputError: SS-1804 not writable, SS-1811 a list is lost, SS-1820 exchanged meanwhile, SS-1823 no exchange is under way.
    """
    now = now or datetime.now(UTC)
    folder = authority.path
    with authority.locked() as lists:
        leaving = retired_folders(folder)
        if not leaving:
            raise InputError(
                "SS-1823", "no exchange of the authority is under way", hint="Begin one with 'certs rotate-ca'."
            )
        current = authority.certificate.subject
        waiting = [
            identity.uri
            for identity, leaf in _live(authority, lists, now)
            if (certificate_held(authority.keys / identity.name, identity) or leaf).issuer != current
        ]
        if waiting:
            raise CheckFailed(
                "SS-1824",
                f"{len(waiting)} certificates of the old authority are still in use",
                hint="Renew them with 'securesplit certs renew --all' and carry what it writes to the sites, or revoke whoever left.",
                details=tuple(sorted(waiting)),
            )
        trust = _alone(authority, now)
        known = _ever_pinned(authority, leaving)
        kept = lists.joined((), trust.authorities)
        for place in leaving:
            write_atomically(place / "crl.pem", lists.pem())
        write_atomically(folder / "trust.pem", trust.pem())
        write_atomically(folder / "crl.pem", kept.pem())
        stale = spread(authority.keys, trust, kept, known)
        # Last, because the keys are what marks the exchange as unfinished.
        for place in (*leaving, *(folder / "retired").glob("root-*")):
            (place / "key.pem").unlink(missing_ok=True)
    return Rotation(
        issued=authority.describe(),
        old=tuple(place.name for place in leaving),
        waiting=(),
        vouched=False,
        stale=stale,
    )


def _require_root(authority: Authority, root: Signer | None, *, keep_root: bool) -> None:
    below = authority.certificate not in authority.trust.roots
    if root is not None and (not below or root.certificate not in authority.trust.roots):
        raise InputError("SS-1821", "that root is not this authority's", hint="Name the folder of its root.")
    if keep_root and root is None:
        raise InputError("SS-1821", "without its root, no new intermediate can be signed", hint="Name it with --root.")


def _live(authority: Authority, lists: Lists, now: datetime) -> list[tuple[Identity, x509.Certificate]]:
    return [
        (identity, leaf)
        for identity, leaf in newest(authority).items()
        if now <= leaf.not_valid_after_utc and not authority.is_withdrawn(leaf, lists)
    ]


def _together(made: Founded, old: Trust) -> Trust:
    new = made.trust.authorities
    return Trust.of((*new, *(one for one in old.authorities if one not in new)))


def _alone(authority: Authority, now: datetime) -> Trust:
    """The authority that signs parties now, and its root."""
    above = [one for one in authority.trust.roots if issued(authority.certificate, one)]
    if authority.certificate in authority.trust.roots:
        return Trust.of((authority.certificate,))
    valid = [one for one in above if one.not_valid_after_utc >= now] or above
    return Trust.of((authority.certificate, valid[0]))


def _cross_check(
    authority: Authority,
    made: Founded,
    trust: Trust,
    lists: Lists,
    cross: x509.Certificate | None,
    old_root: Signer | None,
    now: datetime,
) -> None:
    """Before anything is written: old and new certificates have a path under both, new ones under the new alone."""
    probe_key = generate_key().public_key()
    probe = Identity(authority.domain, "client", "probe")
    leaf = build_leaf(made.issuing, probe_key, probe, Hosts(), now=now, days=1)
    at = max(now, *(one.not_valid_before_utc for one in trust.authorities))
    sound = trust.path(leaf, at) is not None and made.trust.path(leaf, at) is not None
    sound = sound and all(trust.path(old, at) is not None for _, old in _live(authority, lists, at))
    if cross is not None:
        assert old_root is not None
        sound = sound and issued(cross, old_root.certificate)
    if not sound:
        raise InputError(
            "SS-1823",
            "the old authority and its successor do not count side by side, so nothing was changed",
            hint="Check that the old one has not expired; if it has, begin anew in another --keys folder.",
        )


def _place_root(folder: Path, made: Founded, plan: Plan, root_at: Path | None) -> None:
    place = root_at or folder / "root"
    if root_at is not None and root_at.exists():
        raise InputError("SS-1805", f"{root_at} exists already", hint="Name a folder that is to be made.")
    if root_at is None and place.exists():
        old = x509.load_pem_x509_certificate((place / "cert.pem").read_bytes())
        (folder / "retired").mkdir(mode=0o700, exist_ok=True)
        place.rename(folder / "retired" / f"root-{serial_text(old.serial_number)}")
    with folder_in_one_step(place) as aside:
        write_root(aside, made, plan)


def _ever_pinned(authority: Authority, leaving: Sequence[Path]) -> tuple[x509.Certificate, ...]:
    known = list(authority.trust.authorities)
    for place in leaving:
        for pem in (trust_of(place), (place / "cert.pem").read_bytes()):
            with suppress(ValueError):
                known += x509.load_pem_x509_certificates(pem)
    return tuple({certificate_pem(one): one for one in known}.values())


def _scope(authority: Authority) -> Scope:
    constraints = constraints_of(authority.certificate)
    trees = (constraints.permitted_subtrees or ()) if constraints is not None else ()
    return Scope(
        authority.domain,
        tuple(tree.value for tree in trees if isinstance(tree, x509.DNSName)),
        tuple(str(tree.value) for tree in trees if isinstance(tree, x509.IPAddress)),
    )
