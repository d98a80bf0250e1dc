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

__all__ = ["Learner"]

Run = Callable[[Tensor], Tensor]
"""From rows that came to B's output for them, with a graph."""


@dataclass(slots=True)
class _Pending:
    who: str
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
        self._pending: _Pending | None = None
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

    def _put(self, parameters: list[nn.Parameter] | tuple[nn.Parameter, ...]) -> None:
        for slot, parameter in zip(self._slots, parameters, strict=True):
            setattr(slot.module, slot.name, parameter)

    @property
    def waits_for(self) -> str | None:
        """Whose gradient the graph waits for; None without a graph."""
        return None if self._pending is None else self._pending.who

    def forward(self, who: str, step: int, rows: Tensor, run: Run) -> Tensor:
        """Run B with a graph, which is kept for :meth:`backward`; one at a time, the last one counts.

        Args:
            who: the client.
            step: the client's number.
            rows: as they came, in the type that B takes.
            run: B.
        """
        leaf = rows.requires_grad_()
        with self.installed(), self._dropping(who), torch.enable_grad():
            output = run(leaf)
        self._pending = _Pending(who, step, leaf, output)
        return output.detach()

    def backward(self, who: str, step: int, gradient: Tensor) -> Tensor:
        """Backpropagate, let the adapters learn, return dL/d(the rows that came).

        Raises:
            RemoteProtocolError: SS-4014 when no forward of this step is pending.
        """
        pending, self._pending = self._pending, None
        if pending is None or (pending.who, pending.step) != (who, step):
            raise RemoteProtocolError("SS-4014", "a gradient arrived for a step that is not pending")
        with self.installed(), self._dropping(who):  # What is computed again must be computed alike.
            pending.output.backward(gradient.to(pending.output.dtype))  # type: ignore[no-untyped-call]
        if self._descent is not None:
            self._descent.step()
        assert pending.leaf.grad is not None
        return pending.leaf.grad

    def _dropping(self, who: str) -> AbstractContextManager[None]:
        """By the number of steps learnt, which is kept, and not by the client's, which counts what is only measured too."""
        steps = 0 if self._descent is None else self._descent.steps
        return dropping([self._middle], step_key(self._seed, who, steps))

    def forget(self, who: str) -> None:
        """Drop the graph that waits for this client, if one does."""
        if self.waits_for == who:
            self._pending = None

    def state(self) -> tuple[NamedTensor, ...]:
        """Adapters and optimiser, copies; never the graph."""
        values = tuple(NamedTensor(f"adapter.{i}", p.detach().cpu().clone()) for i, p in enumerate(self.parameters))
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
        self._pending = None


def _under(start: str, kept: Mapping[str, Tensor]) -> list[NamedTensor]:
    return [NamedTensor(name.removeprefix(start), value) for name, value in kept.items() if name.startswith(start)]
