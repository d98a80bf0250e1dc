"""What every client held at the start of a round, rebuilt from public facts: A and C with the adapters that sums have moved.

The adapters' first values follow from the job's public seed (securesplit/model/lora.py), and every opened sum moves them alike
at all clients: by the mean of updates, or in regime ``round`` by one AdamW step along the mean gradient. So a server that opens
sums knows the adapters of each round's start. Under ``share-a`` factor B stays at its site and the public start stands for it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks.adamw import EPS
from attacks.sums import BEHIND, RecordedSum
from attacks.view import fork
from securesplit.model.descent import Recipe
from securesplit.model.lora import Layout, adapter_layout, add_adapters, add_prefixes, read_adapters, write_adapters
from securesplit.model.parts import Back, Front, Part

__all__ = ["RoundStart", "modules_of", "next_layer_inputs", "round_start", "shallow", "token_readers"]

_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class RoundStart:
    """The clients' parts at the start of a round.

    Attributes:
        front, back: A and C with adapters; None where the part is not at hand.
        factors: value of each factor of each adapter, by name.
    """

    front: Front | None
    back: Back | None
    factors: dict[str, Tensor]


class _Enough(Exception):
    """No error: it ends a forward pass that has shown what was wanted."""


def round_start(front: object, back: object, target: RecordedSum, sums: Sequence[RecordedSum]) -> RoundStart:
    """Rebuild the start of ``target``'s round.

    Args:
        front, back: the public parts, with or without a code around them; None for what is not at hand. They are copied,
            and the copies share all weights that do not learn.
        target: the round.
        sums: all that were opened; of several with one number the last stands.
    """
    parts = (shallow(front, Front), shallow(back, Back))
    adapters = target.job.adapters
    for part in parts:
        if part is not None:
            own = adapters.of(part.role)
            if own.method == "prefix":
                assert own.prefix_length is not None, "the job's own rule"
                add_prefixes(part, own.prefix_length, seed=own.seed)
                continue
            # Dropout is left out: at rest nothing is dropped.
            add_adapters(
                part, own.rank, own.alpha, own.targets, seed=own.seed, core=own.sharing == "core", rslora=own.rslora
            )  # fmt: skip
    for earlier in {found.round: found for found in sums if found.round < target.round}.values():
        for part in parts:
            if part is not None:
                _move(part, earlier)
    factors = {name: value for part in parts if part is not None for name, value in _values(part).items()}
    found_front, found_back = parts
    return RoundStart(
        front=found_front if isinstance(found_front, Front) else None,
        back=found_back if isinstance(found_back, Back) else None, factors=factors,
    )  # fmt: skip


def shallow(part: object, kind: type[Part]) -> Part | None:
    """A part of this kind whose structure is its own and whose weights are not; a code around it is left behind.

    Returns:
        None for anything else than such a part.
    """
    if not isinstance(part, kind):
        return None
    known: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in part.module.parameters()}
    known |= {id(buffer): buffer for buffer in part.module.buffers()}
    return kind(copy.deepcopy(part.module, known), part.architecture, part.span, part.layers_total)


def _move(part: Part, earlier: RecordedSum) -> None:
    """Apply one sum to a part's adapters."""
    moves = {name: tensor for name, tensor in zip(earlier.names, earlier.tensors, strict=True) if name not in BEHIND}
    layout = Layout(tuple(tensor for tensor in adapter_layout(part).tensors if tensor.name in moves))
    if not layout.tensors:
        return
    mean = np.concatenate([moves[tensor.name].reshape(-1) for tensor in layout.tensors]).astype(np.float64)
    held = read_adapters(part, layout)
    if earlier.sent == "gradients":  # Regime `round`: one step of AdamW a round, whose moments are new.
        said = earlier.job.optimiser
        recipe = Recipe(
            said.client_lr,
            schedule=said.schedule,
            warmup=said.warmup_of(said.client_steps),
            span=said.client_steps or 0,
        )
        rate = recipe.rate(earlier.round)
        mean = -rate * mean / (np.abs(mean) + EPS) - rate * said.weight_decay * held
    write_adapters(part, layout, (held + mean).astype(np.float32))


def _values(part: Part) -> dict[str, Tensor]:
    found, start = {}, 0
    layout = adapter_layout(part)
    flat = read_adapters(part, layout)
    for tensor in layout.tensors:
        size = math.prod(tensor.shape)
        found[tensor.name] = torch.from_numpy(flat[start : start + size].reshape(tensor.shape).copy())
        start += size
    return found


def modules_of(part: Part) -> dict[str, nn.Module]:
    """A part's modules by the whole model's names."""
    return {part.global_name(local): module for local, module in part.module.named_modules() if local}


def captured(run: Callable[[], object], modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What each of these modules is given in one forward pass, which ends as soon as all have been given something."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen[name] = given[0].detach()
            if len(seen) == len(modules):
                raise _Enough

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            run()
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def token_readers(front: Front, names: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
    """Which of these modules read nothing but the token at their position, and what they read for every token.

    In a model with rotary positions they are the attention's projections in the very first layer.

    Args:
        front: A.
        names: of modules that have adapters.

    Returns:
        The modules' names, all of one input; and (V, in) float32, that input by token. Without any: ``((), (0, 0))``.
    """
    held = modules_of(front)
    layer = [name for name in names if name in held and front.span.start in _numbers(name)] if 0 in front.span else []
    modules = {name: held[name] for name in layer}
    if not modules:
        return (), torch.zeros(0, 0)
    pair = captured(lambda: front(torch.tensor([[3, 1]])), modules)
    alone = captured(lambda: front(torch.tensor([[1]])), modules)
    first = next(iter(pair))  # In the order of computation: what reads tokens comes before what reads anything else.
    readers = tuple(
        name for name in modules
        if pair[name].shape == pair[first].shape and torch.equal(pair[name], pair[first])
        and torch.allclose(pair[name][0, 1], alone[name][0, 0], atol=1e-6)
    )  # fmt: skip
    if not readers:
        return (), torch.zeros(0, 0)
    vocabulary = len(front.base.get_input_embeddings().weight)
    wanted = {readers[0]: modules[readers[0]]}
    rows = []
    for start in range(0, vocabulary, _CHUNK):
        ids = torch.arange(start, min(start + _CHUNK, vocabulary))[:, None]
        rows.append(captured(partial(front, ids), wanted)[readers[0]][:, 0].float())
    return readers, torch.cat(rows)


def next_layer_inputs(front: Front, prefix: Sequence[int], candidates: Tensor, wanted: dict[str, nn.Module]) -> Tensor:
    """What a later layer's modules are given at the last position, for each candidate behind a prefix.

    Args:
        front: A. prefix: ids. candidates: (N,) ids. wanted: one module, by name.

    Returns:
        (N, in) float32.
    """
    cache = front.new_cache()
    if prefix:
        with torch.no_grad():
            front(torch.tensor([list(prefix)]), cache=cache)
    name, rows = next(iter(wanted)), []
    for start in range(0, len(candidates), _CHUNK):
        ids = candidates[start : start + _CHUNK]
        grown = fork(cache, torch.zeros(len(ids), dtype=torch.int64)) if prefix else None
        rows.append(captured(partial(front, ids[:, None], cache=grown), wanted)[name][:, -1].float())
    return torch.cat(rows)


def _numbers(name: str) -> tuple[int, ...]:
    """The numbers in a module's name; the first is its layer's."""
    return tuple(int(piece) for piece in name.split(".") if piece.isdigit())[:1]
