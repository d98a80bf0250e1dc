"""How two values of one key compare: which is tighter, and which one binds when both ends have a say.

An order has two questions to answer, and the answers agree: what :meth:`strictest` returns never loosens either value. Values
that no order ranks are counted as loosening, whichever way they change; a change that may loosen is one that does, until
somebody has looked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["Bound", "Effect", "Fixed", "Keys", "NoCommonValue", "Opens", "Order", "Own", "Pinned", "Ranked", "Seals", "Stated", "Subset", "Within"]  # fmt: skip

Effect = Literal["loosens", "tightens", "neutral"]


class NoCommonValue(Exception):
    """No value is at least as strict as both; :mod:`securesplit.policy.negotiate` says of which keys."""


class Order(Protocol):
    """One key's order."""

    def effect(self, before: object, after: object) -> Effect:
        """What a change of two different values does."""
        ...

    def strictest(self, own: object, offered: object) -> object:
        """A value that loosens neither.

        Raises:
            NoCommonValue: when there is none.
        """
        ...


@dataclass(frozen=True, slots=True)
class Bound:
    """A number, or a yes or no, of which one end is the tighter.

    Attributes:
        tight: whether small or large values are tighter.
        absent: what absence counts as; None means the loosest value there is.
    """

    tight: Literal["small", "large"]
    absent: float | None = None

    def _looseness(self, value: object) -> float:
        if value is None and self.absent is None:
            return math.inf
        number = self.absent if value is None else value
        assert isinstance(number, int | float)
        return float(number) if self.tight == "small" else -float(number)

    def effect(self, before: object, after: object) -> Effect:
        """By size alone."""
        old, new = self._looseness(before), self._looseness(after)
        return "neutral" if new == old else "loosens" if new > old else "tightens"

    def strictest(self, own: object, offered: object) -> object:
        """The tighter of the two; ``own`` where they are equal."""
        return own if self._looseness(own) <= self._looseness(offered) else offered


@dataclass(frozen=True, slots=True)
class Ranked:
    """Words in ranks, the loosest first; absence is looser than all. Different words of one rank are not comparable.

    Attributes:
        ranks: the words.
        mixes: whether the tighter word may be put into a policy that was written for the other.
    """

    ranks: tuple[frozenset[str], ...]
    mixes: bool = True

    def _rank(self, value: object) -> int:
        return -1 if value is None else next(i for i, words in enumerate(self.ranks) if value in words)

    def effect(self, before: object, after: object) -> Effect:
        """By rank."""
        return "tightens" if self._rank(after) > self._rank(before) else "loosens"

    def strictest(self, own: object, offered: object) -> object:
        """The word of the higher rank."""
        if own == offered:
            return own
        if not self.mixes or self._rank(own) == self._rank(offered):
            raise NoCommonValue
        return own if self._rank(own) > self._rank(offered) else offered


@dataclass(frozen=True, slots=True)
class Own:
    """No protection hangs on it, and whose policy it is decides: words, and units of measurement."""

    def effect(self, before: object, after: object) -> Effect:
        """None."""
        del before, after
        return "neutral"

    def strictest(self, own: object, offered: object) -> object:
        """The own one: a peer has no say in it."""
        del offered
        return own


@dataclass(frozen=True, slots=True)
class Fixed:
    """What both must say alike.

    Attributes:
        changed: what a change does.
    """

    changed: Effect

    def effect(self, before: object, after: object) -> Effect:
        """As stated."""
        del before, after
        return self.changed

    def strictest(self, own: object, offered: object) -> object:
        """The common value."""
        if own != offered:
            raise NoCommonValue
        return own


@dataclass(frozen=True, slots=True)
class Pinned:
    """An optional value that admits one thing alone: stating it tightens, another one admits something else."""

    def effect(self, before: object, after: object) -> Effect:
        """Stating one tightens; all else may loosen."""
        del after
        return "tightens" if before is None else "loosens"

    def strictest(self, own: object, offered: object) -> object:
        """The one that is stated."""
        if own is None or offered is None or own == offered:
            return offered if own is None else own
        raise NoCommonValue


@dataclass(frozen=True, slots=True)
class Stated:
    """A floor that is tighter the larger it is, and whose very presence costs something else; so presence has no order."""

    def effect(self, before: object, after: object) -> Effect:
        """Larger is tighter; stating it, or removing it, counts as loosening."""
        if isinstance(before, int | float) and isinstance(after, int | float):
            return "tightens" if after > before else "loosens"
        return "loosens"

    def strictest(self, own: object, offered: object) -> object:
        """The larger, when both state it or neither does."""
        if own is None and offered is None:
            return None
        if isinstance(own, int | float) and isinstance(offered, int | float):
            return max(own, offered)
        raise NoCommonValue


@dataclass(frozen=True, slots=True)
class Subset:
    """A list of what may be seen; a part of it shows a function of what the whole list shows, and no more."""

    def effect(self, before: object, after: object) -> Effect:
        """A part is tighter, all else may be looser."""
        assert isinstance(before, Sequence)
        assert isinstance(after, Sequence)
        return "tightens" if set(after) <= set(before) else "loosens"

    def strictest(self, own: object, offered: object) -> object:
        """What stands in both."""
        assert isinstance(own, Sequence)
        assert isinstance(offered, Sequence)
        common = tuple(value for value in own if value in offered)
        if not common:
            raise NoCommonValue
        return common


@dataclass(frozen=True, slots=True)
class Within:
    """A range of acceptable numbers, least and largest."""

    def effect(self, before: object, after: object) -> Effect:
        """A range inside the other is tighter."""
        (low, high), (least, most) = _ends(before), _ends(after)
        return "tightens" if least >= low and most <= high else "loosens"

    def strictest(self, own: object, offered: object) -> object:
        """What lies in both."""
        (low, high), (least, most) = _ends(own), _ends(offered)
        if max(low, least) >= min(high, most):
            raise NoCommonValue
        return (max(low, least), min(high, most))


def _ends(value: object) -> tuple[float, float]:
    assert isinstance(value, tuple)
    low, high = value
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Opens:
    """A table that opens a way out of the client: it stays closed unless both open it."""

    def effect(self, before: object, after: object) -> Effect:
        """Opening loosens."""
        del before
        return "tightens" if after is None else "loosens"

    def strictest(self, own: object, offered: object) -> object:
        """Open when both are."""
        return None if offered is None else own


@dataclass(frozen=True, slots=True)
class Seals:
    """A table that adds noise to what leaves anyhow: one that states it is enough."""

    def effect(self, before: object, after: object) -> Effect:
        """Stating it tightens."""
        del before
        return "loosens" if after is None else "tightens"

    def strictest(self, own: object, offered: object) -> object:
        """Stated when either states it."""
        return offered if own is None else own


@dataclass(frozen=True, slots=True)
class Keys:
    """A table whose keys say all that is to be said of it."""

    def effect(self, before: object, after: object) -> Effect:
        """None of its own."""
        del before, after
        return "neutral"

    def strictest(self, own: object, offered: object) -> object:
        """Made of its keys."""
        return offered if own is None else own
