"""From tokens to text while they come: whole characters only, and never past a stop text.

A character may take several tokens, and a stop text may begin in one token and end in a later one. So what could still
change is held back: an unfinished character, and an end of the text with which a stop text begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Spoken", "Stops", "Tokens"]

_UNFINISHED = "\ufffd"
_MOST_UNFINISHED = 8
"""Tokens for which unfinished characters are waited for: UTF-8 has at most four bytes, and no tokenizer has less than one each."""
_LONGEST = 64
"""Tokens that are spelled together at most; every new one spells all of them once more."""


class Tokens(Protocol):
    """The one method of a Hugging Face tokenizer that is used here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """Token ids to text."""
        ...


class Spoken:
    """The text of tokens, piece by piece; all pieces together are the text.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokens) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._from = 0  # Tokens before this one have no say in how later ones are spelled.
        self._until = 0  # Tokens before this one have been spelled out.
        self._said = 0  # Characters that have been said, of the text from the first of these places on.

    def add(self, token: int) -> str:
        """What is certain now that was not before; often empty."""
        self._tokens.append(token)
        text, waited = self._text(), len(self._tokens) - self._until
        loose = len(text) - len(text.rstrip(_UNFINISHED))
        if waited >= _LONGEST:  # Bytes and bytes, and never a whole text: what was before is forgotten.
            loose = 0
        elif loose and waited >= _MOST_UNFINISHED:
            loose = 1  # The last one alone can become a character still; those before it stay what they are.
        new = text[self._said : len(text) - loose]
        if not new:
            return ""
        self._said += len(new)
        if not loose:
            self._from, self._until = self._until, len(self._tokens)
            self._said = len(self._text())
        return new

    def end(self) -> str:
        """What was held back."""
        rest = self._text()[self._said :]
        self._from = self._until = len(self._tokens)
        self._said = 0
        return rest

    def _text(self) -> str:
        return self._tokenizer.decode(
            self._tokens[self._from :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class Stops:
    """Ends a text before the first stop text that is complete in it, however the text is cut into pieces.

    Args:
        stops: none of them empty.

    Attributes:
        found: whether one was there; nothing comes after it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What of the text so far can be shown now."""
        if self.found:
            return ""
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown
        kept = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - kept
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def end(self) -> str:
        """What was held back; the text ends without a stop text."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """How many characters at the end could be the beginning of this stop text."""
        most = min(len(stop) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(stop[:n])), 0)
