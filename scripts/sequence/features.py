"""Pooled rows of A, of the client's own layers, and of the whole model; each computed once and kept in a folder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from securesplit.model.parts import Back, Front, Middle
from securesplit.model.pool import pool_rows
from securesplit.model.store import load_back, load_front, load_middle, load_tokenizer

MAX_TOKENS = 96
PROMPT = ("Question: ", "\nAnswer:")  # What the whole model reads of a public question, and its last row is kept.
_SENTINEL = 0  # <|endoftext|>, public; its row is cut off.


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Of N texts.

    Attributes:
        shallow: (N, 2D) mean and last of A's rows: all that a release is made of.
        own: (N, 4D) the same, and the same of C applied to A's rows: all the layers that a client has.
    """

    shallow: Tensor
    own: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """The parts, and where rows are kept between runs. B is cut after ``depth`` of its layers."""

    front: Front
    middle: Middle
    back: Back
    tokenizer: Any
    name: str
    depth: int


def load_parts(directory: Path, depth: int) -> Model:
    """Load all parts in float32 and cut B after ``depth`` layers."""
    middle = load_middle(directory).float()
    middle.module.layers = middle.module.layers[:depth]
    manifest = hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()
    front, back = load_front(directory).float(), load_back(directory).float()
    return Model(front, middle, back, load_tokenizer(directory), manifest, depth)


def shallow_features(model: Model, texts: Sequence[str], cache: Path, tell: Callable[[str], None]) -> Features:
    """Pooled rows of the client's layers."""

    def compute(tokens: Tensor, lengths: list[int]) -> Tensor:
        cut = model.front(tokens)
        alone = model.back.base(inputs_embeds=cut, use_cache=False).last_hidden_state
        parts = [
            pool_rows(rows[:, 1:], [n - 1 for n in lengths], how)[:, 0]
            for rows in (cut, alone)
            for how in ("mean", "last")
        ]
        return torch.cat(parts, dim=1)

    rows = _kept(model, "own", ("", ""), texts, cache, tell, compute)
    return Features(rows[:, : 2 * model.front.width], rows)


def deep_features(model: Model, texts: Sequence[str], cache: Path, tell: Callable[[str], None]) -> Tensor:
    """(N, D) the whole model's last row of each text in :data:`PROMPT`, after ``depth`` layers of B."""

    def compute(tokens: Tensor, lengths: list[int]) -> Tensor:
        return pool_rows(model.middle(model.front(tokens)), lengths, "last")[:, 0]

    return _kept(model, f"deep-{model.depth}", PROMPT, texts, cache, tell, compute)


def _kept(
    model: Model,
    kind: str,
    frame: tuple[str, str],
    texts: Sequence[str],
    cache: Path,
    tell: Callable[[str], None],
    compute: Callable[[Tensor, list[int]], Tensor],
) -> Tensor:
    digest = hashlib.sha256("\0".join((model.name, kind, *frame, str(MAX_TOKENS), *texts)).encode()).hexdigest()
    path = cache / f"{digest[:32]}.safetensors"
    if path.is_file():
        kept: Tensor = load_file(path)["rows"]
        return kept
    rows = _run(model, frame, texts, compute, lambda done: tell(f"{kind}: {done} of {len(texts)} texts"))
    cache.mkdir(parents=True, exist_ok=True)
    save_file({"rows": rows}, path)
    return rows


@torch.no_grad()
def _run(
    model: Model,
    frame: tuple[str, str],
    texts: Sequence[str],
    compute: Callable[[Tensor, list[int]], Tensor],
    tell: Callable[[int], None],
) -> Tensor:
    head, tail = (model.tokenizer.encode(part) if part else [] for part in frame)
    encode = model.tokenizer.encode
    ids = [[_SENTINEL, *head, *encode(text, truncation=True, max_length=MAX_TOKENS), *tail] for text in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # Neighbours in length: little padding.
    found: dict[int, Tensor] = {}
    told = time.monotonic()
    for start in range(0, len(order), 32):
        batch = order[start : start + 32]
        lengths = [len(ids[i]) for i in batch]
        tokens = torch.tensor([ids[i] + [_SENTINEL] * (max(lengths) - len(ids[i])) for i in batch])
        found.update(zip(batch, compute(tokens, lengths), strict=True))
        if time.monotonic() - told > 10:
            told = time.monotonic()
            tell(len(found))
    return torch.stack([found[i] for i in range(len(ids))]).contiguous()
