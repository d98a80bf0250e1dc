"""Who has what: the public model cut after two layers, public text, and private passages that nothing was chosen on."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from securesplit.data.corpus import read_corpus
from securesplit.errors import InputError
from securesplit.model.parts import Back, Front, Middle, PartCache
from securesplit.model.store import load_back, load_front, load_middle, load_whole

SENTINEL = 0  # <|endoftext|>
_GRAM = 8  # Two passages that share eight words in a row are taken for excerpts of one source.
_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Texts:
    """Chunks of T tokens; no source is in two of the three.

    Attributes:
        train: (S, T) public: every fit. tune: (M, T) public: every choice. test: (K, N, T) private, for each of K seeds.
    """

    train: Tensor
    tune: Tensor
    test: Tensor


@dataclass(frozen=True, slots=True)
class World:
    """What is public.

    Attributes:
        front: A, in float32. middle, back: B and C in bfloat16, frozen. whole: the language model in bfloat16.
        table: (V, D) embeddings. log_unigram: (V,).
    """

    front: Front
    middle: Middle
    back: Back
    whole: Any
    table: Tensor
    log_unigram: Tensor


def load_world(folder: Path, train: Tensor) -> World:
    """Load the parts and count the public tokens.

    Args:
        folder: a model directory that is cut after the layers that the client holds.
        train: public tokens.
    """
    whole = load_whole(folder)
    front = load_front(folder)
    table = front.base.get_input_embeddings().weight.detach().clone()
    middle, back = load_middle(folder).to(torch.bfloat16), load_back(folder).to(torch.bfloat16)
    whole = whole.to(torch.bfloat16)
    for part in (front, middle, back, whole):
        part.requires_grad_(requires_grad=False)
    return World(front, middle, back, whole, table, unigram(train, len(table)))


def unigram(chunks: Tensor, vocabulary: int) -> Tensor:
    """(V,) smoothed log frequencies of public text; a fiftieth of a count for every token."""
    counts = torch.bincount(chunks.flatten(), minlength=vocabulary).double() + 0.02
    return (counts / counts.sum()).log().float()


class Opened:
    """Partition A behind a public sentinel, whose row nobody sends: what :class:`attacks.view.Front` asks for.

    The state of a text's first position has many times the norm of the others; with the sentinel there it is public.

    Args:
        front: partition A.
        count: sequences in a new cache.
    """

    def __init__(self, front: Front, count: int = 1) -> None:
        self.front, self.count = front, count

    def __call__(self, input_ids: Tensor, *, cache: PartCache | None = None) -> Tensor:
        """(B, T) ids to (B, T, D) states, after the sentinel and what the cache holds."""
        if cache is not None:
            return self.front(input_ids, cache=cache)
        return self.front(with_sentinel(input_ids))[:, 1:]

    def new_cache(self) -> PartCache:
        """A cache that holds the sentinel."""
        cache = self.front.new_cache()
        self.front(torch.full((self.count, 1), SENTINEL), cache=cache)
        return cache


def with_sentinel(tokens: Tensor) -> Tensor:
    """(N, T) to (N, T + 1)."""
    return torch.cat([torch.full((len(tokens), 1), SENTINEL), tokens], dim=1)


def states(front: Front, tokens: Tensor) -> Tensor:
    """(N, T) ids to (N, T, D) float32 states, the sentinel's left out."""
    with torch.inference_mode():
        found = [Opened(front)(part).float() for part in torch.split(tokens, _AT_ONCE)]
    return torch.cat(found).clone()  # A clone outside of inference mode may take part in training.


def half(front: Front) -> Front:
    """A copy in bfloat16: thrice as fast, and its rounding is far below any noise here."""
    return copy.deepcopy(front).to(torch.bfloat16)


def read_texts(folder: Path, tokenizer: Any, *, seeds: int, sizes: tuple[int, int], length: int) -> Texts:
    """Draw the texts; private passages that share eight words with a public one are dropped.

    Args:
        folder: holds train.jsonl (public) and val.jsonl (private), as MultiRC has them.
        tokenizer: the model's.
        seeds: K.
        sizes: passages for tuning, and private passages of a seed.
        length: T.

    Raises:
        InputError: SS-1201 to SS-1205 for a file that cannot be used, SS-1206 when there are not enough passages.
    """
    public = [record.text for record in read_corpus(folder / "train.jsonl")]
    private = [record.text for record in read_corpus(folder / "val.jsonl")]
    draw = random.Random(20261122)  # noqa: S311  # which public file goes where is no secret
    draw.shuffle(public)
    draw.shuffle(private)
    tune_count, test_count = sizes
    seen = _grams(public)
    private = [text for text in private if not _grams([text]) & seen]
    start = len(public) - 2 * tune_count
    earlier = _grams(public[:start])
    held: list[str] = []
    rest = public[:start]
    for text in public[start:]:
        (rest if _grams([text]) & earlier else held).append(text)

    def encode(texts: Iterable[str]) -> list[list[int]]:
        ids = (list(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
        return [tokens for tokens in ids if len(tokens) > length]

    def one(tokens: list[int]) -> list[int]:
        start = draw.randrange(len(tokens) - length)
        return tokens[start : start + length]

    test, tune = encode(private), encode(held)
    if len(test) < seeds * test_count or len(tune) < tune_count:
        raise InputError(
            "SS-1206",
            f"{seeds * test_count} private and {tune_count} public passages of enough tokens are needed, "
            f"there are {len(test)} and {len(tune)}",
            hint="Use fewer seeds or sequences.",
        )
    train = [t[i : i + length] for t in encode(rest) for i in range(0, len(t) - length + 1, length)]
    draw.shuffle(train)
    return Texts(
        torch.tensor(train),
        torch.tensor([one(tokens) for tokens in tune[:tune_count]]),
        torch.tensor([one(tokens) for tokens in test[: seeds * test_count]]).view(seeds, test_count, length),
    )


def _grams(texts: Iterable[str]) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        found.update(tuple(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1))
    return found
