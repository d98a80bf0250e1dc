"""Test 3: everything that leaves a client is in its ledger, carries its noise, and is the same when it is sent again.

A tap keeps every byte of a whole small run of the product's own client: evaluation, training, a secure sum, generation, a
retry, a restart. Each message is parsed from its bytes. Every record's block of rows must have its SHA-256 in the ledger,
under the payer and at the price that the policy's text says (charges.py); every length must be public; a remembered record
must be resent bit for bit; what enters a secure sum, opened with the help of the peers, must be a released vector; and A
and C must end where the released vectors alone take them, so that weights which clean gradients moved, with a noised value
presented as the reason, are found here. What comes before a release is asked by the probes of loop.py. A second way out
shows as a block that no entry knows.

What it cannot see: bytes that leave by other means than the client's link, such as a log shipped by the operating system.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from securesplit.aggregate.fixedpoint import quantise
from securesplit.audit.bench import Floats, claims_of
from securesplit.audit.bounds import chi_square_z, quantile
from securesplit.audit.charges import Watch, undercharged
from securesplit.audit.cohort import ring_of
from securesplit.audit.loop import audit_loop
from securesplit.audit.tiny import TinySite
from securesplit.errors import BudgetExhausted, PolicyDenied, SecureSplitError
from securesplit.model.lora import adapter_layout, read_adapters
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.clipped_sum import ClippedSum
from securesplit.privacy.lattice import step_for
from securesplit.protocol.messages import Backward, Blob, Forward, Message, Secagg, size_of
from securesplit.transport.tensors import tensor_of

_CLOSED = ("SS-2010", "SS-2011")


@dataclass(frozen=True, slots=True)
class CompletenessVerdict:
    """What the tap saw.

    Attributes:
        messages, frames, blocks: messages that left, those with rows, and records' blocks in them.
        unknown: blocks whose SHA-256 no ledger entry has.
        silent: frames whose distance from the clipped rows is not what the noise must make it.
        private_lengths: lengths that are no public bucket.
        sums, unknown_sums: updates that entered a secure sum, and those that are neither released nor hidden by policy.
        undercharged: payers and channels for which the ledger holds less than the releases must have cost.
        learnt: whether the adapters after training are what the released vectors make of the start, by an optimiser that is
            written down here again; in regime ``frozen``, whether A stood still.
            None where training was stopped and so not tested.
        probes: which probes of client and training loop failed (securesplit/audit/loop.py).
        resent: whether a retry and a restart sent the same bytes again.
        raised: channels whose number of releases was raised for this run, at the same share, so that it could end.
        stopped: the code at which the policy ended the run early, or None.
        ok: nothing unknown, silent, private, different, too cheap or left untested; but that a policy which closes training
            or generation altogether (SS-2010, SS-2011) leaves it untested.
    """

    messages: int
    frames: int
    blocks: int
    unknown: int
    silent: int
    private_lengths: int
    sums: int
    unknown_sums: int
    undercharged: int
    learnt: bool | None
    probes: tuple[str, ...]
    resent: bool
    raised: tuple[str, ...]
    stopped: str | None
    ok: bool


def audit_completeness(policy: Policy, site: TinySite, *, error: float) -> CompletenessVerdict:
    """Run a whole tiny client and account for every byte.

    Args:
        policy: audited.
        site: fresh; of this policy, or of :func:`securesplit.audit.tiny.trainable` of it.
        error: probability that right noise is called silent.
    """
    watch, stated, policy = Watch(), policy, site.policy
    watch.observe(site.client.gate)
    client = site.client
    start, front = client.read("B").astype(np.float64), read_adapters(client.front, adapter_layout(client.front))
    stopped = halted = _until_refused(site.train)
    stood = np.array_equal(front, read_adapters(client.front, adapter_layout(client.front)))
    learnt = None if halted else stood if client.regime == "frozen" else _learnt(site, watch, start)
    sums, unknown_sums = _check_sums(site, watch)
    privacy = policy.privacy
    assert isinstance(privacy, Gaussian)
    if privacy.generation is not None:
        stopped = stopped or _until_refused(lambda: _generate(site))
    if privacy.updates is not None and not halted:
        _until_refused(lambda: _sum_again(site))
    resent = _resent(site, watch)
    messages = site.cohort.tap.messages()
    frames = _frames(messages)
    blocks = [block for frame in frames for block in frame]
    # Gradients of answered labels leave as they are: they are functions of the answers, which the ledger has; that they
    # are made from nothing else is what the probe `answers` asks.
    charged = _frames(messages, Forward) if privacy.labels is not None else frames
    unknown = sum(site.ledger.knows(_digest(block)) is None for frame in charged for block in frame)
    lengths = [n for m in messages if isinstance(m, Forward) for n in m.lengths]
    private = sum(n != 1 and n not in policy.limits.buckets for n in lengths)
    silent = _silent(policy, watch, error)
    trained = () if halted else tuple(key for batch in site.training for key in batch.records)
    cheap = undercharged(policy, site.ledger, watch, clients=len(site.job.sums.roster), trained=trained)
    probes = audit_loop(site)
    tested = stopped is None or stopped in _CLOSED
    ok = not (unknown or silent or private or unknown_sums or cheap or probes) and learnt is not False
    return CompletenessVerdict(
        messages=len(messages), frames=len(frames), blocks=len(blocks), unknown=unknown, silent=silent, private_lengths=private,
        sums=sums, unknown_sums=unknown_sums, undercharged=cheap, learnt=learnt, probes=probes, resent=resent,
        raised=_raised(stated, policy), stopped=stopped, ok=ok and tested and resent and len(frames) > 0,
    )  # fmt: skip


def _sum_again(site: TinySite) -> None:
    """One more sum over the records that trained: it must be drawn and paid anew, or be refused by the policy's count."""
    plan = site.client.gate.plan
    assert plan is not None
    assert plan.update is not None
    again = ClippedSum(4, plan.update.clip, step_for(plan.update.part))
    for key in dict.fromkeys(key for batch in site.training for key in batch.records):
        again.add(torch.zeros(4), key)
    site.client.gate.release_update(again)


def _raised(stated: Policy, run: Policy) -> tuple[str, ...]:
    """The channels with other numbers of releases than the policy's own."""
    names = ("activations", "gradients", "updates", "generation")
    return tuple(name for name in names if getattr(stated.privacy, name) != getattr(run.privacy, name))


def _until_refused(act: Callable[[], object]) -> str | None:
    """Run until the end or until the policy's own budget refuses; the code, then."""
    try:
        act()
    except (BudgetExhausted, PolicyDenied) as refusal:
        return refusal.code
    return None


def _generate(site: TinySite) -> None:
    site.client.generate("a made-up prompt"[: site.policy.limits.buckets[-1]], max_new_tokens=2)


def _frames(messages: list[Message], *kinds: type[Message]) -> list[list[bytes]]:
    """Each message of rows as its records' blocks of bytes."""
    out: list[list[bytes]] = []
    lengths: tuple[int, ...] = ()
    for message in messages:
        if isinstance(message, Forward):
            lengths = message.lengths
        if isinstance(message, kinds or (Forward, Backward)):
            out.append(_blocks(message.hidden if isinstance(message, Forward) else message.gradient, lengths))  # type: ignore[attr-defined]
    return out


def _blocks(rows: Blob, lengths: tuple[int, ...]) -> list[bytes]:
    width = size_of(rows.dtype, (1, rows.shape[1]))
    ends = np.cumsum(lengths) * width
    return [rows.data[end - length * width : end] for end, length in zip(ends.tolist(), lengths, strict=True)]


def _digest(block: bytes) -> str:
    return hashlib.sha256(block).hexdigest()


def _check_sums(site: TinySite, watch: Watch) -> tuple[int, int]:
    """How many updates entered a sum, and how many of them nothing accounts for."""
    masked = [m for m in site.cohort.tap.messages() if isinstance(m, Secagg) and m.vector.shape != (0,)]
    if not masked:
        return 0, 0
    privacy, sums = site.policy.privacy, site.job.sums
    assert isinstance(privacy, Gaussian)
    update = watch.updates[-1]
    words = site.cohort.words()
    ring = ring_of(site.job, update.step)
    same, _ = quantise(update.vector, int(words[-1]), scale=ring.scale, clip=ring.clip, w_max=ring.w_max)
    noised = site.ledger.knows(_digest(update.vector.tobytes())) is not None
    # In regime `step` what enters is a difference of states that noised sums made, which were charged one by one.
    steps = (
        privacy.regime == "step"
        and len(watch.updates) > 1
        and all(site.ledger.knows(_digest(u.vector.tobytes())) is not None for u in watch.updates[:-1])
    )
    hidden = privacy.regime == "frozen" and privacy.updates is None and sums.blind
    accounted = bool(np.array_equal(words, same)) and (noised or steps or hidden)
    return len(masked), len(masked) - int(accounted)


def _learnt(site: TinySite, watch: Watch, start: Floats) -> bool:
    """Whether C and A are where noised vectors alone take them: what clean gradients added would be left over here."""
    client, job = site.client, site.job
    words = site.cohort.words()
    ring = ring_of(job, watch.updates[-1].step)
    total = int(words[-1]) + len(job.sums.roster) - 1  # Each peer's zeros count once.
    mean = words[:-1].view(np.int32).astype(np.float64) * (ring.clip / ring.scale / total)
    after = client.read("B").astype(np.float64)
    rate = job.optimiser.client_lr
    if client.regime == "round":
        return np.allclose(after, _adam(start, [mean], rate), rtol=1e-3, atol=1e-5)
    rows = job.schedule.batch
    local = _adam(start, [u.vector / rows for u in watch.updates[:-1]], rate)
    same = np.allclose(watch.updates[-1].vector, local - start, rtol=1e-3, atol=1e-5)
    return same and np.allclose(after, start + mean, rtol=1e-3, atol=1e-5)


def _adam(start: Floats, gradients: list[Floats], rate: float) -> Floats:
    """Adam without weight decay (Kingma and Ba 2015, algorithm 1), with the usual constants."""
    at, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for step, gradient in enumerate(gradients, start=1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        at -= rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return at


def _resent(site: TinySite, watch: Watch) -> bool:
    """Whether a remembered record is sent as the same bytes again, now and after a restart."""
    batch = site.training[0]

    def sent() -> bytes | None:
        site.restart()
        watch.observe(site.client.gate)
        start = len(site.cohort.tap.sent)
        try:
            site.client.loss(batch)
            first = _frames(site.cohort.tap.messages(since=start))
            site.client.middle = site.client.remote  # A frozen B's answers are remembered; a retry asks again.
            site.client.loss(batch)
        except SecureSplitError:
            return None
        again = _frames(site.cohort.tap.messages(since=start))
        return b"".join(first[0]) if again == [first[0], first[0]] else None

    one, two = sent(), sent()
    return one is not None and one == two


def _silent(policy: Policy, watch: Watch, error: float) -> int:
    """How many releases lie closer to, or farther from, the clipped rows than their noise allows."""
    sigmas = {claim.at: claim.sigma for claim in claims_of(policy)}
    limit = quantile(error / max(1, len(watch.rows)))
    count = 0
    for at, released in watch.rows:
        if at not in sigmas:
            continue
        # As the server reads it; what a codec rounds away is a hundredth of the noise and is seen by no such limit.
        seen = tensor_of(Blob(dtype=released.codec, shape=released.shape, data=released.payload)).double()
        residual = (seen - released.graph.detach().double()) / sigmas[at]
        count += abs(chi_square_z(float((residual**2).sum()), residual.numel())) > limit
    return count
