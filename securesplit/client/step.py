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
from securesplit.model.persample import record_losses
from securesplit.privacy.gate import Gate, Released

Middle = Callable[[Released], Tensor]


def cross(batch: Batch, front: Front, gate: Gate, middle: Middle) -> Tensor:
    """From tokens to B's output, (B,T,D), with its graph."""
    hidden = front(batch.tokens)  # A: (B,T) -> (B,T,D)
    private = gate.release(
        hidden, at="cut", records=batch.records, contents=batch.contents
    )  # clip + noise; the ledger pays or raises
    return middle(private)  # wire -> B -> wire, (B,T,D)


def forward(batch: Batch, front: Front, gate: Gate, middle: Middle, back: Back) -> Tensor:
    """The loss of one batch, in nats per token, with its graph."""
    return back(cross(batch, front, gate, middle), batch.labels)  # type: ignore[no-any-return]  # C: (B,T,D) -> ()


def step(batch: Batch, front: Front, gate: Gate, middle: Middle, back: Back) -> float:
    """One step: the loss, and gradients in every adapter on this side.

    Where the policy releases gradients, a record's own must not tell how many tokens its neighbours have. The backward
    pass then starts from a sum over records, divided by a public count, instead of from the mean over tokens. Where it
    releases class labels, ``batch`` has answers in their place by now (securesplit/client/answers.py).

    Returns:
        The loss in nats per token. It stays on the client.
    """
    mixed = cross(batch, front, gate, middle)
    if gate.plan is None or (gate.plan.gradient is None and gate.plan.labels is None):
        loss = back(mixed, batch.labels)  # C: (B,T,D) -> ()
        loss.backward()  # C -> gate -> wire -> B -> wire -> A
        return float(loss.detach())
    losses = record_losses(back(mixed), batch.labels)  # C: (B,T,D) -> (B,T,V) -> (B,)
    (losses.sum() / batch.most_scored).backward()  # type: ignore[no-untyped-call]  # the same way back
    return float(losses.detach().sum()) / batch.scored
