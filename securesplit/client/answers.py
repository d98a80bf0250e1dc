"""What C learns from where a policy releases class labels: answers by randomised response, never the truth.

A gradient made from the answers is a function of what the server has, of C, which noised sums made, and of the answers,
which are charged once and kept for ever. So it may leave as it is, however often.
"""

from __future__ import annotations

from securesplit.data.batches import Batch
from securesplit.errors import PolicyDenied
from securesplit.privacy.gate import Gate, Responded


def answered(batch: Batch, gate: Gate) -> tuple[Batch, Responded | None]:
    """The batch with answers in place of its classes, and the proof for the gate; the batch itself under other policies.

    It comes before anything of the batch is sent, so that answers that cannot be paid stop everything.

    Raises:
        PolicyDenied: SS-2010 when the policy releases class labels and these records have none.
        BudgetExhausted: SS-5001, SS-5002.
    """
    if gate.plan is None or gate.plan.labels is None:
        return batch, None
    if batch.classes is None:
        raise PolicyDenied(
            "SS-2010",
            f"policy '{gate.policy.name}' releases class labels and no other gradients, and these records have no class",
            hint="Use a job with a [task], or a policy with [privacy.gradients].",
        )
    responded = gate.respond(batch.classes, records=batch.records, contents=batch.labelled)
    return batch.with_classes(responded.labels), responded
