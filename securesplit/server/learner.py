"""One copy of B's adapters that learns: its values, its optimiser, and the graph that waits for a gradient.

Several may share one B: the frozen base is in memory once, and each learner puts its own adapters in before it computes
(:meth:`Learner.installed`). One thread calls all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from securesplit.errors import InputError, RemoteProtocolError
from securesplit.model.descent import Descent, NamedTensor, Recipe
from securesplit.model.dropout import dropping, step_key
from securesplit.model.parts import Middle

__all__ = ["Compute", "Learner", "Rows"]

Compute = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
"""From each client's rows to B's output for them, with a graph; one client's output depends on its own rows alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What one client sent for a step: rows in the type that B takes, or a gradient at B's output.

    Attributes:
        weight: of its gradient in B's own; 1 for a step by itself.
    """

    who: str
    step: int
    values: Tensor
    weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    step: int
    leaf: Tensor
    output: Tensor


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where an adapter's parameter stands in B."""

    module: nn.Module
    name: str


class Learner:
    """See the module.

    Args:
        middle: B, with adapters; those that require gradients now are what learns.
        recipe: of the optimiser.
        own: whether this learner has parameters of its own, which start from the values that B has now, or B's.
    """

    def __init__(self, middle: Middle, recipe: Recipe, *, own: bool = False) -> None:
        found = [
            (_Slot(module, name), parameter)
            for module in middle.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        ]
        self._slots = tuple(slot for slot, _ in found)
        self.parameters = tuple(nn.Parameter(p.detach().clone()) if own else p for _, p in found)
        self._descent = Descent(self.parameters, recipe) if found else None
        self._pending: dict[str, _Pending] = {}
        self._inside: tuple[str, ...] = ()  # Whose rows the graph was made of.
        self._middle, self._seed = middle, recipe.seed

    @contextmanager
    def installed(self) -> Iterator[None]:
        """B computes with this learner's adapters inside."""
        before = [getattr(slot.module, slot.name) for slot in self._slots]
        self._put(self.parameters)
        try:
            yield
        finally:
            self._put(before)

    @contextmanager
    def lent(self, values: Sequence[Tensor]) -> Iterator[None]:
        """B computes with these values in place of any learner's; nothing that learns is touched.

        Args:
            values: as :meth:`values` gave them, of a learner of this B.
        """
        before = [getattr(slot.module, slot.name) for slot in self._slots]
        pairs = zip(values, self.parameters, strict=True)
        self._put([nn.Parameter(value.to(own.device), requires_grad=False) for value, own in pairs])
        try:
            yield
        finally:
            self._put(before)

    def values(self) -> tuple[Tensor, ...]:
        """The adapters' values now; copies on the CPU."""
        return tuple(parameter.detach().cpu().clone() for parameter in self.parameters)

    def _put(self, parameters: list[nn.Parameter] | tuple[nn.Parameter, ...]) -> None:
        for slot, parameter in zip(self._slots, parameters, strict=True):
            setattr(slot.module, slot.name, parameter)

    @property
    def waits_for(self) -> tuple[str, ...]:
        """Whose gradients the graph waits for."""
        return tuple(self._pending)

    def forward(self, rows: Sequence[Rows], compute: Compute) -> tuple[Tensor, ...]:
        """Run B with a graph, which is kept for :meth:`backward`; the last one counts.

        Args:
            rows: of one client, or of several whose steps are one.
            compute: B.

        Returns:
            B's output for each.
        """
        leaves = tuple(one.values.requires_grad_() for one in rows)
        self._inside = tuple(one.who for one in rows)
        with self.installed(), self._dropping(), torch.enable_grad():
            outputs = compute(leaves)
        self._pending = {
            one.who: _Pending(one.step, leaf, out) for one, leaf, out in zip(rows, leaves, outputs, strict=True)
        }
        return tuple(output.detach() for output in outputs)

    def backward(self, gradients: Sequence[Rows]) -> tuple[Tensor, ...]:
        """Backpropagate, let the adapters learn, return dL/d(the rows that came), each client's of its own loss.

        Args:
            gradients: at B's output, of clients whose rows the graph holds; whoever brings none has no part in the step.

        Raises:
            RemoteProtocolError: SS-4014 when no forward of this step is pending.
        """
        held = [self._pending.get(one.who) for one in gradients]
        if not held or any(h is None or h.step != one.step for h, one in zip(held, gradients, strict=True)):
            raise RemoteProtocolError("SS-4014", "a gradient arrived for a step that is not pending")
        self._pending = {}
        found = [one for one in held if one is not None]
        came = [one.values.to(h.output.device, h.output.dtype) for one, h in zip(gradients, found, strict=True)]
        pulls = [v * one.weight if one.weight != 1 else v for one, v in zip(gradients, came, strict=True)]
        with self.installed(), self._dropping():  # What is computed again must be computed alike.
            torch.autograd.backward([h.output for h in found], pulls)
        if self._descent is not None:
            self._descent.step()
        out = []
        for one, h in zip(gradients, found, strict=True):
            assert h.leaf.grad is not None
            out.append(h.leaf.grad / one.weight if one.weight != 1 else h.leaf.grad)
        return tuple(out)

    def _dropping(self) -> AbstractContextManager[None]:
        """By the number of steps learnt, which is kept, and not by the clients', which count what is only measured too."""
        steps = 0 if self._descent is None else self._descent.steps
        return dropping([self._middle], step_key(self._seed, "+".join(self._inside), steps))

    def forget(self, who: str) -> None:
        """Drop what waits for this client's gradient, if anything does."""
        self._pending.pop(who, None)

    def take(self, values: Sequence[Tensor]) -> None:
        """Set the adapters; the optimiser goes on with its moments."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)

    def state(self) -> tuple[NamedTensor, ...]:
        """Adapters and optimiser, copies; never the graph."""
        values = tuple(NamedTensor(f"adapter.{i}", value) for i, value in enumerate(self.values()))
        moments = () if self._descent is None else self._descent.state()
        scale = () if self._middle.scale is None else self._middle.scale.state()
        return (
            *values,
            *(NamedTensor(f"descent.{piece.name}", piece.value) for piece in moments),
            *(NamedTensor(f"scale.{piece.name}", piece.value) for piece in scale),
        )

    def restore(self, state: Sequence[NamedTensor]) -> None:
        """Go on from what :meth:`state` gave for the same job; a graph that waits is dropped.

        Raises:
            InputError: SS-1250 when it is of other adapters; nothing is changed.
        """
        kept = {piece.name: piece.value for piece in state}
        values = [kept.get(f"adapter.{i}") for i in range(len(self.parameters))]
        fitting = [v is not None and v.shape == p.shape for v, p in zip(values, self.parameters, strict=True)]
        if not all(fitting):
            raise InputError(
                "SS-1250", "the kept state of the server's part belongs to other adapters", hint="Resume with the job it was kept under."
            )  # fmt: skip
        if self._descent is not None:
            self._descent.restore(_under("descent.", kept))
        if self._middle.scale is not None:
            self._middle.scale.restore(_under("scale.", kept))
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                assert value is not None
                parameter.copy_(value)
        self._pending = {}


def _under(start: str, kept: Mapping[str, Tensor]) -> list[NamedTensor]:
    return [NamedTensor(name.removeprefix(start), value) for name, value in kept.items() if name.startswith(start)]
