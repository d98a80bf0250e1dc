"""What each token leaves in the adapters of a round: exactly in A's first layer, learnt from public text in C's layers.

The gradient at the output of C's last layers is ``J^T W^T (p - e_y)``: it points away from the label's own row of the head. So
columns of factor B are sums of directions that labels have in common, and rows of factor A are sums of inputs. A direction is
learnt by ridge regression on the token's embedding, over public sequences that go through the same parts with the policy's
noise at the cut; a tensor that public text does not explain is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.prior import Prior
from attacks.round_start import RoundStart, modules_of, token_readers
from attacks.sparse import Atoms, Lens
from attacks.sums import RecordedSum
from attacks.view import Noise
from securesplit.model.lora import set_trainable_factor
from securesplit.model.parts import Back, Front, Middle
from securesplit.privacy.clip import clip_sequence

__all__ = ["Public", "Regression", "lenses"]

_BATCH = 8


@dataclass(frozen=True, slots=True)
class Regression:
    """How lenses are learnt.

    Attributes:
        ridge: penalty relative to the mean diagonal of the Gram matrix.
        explained: least part of a tensor's directions that public text must explain.
        widest: most columns of a row.
    """

    ridge: float
    explained: float
    widest: int


@dataclass(frozen=True, slots=True)
class Public:
    """What lenses are learnt from.

    Attributes:
        front, middle, back: the public parts; front and back as the round started.
        sequences: (N, T) public ids.
        noise: the mechanism at the cut, which the clients' own rows went through as well.
        generator: for a simulation of that noise; nothing private is in it.
    """

    front: Front
    middle: Middle
    back: Back
    sequences: Tensor
    noise: Noise
    generator: torch.Generator


@dataclass(slots=True)
class _Seen:
    """Rows at one place of C, for all public positions that have a label.

    Attributes:
        inputs: (n, in) what the module was given. slopes: (n, out) the loss's gradient at its output.
    """

    inputs: list[Tensor]
    slopes: list[Tensor]


def lenses(
    found: RecordedSum, start: RoundStart, public: Public | None, prior: Prior, embedding: Tensor, how: Regression
) -> list[Lens]:
    """Everything through which this sum's tensors show tokens."""
    probability = prior.log_probability.exp()
    shapes = {name: tensor.shape for name, tensor in zip(found.names, found.tensors, strict=True)}
    return [
        *_exact(shapes, start, probability),
        *(
            ()
            if public is None
            else _learnt(shapes, start, public, Atoms(embedding - embedding.mean(0), probability), how)
        ),
    ]


def _exact(shapes: dict[str, tuple[int, ...]], start: RoundStart, probability: Tensor) -> list[Lens]:
    """The first layer of A, where an input is a function of its token and nothing has to be learnt."""
    if start.front is None:
        return []
    readers, inputs = token_readers(
        start.front, sorted({name.rsplit(".lora_", 1)[0] for name in shapes if ".lora_" in name})
    )
    atoms, made = Atoms(inputs, probability), []
    for reader in readers:
        down = start.factors[f"{reader}.lora_A.weight"]
        for factor, change in (("A", torch.eye(inputs.shape[1])), ("B", down.T), ("core", down.T)):
            if (name := f"{reader}.lora_{factor}.weight") in shapes:
                width = shapes[name][1]
                made.append(Lens(name, torch.ones(width), atoms, change, torch.eye(width), transpose=False))
    return made


def _learnt(
    shapes: dict[str, tuple[int, ...]], start: RoundStart, public: Public, atoms: Atoms, how: Regression
) -> list[Lens]:
    """The layers of C, where public text tells what a token leaves: as a label in slopes, as an input or a label in inputs."""
    modules = {
        name: module for name, module in modules_of(public.back).items() if f"{name}.lora_A.weight" in start.factors
    }
    set_trainable_factor(public.back, None)
    labels, tokens, seen = _watch(public, modules)
    made = []
    for module, rows in seen.items():
        slopes, inputs = torch.cat(rows.slopes), torch.cat(rows.inputs)
        up = start.factors[f"{module}.lora_B.weight"]
        for factor, rows_there, named in (
            ("B", slopes, (labels,)),
            ("core", slopes, (labels,)),
            ("A", inputs, (labels, tokens)),
        ):
            name = f"{module}.lora_{factor}.weight"
            if name not in shapes or rows_there.shape[1] > how.widest:
                continue
            fitted = max((_fit(rows_there, ids, atoms, how.ridge) for ids in named), key=lambda fit: fit.explained)
            if fitted.explained < how.explained:
                continue
            if factor == "core":  # Between two constant factors: what is left of a slope behind B.
                kept = fitted.scale[:, None] * up
                size = torch.ones(up.shape[1])
                unexplained = kept.T @ fitted.unexplained @ kept
                made.append(Lens(name, size, atoms, fitted.map @ kept, unexplained, transpose=True))
            else:
                made.append(Lens(name, fitted.scale, atoms, fitted.map, fitted.unexplained, transpose=factor == "B"))
    return made


@dataclass(frozen=True, slots=True)
class _Fit:
    """A ridge regression of directions on embeddings; fields as in :class:`Lens`, and the explained part of the variance."""

    scale: Tensor
    map: Tensor
    unexplained: Tensor
    explained: float


def _fit(rows: Tensor, ids: Tensor, atoms: Atoms, ridge: float) -> _Fit:
    """Every row counts by its direction alone, in coordinates of equal size; rows of zeros say nothing."""
    scale = rows.square().mean(0).sqrt().clamp(min=1e-20)
    rows = rows / scale
    norms = rows.norm(dim=1)
    told = norms > 0
    rows, basis = rows[told] / norms[told, None], atoms.basis[ids[told]]
    gram = basis.T @ basis
    gram.diagonal().add_(ridge * float(gram.diagonal().mean()) + 1e-12)
    found = torch.linalg.solve(gram, basis.T @ rows)
    left = rows - basis @ found
    return _Fit(
        scale, found, left.T @ left / len(rows), 1 - float(left.square().sum() / rows.square().sum().clamp(min=1e-30))
    )


def _watch(public: Public, modules: dict[str, nn.Module]) -> tuple[Tensor, Tensor, dict[str, _Seen]]:
    """Run the public sequences; labels and tokens, (n,), of all positions with a label, and what the modules saw there."""
    seen = {name: _Seen([], []) for name in modules}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> Tensor:
            seen[name].inputs.append(given[0].detach()[:, :-1].flatten(0, 1).float())
            # A leaf of its own where nothing before it learns, so that a gradient is kept in any case.
            result = result if result.requires_grad else result.detach().requires_grad_()
            result.retain_grad()
            outputs[name] = result
            return result

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        for ids in torch.split(public.sequences, _BATCH):
            with torch.no_grad():
                mixed = public.middle(_released(public, ids))
            with torch.enable_grad():
                (public.back(mixed.requires_grad_(), ids) * (ids.shape[1] - 1) * len(ids)).backward()
            for name, output in outputs.items():
                assert output.grad is not None, "every adapter lies between B's output and the loss"
                seen[name].slopes.append(output.grad[:, :-1].flatten(0, 1).float())
    finally:
        for handle in handles:
            handle.remove()
    return public.sequences[:, 1:].flatten(), public.sequences[:, :-1].flatten(), seen


def _released(public: Public, ids: Tensor) -> Tensor:
    """A's rows as the policy's mechanism lets them go, at B's scale; the noise is simulated."""
    hidden: Tensor = public.front(ids)
    noise = public.noise
    if noise.clip is None or not noise.sigma:
        return hidden
    rows = clip_sequence(hidden, noise.clip)
    rows = rows + noise.sigma * torch.randn(rows.shape, generator=public.generator)
    return rows * (noise.clip / math.hypot(noise.clip, noise.sigma * math.sqrt(rows[0].numel())))
