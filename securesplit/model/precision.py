"""What a part's base is computed in, and a scale of its own for gradients in float16.

Adapters are float32 whatever the base is: PEFT's layers bring their input to the adapter's type and their output back. The
range of bfloat16 is float32's; float16's ends at 6e-8 and 65504, and gradients of long texts lie below. So where a part
computes in float16, the gradient that comes into it is multiplied by a power of two, and the adapters' gradients and the
one that goes out are divided by it again, in float32. No scale leaves the part: on the wire and in the optimiser every
gradient is itself, each party has its own scale, and a peer without float16 notices nothing.

Where a number overflows the part's backward pass is done again under half the scale, until it fits; a step is skipped on
this side only where it does not fit without any scale, and then zeros go out. After ``PATIENCE`` steps without overflow the
scale is doubled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from securesplit.errors import InputError
from securesplit.model.descent import NamedTensor

__all__ = ["PATIENCE", "LossScale", "cast_base"]

PATIENCE = 2000
_FIRST, _MOST = 2.0**16, 2.0**24


def cast_base(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring a base's parameters into this type, as new parameters; tables that are computed keep theirs.

    Before adapters are added: theirs are float32.
    """
    for owner in list(module.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_floating_point() and parameter.dtype != dtype:
                setattr(owner, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))


class LossScale:
    """One part's scale.

    Attributes:
        scale: a power of two.
        skipped: steps that did not fit under any scale.
    """

    def __init__(self) -> None:
        self.scale = _FIRST
        self.skipped = 0
        self._fitted = 0

    def through(self, run: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """Run a part so that its backward pass is scaled.

        Args:
            run: the part; from its input to its output, any float type.
            x: its input: tokens, or rows of any float type, best float32, in which its gradient then is.
            parameters: of the part, float32; they get their gradients as usual, or none where the step is skipped.

        Returns:
            The output, float32.
        """
        out: Tensor = _Scaled.apply(self, run, x, *parameters)  # type: ignore[no-untyped-call]
        return out

    def gradients(self, output: Tensor, wanted: Sequence[Tensor], gradient: Tensor) -> list[Tensor | None] | None:
        """Gradients of what is wanted, float32 and unscaled; None for all where they do not fit."""
        while bool(torch.isfinite(gradient).all()):
            found = torch.autograd.grad(
                output, wanted, (gradient.float() * self.scale).to(output.dtype), retain_graph=True, allow_unused=True
            )
            if all(bool(torch.isfinite(g).all()) for g in found if g is not None):
                divided: list[Tensor | None] = [None if g is None else g.float() / self.scale for g in found]
                self._fitted += 1
                if self._fitted >= PATIENCE:
                    self._fitted, self.scale = 0, min(_MOST, 2 * self.scale)
                return divided
            self._fitted = 0
            if self.scale <= 1:
                break
            self.scale /= 2
        self.skipped += 1
        return None

    def state(self) -> tuple[NamedTensor, ...]:
        """What the next step depends on."""
        counts = ("scale", self.scale), ("fitted", self._fitted), ("skipped", self.skipped)
        return tuple(NamedTensor(name, torch.tensor(value, dtype=torch.float64)) for name, value in counts)

    def restore(self, state: Sequence[NamedTensor]) -> None:
        """Go on from what :meth:`state` gave.

        Raises:
            InputError: SS-1250 when it is no scale's.
        """
        held = {piece.name: piece.value for piece in state}
        if held.keys() != {"scale", "fitted", "skipped"} or any(value.numel() != 1 for value in held.values()):
            raise InputError(
                "SS-1250", "the kept state has no scale of gradients", hint="Resume with the job it was kept under."
            )
        self.scale = float(held["scale"])
        self._fitted, self.skipped = int(held["fitted"]), int(held["skipped"])


class _Scaled(torch.autograd.Function):
    """A part as one differentiable function, whose inner graph is walked under a scale."""

    @staticmethod
    def forward(ctx: Any, scale: LossScale, run: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        leaf = x.detach()
        if leaf.is_floating_point():
            leaf = leaf.requires_grad_()
        with torch.enable_grad():
            output = run(leaf)
        ctx.scale, ctx.leaf, ctx.output, ctx.parameters = scale, leaf, output, parameters
        return output.detach().float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        leaf, parameters = ctx.leaf, ctx.parameters
        wanted = [leaf, *parameters] if leaf.requires_grad else list(parameters)
        found = ctx.scale.gradients(ctx.output, wanted, gradients[0])
        ctx.output = None  # The inner graph is done with.
        if found is None:
            return (None, None, torch.zeros_like(leaf) if leaf.requires_grad else None, *(None for _ in parameters))
        inner = found.pop(0) if leaf.requires_grad else None
        if inner is not None:
            inner = inner.to(leaf.dtype)
        return (None, None, inner, *found)
