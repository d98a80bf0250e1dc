"""Denoising at the client: B's answer is corrected by what the client alone has beside it.

    B's output + linear map of (B's output, the client's clean states, the noise that it drew) -> C -> loss

The place of Split-N-Denoise's denoiser (arXiv 2310.09130), in linear form, trained on public text for the loss itself through
the frozen C. Nothing more is sent than without it, so that nothing more is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scripts.defences.defence import Defence
from scripts.defences.utility import Public, Served, middle_out, token_losses
from scripts.defences.world import World

_BATCH = 8
_SIDE_BY_SIDE = 24


@dataclass(frozen=True, slots=True)
class Heard:
    """Some sequences as the client has them after B answered.

    Attributes:
        mixed: (N, T + 1, D) of B. sides: (N, T, 3 D), B's output, clean states and noise, standardised with public moments.
        tokens: (N, T).
    """

    mixed: Tensor
    sides: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class Denoiser:
    """The correction, in units of B's output.

    Attributes:
        mean, size: (3 D,) of the sides. matrix: (3 D, D); all 0 where the tuning text liked no correction.
    """

    mean: Tensor
    size: Tensor
    matrix: Tensor

    def corrected(self, heard: Heard) -> Tensor:
        """(N, T + 1, D); the sentinel's row is kept."""
        rows = heard.mixed[:, 1:] + (heard.sides @ self.matrix).to(heard.mixed.dtype)
        return torch.cat([heard.mixed[:, :1], rows], dim=1)


def listen(
    world: World, first: Tensor, defence: Defence, served: Served, seen: tuple[Tensor, Tensor], tokens: Tensor
) -> Heard:
    """Send what was released, (N, T, k) of states (N, T, D), through the server, and put beside it what is known.

    The sides are raw; :func:`fit_denoiser` and :func:`standard` give them their units.
    """
    observed, hidden = seen
    with torch.inference_mode():
        parts = [middle_out(world, first, rows) for rows in torch.split(served(observed), _SIDE_BY_SIDE)]
    mixed = torch.cat(parts).clone()
    noise = observed - defence.expected(hidden)
    return Heard(mixed, torch.cat([mixed[:, 1:].float(), hidden, noise], dim=-1), tokens)


def standard(heard: Heard, mean: Tensor, size: Tensor) -> Heard:
    """The same with standardised sides; a few rows of many times the common length are bounded."""
    return Heard(heard.mixed, ((heard.sides - mean) / size).clamp(-8, 8), heard.tokens)


def losses(world: World, denoiser: Denoiser, heard: Heard) -> Tensor:
    """(N,) mean loss of every sequence of standardised sides behind the denoiser."""
    out = []
    with torch.inference_mode():
        for part in torch.split(torch.arange(len(heard.tokens)), _SIDE_BY_SIDE):
            some = Heard(heard.mixed[part], heard.sides[part], heard.tokens[part])
            out.append(token_losses(world, denoiser.corrected(some), some.tokens).mean(1))
    return torch.cat(out).clone()


def fit_denoiser(
    world: World, first: Tensor, defence: Defence, served: Served, public: Public, *, rows: int, steps: int, seed: int
) -> Denoiser:
    """Adam from no correction at all, through C; dropped when the tuning text is not the better for it.

    Args:
        world, first, defence, served, public: as in :func:`scripts.defences.utility.fit_server`.
        rows: public sequences that are sent through B. steps: batches of eight. seed: of the noise and the batches.
    """
    generator = torch.Generator().manual_seed(seed)

    def hear(hidden: Tensor, tokens: Tensor) -> Heard:
        return listen(world, first, defence, served, (defence.release(hidden, generator), hidden), tokens)

    raw = hear(public.hidden[:rows], public.train[:rows])
    flat = raw.sides.flatten(0, 1)
    mean, size = flat.mean(0), flat.std(0).clamp_min(1e-6)
    heard, tuning = standard(raw, mean, size), standard(hear(public.hidden_tune, public.tune), mean, size)
    # One unit of the matrix moves a coordinate of B's output by its own deviation.
    unit = size[: heard.mixed.shape[-1]]
    matrix = nn.Parameter(torch.zeros(heard.sides.shape[-1], heard.mixed.shape[-1]))
    optimizer = torch.optim.Adam([matrix], lr=0.0, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        picks = torch.randint(len(heard.tokens), (_BATCH,), generator=generator)
        some = Heard(heard.mixed[picks], heard.sides[picks], heard.tokens[picks])
        loss = token_losses(world, Denoiser(mean, size, matrix * unit).corrected(some), some.tokens).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([matrix], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    forms = [Denoiser(mean, size, torch.zeros_like(matrix)), Denoiser(mean, size, matrix.detach() * unit)]
    return min(forms, key=lambda form: float(losses(world, form, tuning).mean()))
