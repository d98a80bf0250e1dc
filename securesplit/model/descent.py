"""How adapters move: one optimiser over named parameters, whose whole state can be read and set.

Both ends use it, the clients for A and C and the server for B, so that a job's recipe means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from securesplit.errors import InputError

__all__ = ["Descent", "NamedTensor", "Recipe"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a job says about an optimiser.

    Attributes:
        learning_rate: of AdamW.
    """

    learning_rate: float


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

    Attributes:
        steps: how often :meth:`step` has been called.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], recipe: Recipe) -> None:
        self.steps = 0
        self._parameters = tuple(parameters)
        self._optimiser = torch.optim.AdamW(self._parameters, lr=recipe.learning_rate, weight_decay=0.0)

    def step(self) -> None:
        """Move along the gradients that the parameters hold, and forget them."""
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.steps += 1

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Forget the gradients without a step."""
        self._optimiser.zero_grad(set_to_none=set_to_none)

    def state(self) -> tuple[NamedTensor, ...]:
        """Everything that the next step depends on besides parameters and gradients; copies."""
        kept = [NamedTensor("steps", torch.tensor(self.steps))]
        for i, parameter in enumerate(self._parameters):
            for name, value in self._optimiser.state.get(parameter, {}).items():
                kept.append(NamedTensor(f"{i}.{name}", torch.as_tensor(value).detach().cpu().clone()))
        return tuple(kept)

    def restore(self, state: Sequence[NamedTensor]) -> None:
        """Go on from what :meth:`state` gave for the same parameters.

        Raises:
            InputError: SS-1250 when it was other parameters' state; nothing is changed.
        """
        moments: list[tuple[nn.Parameter, str, Tensor]] = []
        steps = None
        for piece in state:
            if piece.name == "steps":
                steps = int(piece.value)
                continue
            number, _, name = piece.name.partition(".")
            if not number.isascii() or not number.isdigit() or int(number) >= len(self._parameters):
                raise _another()
            parameter = self._parameters[int(number)]
            if name != "step" and piece.value.shape != parameter.shape:
                raise _another()
            moments.append((parameter, name, piece.value))
        if steps is None:
            raise _another()
        self.steps = steps
        self._optimiser.state.clear()
        for parameter, name, value in moments:
            placed = value.clone() if name == "step" else value.to(parameter.device, copy=True)
            self._optimiser.state[parameter][name] = placed


def _another() -> InputError:
    return InputError(
        "SS-1250",
        "the kept state of an optimiser belongs to other adapters",
        hint="Resume with the job it was kept under.",
    )
