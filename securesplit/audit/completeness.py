"""Test 3: everything that leaves a client is in its ledger, carries its noise, and is the same when it is sent again.

A tap keeps every byte of a whole small run of the product's own client: evaluation, training, a secure sum, generation, a
retry, a restart. Each message is parsed from its bytes. Every record's block of rows must have its SHA-256 in the ledger;
every length must be public; a remembered record must be resent bit for bit; what enters a secure sum, opened with the
help of the peers, must be a released vector. A second way out shows as a block that no entry knows.

What it cannot see: bytes that leave by other means than the client's link, such as a log shipped by the operating system.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from securesplit.admit import WEIGHT_CAP
from securesplit.aggregate.config import largest_scale
from securesplit.aggregate.fixedpoint import quantise
from securesplit.audit.bench import Floats, claims_of
from securesplit.audit.bounds import chi_square_z, quantile
from securesplit.audit.tiny import TinySite
from securesplit.errors import BudgetExhausted, PolicyDenied, SecureSplitError
from securesplit.model.lora import adapter_layout, read_adapters
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.released import Released, ReleasedUpdate
from securesplit.protocol.messages import Backward, Blob, Forward, Message, Secagg

_ITEM = {"f32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class CompletenessVerdict:
    """What the tap saw.

    Attributes:
        messages, frames, blocks: messages that left, those with rows, and records' blocks in them.
        unknown: blocks whose SHA-256 no ledger entry has.
        silent: frames whose distance from the clipped rows is not what the noise must make it.
        private_lengths: lengths that are no public bucket.
        sums, unknown_sums: updates that entered a secure sum, and those that are neither released nor hidden by policy.
        learnt: whether the adapters after training are what the released vectors make of the start, by an optimiser that is
            written down here again; in regime ``frozen``, whether A stood still.
        resent: whether a retry and a restart sent the same bytes again.
        stopped: the code at which the policy's budget ended the run early, or None.
        ok: nothing unknown, silent, private or different.
    """

    messages: int
    frames: int
    blocks: int
    unknown: int
    silent: int
    private_lengths: int
    sums: int
    unknown_sums: int
    learnt: bool
    resent: bool
    stopped: str | None
    ok: bool


@dataclass(slots=True)
class _Watch:
    """What the client's own gate handed over, for comparison with what left."""

    rows: list[tuple[str, Released]] = field(default_factory=list)
    updates: list[ReleasedUpdate] = field(default_factory=list)


def audit_completeness(policy: Policy, site: TinySite, *, error: float) -> CompletenessVerdict:
    """Run a whole tiny client and account for every byte.

    Args:
        policy: audited.
        site: of this policy, fresh.
        error: probability that right noise is called silent.
    """
    watch = _Watch()
    _observe(site, watch)
    client = site.client
    start, front = client.read("B").astype(np.float64), read_adapters(client.front, adapter_layout(client.front))
    stopped = _until_refused(site.train)
    stood = np.array_equal(front, read_adapters(client.front, adapter_layout(client.front)))
    learnt = stopped is not None or (stood if client.regime == "frozen" else _learnt(site, watch, start))
    sums, unknown_sums = _check_sums(site, watch)
    privacy = policy.privacy
    assert isinstance(privacy, Gaussian)
    if privacy.generation is not None:
        stopped = stopped or _until_refused(lambda: _generate(site))
    resent = _resent(site, watch)
    messages = site.cohort.tap.messages()
    frames = _frames(messages)
    blocks = [block for frame in frames for block in frame]
    # Gradients of answered labels leave as they are: they are functions of the answers, which the ledger has.
    charged = _frames(messages, Forward) if privacy.labels is not None else frames
    unknown = sum(site.ledger.knows(_digest(block)) is None for frame in charged for block in frame)
    lengths = [n for m in messages if isinstance(m, Forward) for n in m.lengths]
    private = sum(n != 1 and n not in policy.limits.buckets for n in lengths)
    silent = _silent(policy, watch, error)
    ok = not (unknown or silent or private or unknown_sums) and learnt and resent and len(frames) > 0
    return CompletenessVerdict(
        messages=len(messages), frames=len(frames), blocks=len(blocks), unknown=unknown, silent=silent, private_lengths=private,
        sums=sums, unknown_sums=unknown_sums, learnt=learnt, resent=resent, stopped=stopped, ok=ok,
    )  # fmt: skip


def _observe(site: TinySite, watch: _Watch) -> None:
    """Keep what this client's gate hands over, beside handing it over."""
    gate = site.client.gate
    release, release_update = gate.release, gate.release_update

    def watched(*args: object, **named: object) -> Released:
        released = release(*args, **named)  # type: ignore[arg-type]
        watch.rows.append((str(named["at"]), released))
        return released

    def watched_update(update: object) -> ReleasedUpdate:
        released = release_update(update)  # type: ignore[arg-type]
        watch.updates.append(released)
        return released

    gate.release, gate.release_update = watched, watched_update  # type: ignore[method-assign]


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
    width = rows.shape[1] * _ITEM[rows.dtype]
    ends = np.cumsum(lengths) * width
    return [rows.data[end - length * width : end] for end, length in zip(ends.tolist(), lengths, strict=True)]


def _digest(block: bytes) -> str:
    return hashlib.sha256(block).hexdigest()


def _check_sums(site: TinySite, watch: _Watch) -> tuple[int, int]:
    """How many updates entered a sum, and how many of them nothing accounts for."""
    masked = [m for m in site.cohort.tap.messages() if isinstance(m, Secagg) and m.vector.shape != (0,)]
    if not masked:
        return 0, 0
    privacy, sums = site.policy.privacy, site.job.sums
    assert isinstance(privacy, Gaussian)
    update = watch.updates[-1]
    words = site.cohort.words()
    scale = largest_scale(len(sums.roster), WEIGHT_CAP)
    same, _ = quantise(update.vector, int(words[-1]), scale=scale, clip=sums.clip, w_max=WEIGHT_CAP)
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


def _learnt(site: TinySite, watch: _Watch, start: Floats) -> bool:
    """Whether C and A are where noised vectors alone take them: what clean gradients added would be left over here."""
    client, job = site.client, site.job
    words = site.cohort.words()
    scale = largest_scale(len(job.sums.roster), WEIGHT_CAP)
    total = int(words[-1]) + len(job.sums.roster) - 1  # Each peer's zeros count once.
    mean = words[:-1].view(np.int32).astype(np.float64) * (job.sums.clip / scale / total)
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


def _resent(site: TinySite, watch: _Watch) -> bool:
    """Whether a remembered record is sent as the same bytes again, now and after a restart."""
    batch = site.training[0]

    def sent() -> bytes | None:
        site.restart()
        _observe(site, watch)
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


def _silent(policy: Policy, watch: _Watch, error: float) -> int:
    """How many releases lie closer to, or farther from, the clipped rows than their noise allows."""
    sigmas = {claim.at: claim.sigma for claim in claims_of(policy)}
    limit = quantile(error / max(1, len(watch.rows)))
    count = 0
    for at, released in watch.rows:
        if at not in sigmas:
            continue
        dtype = torch.float32 if released.codec == "f32" else torch.bfloat16
        seen = torch.frombuffer(bytearray(released.payload), dtype=dtype).double()
        residual = (seen - released.graph.detach().double().flatten()) / sigmas[at]
        count += abs(chi_square_z(float((residual**2).sum()), residual.numel())) > limit
    return count
