"""How adapters move: one optimiser over named parameters, whose whole state can be read and set.

Both ends use it, the clients for A and C and the server for B, so that a job's recipe means the same everywhere.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from securesplit.errors import InputError

__all__ = ["Descent", "NamedTensor", "Recipe"]

_log = logging.getLogger(__name__)
_COUNTS = {"steps", "moves", "waiting", "rate"}
_GRADIENT = "gradient"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a job says about an optimiser.

    Attributes:
        learning_rate: of AdamW, at its highest.
        weight_decay, betas: of AdamW.
        schedule: how the rate goes on after the warm-up.
        warmup: moves in which the rate rises as a line from 0.
        span: moves until the rate is 0, for ``linear`` and ``cosine``; it stays there.
        accumulate: gradients whose mean is one move.
        max_grad_norm: the largest norm of that mean over all parameters together; None for any.
        seed: public; with client and step it says what dropout leaves out (securesplit/model/dropout.py).
    """

    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    span: int = 0
    accumulate: int = 1
    max_grad_norm: float | None = None
    seed: int = 0

    def rate(self, moves: int) -> float:
        """The rate of the move that has so many before it; as the schedules of ``transformers`` define it."""
        if moves < self.warmup:
            return self.learning_rate * moves / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        if moves >= self.span:  # Also where the warm-up fills the whole span.
            return 0.0
        progress = (moves - self.warmup) / (self.span - self.warmup)
        if self.schedule == "linear":
            return self.learning_rate * (1.0 - progress)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True, slots=True, eq=False)
class NamedTensor:
    """One piece of an optimiser's state, or of anything else that is kept."""

    name: str
    value: Tensor


class Descent:
    """AdamW along a recipe.

    Args:
        parameters: what moves, in an order that is the same at every start of the job.
        recipe: how.
        moves: how many moves other optimisers made before along the same schedule.

    Attributes:
        steps: how often :meth:`step` has been called.
        moves: how often the parameters have moved, those before included.
        rate: the highest rate of this optimiser's moves; 0 before the first.
        skipped: moves that were not made since this object began, because a gradient's square is no finite float32, or
            because float16 skipped the step and left no gradient.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], recipe: Recipe, *, moves: int = 0) -> None:
        self.steps = 0
        self.moves = moves
        self.rate = 0.0
        self.skipped = 0
        self._waiting = 0
        self._recipe = recipe
        self._parameters = tuple(parameters)
        self._optimiser = torch.optim.AdamW(
            self._parameters, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
        )

    def step(self) -> bool:
        """Take the gradients that the parameters hold; move along the mean of as many as the recipe says.

        Returns:
            Whether the parameters moved. Gradients are forgotten then, and where they overflow and nothing moves; while they
            wait for others they stay, and the next ones are added.
        """
        self.steps += 1
        self._waiting += 1
        if self._waiting < self._recipe.accumulate:
            return False
        return self._move()

    def finish(self) -> bool:
        """Move along the mean of gradients that still wait for others, if there are any; whether the parameters moved."""
        return bool(self._waiting) and self._move()

    def _move(self) -> bool:
        waiting, self._waiting = self._waiting, 0
        if not self._fits():
            _log.warning("a gradient overflowed or is missing: nothing moves along it")
            self.skipped += 1
            self._optimiser.zero_grad(set_to_none=True)
            return False
        if waiting > 1:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(waiting)
        if self._recipe.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._recipe.max_grad_norm)
        rate = self._recipe.rate(self.moves)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.moves += 1
        self.rate = max(self.rate, rate)
        return True

    def _fits(self) -> bool:
        """Whether there is a gradient, and AdamW's second moment could hold it; NaN or infinity would stay there for ever."""
        held = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        return bool(held) and all(bool(torch.isfinite(gradient.square().sum())) for gradient in held)

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Forget the gradients without a step."""
        self._optimiser.zero_grad(set_to_none=set_to_none)

    def state(self) -> tuple[NamedTensor, ...]:
        """Everything that the next step depends on besides the parameters' values; copies."""
        counts = ("steps", self.steps), ("moves", self.moves), ("waiting", self._waiting), ("rate", self.rate)
        kept = [NamedTensor(name, torch.tensor(count, dtype=torch.float64)) for name, count in counts]
        for i, parameter in enumerate(self._parameters):
            for name, value in self._optimiser.state.get(parameter, {}).items():
                kept.append(NamedTensor(f"{i}.{name}", torch.as_tensor(value).detach().cpu().clone()))
            if self._waiting and parameter.grad is not None:
                kept.append(NamedTensor(f"{i}.{_GRADIENT}", parameter.grad.detach().cpu().clone()))
        return tuple(kept)

    def restore(self, state: Sequence[NamedTensor]) -> None:
        """Go on from what :meth:`state` gave for the same parameters.

        Raises:
            InputError: SS-1250 when it was other parameters' state; nothing is changed.
        """
        moments: list[tuple[nn.Parameter, str, Tensor]] = []
        counts: dict[str, float] = {}
        for piece in state:
            if piece.name in _COUNTS and piece.value.numel() == 1:
                counts[piece.name] = float(piece.value)
                continue
            number, _, name = piece.name.partition(".")
            if not number.isascii() or not number.isdigit() or int(number) >= len(self._parameters):
                raise _another()
            parameter = self._parameters[int(number)]
            if name != "step" and piece.value.shape != parameter.shape:
                raise _another()
            moments.append((parameter, name, piece.value))
        if counts.keys() != _COUNTS:
            raise _another()
        self.steps, self.moves, self._waiting = int(counts["steps"]), int(counts["moves"]), int(counts["waiting"])
        self.rate = counts["rate"]
        self._optimiser.state.clear()
        for parameter in self._parameters:
            parameter.grad = None
        for parameter, name, value in moments:
            placed = value.clone() if name == "step" else value.to(parameter.device, copy=True)
            if name == _GRADIENT:
                parameter.grad = placed
            else:
                self._optimiser.state[parameter][name] = placed


def _another() -> InputError:
    return InputError(
        "SS-1250",
        "the kept state of an optimiser belongs to other adapters",
        hint="Resume with the job it was kept under.",
    )
