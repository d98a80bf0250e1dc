"""The audited path, one call a release: Gate -> link -> session and codec -> bytes -> the server's session -> tensor.

Claims are computed here from the policy's text alone, by the formulae of docs/threat-model.md, and not by the plan that
the gate uses; so a plan with C for 2C is found like a gate without noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from securesplit.admit import ring_steps
from securesplit.aggregate.answered import AnswerLog
from securesplit.audit.cohort import MODEL, Cohort, job_for, ring_of
from securesplit.audit.receiver import Receiver, as_rows
from securesplit.client.rounds import secure_sum
from securesplit.policy.schema import Channel, Gaussian, Policy
from securesplit.privacy.clipped_sum import ClippedSum
from securesplit.privacy.gate import Gate
from securesplit.privacy.lattice import discrete_gaussian, step_for
from securesplit.privacy.ledger import Charge, Ledger
from securesplit.privacy.plan import At, enforced_mu, rows_moved
from securesplit.privacy.released import Codec, Released, ReleasedUpdate
from securesplit.protocol.codec import Caps

Floats = npt.NDArray[np.float64]
BATCH = 1000
"""Records in one message."""
ROWS: tuple[At, ...] = ("cut", "decode", "gradient")
"""The channels on which rows leave."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a policy claims of one release on one channel.

    Attributes:
        at: the channel.
        clip: C.
        mu: of one release.
        distance: L2 between neighbours' clipped values: 2C, or 2C sqrt(rows) where one token moves several clipped rows.
        rows: rows that one unit of privacy can move, each clipped at C; 1 where a record is clipped as a whole.
        per_row: whether rows are clipped one by one.
        releases: that the policy allows.
    """

    at: At
    clip: float
    mu: float
    distance: float
    rows: int
    per_row: bool
    releases: int

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise on each coordinate."""
        return self.distance / self.mu


def claims_of(policy: Policy) -> tuple[Claim, ...]:
    """One claim per channel of a private policy on which noised numbers leave."""
    privacy = policy.privacy
    assert isinstance(privacy, Gaussian)
    total = enforced_mu(privacy.epsilon, privacy.delta)
    by_token = privacy.unit == "token"
    moved = rows_moved(job_for(policy).cut.front, policy.limits.buckets) if by_token else 1
    stated: tuple[tuple[At, Channel | None, int, bool], ...] = (
        ("cut", privacy.activations, moved, by_token),
        ("decode", privacy.generation, 1, False),
        ("gradient", privacy.gradients, 1, False),
        ("update", privacy.updates, 1, False),
    )
    return tuple(
        Claim(
            at, c.clip, total * math.sqrt(c.share / c.releases), 2 * c.clip * math.sqrt(rows), rows, per_row, c.releases
        )
        for at, c, rows, per_row in stated
        if c is not None
    )


class UnmeteredLedger(Ledger):
    """The site's ledger, but that it refuses nothing for its cost.

    Thousands of trials are thousands of releases of one site, which no budget allows. Everything else of a charge happens:
    entry, chain, payload, fsync. That budgets are kept is tested with the ledger, and by the test of completeness.
    """

    def _admit(self, charge: Charge, budget: int, cap: int, count: int = 1) -> None:
        del charge, budget, cap, count


class Bench:
    """A site on the audited path, whose rows are the auditor's.

    Args:
        policy: audited.
        folder: for keys and the ledger; empty or new.
        codec: of the wire.

    Attributes:
        exact: whether rows arrive to the last bit; a codec that rounds, after the noise, leaves nothing of its lattice.
        cohort: the site with its link, its tap and its peers.
        gate, ledger: the site's.
    """

    def __init__(self, policy: Policy, folder: Path, *, codec: Codec = "f32") -> None:
        self.policy = policy
        job = job_for(policy, codec=codec)
        self.exact = codec == "f32"
        self._receiver = Receiver(job, model=MODEL, caps=Caps(message_bytes=policy.limits.max_message_bytes))
        self.cohort = Cohort(folder, policy, job, self._receiver)
        self._state = "start"
        self._answers = AnswerLog(folder / "answered.log")
        self._names, self._rounds = count(), count()
        self._opened = 0
        self.ledger = self.cohort.ledger(UnmeteredLedger)
        self.gate = self._gate()

    def close(self) -> None:
        """Close the files."""
        self.ledger.close()
        self._answers.close()

    def resume(self) -> None:
        """What a restart of the site does: the ledger is opened again, and a new gate stands on it."""
        self.ledger.close()
        self.ledger = self.cohort.ledger(UnmeteredLedger)
        self.gate = self._gate()

    def names(self, n: int) -> list[str]:
        """Fresh ledger keys."""
        return [f"canary-{next(self._names)}" for _ in range(n)]

    def send(
        self, rows: Tensor, *, at: At, records: Sequence[str] | None = None, learn: bool = False, memoise: bool = False
    ) -> Floats:
        """Release rows (B,T,D) and send them; what the server decodes, (B,T,D).

        Args:
            rows: of any float type.
            at: ``cut``, ``decode`` or ``gradient``.
            records: ledger keys; fresh ones when absent. At ``decode`` all records pay.
            learn: release as a training step does, with a graph; otherwise as an evaluation does, without.
            memoise: as of :meth:`Gate.release`.
        """
        named = list(records) if records is not None else self.names(len(rows))
        keys = None if at == "decode" else named  # What is generated is charged to all records.
        with nullcontext() if learn else torch.no_grad():
            tensor = rows.detach().clone().requires_grad_() if learn else rows
            released = self.gate.release(tensor, at=at, records=keys, contents=keys, memoise=memoise)
        return self._send(released, at)

    def send_labels(self, labels: Tensor) -> npt.NDArray[np.int64]:
        """Answer for labels (B,) at random, send a gradient that tells the answers; what the server reads off it, (B,)."""
        keys = self.names(len(labels))
        responded = self.gate.respond(labels, records=keys, contents=keys)
        gradient = responded.labels[:, None, None].float()
        released = self.gate.release(gradient, at="gradient", records=keys, responded=responded)
        return np.rint(self._send(released, "gradient").ravel()).astype(np.int64)  # A codec rounds, an answer does not.

    def summing(self, dim: int) -> ClippedSum:
        """An empty sum, as a training loop makes it."""
        assert self.gate.plan is not None
        channel = self.gate.plan.channel("update")
        assert channel is not None
        return ClippedSum(dim, channel.clip, step_for(channel.part))

    def release(self, total: ClippedSum) -> Floats:
        """Release a sum; the noised one, (d,), as far as it can be told apart from the sum of all."""
        return self._with_others(self.gate.release_update(total))

    def apply(self, total: ClippedSum) -> Floats:
        """Release a sum and let the site's state change by it; the noised one, (d,)."""
        released = self.gate.release_update(total)
        self._state += "+"
        self.gate.moved(released)
        return self._with_others(released)

    @staticmethod
    def _with_others(released: ReleasedUpdate) -> Floats:
        """What the server and all colluders can make of a secure sum: this site's part and the other honest ones' noise."""
        return _joined(np.rint(released.vector / released.step), released) if released.step else released.vector

    def send_sum(self, total: ClippedSum) -> tuple[Floats, Floats]:
        """Release a sum and put it through a secure one.

        Returns:
            What a peer that opens it reads of this site's part, (d,), and what the gate released, (d,). Where the policy
            shares noise, both with the noise of as many honest peers as it counts on.
        """
        self.cohort.invite()
        released = self.gate.release_update(total)
        folder = self.cohort.link.folder
        assert folder is not None
        secure_sum(
            self.cohort.link, folder, self.policy, released, weight=1, number=next(self._rounds), frozen="0" * 64, origin=b"",
            answers=self._answers,
        )  # fmt: skip
        words = self.cohort.words()[:-1].view(np.int32).astype(np.float64)
        if released.step:
            mine = np.rint(released.vector / released.step)
            joined = _joined(mine, released)
            return joined + (words - mine) * released.step, joined
        ring = ring_of(self.cohort.job, 0.0)
        return words * ring.clip / ring.scale, released.vector

    def _gate(self) -> Gate:
        job = self.cohort.job
        return Gate(
            self.policy,
            self.ledger,
            version=MODEL,
            state=lambda: self._state,
            codec=job.codec,
            front=job.cut.front,
            ring=ring_steps(job),
        )

    def _send(self, released: Released, at: At) -> Floats:
        batch, length, width = released.shape
        if at != "gradient":
            self.cohort.link.forward(released, learn=False)
            self._opened = 0
        else:
            if self._opened != batch * length:
                # A gradient belongs to a step, and one step may carry any number; its rows are nobody's.
                self._opened = batch * length
                nobody = self.names(1) * batch
                rows = self.gate.release(torch.zeros(batch, length, 1), at="cut", records=nobody, contents=nobody)
                self.cohort.link.forward(rows, learn=True)
                self._receiver.take()
            self.cohort.link.backward(released)
        return as_rows(self._receiver.take(), (batch, length, width))


def _joined(steps: Floats, released: ReleasedUpdate) -> Floats:
    """A site's part, in lattice steps, with as many honest peers' as its noise counts on; in model units."""
    others = (discrete_gaussian(steps.shape).astype(np.float64) for _ in range(released.honest - 1))
    whole: Floats = sum(others, steps) * released.step
    return whole
