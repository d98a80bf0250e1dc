"""The ledger's entries, chained by HMAC-SHA256 under a key of the site.

Entry n holds the hash of entry n-1, and the first one the ledger's identity (its random id and its owner at birth), so an
editor of the file who lacks the site key can neither change, insert, reorder nor drop an entry without its being found at
the next opening. Dropping the last entries leaves a true chain; the anchor finds that. An edit made behind the back of a
process that has the ledger open is found by that process only where it touches what it reads, and by everybody later.

An entry's hash is ``HMAC(key, JSON array [seq, prev, record, channel, units, clip, sigma, step, version, payload,
policy, unit, time])``, no blanks, ASCII; ``payload`` is the SHA-256 of the bytes that left, in hex.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from securesplit.errors import PolicyDenied

ADOPTED = "adopted"

SCHEMA = (
    "CREATE TABLE meta (id TEXT NOT NULL, owner TEXT NOT NULL, genesis TEXT NOT NULL) STRICT",
    """CREATE TABLE entries (
      seq INTEGER PRIMARY KEY, prev TEXT NOT NULL, hash TEXT NOT NULL, record TEXT NOT NULL, channel TEXT NOT NULL,
      units INTEGER NOT NULL CHECK (units > 0 OR channel = 'adopted'), clip REAL NOT NULL, sigma REAL NOT NULL,
      step REAL NOT NULL, version TEXT NOT NULL, payload TEXT NOT NULL, policy TEXT NOT NULL, unit TEXT NOT NULL,
      time INTEGER NOT NULL
    ) STRICT""",
    "CREATE INDEX by_record ON entries (record, channel, version)",
    "CREATE INDEX by_payload ON entries (payload)",
    "CREATE TABLE memo (seq INTEGER PRIMARY KEY, payload BLOB NOT NULL) STRICT",
)
_COLUMNS = "seq, time, record, channel, units, clip, sigma, step, version, payload, policy, unit, prev, hash"


@dataclass(frozen=True, slots=True)
class Charge:
    """One release of one record: what it costs, and the bytes that will leave.

    Attributes:
        record: a key from :meth:`securesplit.privacy.ledger.Ledger.key`, or ``*``.
        channel: where it leaves: ``cut``, ``gradient``, ``decode`` or ``update``; ``peers`` for their reserve.
        units: mu^2 in 2^-40; at least 1, so that no charge refunds.
        clip, sigma: the mechanism's parameters, for the record.
        policy: digest of the policy that allowed it.
        step: the lattice's spacing gamma; 0 where the noise is not on a lattice.
        version: names content, mechanism and model state. Under the same record, channel and version nothing is charged
            twice and the first bytes are resent. Empty: never remembered.
        payload: the noised bytes; empty for a reserve.
        unit: what the charge protects: ``sequence``, ``token`` or ``user``. A ledger counts in one unit only, because a charge
            of one says too little of another.
    """

    record: str
    channel: str
    units: int
    clip: float
    sigma: float
    policy: str
    step: float = 0.0
    version: str = ""
    payload: bytes = field(default=b"", repr=False)
    unit: str = "sequence"

    def __post_init__(self) -> None:
        if self.units < 1 or self.channel == ADOPTED:
            raise ValueError("a charge costs at least one unit, on a channel of releases")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger.

    Attributes:
        seq: 1, 2, 3, ...
        time: nanoseconds since 1970 by this machine's clock; for people, nothing is decided by it.
        record, channel, units, clip, sigma, step, version, policy, unit: as in :class:`Charge`. An adoption has the channel
            ``adopted``, costs nothing, and names the new owner in ``version``.
        payload: SHA-256 of the released bytes, hex.
        prev, hash: of the chain, hex.
    """

    seq: int
    time: int
    record: str
    channel: str
    units: int
    clip: float
    sigma: float
    step: float
    version: str
    payload: str
    policy: str
    unit: str
    prev: str
    hash: str

    @property
    def adopted(self) -> bool:
        """Whether this is an adoption (:meth:`securesplit.privacy.ledger.Ledger.adopt`) and not a release."""
        return self.channel == ADOPTED


@dataclass(frozen=True, slots=True)
class Link:
    """A place in the chain: a sequence number and the hash there; 0 and the genesis for none."""

    seq: int
    hash: str


class Chain:
    """The entries of one open ledger.

    Args:
        db: holds the tables of :data:`SCHEMA`.
        key: the site's key for chaining, 32 bytes.

    Raises:
        PolicyDenied: SS-2024 when ``key`` did not write this ledger's identity.
        sqlite3.Error: as from all methods here; the ledger maps them.
    """

    def __init__(self, db: sqlite3.Connection, key: bytes) -> None:
        self._db, self._key = db, key
        rows = db.execute("SELECT id, owner, genesis FROM meta").fetchall()
        if len(rows) != 1:
            raise broken("the ledger has lost its identity")
        self.id, self._first_owner, self._genesis = (str(value) for value in rows[0])
        if not hmac.compare_digest(self._genesis, genesis(key, self.id, self._first_owner)):
            raise broken("site.key is not the key of the ledger beside it")

    def owner(self) -> str:
        """Whose ledger this is: what it was made with, or what the last adoption says."""
        row = self._db.execute(
            "SELECT version FROM entries WHERE channel = ? ORDER BY seq DESC LIMIT 1", (ADOPTED,)
        ).fetchone()
        return self._first_owner if row is None else str(row[0])

    def head(self) -> Link:
        """The last entry."""
        row = self._db.execute("SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
        return Link(0, self._genesis) if row is None else Link(int(row[0]), str(row[1]))

    def unit(self) -> str | None:
        """In which unit of privacy this ledger counts; None while nothing was charged."""
        row = self._db.execute(
            "SELECT unit FROM entries WHERE channel != ? ORDER BY seq LIMIT 1", (ADOPTED,)
        ).fetchone()
        return None if row is None else str(row[0])

    def holds(self, link: Link) -> bool:
        """Whether the chain runs through a link."""
        if link.seq == 0:
            return link.hash == self._genesis
        row = self._db.execute("SELECT hash FROM entries WHERE seq = ?", (link.seq,)).fetchone()
        return row is not None and str(row[0]) == link.hash

    def follow(self, link: Link) -> Link:
        """Recompute the chain after a link that was verified before; the new last link.

        Raises:
            PolicyDenied: SS-2024 at the first entry that does not follow from the one before.
        """
        if not self.holds(link):
            raise broken(f"the ledger was changed at entry {link.seq}")
        for entry in self.entries(after=link.seq):
            if entry.seq != link.seq + 1 or entry.prev != link.hash or entry.hash != self._hash(entry):
                raise broken(f"the ledger was changed at entry {link.seq + 1}")
            link = Link(entry.seq, entry.hash)
        return link

    def verify(self) -> Link:
        """Recompute the whole chain; its last link. Raises as :meth:`follow`."""
        return self.follow(Link(0, self._genesis))

    def entries(self, *, after: int = 0) -> Iterator[Entry]:
        """Entries in order."""
        for row in self._db.execute(f"SELECT {_COLUMNS} FROM entries WHERE seq > ? ORDER BY seq", (after,)):  # noqa: S608  # a constant
            yield Entry(*row)

    def find(self, record: str, channel: str, version: str) -> Entry | None:
        """The entry that released something under a version; none for the empty one, which is never remembered."""
        if not version:
            return None
        row = self._db.execute(
            f"SELECT {_COLUMNS} FROM entries WHERE record = ? AND channel = ? AND version = ?",  # noqa: S608  # a constant
            (record, channel, version),
        ).fetchone()
        return None if row is None else Entry(*row)

    def append(self, charge: Charge) -> Entry:
        """Add what a charge says. Call inside a transaction."""
        return self._add(
            record=charge.record, channel=charge.channel, units=charge.units, clip=float(charge.clip),
            sigma=float(charge.sigma), step=float(charge.step), version=charge.version,
            payload=hashlib.sha256(charge.payload).hexdigest(), policy=charge.policy, unit=charge.unit,
        )  # fmt: skip

    def append_adoption(self, owner: str) -> Entry:
        """Add that the ledger was taken over deliberately. Call inside a transaction."""
        return self._add(
            record="",
            channel=ADOPTED,
            units=0,
            clip=0.0,
            sigma=0.0,
            step=0.0,
            version=owner,
            payload="",
            policy="",
            unit="",
        )

    def _add(
        self,
        *,
        record: str,
        channel: str,
        units: int,
        clip: float,
        sigma: float,
        step: float,
        version: str,
        payload: str,
        policy: str,
        unit: str,
    ) -> Entry:
        last = self.head()
        draft = Entry(
            seq=last.seq + 1, time=time.time_ns(), record=record, channel=channel, units=units, clip=clip, sigma=sigma,
            step=step, version=version, payload=payload, policy=policy, unit=unit, prev=last.hash, hash="",
        )  # fmt: skip
        digest = self._hash(draft)
        self._db.execute(
            f"INSERT INTO entries ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608  # a constant
            (
                draft.seq, draft.time, record, channel, units, clip, sigma, step, version, payload, policy, unit, last.hash,
                digest,
            ),
        )  # fmt: skip
        return Entry(
            seq=draft.seq, time=draft.time, record=record, channel=channel, units=units, clip=clip, sigma=sigma,
            step=step, version=version, payload=payload, policy=policy, unit=unit, prev=last.hash, hash=digest,
        )  # fmt: skip

    def _hash(self, e: Entry) -> str:
        fields = [
            e.seq, e.prev, e.record, e.channel, e.units, e.clip, e.sigma, e.step, e.version, e.payload, e.policy, e.unit, e.time,
        ]  # fmt: skip
        return _mac(self._key, fields)


def genesis(key: bytes, ledger: str, owner: str) -> str:
    """What stands before the first entry: the ledger's identity under the site's key."""
    return _mac(key, ["securesplit ledger v1", ledger, owner])


def broken(what: str) -> PolicyDenied:
    """A ledger that was changed from outside is refused whole: what it says was spent is not known to be true."""
    return PolicyDenied(
        "SS-2024",
        f"{what}, so nothing may be sent",
        hint="Keep it, and put back the newest copy of the ledger's folder from before the change; then find out who wrote to it.",
    )


def _mac(key: bytes, fields: list[object]) -> str:
    return hmac.new(key, json.dumps(fields, separators=(",", ":")).encode(), hashlib.sha256).hexdigest()
