"""A round that is lost with a connection, a client or the server is tried again; one that somebody spoilt is not.

Nothing here decides what may be answered: a run that is tried again has fresh keys, and the same update enters sums over
one set of clients only, whatever makes this client try (securesplit/aggregate/answered.py). So a server that loses rounds
on purpose gains nothing but this client's time, of which ``sums.attempts`` is the measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from securesplit.client.link import FINAL, Link
from securesplit.errors import AggregationAborted, ConnectionFailed, SecureSplitError

__all__ = ["LOST", "Attempts"]

T = TypeVar("T")

LOST = frozenset({"SS-6006", "SS-6010", "SS-6013", "SS-6016", "SS-6030", "SS-6034"})
"""Codes of runs that were lost, with nobody to blame: the run is gone, clients are missing, this one was too late, the worker
died, or clients of an earlier sum of this very update are missing."""
_FIRST, _LONGEST = 0.2, 10.0


class Attempts:
    """Tries one round's steps until they succeed, or often enough.

    Args:
        link: an open session; made anew when it is not open any more.
        number: the round, for messages.
        sleep: waits for seconds.
    """

    def __init__(self, link: Link, number: int, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._link, self._number, self._sleep = link, number, sleep
        self._limit = link.job.sums.attempts or 1
        self._failed = 0
        self._gone: ConnectionFailed | None = None

    def run(self, step: Callable[[], T]) -> T:
        """What the step gives, when it succeeds.

        Raises:
            AggregationAborted: SS-6031 after the last attempt, with the names of those who were missing.
            SecureSplitError: what the step raised, when another try cannot change it, or when the job has one attempt.
        """
        while True:
            with self.spared():
                self._connected()
                return step()

    def fresh(self) -> None:
        """Something has come about; all attempts are open again for what follows."""
        self._failed = 0

    @contextmanager
    def spared(self) -> Iterator[None]:
        """What is lost in here counts as an attempt, after a pause; it ends the round only when that was the last."""
        try:
            yield
        except SecureSplitError as error:
            if not _lost(error) or self._limit == 1:
                raise
            self._failed += 1
            self._gone = error if isinstance(error, ConnectionFailed) else None
            if self._failed >= self._limit:
                raise self._over(error) from error
        else:
            return
        self._sleep(min(_FIRST * 2 ** min(self._failed - 1, 10), _LONGEST))

    def _connected(self) -> None:
        if self._gone is not None or not self._link.alive:
            gone = self._gone or ConnectionFailed("SS-3020", "the server closed the connection")
            self._link.reconnect(gone, within=self._link.job.sums.patience)
            self._gone = None

    def _over(self, error: SecureSplitError) -> AggregationAborted:
        missing = ", ".join(self._link.sums.missing)
        what = f"round {self._number + 1} was lost {self._failed} times, the last time with {error.code}"
        return AggregationAborted(
            "SS-6031",
            f"{what}; missing: {missing}" if missing else f"{what}; nobody of the roster is known to be missing",
            hint="Start the missing clients again, then this one; or raise sums.attempts. Nothing was released twice.",
        )


def _lost(error: SecureSplitError) -> bool:
    return error.code in LOST or (isinstance(error, ConnectionFailed) and error.code not in FINAL)
