"""Auxiliary text must not hold what is attacked: an attacker who has the very text attacks nothing.

Texts are compared by what they say and not by how it is set: compatible characters made one (NFKC), letters case-folded,
punctuation and blanks left out. A unit is a word; in scripts without blanks, it is a character. A record is refused when

* nine tenths of its distinct 5-grams of words (8-grams where most units are characters) stand in one auxiliary text, or
* nine tenths of those of an auxiliary text with six words or more (twelve characters) stand in one record, or
* it is too short for one such gram (a label, "yes") and is an auxiliary text of its own.

Why not any shared run of words: public and private records of one house share their forms. Ward notes of two draws share up
to 85 % of their 5-grams and a run of 87 % of their words, and only persons differ (tests/attacks/test_overlap.py). Below nine tenths
nothing tells a copied record from a filled-in form: a record of 60 words with one of them changed is refused, one of 30
is not. A paraphrase or a translation is not found at all. Disjoint text is the duty of whoever brings it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from securesplit.errors import InputError

__all__ = ["refuse_overlap"]

# Kana, Han, Thai, Lao, Burmese and Khmer are written without blanks between words.
_CHARACTER = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_UNIT = re.compile(rf"[{_CHARACTER}]|[^\W{_CHARACTER}]+")
_WORDS, _CHARACTERS = 5, 8
_FRAGMENT = {_WORDS: 6, _CHARACTERS: 12}
_SHARE = (9, 10)

Units = tuple[str, ...]
Grams = frozenset[Units]


def refuse_overlap(records: Iterable[str], texts: Sequence[str]) -> None:
    """Refuse auxiliary texts that hold a record, or most of one, or are most of one.

    Args:
        records: private texts: all of the recording's, attacked or not, and those whose membership is asked.
        texts: the auxiliary ones.

    Raises:
        InputError: SS-1703; it names the auxiliary text by its number, never by its words.
    """
    private = list({units for record in records if (units := _units(record))})
    public = [_units(text) for text in texts]
    found = _short(private, public)
    for size in {_size(units) for units in (*private, *public)}:
        mine = [_grams(units, size) if _size(units) == size else frozenset() for units in private]
        theirs = [_grams(units, size) for units in public]
        pieces = [
            grams if len(units) >= _FRAGMENT[size] and _size(units) == size else frozenset()
            for units, grams in zip(public, theirs, strict=True)
        ]
        found |= {text for _, text in _inside(mine, theirs)}
        found |= {text for text, _ in _inside(pieces, [_grams(units, size) for units in private])}
    if found:
        raise InputError(
            "SS-1703",
            f"the auxiliary text holds a record of the recording or a candidate, whole or nearly: {len(found)} of "
            f"{len(texts)} texts, first number {min(found) + 1}",
            hint="Give public text that is disjoint from the private one.",
        )  # fmt: skip


def _units(text: str) -> Units:
    """Words and characters as they are compared; a text of signs alone is one unit."""
    flat = unicodedata.normalize("NFKC", text).casefold()
    return tuple(_UNIT.findall(flat)) or tuple(filter(None, [" ".join(flat.split())]))


def _size(units: Units) -> int:
    """Length of the grams by which a text is compared: that of characters where most units are such."""
    characters = sum(len(unit) == 1 and re.match(f"[{_CHARACTER}]", unit) is not None for unit in units)
    return _CHARACTERS if 2 * characters > len(units) else _WORDS


def _grams(units: Units, size: int) -> Grams:
    return frozenset(units[start : start + size] for start in range(len(units) - size + 1))


def _short(private: Sequence[Units], public: Sequence[Units]) -> set[int]:
    """Auxiliary texts that are, from end to end, a record too short for one gram."""
    short = {units for units in private if len(units) < _size(units)}
    return {place for place, units in enumerate(public) if units in short}


def _inside(parts: Sequence[Grams], wholes: Sequence[Grams]) -> list[tuple[int, int]]:
    """Pairs (part, whole) where the whole holds nine tenths of the part's grams.

    It looks at few pairs and loses none: a whole that lacks at most m grams of a part holds one of any m + 1 of them, so
    the m + 1 rarest are enough of an index.
    """
    common = Counter(gram for part in parts for gram in part)
    index: dict[Units, list[int]] = {}
    need = [-(-len(part) * _SHARE[0] // _SHARE[1]) for part in parts]
    for place, part in enumerate(parts):
        for gram in sorted(part, key=lambda gram: (common[gram], gram))[: len(part) - need[place] + 1]:
            index.setdefault(gram, []).append(place)
    pairs = []
    for place, whole in enumerate(wholes):
        near = {part for gram in whole if gram in index for part in index[gram]}
        pairs += [(part, place) for part in near if len(parts[part] & whole) >= need[part]]
    return pairs
