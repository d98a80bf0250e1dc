"""What the rest of the model still makes of defended states: one measure for every defence.

    observed -> affine decoder at the server -> B -> C -> loss of the next token, in nats

The decoder is public post-processing, fitted on public text that went through the same defence: linear least squares to the
clean states (the linear MMSE denoiser), then a few steps through the frozen B and C. It is free for an honest server and for
a curious one. Every defence gets the same number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from scripts.defences.defence import Defence
from scripts.defences.world import SENTINEL, World
from securesplit.model.parts import Front

_BATCH = 8
_SIDE_BY_SIDE = 24  # Sequences in one forward pass without gradients.


@dataclass(frozen=True, slots=True)
class Affine:
    """``(rows - mean) @ matrix + bias``: (..., k) to (..., D)."""

    mean: Tensor
    matrix: Tensor
    bias: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Decode."""
        return (rows - self.mean) @ self.matrix + self.bias


@dataclass(frozen=True, slots=True)
class Served:
    """The server of one defence, and how it was chosen on public text.

    Attributes:
        decoder: None feeds B the observation as it is.
        tuned: losses on the public tuning text, by form.
    """

    decoder: Affine | None
    tuned: dict[str, float]

    def __call__(self, observed: Tensor) -> Tensor:
        """(N, T, k) to (N, T, D)."""
        return observed if self.decoder is None else self.decoder(observed)


def least_squares(rows: Tensor, targets: Tensor) -> Affine:
    """The affine map of least squared error, rows (..., k) to targets (..., D)."""
    X, Y = rows.flatten(0, -2).double(), targets.flatten(0, -2).double()
    mean, middle = X.mean(0), Y.mean(0)
    X, Y = X - mean, Y - middle
    gram = X.T @ X
    floor = 1e-6 * float(gram.diagonal().mean()) + 1e-12
    matrix = torch.linalg.solve(gram + floor * torch.eye(len(gram), dtype=torch.float64), X.T @ Y)
    return Affine(mean.float(), matrix.float(), middle.float())


def opening(front: Front) -> Tensor:
    """The sentinel's own state, (1, 1, D), which anybody computes."""
    with torch.inference_mode():
        state = front(torch.tensor([[SENTINEL]]))
    return state.float().clone()


def middle_out(world: World, first: Tensor, rows: Tensor) -> Tensor:
    """B's output (N, T + 1, D) bfloat16 on states (N, T, D) behind the sentinel's."""
    hidden = torch.cat([first.expand(len(rows), -1, -1), rows], dim=1)
    return world.middle(hidden.to(torch.bfloat16))  # type: ignore[no-any-return]


def token_losses(world: World, mixed: Tensor, tokens: Tensor) -> Tensor:
    """(N, T - 1) nats for tokens 1.. from B's output (N, T + 1, D): those whose context holds a private row."""
    logits = world.back(mixed)[:, 1:-1].float()
    flat = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(len(tokens), -1)


@torch.inference_mode()
def sequence_losses(world: World, first: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """(N,) mean loss of every sequence when B is fed these states."""
    parts = zip(torch.split(rows, _SIDE_BY_SIDE), torch.split(tokens, _SIDE_BY_SIDE), strict=True)
    return torch.cat([token_losses(world, middle_out(world, first, r), t).mean(1) for r, t in parts]).clone()


@dataclass(frozen=True, slots=True)
class Public:
    """Public text as one defence shows it.

    Attributes:
        train, tune: tokens. clean: states of ``train`` from the pre-trained A, which B expects.
        hidden, hidden_tune: states from the client's own A.
    """

    train: Tensor
    tune: Tensor
    clean: Tensor
    hidden: Tensor
    hidden_tune: Tensor


def fit_server(
    world: World, first: Tensor, defence: Defence, public: Public, *, own: Affine | None, steps: int, seed: int
) -> Served:
    """Fit the decoder, train it through B and C, and keep what the tuning text likes best.

    Args:
        world: the model. first: the sentinel's state. defence: the defence. public: public text.
        own: a decoder that the defence was trained with, if it was.
        steps: of training, the same for every defence. seed: of the noise and the batches.
    """
    generator = torch.Generator().manual_seed(seed)

    def shown(hidden: Tensor) -> Tensor:
        return defence.served(hidden, defence.release(hidden, generator))

    observed, tuning = shown(public.hidden), shown(public.hidden_tune)
    forms: dict[str, Affine | None] = {"least squares": least_squares(observed, public.clean)}
    if observed.shape[-1] == public.clean.shape[-1]:
        forms["raw"] = None
    if own is not None:
        forms["own"] = own
    tuned: dict[str, float] = {}

    def judge(name: str) -> None:
        rows = Served(forms[name], {})(tuning)
        tuned[name] = float(sequence_losses(world, first, rows, public.tune).mean())

    for name in tuple(forms):
        judge(name)
    start = forms[min(tuned, key=tuned.__getitem__)]
    if steps:
        width = observed.shape[-1]
        start = start or Affine(torch.zeros(width), torch.eye(width), torch.zeros(width))
        forms["trained"] = _train(world, first, start, shown, public, steps, generator)
        judge("trained")
    return Served(forms[min(tuned, key=tuned.__getitem__)], {k: round(v, 4) for k, v in tuned.items()})


def _train(
    world: World,
    first: Tensor,
    start: Affine,
    shown: Callable[[Tensor], Tensor],
    public: Public,
    steps: int,
    generator: torch.Generator,
) -> Affine:
    """Adam on matrix and bias, in units in which both the rows and the states have variance 1; a cosine schedule."""
    with torch.no_grad():
        size = (shown(public.hidden[:64]) - start.mean).std()
        scale = public.clean.std()
    matrix = nn.Parameter(start.matrix * (size / scale))
    bias = nn.Parameter(start.bias / scale)
    optimizer = torch.optim.Adam([matrix, bias], lr=0.0, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        picks = torch.randint(len(public.train), (_BATCH,), generator=generator)
        rows = ((shown(public.hidden[picks]) - start.mean) / size) @ matrix + bias
        loss = token_losses(world, middle_out(world, first, rows * scale), public.train[picks]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([matrix, bias], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Affine(start.mean, matrix.detach() * (scale / size), bias.detach() * scale)
