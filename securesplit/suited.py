"""Which ways of learning a regime can protect: what a job asks of the optimiser, the adapters, the precision, the schedule.

Regimes ``round`` and ``step`` clip each record's own gradient before it is summed and noised. What cannot be taken apart by
record, or what would let text decide without noise, is refused there; each with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator

from securesplit.policy.rules import Breach
from securesplit.policy.schema import Gaussian, Policy
from securesplit.protocol.adapters import PartName
from securesplit.protocol.job import Job

__all__ = ["learning_breaches"]

_ENDS: tuple[PartName, ...] = ("front", "back")


def learning_breaches(policy: Policy, job: Job) -> Iterator[Breach]:
    """What of the job's learning the policy's regime has no protection for."""
    privacy = policy.privacy
    if not isinstance(privacy, Gaussian):
        return
    regime, adapters = privacy.regime, job.adapters
    if adapters.embedding:
        why = "A does not learn" if regime == "frozen" else "an embedding's gradient is not taken apart by record"
        what = f"embedding = true; in regime '{regime}' {why}"
        yield Breach("privacy.regime.embedding", what, regime, True)  # noqa: FBT003 - the job's value
    if regime == "frozen":
        return
    if adapters.method == "prefix":
        what = (
            f"method 'prefix'; regime '{regime}' clips by record, and a prefix's gradient is not taken apart by record"
        )
        yield Breach("privacy.regime.prefix", what, regime, "prefix")
    if lengths := [part for part in _ENDS if adapters.of(part).dora]:
        what = f"dora in {' and '.join(lengths)}; regime '{regime}' clips by record, and the gradient of DoRA's lengths is not taken apart by record"
        yield Breach("privacy.regime.dora", what, regime, True)  # noqa: FBT003 - the job's value
    yield from _computing(regime, job)
    yield from _scheduled(regime, job)


def _computing(regime: str, job: Job) -> Iterator[Breach]:
    scaled = [p for p in _ENDS if job.precision is not None and getattr(job.precision, p) == "f16"]
    if scaled:
        what = (
            f"f16 in {' and '.join(scaled)}; a step that overflows is done again or skipped, and in regime '{regime}' that "
            "would let one record decide what is summed: use bf16"
        )
        yield Breach("privacy.regime.precision", what, regime, "f16")
    twice = [p for p in _ENDS if job.memory is not None and p in job.memory.checkpointing]
    if twice:
        what = (
            f"checkpointing of {' and '.join(twice)}; regime '{regime}' takes gradients apart by record, which keeps every "
            "layer's input anyway and must see each pass once"
        )
        yield Breach("privacy.regime.checkpointing", what, regime, list(twice))


def _scheduled(regime: str, job: Job) -> Iterator[Breach]:
    if job.optimiser.accumulate > 1:
        what = f"accumulate = {job.optimiser.accumulate}; regime '{regime}' moves once for each noised sum: use larger batches"
        yield Breach("privacy.regime.accumulate", what, regime, job.optimiser.accumulate)
    if regime == "round" and job.schedule.evaluate_every is not None:
        what = (
            "evaluate_every; in regime 'round' nothing moves inside a round, and every loss would be the round's first"
        )
        yield Breach("privacy.regime.evaluate_every", what, regime, job.schedule.evaluate_every)
    for name in ("patience", "keep_best"):
        if getattr(job.schedule, name):
            what = f"{name}; in regime '{regime}' held-out text would decide, without noise, what is learnt or kept"
            yield Breach(f"privacy.regime.{name}", what, regime, getattr(job.schedule, name))
