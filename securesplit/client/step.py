"""The page to read first: one training step.

Every other file explains one word of it. ``front`` is A, ``gate`` the only way out, ``middle`` the server's B behind a
wire, ``back`` is C with norm, head and loss. What crosses is (B,T,D) hidden states and, where the policy lets B learn,
(B,T,D) gradients; both leave through the gate, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from securesplit.data.batches import Batch
from securesplit.model.parts import Back, Front
from securesplit.privacy.gate import Gate, Released

Middle = Callable[[Released], Tensor]


def forward(batch: Batch, front: Front, gate: Gate, middle: Middle, back: Back) -> Tensor:
    """The loss of one batch, in nats per token, with its graph."""
    hidden = front(batch.tokens)  # A: (B,T) -> (B,T,D)
    private = gate.release(
        hidden, at="cut", records=batch.records, contents=batch.contents
    )  # clip + noise; the ledger pays or raises
    mixed = middle(private)  # wire -> B -> wire, (B,T,D)
    loss: Tensor = back(mixed, batch.labels)  # C: (B,T,D) -> ()
    return loss


def step(batch: Batch, front: Front, gate: Gate, middle: Middle, back: Back) -> float:
    """One step: the loss, and gradients in every adapter on this side.

    Returns:
        The loss in nats per token. It stays on the client.
    """
    loss = forward(batch, front, gate, middle, back)
    loss.backward()  # type: ignore[no-untyped-call]  # C -> gate -> wire -> B -> wire -> A
    return float(loss.detach())
