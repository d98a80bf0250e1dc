"""Examples as tokens of which only the answer is learnt.

    tokens    prompt ... prompt  answer ... answer  end  fill
    labels    -100   ... -100    answer ... answer  end  -100

Prompt and answer are tokenised apart, so that a prompt has the same tokens in training and in generation. The answer's
tokens cross the cut like all others, noised and paid for; that they alone are learnt changes nothing about that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from securesplit.data.batches import Encoded
from securesplit.errors import InputError

__all__ = ["Answered", "Asked", "Tokens", "answer_tokens", "encode_answers", "prompt_tokens"]


class Asked(Protocol):
    """An example as text, as securesplit/data/tasks/fit.py makes it."""

    @property
    def prompt(self) -> str:
        """What the model is given; empty where all is learnt."""
        ...

    @property
    def answer(self) -> str | None:
        """What it is to learn."""
        ...


class Tokens(Protocol):
    """The parts of a Hugging Face tokenizer that are used here."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The text's token ids, with or without the model's own special tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Answered:
    """One example as tokens.

    Attributes:
        tokens: all of them.
        start: how many stand before the first that is learnt.
    """

    tokens: tuple[int, ...]
    start: int


def prompt_tokens(text: str, tokenizer: Tokens) -> list[int]:
    """A prompt's tokens, with what the model's convention puts in front; what it puts behind would end the text, and goes."""
    ids = [int(i) for i in tokenizer.encode(text, add_special_tokens=True)]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def answer_tokens(text: str, tokenizer: Tokens) -> list[int]:
    """An answer's tokens and the token that ends a text, where the model has one."""
    ids = [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    return ids if tokenizer.eos_token_id is None else [*ids, int(tokenizer.eos_token_id)]


def tokenise(examples: Sequence[Asked], tokenizer: Tokens) -> tuple[Answered, ...]:
    """Examples to tokens.

    Raises:
        InputError: SS-1245 when examples have no answer, which cannot be learnt.
    """
    missing = sum(example.answer is None for example in examples)
    if missing:
        raise InputError(
            "SS-1245", f"{missing} example(s) have no gold answer to learn",
            hint="Train on a labelled file; test files of most tasks have no labels.",
        )  # fmt: skip
    found: list[Answered] = []
    for example in examples:
        assert example.answer is not None
        # A text alone is learnt from its first token on, with what the model's convention puts in front of it.
        front = prompt_tokens(example.prompt, tokenizer) if example.prompt else []
        rest = answer_tokens(example.answer, tokenizer) if front else [*_whole(example.answer, tokenizer)]
        found.append(Answered((*front, *rest), len(front)))
    return tuple(found)


def encode_answers(
    rows: Sequence[Answered],
    texts: Sequence[str],
    max_tokens: int,
    identify: Callable[[bytes], str],
    *,
    users: Sequence[str] | None = None,
) -> tuple[Encoded, ...]:
    """Tokens to what batches are made of; equal examples are told apart as in securesplit/data/batches.py.

    Args:
        rows: of :func:`tokenise`.
        texts: prompt and answer of each row as the ledger is to know it.
        max_tokens: longest sequence.
        identify: keyed name in the ledger.
        users: who pays, under unit ``user``.

    Raises:
        InputError: SS-1222 for a row over ``max_tokens``: nothing is cut here; SS-1221 when no row has two tokens.
    """
    long = sum(len(row.tokens) > max_tokens for row in rows)
    if long:
        raise InputError(
            "SS-1222", f"{long} example(s) are longer than {max_tokens} tokens",
            hint="Raise --max-tokens up to the policy's largest bucket.",
        )  # fmt: skip
    kept: list[Encoded] = []
    equals: Counter[tuple[bytes, Answered]] = Counter()
    for source, (row, text) in enumerate(zip(rows, texts, strict=True)):
        if len(row.tokens) < 2:
            continue
        payer = text.encode("utf-8") if users is None else b"user:" + users[source].encode("utf-8")
        place = equals[payer, row]
        equals[payer, row] += 1
        again = b"" if place == 0 else b"again %d:" % place
        # Where the answer begins is part of the name: another mask makes another gradient of the same tokens.
        named = b"answer %d:" % row.start + b",".join(b"%d" % token for token in row.tokens)
        record = identify(payer if users is not None else again + payer)
        kept.append(Encoded(source, record, row.tokens, identify(again + named), row.start))
    if not kept:
        raise InputError("SS-1221", "no example is longer than one token", hint="Give longer examples.")
    return tuple(kept)


def _whole(text: str, tokenizer: Tokens) -> tuple[int, ...]:
    ids = prompt_tokens(text, tokenizer)
    return tuple(ids) if tokenizer.eos_token_id is None else (*ids, int(tokenizer.eos_token_id))
