"""Who reads what: public text to train and tune on, and fresh private passages that nothing was chosen on."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from securesplit.data.corpus import read_corpus
from securesplit.errors import InputError

_GRAM = 8  # Two passages that share eight words in a row are taken for excerpts of one source.


@dataclass(frozen=True, slots=True)
class Texts:
    """Token chunks of equal length; no source is in two of the three.

    Attributes:
        train: (S, T) public chunks, many of one passage: unigram, code, client-only training.
        tune: (N, T) public chunks, one of a passage: gates and every choice.
        test: (M, T) private chunks, one of a passage: figures only.
    """

    train: Tensor
    tune: Tensor
    test: Tensor


def read_texts(folder: Path, tokenizer: Any, *, seed: int, sizes: tuple[int, int], length: int) -> Texts:
    """Draw the texts of one seed; different seeds (0, 1, ...) have disjoint ``test`` passages, and all else in common.

    Args:
        folder: holds train.jsonl (public) and test.jsonl (private), as MultiRC has them.
        tokenizer: the model's.
        seed: which passages, and which chunk of each.
        sizes: how many of ``tune`` and ``test``.
        length: T.

    Raises:
        InputError: SS-1201 to SS-1205 for a file that cannot be used, SS-1206 when there are not enough passages.
    """
    public = [record.text for record in read_corpus(folder / "train.jsonl")]
    private = [record.text for record in read_corpus(folder / "test.jsonl")]
    shuffle = random.Random(20261122)  # noqa: S311  # which public file goes where is no secret
    shuffle.shuffle(public)
    shuffle.shuffle(private)
    encode = [_encode(text, tokenizer) for text in public]
    seen = _grams(public)
    test = [
        tokens for text in private if not _grams([text]) & seen and len(tokens := _encode(text, tokenizer)) > length
    ]
    # Passages for tuning come from the end of the list; those with a sibling among the others are dropped.
    tune_count, test_count = sizes
    start = (2 * len(public)) // 3
    held_out, rest = _apart(public, range(start, len(public)))
    tune = [encode[i] for i in held_out if len(encode[i]) > length]
    draw = random.Random(1000)  # noqa: S311  # a benchmark's choice of chunks
    tuning = torch.tensor([_one(tokens, length, draw) for tokens in _slice(tune, 0, tune_count)])
    draw = random.Random(seed)  # noqa: S311
    return Texts(
        torch.tensor([chunk for i in rest for chunk in _chunks(encode[i], length)]),
        tuning,
        torch.tensor([_one(tokens, length, draw) for tokens in _slice(test, seed, test_count)]),
    )


def _encode(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _grams(texts: Iterable[str]) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        found.update(tuple(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1))
    return found


def _apart(texts: Sequence[str], wanted: range) -> tuple[list[int], list[int]]:
    """The wanted passages that share nothing with any other, and all passages that are not wanted."""
    grams = [_grams([text]) for text in texts]
    held = [i for i in wanted if not any(grams[i] & grams[j] for j in range(len(texts)) if j != i)]
    return held, [i for i in range(len(texts)) if i not in wanted]


def _chunks(tokens: list[int], length: int) -> list[list[int]]:
    return [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]


def _one(tokens: list[int], length: int, draw: random.Random) -> list[int]:
    start = draw.randrange(len(tokens) - length)
    return tokens[start : start + length]


def _slice(items: list[list[int]], seed: int, count: int) -> list[list[int]]:
    if len(items) < (seed + 1) * count:
        raise InputError(
            "SS-1206",
            f"seed {seed} needs {(seed + 1) * count} passages of enough tokens, there are {len(items)}",
            hint="Use fewer seeds or sequences.",
        )
    return items[seed * count : (seed + 1) * count]
