"""Fingerprints as words that two people can read to each other.

Six pronounceable words carry the first 96 bits of a SHA-256: whoever wants to put another request or authority in the place of
one whose words were read out needs 2^96 attempts. Two consonant-vowel pairs and a consonant per word hold 16 bits (the
"proquint" of Wilkerson, arXiv:0901.4016), so no list of words is needed and none can differ between versions.

What this does not protect against: two people who do not compare them, or who compare them over the channel that the
attacker holds.
"""

from __future__ import annotations

import hashlib
import re

__all__ = ["same_words", "words_of"]

_CONSONANTS = "bdfghjklmnprstvz"
_VOWELS = "aiou"
_COUNT = 6


def words_of(purpose: bytes, data: bytes) -> str:
    """The words of some bytes.

    Args:
        purpose: what they are, such as ``b"request"``, so that one kind's words never fit another's.
        data: the bytes.
    """
    digest = hashlib.sha256(b"securesplit words v1: " + purpose + b"\0" + data).digest()
    return "-".join(_word(int.from_bytes(digest[2 * i : 2 * i + 2], "big")) for i in range(_COUNT))


def same_words(left: str, right: str) -> bool:
    """Whether two people mean the same words; case, blanks and hyphens do not count."""
    return _letters(left) == _letters(right) != ""


def _word(bits: int) -> str:
    return "".join(
        (_CONSONANTS, _VOWELS)[place % 2][bits >> shift & (15, 3)[place % 2]]
        for place, shift in enumerate((12, 10, 6, 4, 0))
    )


def _letters(words: str) -> str:
    return re.sub(r"[\s,-]", "", words).lower()
