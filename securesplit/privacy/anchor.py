"""Anchors: what a site remembers of its ledger outside of the ledger's own folder.

After every commit, and before anything is sent, the ledger's last sequence number and hash are written to one small file
per ledger, by default under ``~/.local/state/securesplit/anchors``, together with where the ledger lies: the inode of its
file and of the folder above, and the client's key (as a hash). Two kinds of pointer, by place and by the client's key, lead
from what a deleted ledger leaves behind to the anchor it had.

Found: a ledger that was deleted, truncated, put back from an older copy, continued on two copies, or copied to another
place, disk or machine; a client's key that turns up with a fresh ledger. A ledger ahead of its anchor but containing it is
whole: a crash fell between commit and anchor, or another process is about to write it.

Not found: somebody who rolls back or deletes the anchors too, or copies the whole machine (its image with both); nothing on
a machine can know that. That is what the sealed remote anchor is for (securesplit/privacy/sealed.py). Anchors are not
secret and not signed: who can write them can be refused, or can hide a rollback, but learns nothing.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from securesplit.errors import PolicyDenied
from securesplit.privacy.chain import Link
from securesplit.privacy.inode import Inode

_HEX = r"^[0-9a-f]{64}$"


class Anchor(BaseModel):
    """One ledger's anchor, as its file holds it.

    Attributes:
        ledger: the ledger's id.
        seq, head: the last entry that was committed.
        place: the ledger's folder, for people.
        file, parent: ``ledger.sqlite`` and the folder above its folder.
        owner: hash of the client's key, empty where there is none; see :func:`owner_tag`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    ledger: str = Field(pattern=r"^[0-9a-f]{32}$")
    seq: int = Field(ge=0)
    head: str = Field(pattern=_HEX)
    place: str
    file: Inode
    parent: Inode
    owner: str = Field(pattern=r"^([0-9a-f]{64})?$")


@dataclass(frozen=True, slots=True)
class Footing:
    """Where a ledger lies and whose it is.

    Attributes:
        place: its folder, absolute, without symbolic links.
        owner: see :func:`owner_tag`.
    """

    place: Path
    owner: str

    def file(self) -> Inode:
        """The inode of ``ledger.sqlite`` now. Raises FileNotFoundError when it is gone."""
        return Inode.of(self.place / "ledger.sqlite")

    def parent(self) -> Inode:
        """The inode of the folder above."""
        return Inode.of(self.place.parent)


class Anchors:
    """The folder of anchors of one user of this machine.

    Callers hold the ledger's lock around what reads and then writes; the folder itself needs none, because every file in
    it is replaced whole.

    Raises:
        OSError: as from all methods here; the ledger maps it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def read(self, ledger: str) -> Anchor | None:
        """A ledger's anchor; None where there is none or it cannot be understood, which is no better."""
        try:
            anchor = Anchor.model_validate_json((self._folder / f"{ledger}.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        return anchor if anchor.ledger == ledger else None

    def write(self, ledger: str, link: Link, footing: Footing) -> None:
        """Advance a ledger's anchor; on return it is on disk."""
        anchor = Anchor(
            ledger=ledger, seq=link.seq, head=link.hash, place=str(footing.place), file=footing.file(),
            parent=footing.parent(), owner=footing.owner,
        )  # fmt: skip
        self._replace(f"{ledger}.json", anchor.model_dump_json().encode())
        # A crash before the pointers leaves a ledger of which nothing was sent yet; the next opening writes them.
        for pointer in _pointers(footing):
            if self._target(pointer) != ledger:
                self._replace(pointer, ledger.encode())

    def require_free(self, footing: Footing, *, but: str = "") -> None:
        """Refuse a new ledger where there must be an old one.

        A folder that was deleted and made again, with another client's key in it, is a new site. A key that has had a
        ledger is the same site wherever it lies, and so is the same folder whatever key lies in it now.

        Args:
            footing: of the ledger that is about to begin.
            but: the id of a ledger that may have been here.

        Raises:
            PolicyDenied: SS-2020.
        """
        for pointer in _pointers(footing):
            ledger = self._target(pointer)
            if ledger is None or ledger == but:
                continue
            known = self.read(ledger)
            if known is None or pointer.startswith("owner-") or _same_folder(known, footing):
                raise deleted(footing.place if known is None else Path(known.place))

    def _target(self, pointer: str) -> str | None:
        try:
            return (self._folder / pointer).read_text("ascii")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            return ""

    def _replace(self, name: str, data: bytes) -> None:
        descriptor, draft = tempfile.mkstemp(dir=self._folder, prefix=".draft-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(draft).replace(self._folder / name)
        except BaseException:
            with suppress(OSError):
                Path(draft).unlink()
            raise
        sync_folder(self._folder)


def _same_folder(known: Anchor, footing: Footing) -> bool:
    here = footing.parent()
    if not here.born and known.owner != footing.owner:
        return False  # Without a time of birth, a folder made again can have the old one's number.
    return known.place == str(footing.place) and known.parent.same(here)


def require_footing(anchor: Anchor, footing: Footing) -> None:
    """Refuse a ledger that does not lie where its anchor says.

    Raises:
        PolicyDenied: SS-2020 when its file is gone, SS-2022 when it is another file or lies in another folder.
    """
    try:
        here = anchor.file.same(footing.file()) and anchor.parent.same(footing.parent())
    except FileNotFoundError:
        raise deleted(footing.place) from None
    if not here:
        raise copied(footing.place)


def default_anchors() -> Path:
    """``~/.local/state/securesplit/anchors``. Raises RuntimeError for a user without a home."""
    return Path.home() / ".local" / "state" / "securesplit" / "anchors"


def owner_tag(key: bytes | None) -> str:
    """A client's key in one line that does not give it away: SHA-256 of its file; empty for none.

    The file's bytes count, so the same key written anew, such as under a passphrase, counts as another.
    """
    return "" if key is None else hashlib.sha256(b"securesplit ledger owner v1\0" + key).hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def deleted(place: Path) -> PolicyDenied:
    """The refusal of a site whose ledger is gone."""
    return PolicyDenied(
        "SS-2020",
        f"the ledger in {place} is gone, and what its records have spent is unknown, so nothing may be sent",
        hint="Put the newest copy of that folder back and run `securesplit privacy adopt`. Without one these records stay unused; new data needs a new key folder (`securesplit certs issue`).",
    )


def copied(place: Path) -> PolicyDenied:
    """The refusal of a ledger that this machine does not know at this place."""
    return PolicyDenied(
        "SS-2022",
        f"the ledger in {place} is a copy, or was moved to another folder, disk or machine, so nothing may be sent",
        hint="Use the original. If this is the only one left and it is the newest, take it over with `securesplit privacy adopt`; that stays visible in it.",
    )


def rolled_back(place: Path) -> PolicyDenied:
    """The refusal of a ledger that has forgotten something."""
    return PolicyDenied(
        "SS-2021",
        f"the ledger in {place} is older than what was already sent, or another copy of it was used, so nothing may be sent",
        hint="Put the newest copy back. Without it these records stay unused: what they have spent since is unknown.",
    )


def _pointers(footing: Footing) -> tuple[str, ...]:
    place = f"place-{hashlib.sha256(os.fsencode(footing.place)).hexdigest()}"
    return (place, f"owner-{footing.owner}") if footing.owner else (place,)
