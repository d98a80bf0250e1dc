"""Where rule meets fact: does this client's policy allow this server's job? Every breach is named at once.

The server's wishes never loosen anything: a job carries no privacy parameter, and what it carries is only compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from securesplit.aggregate.config import Floors, RoundConfig, largest_scale
from securesplit.aggregate.fit import Wishes, fit_round
from securesplit.errors import InputError, LeakageExceeded, PolicyDenied
from securesplit.policy.leakage import Proof, Traffic, faults_of
from securesplit.policy.rules import Breach
from securesplit.policy.schema import Gaussian, Policy
from securesplit.protocol.job import Job
from securesplit.suited import learning_breaches

WEIGHT_CAP = 255
"""Weights in a secure sum are numbers of records, capped here; the cap is public, the weights are hidden in the sum."""


def breaches(policy: Policy, job: Job) -> tuple[str, ...]:
    """One line per rule of the policy that the job breaks; each begins with the rule's name."""
    return tuple(breach.line() for breach in broken_rules(policy, job))


def broken_rules(policy: Policy, job: Job) -> tuple[Breach, ...]:
    """Every rule of the policy that the job breaks, with the values on both sides."""
    sums = policy.aggregation
    if not job.mode.summed:
        return (*_limits(policy, job), *_labels(policy, job), *_mode(policy, job), *learning_breaches(policy, job))
    floors = (
        ("aggregation.min_clients", sums.min_clients, job.sums.min_clients, "sums of {} clients, and {} is the least"),
        ("aggregation.min_threshold", sums.min_threshold, job.sums.threshold, "a threshold of {}, and {} is the least"),
    )
    found = [*_limits(policy, job)]
    found += [Breach(rule, what.format(has, ours), ours, has) for rule, ours, has, what in floors if has < ours]
    if job.sums.clip > sums.max_update:
        what = f"a clip of {job.sums.clip}, and {sums.max_update} is the most"
        found.append(Breach("aggregation.max_update", what, sums.max_update, job.sums.clip))
    if 2 * job.sums.threshold <= (n := len(job.sums.roster)):
        what = "the threshold is not more than half of the roster"
        found.append(Breach("aggregation.majority", what, n // 2 + 1, job.sums.threshold))
    if sums.blind and not job.sums.blind:
        found.append(Breach("aggregation.blind", "the server would see the sum", policy=True, other=False))
    if not found:  # One fault of the sums' numbers, told twice in different words, helps nobody.
        found += _sums(policy, job)
    return (
        *found,
        *_labels(policy, job),
        *_sharing(policy, job),
        *_noise(policy, job),
        *_mode(policy, job),
        *learning_breaches(policy, job),
    )


def label_breaches(policy: Policy, job: Job) -> tuple[str, ...]:
    """What is wrong between the policy's labels and the job's, in at most one line."""
    return tuple(breach.line() for breach in _labels(policy, job))


def sharing_breaches(policy: Policy, job: Job) -> tuple[str, ...]:
    """What is wrong between the policy's regime and what the job's clients share of their adapters, in at most one line."""
    return tuple(breach.line() for breach in _sharing(policy, job))


def noise_breaches(policy: Policy, job: Job) -> tuple[str, ...]:
    """What is wrong between noise that a policy shares with other clients and the job's sums, in at most two lines."""
    return tuple(breach.line() for breach in _noise(policy, job))


def _limits(policy: Policy, job: Job) -> Iterator[Breach]:
    """The cut, and how much crosses it at once."""
    limits = policy.limits
    for end, least, has in (("front", limits.min_front, job.cut.front), ("back", limits.min_back, job.cut.back)):
        where = "in front" if end == "front" else "at the back"
        if has < least:
            what = f"the cut leaves {has} layers {where}, and {least} is the least"
            yield Breach(f"limits.min_{end}", what, least, has)
    if job.schedule.batch > limits.max_sequences:
        what = f"batches of {job.schedule.batch}, and {limits.max_sequences} is the most"
        yield Breach("limits.max_sequences", what, limits.max_sequences, job.schedule.batch)


def _mode(policy: Policy, job: Job) -> Iterator[Breach]:
    """What a mode of training asks of a policy that protects.

    Who hands its adapters over shows them to the others by themselves, so they must carry noise that suffices alone. Parts
    that stay at a site are moved by local steps, of which regime ``round`` has none. Where B stands still, nothing tells
    copies of it apart.
    """
    training, privacy = job.mode, policy.privacy
    pinned = policy.aggregation.roster
    if not training.summed and pinned is not None and (odd := set(pinned) ^ set(job.sums.roster)):
        what = f"the job's roster is another one, in {len(odd)} name(s)"
        yield Breach("aggregation.roster", what, list(pinned), sorted(job.sums.roster))
    if not isinstance(privacy, Gaussian):
        return
    alone = privacy.updates is None or (privacy.updates.honest or 1) == 1
    if training.mode == "sequential" and (privacy.regime != "step" or not alone):
        what = "mode 'sequential' hands each client's own adapters to the others; only noise that suffices alone, in regime 'step', covers that"
        yield Breach("privacy.regime.mode", what, privacy.regime, training.mode)
    elif (training.personal or not training.summed) and (privacy.regime == "round" or not alone):
        what = "parts that stay at their site need local steps with noise of their own; this policy's regime or shared noise has none"
        yield Breach("privacy.regime.mode", what, privacy.regime, training.mode)
    elif privacy.regime == "frozen" and ((training.replicated and training.summed) or training.mode == "client-batch"):
        what = f"mode '{training.mode}' is about how the server's part learns, and under regime 'frozen' it does not"
        yield Breach("privacy.regime.mode", what, privacy.regime, training.mode)
    elif privacy.regime == "frozen" and training.personal:
        what = "regime 'frozen' trains the back alone: with a personal back nothing is left to sum; that is mode 'splitfed-v3'"
        yield Breach("privacy.regime.mode", what, privacy.regime, list(training.personal))


def _sums(policy: Policy, job: Job) -> Iterator[Breach]:
    """Who takes part in the job's secure sums, and their numbers by themselves."""
    pinned = policy.aggregation.roster
    if pinned is not None and (odd := set(pinned) ^ set(job.sums.roster)):
        what = f"the job's roster is another one, in {len(odd)} name(s)"
        yield Breach("aggregation.roster", what, list(pinned), sorted(job.sums.roster))
        return
    try:
        config = round_config(job, model="0" * 64, run=bytes(16), number=0, dim=1, frozen="0" * 64)
    except InputError as error:
        for what in error.details or (error.what,):
            yield Breach("aggregation.sums", what, None, None)
        return
    least = policy.aggregation.min_colluders or 0
    if config.colluders < least:
        what = f"sums that withstand {config.colluders} colluders, and {least} is the least"
        yield Breach("aggregation.min_colluders", what, least, config.colluders)


def _labels(policy: Policy, job: Job) -> Iterator[Breach]:
    """A policy with ``[privacy.labels]`` releases gradients of answered class labels and no others, so text cannot be learnt
    under it; and the answers' noise is sized for its own number of classes.
    """
    labels = policy.privacy.labels if isinstance(policy.privacy, Gaussian) else None
    if labels is None:
        return
    if job.task is None:
        what = "the job has no [task]; [privacy.labels] releases answers for class labels and no other gradients"
        yield Breach("privacy.labels.task", what, labels.classes, None)
    elif len(job.task.labels) != labels.classes:
        what = f"{len(job.task.labels)} labels; privacy.labels.classes is {labels.classes}"
        yield Breach("privacy.labels.classes", what, labels.classes, len(job.task.labels))


def _sharing(policy: Policy, job: Job) -> Iterator[Breach]:
    """A factor that stays at its site needs local steps. Averaging two factors apart is for sums without noise: noise would
    drown the residual that such a run must report.
    """
    privacy, sharing = policy.privacy, job.adapters.sharing
    if not isinstance(privacy, Gaussian):
        return
    if sharing == "share-a" and privacy.regime == "round":
        what = "sharing 'share-a' needs local steps for each client's own B; regime 'round' has none"
        yield Breach("privacy.regime.sharing", what, privacy.regime, sharing)
    elif sharing == "naive" and (privacy.regime != "frozen" or privacy.updates is not None):
        what = "sharing 'naive' reports what it gets wrong, and this policy's noise on updates would drown that figure"
        yield Breach("privacy.updates.sharing", what, privacy.regime, sharing)


def _noise(policy: Policy, job: Job) -> Iterator[Breach]:
    """Shared noise counts on the honest clients that the smallest sum of the job holds, its colluders left out; and the ring
    must have room for it, because it is made of the ring's own steps: 12 standard deviations, beyond which a coordinate
    lies once in 10^31.
    """
    if (
        not isinstance(policy.privacy, Gaussian)
        or policy.privacy.updates is None
        or policy.privacy.updates.honest is None
    ):
        return
    # Both load torch, which those who only read policies need not wait for.
    from securesplit.privacy.lattice import SIGMA, step_for
    from securesplit.privacy.plan import plan_for, rows_moved

    sums, honest, n = job.sums, policy.privacy.updates.honest, len(job.sums.roster)
    try:
        left = round_config(job, model="0" * 64, run=bytes(16), number=0, dim=1, frozen="0" * 64).honest
    except InputError:
        return  # Told by _sums.
    if left < honest:
        what = f"a sum may hold {left} honest clients; updates.honest is {honest}, and the noise is sized for that"
        yield Breach("privacy.updates.honest", what, honest, left)
    plan = plan_for(policy.privacy, rows=rows_moved(job.cut.front, policy.limits.buckets)).update
    assert plan is not None, "the policy has a channel for updates"
    if plan.clip / step_for(plan.part) + 12 * SIGMA > ring_steps(job):
        bits = sums.ring_bits or 32
        what = f"a ring of {bits} bits has no room for {n} clients with this noise; ask for sums.ring_bits = 64"
        yield Breach("privacy.updates.ring", what, None, bits)


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


def traffic_of(policy: Policy, job: Job, *, model: str) -> Traffic:
    """What the server of this job sees under this policy; a report must speak of as much.

    Gradients cross unless the regime is ``frozen``. A policy without noise gives everything away with its first release.
    """
    regime = policy.privacy.regime if isinstance(policy.privacy, Gaussian) else None
    fresh = {"round": job.schedule.rounds, "step": job.schedule.rounds * job.schedule.epochs}.get(regime or "", 1)
    gradients, opened = regime != "frozen", not job.sums.blind
    return Traffic(
        mechanism=policy.mechanism_digest, model=model, cut=(job.cut.front, job.cut.back), codec=job.codec,
        code=None if job.code is None else job.code.digest, classes=0 if job.task is None else len(job.task.labels),
        fresh=fresh, channels=frozenset({"O1"} | ({"O3"} if gradients else set()) | ({"O5"} if opened else set())),
    )  # fmt: skip


def require_proof(
    policy: Policy, job: Job, *, model: str, proofs: Sequence[Proof], now: datetime | None = None
) -> None:
    """Hold a policy with ``[leakage]`` limits to its reports; without the table everything passes.

    Args:
        policy: this side's own.
        job: what is to be served or joined.
        model: digest of the model's manifest.
        proofs: the reports in this side's own folder.
        now: for tests; the clock when absent.

    Raises:
        LeakageExceeded: SS-7002 when the last report exceeds a limit.
        PolicyDenied: SS-2027 when no fresh report speaks of this job, or only one by an adversary who knew or saw less
            than the job's server does.
    """
    if policy.leakage is None:
        return
    traffic = traffic_of(policy, job, model=model)
    missing, over = faults_of(policy.leakage, proofs, traffic, now=now or datetime.now(UTC))
    if over:
        raise LeakageExceeded(
            "SS-7002",
            f"policy '{policy.name}' allows less than the attacks got from traffic like that of job '{job.name}'",
            hint="Tighten the budget or move the cut, record again, and attack the new recording.",
            details=over,
        )
    if missing:
        raise PolicyDenied(
            "SS-2027",
            f"policy '{policy.name}' limits what attacks may get, and no fresh report proves it for the job '{job.name}'",
            hint="Attack a recording of this mechanism, cut and codec with `attack run --out DIR`, and name the folder by --evidence.",
            details=missing,
        )


def floors_of(policy: Policy, *, honest: int = 1) -> Floors:
    """What a client insists on in every round.

    Args:
        policy: the client's own.
        honest: how many honest clients the noise of its update counts on; 1 when on nobody else.
    """
    rules = policy.aggregation
    return Floors(
        min_clients=rules.min_clients, min_threshold=rules.min_threshold, blind=rules.blind, min_honest=honest,
        min_colluders=rules.min_colluders or 0,
        # Under shared noise the ring's clip follows from the noise, and the update was clipped by its norm before.
        max_update=rules.max_update if honest == 1 else math.inf,
    )  # fmt: skip


def weight_cap(job: Job, step: float) -> int:
    """The largest weight of a client in this job's sums: 1 where every update counts once, as it must under shared noise."""
    return 1 if step or job.sums.weights == "uniform" else WEIGHT_CAP


def ring_steps(job: Job) -> int:
    """How many steps one client's coordinate may have in this job's sums, where every update counts once."""
    return largest_scale(len(job.sums.roster), 1, job.sums.ring_bits or 32)


def round_config(
    job: Job, *, model: str, run: bytes, number: int, dim: int, frozen: str, step: float = 0.0
) -> RoundConfig:
    """One secure sum's parameters. Both ends build them from what they hold, so none is taken on trust.

    Args:
        job: as sent in Welcome.
        model: digest of the model's manifest.
        run: the sum's name, from the server, 16 bytes.
        number: the round.
        dim: coordinates of an update.
        frozen: digest of what all clients must hold alike.
        step: the ring's step where the clients share the noise of the sum, or 0; the clip follows from it then.

    Raises:
        InputError: SS-1601 when the job's numbers do not fit together.
    """
    sums, w_max, bits = job.sums, weight_cap(job, step), job.sums.ring_bits or 32
    clip = sums.clip if not step else step * largest_scale(len(sums.roster), w_max, bits)
    wishes = Wishes(
        roster=tuple(sorted(sums.roster)), threshold=sums.threshold, min_clients=sums.quorum or sums.min_clients, clip=clip, w_max=w_max,
        blind=sums.blind, colluders=sums.colluders, ring_bits=bits, backend=sums.backend or "masks",
        prg=sums.prg or "aes256ctr",
    )  # fmt: skip
    return fit_round(wishes, session_id=run, number=number, dim=dim, model=model, frozen=frozen)
