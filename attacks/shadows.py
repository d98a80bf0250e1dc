"""Shadow models: LoRA copies of the public model, trained on public text that holds no candidate (offline LiRA).

A shadow should differ from the trained model in one thing, that no candidate was in its text. So it copies what the
trained model gives away by itself: which weights moved, at which rank, and how far; and it stops when it has moved as far.
Its data order and its draw of texts come from the run's seed. Nothing private is trained on, and nothing is released.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attacks.knowledge import Knowledge
from attacks.view import ServerView
from securesplit.model.lora import adapter_layout, adapter_parameters, add_adapters, read_adapters, write_adapters

__all__ = ["Recipe", "fine_tune", "moved", "recipe_of", "shadow_models"]

_IGNORED = -100
# Singular values of an update below this part of the largest are rounding of the merged weights.
_ROUNDING = 0.02
_MOST_RANK = 64


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a shadow is trained.

    Attributes:
        rank: of its adapters. scale: alpha / rank. targets: endings of the layers' names; empty for the attention.
        samples: texts. batch: sequences in a step. steps: at most. rate: AdamW's.
        moved: Frobenius norm of the update of all weights at which it stops; None to use up the steps.
        limit: tokens of a text.
    """

    rank: int
    scale: float
    targets: tuple[str, ...]
    samples: int
    batch: int
    steps: int
    rate: float
    moved: float | None
    limit: int


def recipe_of(trained: Any, public: Any, view: ServerView, base: Recipe) -> Recipe:
    """What the trained model says of its own training, over the settings' guesses.

    Args:
        trained: the model with its adapters merged. With loose adapters, or equal to the public one, it says nothing here.
        public: the model it started from.
        view: distinct releases in the traffic say how many records were trained on.
        base: the guesses.
    """
    before, after = dict(public.named_parameters()), dict(trained.named_parameters())
    moved_by = {
        name: (after[name].detach() - weight.detach()).float()
        for name, weight in before.items()
        if weight.ndim == 2 and name in after and after[name].shape == weight.shape
    }
    moved_by = {name: delta for name, delta in moved_by.items() if bool(delta.any())}
    records = len({seen.rows.tobytes() for seen in view.traffic})
    recipe = replace(base, samples=records or base.samples)
    if not moved_by:
        return recipe
    first = torch.linalg.svdvals(next(iter(moved_by.values())))
    return replace(
        recipe,
        rank=min(_MOST_RANK, int((first > _ROUNDING * first[0]).sum())),
        targets=tuple(sorted({name.removesuffix(".weight").rsplit(".", 1)[-1] for name in moved_by})),
        moved=math.sqrt(sum(float(delta.double().square().sum()) for delta in moved_by.values())),
    )


def shadow_models(
    known: Knowledge, recipe: Recipe, count: int, *, exclude: frozenset[tuple[int, ...]]
) -> Iterator[Any]:
    """Train shadows one after the other in one copy of the public model, and give each out in evaluation mode.

    Args:
        exclude: token ids of all candidates, cut at the recipe's limit; public texts that equal one are left out.
    """
    texts = [text[: recipe.limit] for text in known.prior.texts]
    texts = [text for text in texts if len(text) > 1 and text not in exclude]
    assert known.model.whole is not None, "the worker always has the public model"
    if not texts:
        return
    model = copy.deepcopy(known.model.whole()).float()
    layout = add_adapters(model, recipe.rank, recipe.scale * recipe.rank, recipe.targets, seed=known.seed)
    start = read_adapters(model, layout)
    for number in range(count):
        generator = torch.Generator().manual_seed(known.seed * 1009 + number)
        chosen = torch.randperm(len(texts), generator=generator)[: recipe.samples].tolist()
        write_adapters(model, layout, start)
        fine_tune(model, [texts[i] for i in chosen], recipe, generator)
        yield model


def fine_tune(model: Any, texts: Sequence[Sequence[int]], recipe: Recipe, generator: torch.Generator) -> int:
    """Train a model's adapters on texts, as a client trains: AdamW on the mean loss over all but the padding.

    Returns:
        Steps taken.
    """
    parameters = list(adapter_parameters(model))
    optimiser = torch.optim.AdamW(parameters, lr=recipe.rate, weight_decay=0.0)
    model.train()
    order: list[int] = []
    taken = 0
    with torch.enable_grad():
        while taken < recipe.steps:
            if not order:
                order = torch.randperm(len(texts), generator=generator).tolist()
            part, order = order[: recipe.batch], order[recipe.batch :]
            ids, labels = _stacked([texts[i] for i in part])
            optimiser.zero_grad()
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            optimiser.step()
            taken += 1
            if recipe.moved is not None and moved(model, recipe.scale) >= recipe.moved:
                break
    model.eval()
    return taken


def _stacked(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, texts))
    rows = [[*text, *[0] * (width - len(text))] for text in texts]
    marks = [[*text, *[_IGNORED] * (width - len(text))] for text in texts]
    return torch.tensor(rows), torch.tensor(marks)


def moved(model: Any, scale: float) -> float:
    """Frobenius norm of ``scale B A`` over all adapters, by r x r products alone: |B A|^2 = tr(B'B A A')."""
    held: dict[str, dict[str, nn.Parameter]] = {}
    names = [tensor.name for tensor in adapter_layout(model).tensors]
    for name, parameter in zip(names, adapter_parameters(model), strict=True):
        stem, factor = name.rsplit(".lora_", 1)
        held.setdefault(stem, {})[factor[0]] = parameter
    total = 0.0
    for pair in held.values():
        a, b = pair["A"].detach().double(), pair["B"].detach().double()
        total += float(((b.T @ b) * (a @ a.T)).sum())
    return scale * math.sqrt(total)
