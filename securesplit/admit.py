"""Where rule meets fact: does this client's policy allow this server's job? Every breach is named at once.

The server's wishes never loosen anything: a job carries no privacy parameter, and what it carries is only compared.
"""

from __future__ import annotations

from securesplit.aggregate.config import RoundConfig, largest_scale
from securesplit.errors import PolicyDenied
from securesplit.policy.schema import Gaussian, Policy
from securesplit.protocol.job import Job

WEIGHT_CAP = 255
"""Weights in a secure sum are numbers of records, capped here; the cap is public, the weights are hidden in the sum."""


def breaches(policy: Policy, job: Job) -> tuple[str, ...]:
    """One sentence per rule of the policy that the job breaks."""
    limits, sums = policy.limits, policy.aggregation
    checks = (
        (
            job.cut.front < limits.min_front,
            f"the cut leaves {job.cut.front} layers in front; limits.min_front is {limits.min_front}",
        ),
        (
            job.cut.back < limits.min_back,
            f"the cut leaves {job.cut.back} layers at the back; limits.min_back is {limits.min_back}",
        ),
        (
            job.schedule.batch > limits.max_sequences,
            f"batches of {job.schedule.batch}; limits.max_sequences is {limits.max_sequences}",
        ),
        (
            job.sums.min_clients < sums.min_clients,
            f"sums of {job.sums.min_clients} clients; aggregation.min_clients is {sums.min_clients}",
        ),
        (
            job.sums.threshold < sums.min_threshold,
            f"a threshold of {job.sums.threshold}; aggregation.min_threshold is {sums.min_threshold}",
        ),
        (2 * job.sums.threshold <= len(job.sums.roster), "the threshold is not more than half of the roster"),
        (
            job.sums.clip > sums.max_update,
            f"a clip of {job.sums.clip:g}; aggregation.max_update is {sums.max_update:g}",
        ),
        (sums.blind and not job.sums.blind, "the server would see the sum of updates; aggregation.blind is true"),
    )
    return (*(sentence for broken, sentence in checks if broken), *label_breaches(policy, job))


def label_breaches(policy: Policy, job: Job) -> tuple[str, ...]:
    """What is wrong between the policy's labels and the job's, in at most one sentence.

    A policy with ``[privacy.labels]`` releases gradients of answered class labels and no others, so text cannot be learnt
    under it; and the answers' noise is sized for its own number of classes.
    """
    labels = policy.privacy.labels if isinstance(policy.privacy, Gaussian) else None
    if labels is None:
        return ()
    if job.task is None:
        return ("the job has no [task]; [privacy.labels] releases answers for class labels and no other gradients",)
    count = len(job.task.labels)
    return () if count == labels.classes else (f"{count} labels; privacy.labels.classes is {labels.classes}",)


def admit(policy: Policy, job: Job, *, peer: str) -> None:
    """Let the job pass, or refuse it with every reason.

    Args:
        policy: the client's own.
        job: as the server sent it.
        peer: the server's certificate name, for the message.

    Raises:
        PolicyDenied: SS-2001 with one detail per breach.
    """
    if found := breaches(policy, job):
        raise PolicyDenied(
            "SS-2001",
            f"policy '{policy.name}' does not allow the job '{job.name}' of server '{peer}': {len(found)} breach(es)",
            hint="Ask the server's operator for another job; a policy is loosened by its owner only, after thought.",
            details=found,
        )


def round_config(job: Job, *, model: str, run: bytes, number: int, dim: int, frozen: str) -> RoundConfig:
    """One secure sum's parameters. Both ends build them from what they hold, so none is taken on trust.

    Args:
        job: as sent in Welcome.
        model: digest of the model's manifest.
        run: the sum's name, from the server, 16 bytes.
        number: the round.
        dim: coordinates of an update.
        frozen: digest of what all clients must hold alike.

    Raises:
        InputError: SS-1601 when the job's numbers do not fit together.
    """
    sums = job.sums
    return RoundConfig(
        session_id=run,
        round=number,
        roster=tuple(sorted(sums.roster)),
        threshold=sums.threshold,
        min_clients=sums.min_clients,
        dim=dim,
        scale=largest_scale(len(sums.roster), WEIGHT_CAP),
        clip=sums.clip,
        w_max=WEIGHT_CAP,
        model=model,
        frozen=frozen,
        blind=sums.blind,
    )
