"""Defences that are trained: partition A, a code and the server's decoder together, through the frozen B and C.

* ``nopeek``: loss + alpha x distance correlation of token embeddings and released states (Vepakomma et al. 2020).
* ``vib``: loss + beta x KL(N(m(h), v(h)) || N(0, 1)) per row (Alemi et al. 2017; MID and ADMI have this form).
* ``shaped``: no regulariser; the clipped code goes through the noise of a stated mu, so that training puts what the task
  needs where the noise hurts least, and the guarantee stays.

Public text only. A level starts where the one before it ended, so that strong levels have had more steps than weak ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scripts.defences.defence import Bottleneck, Defence, Linear, clip_rows
from scripts.defences.moments import distance_correlation, principal
from scripts.defences.utility import Affine, middle_out, opening, token_losses
from scripts.defences.world import Opened, World
from securesplit.model.parts import Front

_BATCH = 8
_RATE = {"front": 1e-4, "code": 1e-3, "level": 3e-2}


@dataclass(frozen=True, slots=True)
class Trained:
    """What training gave to all clients, and thereby to the server.

    Attributes:
        front: their A. defence: code and noise. decoder: the server's side of the code; None where B is fed the states.
        facts: what the last steps measured: loss, and the regulariser without its weight.
    """

    front: Front
    defence: Defence
    decoder: Affine | None
    facts: dict[str, float]


class Model(nn.Module):
    """All that is trained, in units in which states and codes have variance 1.

    Args:
        front: A, copied. kind: as the module says. mean: (D,) public. basis: (D, k) principal directions. size: the
            states' typical length.
    """

    def __init__(self, front: Front, kind: str, mean: Tensor, basis: Tensor, size: float) -> None:
        super().__init__()
        self.kind, self.size, self.k = kind, size, basis.shape[1]
        self.front = copy.deepcopy(front)
        for name, weight in self.front.named_parameters():
            weight.requires_grad_(requires_grad="embed" not in name)
        self.register_buffer("mean", mean)
        if kind != "nopeek":
            stretch = math.sqrt(self.k)
            self.encode = nn.Parameter(basis * stretch)
            self.encode_bias = nn.Parameter(torch.zeros(self.k))
            self.decode = nn.Parameter(basis.T / stretch)
            self.decode_bias = nn.Parameter(torch.zeros(basis.shape[0]))
        if kind == "vib":
            self.spread = nn.Parameter(torch.zeros(basis.shape[0], self.k))
            self.level = nn.Parameter(torch.full((self.k,), 2 * math.log(0.3)))

    def groups(self) -> list[dict[str, object]]:
        """Parameters by learning rate."""
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        out: list[dict[str, object]] = []
        for kind, rate in _RATE.items():
            mine = [
                p
                for n, p in named
                if kind == ("front" if n.startswith("front.") else "level" if n == "level" else "code")
            ]
            if mine:
                out.append({"params": mine, "rate": rate, "lr": 0.0})
        return out

    def code(self, hidden: Tensor) -> Tensor:
        """The code's mean, (..., k), of length about sqrt(k)."""
        encoded: Tensor = (hidden - self.mean) / self.size @ self.encode + self.encode_bias
        return encoded

    def back_to_states(self, code: Tensor) -> Tensor:
        """The server's decoder."""
        states: Tensor = (code @ self.decode + self.decode_bias) * self.size + self.mean
        return states

    def loss(
        self, world: World, first: Tensor, tokens: Tensor, weight: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The task's loss, and the regulariser (0 for ``shaped``, whose ``weight`` is mu)."""
        hidden = Opened(self.front)(tokens)
        if self.kind == "nopeek":
            released, extra = hidden, distance_correlation(world.table[tokens].flatten(0, 1), hidden.flatten(0, 1))
        else:
            code = self.code(hidden)
            noise = torch.randn(code.shape, generator=generator)
            if self.kind == "vib":
                level = ((hidden - self.mean) / self.size @ self.spread + self.level).clamp(-8.0, 6.0)
                extra = ((code.square() + level.exp() - 1 - level) / 2).sum(-1).mean()
                released = self.back_to_states(code + (level / 2).exp() * noise)
            else:
                bound = math.sqrt(self.k)
                released = self.back_to_states(clip_rows(code, bound) + 2 * bound / weight * noise)
                extra = torch.zeros(())
        return token_losses(world, middle_out(world, first, released), tokens).mean(), extra

    @torch.no_grad()
    def finish(self, weight: float, facts: dict[str, float]) -> Trained:
        """The trained defence with its units put back."""
        front = copy.deepcopy(self.front).requires_grad_(requires_grad=False)
        if self.kind == "nopeek":
            plain = Linear(None, None, math.inf, 0.0, exact=True)
            return Trained(front, plain, None, facts)
        matrix, bias = self.encode.detach() / self.size, self.encode_bias.detach()
        decoder = Affine(
            torch.zeros(self.k), self.decode.detach() * self.size, self.decode_bias * self.size + self.mean
        )
        if self.kind == "vib":
            spread, level = self.spread.detach() / self.size, self.level.detach().clone()
            return Trained(front, Bottleneck(self.mean, matrix, bias, spread, level), decoder, facts)
        # ``code = (h - mean) matrix + bias`` as one centred map: the bias is a shift of the mean, by least squares exact.
        mean = self.mean - torch.linalg.lstsq(matrix.T, bias[:, None]).solution[:, 0]
        bound = math.sqrt(self.k)
        return Trained(front, Linear(mean, matrix.clone(), bound, 2 * bound / weight), decoder, facts)


def fresh(world: World, hidden: Tensor, kind: str, k: int) -> Model:
    """An untrained model of the kind, its code on public principal directions."""
    mean, basis = principal(hidden, k, whiten=False)
    size = float((hidden - mean).flatten(0, 1).norm(dim=1).median())
    return Model(world.front, kind, mean, basis, size)


def train(
    model: Model,
    world: World,
    public: Tensor,
    *,
    weight: float,
    steps: int,
    seed: int,
    progress: Callable[[int, float, float], None],
) -> dict[str, float]:
    """Train in place: Adam, a cosine schedule, gradients clipped at norm 1.

    Args:
        model: from :func:`fresh` or an earlier level. world: the frozen rest. public: (S, T) tokens.
        weight: alpha, beta or mu. steps: batches of eight. seed: of batches and noise. progress: step, loss, regulariser.

    Returns:
        Means of loss and regulariser over the last quarter.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.groups(), lr=0.0, betas=(0.9, 0.98))
    first, seen = opening(world.front), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        tokens = public[torch.randint(len(public), (_BATCH,), generator=generator)]
        loss, extra = model.loss(world, first, tokens, weight, generator)
        (loss if model.kind == "shaped" else loss + weight * extra).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((float(loss.detach()), float(extra.detach())))
        progress(step, *seen[-1])
    last = seen[-max(1, steps // 4) :]
    return {"loss": sum(s[0] for s in last) / len(last), "regulariser": sum(s[1] for s in last) / len(last)}


def save(model: Model, file: object) -> None:
    """The trained tensors, embeddings left out, as safetensors, whole or not at all."""
    from pathlib import Path

    file = Path(str(file))
    part = file.with_suffix(".part")
    save_file({n: t.detach().contiguous() for n, t in model.state_dict().items() if "embed" not in n}, part)
    part.replace(file)


def load(model: Model, file: object) -> None:
    """Read what :func:`save` wrote into a fresh model."""
    model.load_state_dict(load_file(str(file)), strict=False)
