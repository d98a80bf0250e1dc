"""A client, a server and nothing between them: the product's training step on plain tensors, with a stranger as server.

It mirrors securesplit/client/step.py and securesplit/server/engine.py: A, clip, noise, B, C, the gradient's clip and noise,
B's gradient back, one step of AdamW on each side. The noise is torch's generator from a stated seed, because nothing here
is released; the product's own path through gate and wire is tests/client/test_guardian.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from attacks.bounds import best_guess, ceiling
from attacks.ridge import fit
from attacks.trap import Trap
from attacks.view import Noise
from securesplit.client.guardian import Watched, watched
from securesplit.model.lora import adapter_parameters, add_adapters, set_trainable_factor
from securesplit.privacy.clip import clip_sequence

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, SEED = 8, 16.0, 7


@dataclass(frozen=True, slots=True)
class Parts:
    """Loaders, each giving fresh weights.

    Attributes:
        front, middle, back: A, B, C without adapters.
        targets: of the adapters.
    """

    front: Callable[[], Any]
    middle: Callable[[], Any]
    back: Callable[[], Any]
    targets: tuple[str, ...] = TARGETS


@dataclass(frozen=True, slots=True)
class Setting:
    """What a job and a policy say.

    Attributes:
        mu: of one release of a sequence, replace-one, on each of the two channels; 0 for no noise.
        clip, gradient_clip: Frobenius bounds of one sequence; used where there is noise.
        client_rate, server_rate: of AdamW.
        batch: sequences in one step.
        seed: of batches and noise.
    """

    mu: float = 0.0
    clip: float = 600.0
    gradient_clip: float = 1.0
    client_rate: float = 2e-3
    server_rate: float = 1e-3
    batch: int = 2
    seed: int = 1

    @property
    def noise(self) -> Noise:
        """The mechanism at the cut."""
        return Noise(2 * self.clip / self.mu, self.clip) if self.mu else Noise(0.0, None)

    def gain(self, coordinates: int) -> float:
        """The public factor before B, as in securesplit/privacy/plan.py."""
        return self.clip / math.hypot(self.clip, self.noise.sigma * math.sqrt(coordinates)) if self.mu else 1.0


class Answerer(Protocol):
    """What may stand where B stands, for a backward."""

    def answer(self, rows: Tensor, gradient: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(N,T,D) rows and gradient at B's output to (N,T,D)."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One step as it crossed.

    Attributes:
        rows, gradient: what the client sent. output, due: what an honest B gives, which learns.
        tokens: the truth, for a colluding client's part.
        public_output, public_due: the published B's; equal to the others where they were not computed.
    """

    rows: Tensor
    gradient: Tensor
    output: Tensor
    due: Tensor
    tokens: Tensor
    public_output: Tensor
    public_due: Tensor

    def beside(self, received: Tensor) -> Watched:
        """What a client that watches this step sees, if it was answered with ``received``."""
        return watched(self.output, received, self.public_output, self.public_due)


@dataclass
class World:
    """One client and one honest B, step by step.

    Args:
        parts, setting: see there.
        tokens: (N, T) the client's private sequences.
        watch: whether to compute the published B beside.
        alone: leave B out; only what ignores it can then answer.
    """

    parts: Parts
    setting: Setting
    tokens: Tensor
    watch: bool = True
    alone: bool = False
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.front, self.back, self.middle = self.parts.front(), self.parts.back(), self.parts.middle()
        self.public = self.parts.middle()
        self.public.requires_grad_(requires_grad=False)
        for part in (self.front, self.middle, self.back):
            add_adapters(part, RANK, ALPHA, self.parts.targets, seed=SEED)
        set_trainable_factor(self.front, "B")
        set_trainable_factor(self.back, "B")
        set_trainable_factor(self.middle, "both")
        learning = [p for part in (self.front, self.back) for p in adapter_parameters(part) if p.requires_grad]
        self._client = torch.optim.AdamW(learning, lr=self.setting.client_rate, weight_decay=0.0)
        self._server = torch.optim.AdamW(adapter_parameters(self.middle), lr=self.setting.server_rate, weight_decay=0.0)
        self._generator = torch.Generator().manual_seed(self.setting.seed)

    def step(self, answer: Callable[[Step], Tensor]) -> Step:
        """One step: the client learns from what ``answer`` gives; B learns from the gradient as an honest one does."""
        chosen = torch.randperm(len(self.tokens), generator=self._generator)[: self.setting.batch]
        tokens = self.tokens[chosen]
        hidden = self.front(tokens)
        bounded, rows = self.release(hidden)
        made = self._alone(rows, tokens) if self.alone else self._crossed(rows, tokens)
        received = answer(made)
        bounded.backward(received)
        self._client.step()
        self._client.zero_grad()
        return made

    def release(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, D) states clipped, with their graph; and as they are sent."""
        noise = self.setting.noise
        if noise.clip is None:
            return hidden, hidden.detach()
        bounded = clip_sequence(hidden, noise.clip)
        drawn = torch.randn(bounded.shape, generator=self._generator)
        return bounded, bounded.detach() + noise.sigma * drawn

    def _crossed(self, rows: Tensor, tokens: Tensor) -> Step:
        gain = self.setting.gain(rows[0].numel())
        leaf = rows.clone().requires_grad_()
        output = self.middle(leaf * gain)
        seen = output.detach().requires_grad_()
        loss = self.back(seen, tokens)
        loss.backward()
        self.losses.append(float(loss.detach()))
        gradient = self._gradient(seen.grad)
        output.backward(gradient)
        public_output, public_due = output.detach(), leaf.grad
        if self.watch:
            own = rows.clone().requires_grad_()
            again = self.public(own * gain)
            (public_due,) = torch.autograd.grad(again, own, gradient)
            public_output = again.detach()
        made = Step(rows, gradient, output.detach(), leaf.grad, tokens, public_output, public_due)
        self._server.step()
        self._server.zero_grad()
        return made

    def _gradient(self, gradient: Tensor) -> Tensor:
        if not self.setting.mu:
            return gradient
        bounded = clip_sequence(gradient, self.setting.gradient_clip)
        sigma = 2 * self.setting.gradient_clip / self.setting.mu
        return bounded + sigma * torch.randn(bounded.shape, generator=self._generator)

    @staticmethod
    def _alone(rows: Tensor, tokens: Tensor) -> Step:
        nothing = torch.ones_like(rows)
        return Step(rows, nothing, nothing, nothing, tokens, nothing, nothing)


def trap_for(parts: Parts, setting: Setting, public: Tensor, **options: Any) -> Trap:
    """A hijacker's craft on a fresh copy of A that moves as the clients' A does."""
    copy = parts.front()
    add_adapters(copy, RANK, ALPHA, parts.targets, seed=SEED)
    set_trainable_factor(copy, "B")
    embedding = copy.base.get_input_embeddings().weight.detach()
    return Trap(copy, embedding, public, setting.noise, rate=setting.client_rate, **options)


@dataclass(frozen=True, slots=True)
class Reading:
    """What an inverter names of sequences that nobody trained on.

    Attributes:
        recovery: share of positions, the best of the inverters, per position of (N, T).
        hits: of each sequence, by the best.
        ridge, trap: by inverter; trap is NaN without one.
        kappa, bound: the best guess without looking, and the ceiling above it; 1 without noise.
    """

    recovery: float
    hits: tuple[int, ...]
    ridge: float
    trap: float
    kappa: float
    bound: float


def read(world: World, victims: Tensor, public: Tensor, trap: Trap | None = None) -> Reading:
    """Attack fresh sequences through the client's A as it is now; the attacker knows this A exactly, an upper bound.

    Args:
        world: after its steps.
        victims: (M, T) token ids that nobody trained on.
        public: (N, T) for the ridge inverter, which is fitted to this very A with the noise on.
        trap: the hijacker's own inverter reads as well.
    """
    front, setting = world.front, world.setting
    with torch.no_grad():
        _, rows = world.release(front(victims).float())
    embedding = front.base.get_input_embeddings().weight.detach()
    inverter, layer = fit(front, embedding, public, setting.noise)
    found = {"ridge": _invert(inverter, rows / layer.factor)}
    if trap is not None:
        found["trap"] = trap.read(rows)
    scores = {name: (ids == victims).sum(1) for name, ids in found.items()}
    best = max(scores.values(), key=lambda hits: int(hits.sum()))
    positional = public.mode(dim=0).values.tolist()
    kappa = best_guess(victims.tolist(), positional, frozenset())
    total = victims.numel()
    return Reading(
        recovery=int(best.sum()) / total, hits=tuple(best.tolist()), ridge=int(scores["ridge"].sum()) / total,
        trap=int(scores["trap"].sum()) / total if trap is not None else math.nan,
        kappa=kappa, bound=ceiling(kappa, setting.mu) if setting.mu else 1.0,
    )  # fmt: skip


def _invert(inverter: Any, rows: Tensor) -> Tensor:
    first = inverter.propose(rows[:, 0], 0, 1)
    later = inverter.propose(rows[:, 1:].flatten(0, 1), 1, 1).view(len(rows), -1)
    return torch.cat([first, later], dim=1)
