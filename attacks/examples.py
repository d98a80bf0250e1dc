"""Texts beside what an attack made of them, piece by piece. They are private, and leave a run only where it may show them."""

from __future__ import annotations

from collections.abc import Sequence

from attacks.exchange import Answer, Recovered
from attacks.metrics import Decode, span_of
from attacks.report import Example, Piece
from attacks.scoring import Scorer, guesses_of
from attacks.truth import Truth


def examples_of(answers: Sequence[Answer], attack: str, scorer: Scorer, count: int) -> tuple[Example, ...]:
    """The first ``count`` sequences with what the attack recovered; of several seeds the first."""
    answer = next(a for a in answers if a.attack == attack and isinstance(a, Recovered))
    assert isinstance(answer, Recovered)
    guesses = guesses_of(answer, scorer.truths)
    return tuple(_example(t, guesses[t.key], attack, scorer.decode) for t in scorer.truths[:count])


def _example(truth: Truth, guess: Sequence[int], attack: str, decode: Decode) -> Example:
    guess = [token for token in guess[: len(truth.tokens)] if token >= 0]
    shift = len(truth.tokens) - len(guess) if len(guess) < len(truth.tokens) else 0
    private = [span for piece in truth.pii if (span := span_of(piece, truth.tokens, decode)) is not None]
    named = {i for span in private for i in span}
    right = [i >= shift and guess[i - shift] == token for i, token in enumerate(truth.tokens)]
    return Example(
        truth=decode(truth.tokens),
        recovered=decode(guess),
        attack=attack,
        truth_pieces=_pieces(truth.tokens, [i in named for i in range(len(truth.tokens))], right, decode),
        recovered_pieces=_pieces(guess, [i + shift in named for i in range(len(guess))], right[shift:], decode),
    )


def _pieces(tokens: Sequence[int], named: Sequence[bool], right: Sequence[bool], decode: Decode) -> tuple[Piece, ...]:
    """Runs of tokens with the same marks. Prefixes are decoded, because a character may be spread over several tokens."""
    found: list[Piece] = []
    start, before = 0, ""
    for end in range(1, len(tokens) + 1):
        if end < len(tokens) and (named[end], right[end]) == (named[start], right[start]):
            continue
        whole = decode(tokens[:end])
        found.append(Piece(text=whole[len(before) :], pii=named[start], right=right[start]))
        start, before = end, whole
    return tuple(found)
