"""B as seen from the client: a function from released rows to hidden states, with a gradient where B learns.

Only this file and securesplit/client/generate.py hand rows to a link, and the link takes nothing but :class:`Released`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from securesplit.client.guardian import Guardian
from securesplit.client.link import Link
from securesplit.client.plausible import Witness
from securesplit.data.batches import Batch
from securesplit.privacy.gate import Gate, Released, Responded

Observer = Callable[[int, Batch], None]
"""Told, on this site alone, which batch went out under which step number."""


class RemoteMiddle:
    """B behind a link.

    Args:
        link: an open session.
        gate: for the gradients that leave in the backward pass.
        observe: called after each forward; for the truth file of an experiment.

    Attributes:
        learn: whether B and A get gradients from the next calls.
        batch: what the next call is about, by :meth:`about`; its records are charged for the gradient.
        witness: keeps how every answer of the server looked.
        guardian: computes some steps itself and ends the run where the server's answers are other ones; None for trust.
    """

    def __init__(self, link: Link, gate: Gate, *, observe: Observer | None = None) -> None:
        self.learn = False
        self.batch: Batch | None = None
        self.witness = Witness()
        self.guardian: Guardian | None = None
        self._responded: Responded | None = None
        self._link = link
        self._gate = gate
        self._observe = observe

    def about(self, batch: Batch, responded: Responded | None = None) -> None:
        """Say what the next call is about and, where the policy releases labels, which answers its labels are."""
        self.batch, self._responded = batch, responded

    def __call__(self, private: Released) -> Tensor:
        """Released rows, (B,T,D) or under a code (B,T,k), to (B,T,D) of B's output, float32."""
        if self.learn:
            # Without a leaf that wants a gradient autograd would leave the wire out, and B would wait for a backward.
            graph = private.graph if private.graph.requires_grad else private.graph.detach().requires_grad_()
            mixed: Tensor = _Remote.apply(graph, private, self)  # type: ignore[no-untyped-call]
            return mixed
        return self.forward(private)

    def forward(self, private: Released) -> Tensor:
        """One request without a graph."""
        mixed = self._link.forward(private, learn=self.learn)
        self.witness.answered(private, mixed)
        if self.guardian is not None:
            self.guardian.answered(private, mixed, learn=self.learn)
        if self._observe is not None and self.batch is not None:
            self._observe(self._link.step, self.batch)
        return mixed

    def backward(self, gradient: Tensor) -> Tensor:
        """Release dL/d(B's output), (B,T,D), get dL/d(what was sent), of the shape that was sent."""
        records = None if self.batch is None else self.batch.records
        # Taken, not kept: the next gradient of the same records may come from other labels.
        responded, self._responded = self._responded, None
        released = self._gate.release(gradient, at="gradient", records=records, memoise=False, responded=responded)
        received = self._link.backward(released)
        self.witness.taught(released, received)
        if self.guardian is not None:
            self.guardian.taught(released, received)
        return received


class RememberingMiddle:
    """A frozen B answers the same bytes with the same bytes, so each release is sent once and its answer kept.

    This is what makes any number of local epochs free in regime ``frozen``.
    """

    def __init__(self, remote: RemoteMiddle) -> None:
        self._remote = remote
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, private: Released) -> Tensor:
        """As :class:`RemoteMiddle`, from memory where possible."""
        key = hashlib.sha256(private.payload).digest()
        if key not in self._known:
            self._known[key] = self._remote(private)
        return self._known[key]


class _Remote(torch.autograd.Function):
    """The wire as a differentiable function. Noise is additive, so the gradient passes straight to the clipped rows."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, private: Released, remote: RemoteMiddle) -> Tensor:
        del graph
        ctx.remote = remote
        return remote.forward(private)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.remote.backward(gradients[0]), None, None
