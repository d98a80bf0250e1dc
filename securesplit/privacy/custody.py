"""The ledger's file in custody: opened only when it is whole and the right one, written only under lock and anchor.

Order of a write: the ledger's lock (flock on its folder, so that anchors of several processes only advance) -> transaction
-> compare with the anchor -> append -> commit, fsync -> anchor, fsync -> unlock. Only then may anything leave.

Order of an opening: lock -> is a ledger missing that must be here? -> site key -> identity -> chain -> payloads complete ->
client key -> anchor -> the anchor catches up.

What this does not do: withstand who edits the file through another program while a process has it open, and puts it back
in order before the next opening; wait for a bounded time, when another process holds the lock and is stopped.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from securesplit.errors import CheckFailed, InputError, PolicyDenied
from securesplit.privacy.anchor import (
    Anchors,
    Footing,
    copied,
    default_anchors,
    owner_tag,
    require_footing,
    rolled_back,
    sync_folder,
)
from securesplit.privacy.chain import SCHEMA, Chain, Link, broken, genesis
from securesplit.privacy.memo import Memo
from securesplit.privacy.sitekey import derive, site_key

# What SQLite says of a file's content; whatever else it says is said of the disk.
_CONTENT = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR", "SQLITE_CONSTRAINT", "SQLITE_MISMATCH", "SQLITE_FORMAT")


class Custody:
    """One process's hold of a ledger; arguments and errors are those of :class:`securesplit.privacy.ledger.Ledger`.

    Attributes:
        place: the ledger's folder.
        db, chain, memo: its parts.
        records_key, anchor_key: derived from the site's key.
    """

    def __init__(
        self, directory: Path, *, anchors: Path | None = None, owner: bytes | None = None, adopt: bool = False
    ) -> None:
        self._mutex = threading.RLock()
        self._anchored = -1  # The highest sequence number that is known to stand in the anchor.
        self._seen = Link(0, "")  # The last link that this process has verified.
        self._folder: int | None = None
        self._db: sqlite3.Connection | None = None
        try:
            self.place = directory.resolve()
            if adopt and not (self.place / "ledger.sqlite").is_file():
                raise InputError("SS-1532", f"{directory} holds no ledger", hint="Put the ledger's folder there first.")
            self.place.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
            self._footing = Footing(self.place, owner_tag(_owner(self.place) if owner is None else owner))
            self._anchors = Anchors(default_anchors() if anchors is None else anchors)
            with self._alone():
                self._connect()
                self._accept(adopt=adopt)
        except (OSError, RuntimeError, sqlite3.Error) as error:
            self.close()
            if isinstance(error, sqlite3.Error) and _of_content(error):
                raise broken(f"the ledger in {directory} cannot be read") from None
            raise InputError(
                "SS-1520",
                f"the ledger in {directory}, or its anchor, cannot be used: {type(error).__name__}",
                hint="Check the disk and its permissions, there and in ~/.local/state/securesplit.",
            ) from None
        except BaseException:
            self.close()
            raise

    @property
    def db(self) -> sqlite3.Connection:
        """The open file."""
        assert self._db is not None
        return self._db

    def close(self) -> None:
        """Let go of the file; twice is once."""
        if self._db is not None:
            self._db.close()
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """For questions: no other thread's half-done transaction is seen.

        Raises:
            PolicyDenied: SS-2024 when the file cannot be understood any more.
            InputError: SS-1520 when the disk cannot be read.
        """
        with self._mutex:
            try:
                yield
            except sqlite3.Error as error:
                if _of_content(error):
                    raise broken("the ledger cannot be read") from None
                raise InputError(
                    "SS-1520", f"the ledger cannot be read ({type(error).__name__})", hint="Check the disk."
                ) from None

    @contextmanager
    def committing(self) -> Iterator[None]:
        """For appending: on leaving, what was appended is on disk and anchored; after an exception nothing was appended.

        Raises:
            PolicyDenied: SS-2020 to SS-2024 when the ledger was deleted, replaced or altered since it was opened.
            CheckFailed: SS-1522 when the disk refuses.
        """
        with self._alone(), _refusing_disk():
            with self._transaction():
                self._require_anchored()
                self._seen = self.chain.follow(self._seen)
                yield
            self._advance()

    def require_anchored_to(self, seq: int) -> None:
        """Make sure that an entry stands in the anchor, because its payload is about to leave once more.

        Another process may have died, or may be, between its commit and its anchor. Raises as :meth:`committing`.
        """
        if seq > self._anchored:
            with self._alone(), _refusing_disk():
                self._require_anchored()
                self._advance()

    def _connect(self) -> None:
        path = self.place / "ledger.sqlite"
        known = path.exists() and path.stat().st_size > 0
        if not known:
            self._anchors.require_free(self._footing)
        key = site_key(self.place / "site.key", make=not known)
        self.records_key, self.anchor_key = derive(key, "records"), derive(key, "anchor")
        self._db = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            self.db.execute(f"PRAGMA {pragma}")
        if self.db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0:
            self._anchors.require_free(self._footing)
            self._create(derive(key, "chain"))
        self.chain = Chain(self.db, derive(key, "chain"))
        self.memo = Memo(self.db, derive(key, "payloads"), self.chain.id)

    def _create(self, key: bytes) -> None:
        name, owner = secrets.token_hex(16), self._footing.owner
        with self._transaction():
            for statement in SCHEMA:
                self.db.execute(statement)
            self.db.execute("INSERT INTO meta VALUES (?, ?, ?)", (name, owner, genesis(key, name, owner)))
        sync_folder(self.place)

    def _accept(self, *, adopt: bool) -> None:
        self._seen = self.chain.verify()
        self.memo.require_complete()
        if adopt:
            self._anchors.require_free(self._footing, but=self.chain.id)
            anchor = self._anchors.read(self.chain.id)
            if anchor is not None and not self.chain.holds(Link(anchor.seq, anchor.head)):
                raise rolled_back(self.place)
            with self._transaction():
                self.chain.append_adoption(self._footing.owner)
        else:
            if self.chain.owner() != self._footing.owner:
                raise _another_owner(self.place)
            self._require_anchored()
        self._advance()

    def _require_anchored(self) -> None:
        anchor = self._anchors.read(self.chain.id)
        if anchor is not None:
            if not self.chain.holds(Link(anchor.seq, anchor.head)):
                raise rolled_back(self.place)
            require_footing(anchor, self._footing)
        elif self._anchored >= 0 or self.chain.head().seq > 0:
            raise copied(self.place)
        else:  # A crash fell between the making of the ledger and its first anchor.
            self._anchors.require_free(self._footing, but=self.chain.id)

    def _advance(self) -> None:
        head = self.chain.head()
        if head.seq > self._anchored:
            self._anchors.write(self.chain.id, head, self._footing)
            self._anchored = head.seq

    @contextmanager
    def _alone(self) -> Iterator[None]:
        assert self._folder is not None
        with self._mutex:
            fcntl.flock(self._folder, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._folder, fcntl.LOCK_UN)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:  # A full disk may have rolled back already.
                self.db.execute("ROLLBACK")
            raise


@contextmanager
def _refusing_disk() -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if isinstance(error, sqlite3.Error) and _of_content(error):
            raise broken("the ledger cannot be read") from None
        raise CheckFailed(
            "SS-1522",
            f"the ledger or its anchor could not be written ({type(error).__name__}), so nothing was sent",
            hint="Free the disk and start again.",
        ) from None


def _of_content(error: sqlite3.Error) -> bool:
    return str(getattr(error, "sqlite_errorname", "")).startswith(_CONTENT)


def _owner(place: Path) -> bytes | None:
    try:
        return (place.parent / "key.pem").read_bytes()
    except FileNotFoundError:
        return None


def _another_owner(place: Path) -> PolicyDenied:
    return PolicyDenied(
        "SS-2023",
        f"the ledger in {place} belongs to another client key than the one beside it, so nothing may be sent",
        hint="Put the two that belong together back. If this client's key was renewed, run `securesplit privacy adopt`.",
    )
