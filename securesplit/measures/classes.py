"""Classes: which one a generated text names, accuracy, and macro F1.

A text names a class when it begins with one of the class's words, as a whole word: "Yes, because ..." is yes, "Nothing"
is not no. Words of one letter, as in "A or B", count only when they stand alone before the first mark or line break, or
"A man came in" would be choice A. Of several that fit the longest counts. A text that names none is unparsable, and
unparsable is wrong.

What stands before a text's first letter is passed over, be it a quote or a bullet, but for classes that begin with a mark
themselves: "-1" names -1 where that is a class, and 1 where it is not. A text that is a class's name letter by letter names that
one, also where names differ in nothing but case or marks.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Label", "accuracy", "class_row", "macro_f1", "named_class"]

_Sums = npt.NDArray[np.float64]
_LEADING = re.compile(r"^[\W_]+")
# So many marks before the first letter are looked through; more say nothing.
_MOST_MARKS = 32
_HEAD = re.compile(r"[^\W_]+(?:[ '\u2019-][^\W_]+)*")


@dataclass(frozen=True, slots=True)
class Label:
    """One class.

    Attributes:
        name: as the data names it.
        words: what else a text may call it.
    """

    name: str
    words: tuple[str, ...] = ()


def named_class(text: str, labels: Sequence[Label]) -> int | None:
    """The index of the class that a text names, None when it names none."""
    bare = text.strip()
    for index, label in enumerate(labels):
        if bare == label.name.strip():
            return index
    starts = _starts(_folded(text))
    head = match.group() if (match := _HEAD.match(starts[-1])) else ""
    found, longest = None, (0, False)
    for index, label in enumerate(labels):
        for word in (label.name, *label.words):
            plain = _folded(word)
            # Of names that differ in case alone, the one that is spelled as the text is.
            rank = len(plain), word.strip() in text
            if rank > longest and _begins(starts, head, plain):
                found, longest = index, rank
    return found


def class_row(gold: int, given: int | None, count: int) -> tuple[float, ...]:
    """What one example adds to the sums, (3 count + 2,): of each class true and false positives and false negatives;
    right answers; one.

    Args:
        gold: index of the true class.
        given: index of the named class; None for an unparsable answer.
        count: classes.
    """
    row = [0.0] * (3 * count + 2)
    if given == gold:
        row[3 * gold] = row[-2] = 1.0
    else:
        row[3 * gold + 2] = 1.0
        if given is not None:
            row[3 * given + 1] = 1.0
    row[-1] = 1.0
    return tuple(row)


def accuracy(sums: _Sums) -> _Sums:
    """Share of right answers, (R, 3C + 2) to (R,)."""
    found: _Sums = sums[:, -2] / sums[:, -1]
    return found


def macro_f1(sums: _Sums) -> _Sums:
    """Mean of the classes' F1, over classes that are true or named at least once, (R, 3C + 2) to (R,)."""
    hit, false, missed = (sums[:, start:-2:3] for start in range(3))
    seen = hit + false + missed > 0
    scores = np.divide(2 * hit, 2 * hit + false + missed, out=np.zeros_like(hit), where=seen)
    found: _Sums = scores.sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
    return found


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().replace("_", " ").strip()


def _starts(folded: str) -> tuple[str, ...]:
    """The text from each mark before its first letter on, and last from that letter on."""
    marks = match.end() if (match := _LEADING.match(folded)) else 0
    return tuple(folded[at:] for at in range(max(0, marks - _MOST_MARKS), marks + 1))


def _begins(starts: Sequence[str], head: str, word: str) -> bool:
    if not word:
        return False
    if len(word) == 1 and word.isalnum():
        return head == word
    # A class that begins with a mark is named with it; any other begins where the text's first letter is.
    among = starts if _LEADING.match(word) else starts[-1:]
    return any(s.startswith(word) and not s[len(word) : len(word) + 1].isalnum() for s in among)
