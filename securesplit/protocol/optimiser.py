"""The job's tables ``[optimiser]``, ``[precision]`` and ``[memory]``: how adapters move, and what computing costs."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from securesplit.protocol.adapters import PartName

__all__ = ["Kind", "Memory", "Optimiser", "Precision", "Rate"]

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
Rate = Literal["constant", "linear", "cosine"]
Kind = Literal["f32", "bf16", "f16", "int8", "nf4"]


class Optimiser(BaseModel):
    """AdamW on adapters, with separate steps for the server's and the clients' parts.

    Attributes:
        client_lr, server_lr: highest learning rate of A and C, and of B.
        weight_decay: as in AdamW: each step takes away rate * weight_decay of every adapter's value.
        betas: of the two moments.
        schedule: how the rate goes on after the warm-up: ``constant``, or down to 0 as a line or half a cosine.
        client_steps, server_steps: optimiser steps of each side until the rate is 0; it stays there. They are said, not
            counted, because a server must not learn how many records a client has.
        warmup: optimiser steps in which the rate rises from 0; or below 1 that share of the side's steps.
        accumulate: client steps in one optimiser step, on both ends, whose gradients are averaged.
        max_grad_norm: the largest norm of a side's whole gradient; beyond it the gradient is scaled down. A and C count
            together and B by itself: a norm over all parties would need a message.
    """

    model_config = _STRICT
    client_lr: Annotated[float, Field(gt=0, le=1)]
    server_lr: Annotated[float, Field(gt=0, le=1)]
    weight_decay: Annotated[float, Field(ge=0, le=1, exclude_if=lambda value: value == 0)] = 0.0
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=False, exclude_if=lambda value: value == (0.9, 0.999)),
    ] = (0.9, 0.999)
    schedule: Annotated[Rate, Field(exclude_if=lambda value: value == "constant")] = "constant"
    client_steps: Annotated[int | None, Field(ge=1, le=10**9)] = None
    server_steps: Annotated[int | None, Field(ge=1, le=10**9)] = None
    warmup: Annotated[int | float, Field(ge=0, le=10**9, exclude_if=lambda value: value == 0)] = 0
    accumulate: Annotated[int, Field(ge=1, le=4096, exclude_if=lambda value: value == 1)] = 1
    max_grad_norm: Annotated[float | None, Field(gt=0)] = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        faults = []
        spans = self.client_steps, self.server_steps
        if self.schedule != "constant" and None in spans:
            faults.append(f"schedule '{self.schedule}' needs client_steps and server_steps, at whose end the rate is 0")
        if isinstance(self.warmup, float) and self.warmup >= 1 and not self.warmup.is_integer():
            faults.append("warmup is a whole number of steps, or a share below 1")
        if isinstance(self.warmup, float) and 0 < self.warmup < 1 and None in spans:
            faults.append("a share of warmup needs client_steps and server_steps to be a share of")
        if any(span is not None and self.warmup_of(span) > span for span in spans):
            faults.append("warmup is longer than the schedule")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def warmup_of(self, span: int | None) -> int:
        """Optimiser steps of the warm-up for a side with so many steps; a share is rounded up."""
        if 0 < self.warmup < 1:
            return 0 if span is None else -int(-self.warmup * span // 1)
        return int(self.warmup)


class Precision(BaseModel):
    """What each part's base computes in; its own stored type where none is said. Adapters are float32 always.

    Attributes:
        front, middle, back: ``f32``, ``bf16``, ``f16`` with a scale of its own, or base weights in ``int8`` or ``nf4``.
    """

    model_config = _STRICT
    front: Kind | None = None
    middle: Kind | None = None
    back: Kind | None = None

    def of(self, part: PartName) -> Kind | None:
        """What is said of one part."""
        said: Kind | None = getattr(self, part)
        return said


class Memory(BaseModel):
    """What is computed twice instead of being kept.

    Attributes:
        checkpointing: parts that keep each decoder layer's input alone and compute the layer again in the backward pass.
    """

    model_config = _STRICT
    checkpointing: Annotated[tuple[PartName, ...], Field(strict=False)] = ()
