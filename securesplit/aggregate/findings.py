"""What a check of a recorded round says: verify.py finds it, compare.py adds to it, the command prints it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.record import RoundRecord

__all__ = ["Check", "Report", "printable", "shown"]

_MOST_NAMES = 12


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer.

    Attributes:
        name: stable, for scripts.
        ok: the answer.
        detail: one sentence, printable whatever the record holds.
        warning: it passed, but somebody should look at it.
    """

    name: str
    ok: bool
    detail: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of one record after it was checked.

    Attributes:
        record: as it came.
        config: None when it is not legal; then nothing else could be checked.
        t3: the recomputed transcript hash over U3.
        clients: names of U1 as far as the adverts can be read, sorted.
        signers: survivors whose signature over T3 is good.
        checks: in the order of the round.
    """

    record: RoundRecord
    config: RoundConfig | None
    t3: bytes = field(repr=False)
    clients: tuple[str, ...]
    signers: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def valid(self) -> bool:
        """Whether no check failed."""
        return all(check.ok for check in self.checks)

    @property
    def sealed(self) -> bool:
        """Whether the maker is known to have made it, so that what no other signature covers can be held against it."""
        return any(check.name == "maker" and check.ok and not check.warning for check in self.checks)

    @property
    def agreed(self) -> bool:
        """Whether enough clients signed the survivors, which vouches for all sets whoever made the record."""
        return self.config is not None and len(self.signers) >= self.config.threshold

    def also(self, *checks: Check) -> Report:
        """The report with further checks."""
        return replace(self, checks=(*self.checks, *checks))


def printable(text: str) -> str:
    """Text without control characters: a record is somebody else's, and names in it may hold commands for a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def shown(names: Sequence[str]) -> str:
    """Names for a sentence, the first dozen of them."""
    more = len(names) - _MOST_NAMES
    listed = ", ".join(names[:_MOST_NAMES]) or "nobody"
    return printable(listed + (f" and {more} more" if more > 0 else ""))
