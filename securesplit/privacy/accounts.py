"""Sums over the ledger's entries. All are integers, in units of 2^-40 of mu^2."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Collection
from dataclasses import dataclass

from securesplit.privacy.chain import ADOPTED
from securesplit.privacy.plan import UNITS

ALL = "*"


@dataclass(frozen=True, slots=True)
class Spent:
    """What one channel has cost so far: the number of entries, and mu of the record that spent most on it."""

    channel: str
    releases: int
    mu: float


class Accounts:
    """Questions to a ledger's file. sqlite3 errors pass through all of them; custody maps them."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def spent(self, record: str, channels: Collection[str] | None = None) -> int:
        """What a record has spent, what was charged to all records included."""
        own = 0 if record == ALL else self._sum(record, channels)
        return own + self._sum(ALL, channels)

    def worst(self, channels: Collection[str] | None = None) -> int:
        """What the record that has spent most has spent, what was charged to all records included."""
        where, names = _within(channels)
        sql = f"SELECT COALESCE(MAX(total), 0) FROM (SELECT SUM(units) AS total FROM entries WHERE record != ?{where} GROUP BY record)"  # noqa: S608  # only question marks are put in
        return self._sum(ALL, channels) + int(self._db.execute(sql, (ALL, *names)).fetchone()[0])

    def releases(self, record: str, channel: str) -> int:
        """How often a record was released on a channel."""
        sql = "SELECT COUNT(*) FROM entries WHERE record = ? AND channel = ?"
        return int(self._db.execute(sql, (record, channel)).fetchone()[0])

    def versions(self, record: str, channel: str) -> tuple[str, ...]:
        """Under which versions a record was released on a channel."""
        sql = "SELECT DISTINCT version FROM entries WHERE record = ? AND channel = ? AND version != ''"
        return tuple(str(version) for (version,) in self._db.execute(sql, (record, channel)))

    def first_with(self, payload_sha256: str) -> int | None:
        """The first entry whose payload has a hash."""
        sql = "SELECT MIN(seq) FROM entries WHERE payload = ? AND channel != ?"
        seq = self._db.execute(sql, (payload_sha256, ADOPTED)).fetchone()[0]
        return None if seq is None else int(seq)

    def summary(self) -> tuple[Spent, ...]:
        """Per channel: entries, and mu of its most expensive record, what was charged to all included."""
        sql = "SELECT channel, COUNT(*) FROM entries WHERE channel != ? GROUP BY channel"
        return tuple(
            Spent(channel=str(c), releases=int(n), mu=math.sqrt(self.worst((str(c),)) / UNITS))
            for c, n in self._db.execute(sql, (ADOPTED,)).fetchall()
        )

    def _sum(self, record: str, channels: Collection[str] | None) -> int:
        where, names = _within(channels)
        sql = f"SELECT COALESCE(SUM(units), 0) FROM entries WHERE record = ?{where}"  # noqa: S608  # only question marks are put in
        return int(self._db.execute(sql, (record, *names)).fetchone()[0])


def _within(channels: Collection[str] | None) -> tuple[str, tuple[str, ...]]:
    if channels is None:
        return "", ()
    return f" AND channel IN ({','.join('?' * len(channels))})", tuple(channels)
