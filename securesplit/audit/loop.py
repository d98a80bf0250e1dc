"""What happens to a record before its release: probes of the product's own client and training loop.

A release can carry its noise and be paid for, and still tell more than was paid: when A and C were moved by something else
than noised sums, when one user enters a sum several times, when a gradient was scaled by what a neighbour in its batch is,
or when it was made from the true labels and is presented as made from the answers. Each probe puts one such question to
the code that would do it, with the server's part or the gradients replaced by public ones so that two worlds can be
compared bit by bit.

What they cannot see: coupling of records that shows only in inputs other than these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from securesplit.audit.bench import Floats, claims_of
from securesplit.audit.tiny import TinySite
from securesplit.client.client import Client
from securesplit.client.link import Link
from securesplit.client.middle import RemoteMiddle
from securesplit.client.train import Trainer
from securesplit.data.batches import IGNORED, Batch
from securesplit.errors import PolicyDenied, SecureSplitError
from securesplit.model.lora import adapter_layout, read_adapters, write_adapters
from securesplit.policy.schema import Gaussian
from securesplit.privacy.clipped_sum import ClippedSum
from securesplit.privacy.gate import ReleasedUpdate
from securesplit.privacy.released import Released

_FOREIGN = "SS-2014"


class _Stop(Exception):
    """What was to be seen has been seen, and nothing shall leave."""


def audit_loop(site: TinySite) -> tuple[str, ...]:
    """Put every question that the policy's regime allows; the names of the probes that failed.

    ``lineage``, ``units``, ``neighbours`` and ``answers``; each begins with a restart of the site, so at the start of the job.
    """
    privacy = site.policy.privacy
    assert isinstance(privacy, Gaussian)
    probes: list[tuple[str, Callable[[TinySite], bool]]] = [("lineage", _refuses_foreign_states)]
    if privacy.regime != "frozen":
        probes += [("units", _unit_is_clipped_whole), ("neighbours", _neighbour_says_nothing)]
    if privacy.labels is not None and privacy.regime != "frozen":
        probes.append(("answers", _truth_says_nothing))
    failed = []
    for name, probe in probes:
        site.restart()
        try:
            passed = probe(site)
        except (SecureSplitError, ValueError, IndexError):
            passed = False  # A question that could not be put was not answered.
        if not passed:
            failed.append(name)
    return tuple(failed)


def _refuses_foreign_states(site: TinySite) -> bool:
    """After A, or what else shapes releases, was moved by hand: nothing leaves, on no channel and by no call."""
    client, batch = site.client, site.training[0]
    parts = (client.front,) if client.regime == "frozen" else (client.front, client.back)
    open_at = [claim.at for claim in claims_of(site.policy) if claim.at != "update"]
    zeros, fresh = torch.zeros(1, batch.bucket, client.front.width), [site.ledger.key(b"a foreign state")]
    for part in parts:
        layout = adapter_layout(part)
        before = read_adapters(part, layout)
        write_adapters(part, layout, before + np.float32(1e-3))
        calls: list[Callable[[], object]] = [lambda: client.loss(batch)]
        calls += [lambda at=at: client.gate.release(zeros, at=at, records=fresh, contents=fresh) for at in open_at]  # type: ignore[misc]
        if client.regime == "step":
            calls.append(lambda: client.gate.release_update(np.zeros(4)))
        left, head = len(site.cohort.tap.sent), site.ledger.head()
        refused = {_refusal(call) for call in calls} == {_FOREIGN}
        write_adapters(part, layout, before)
        if not refused or len(site.cohort.tap.sent) != left or site.ledger.head() != head:
            return False
    return True


def _refusal(call: Callable[[], object]) -> str | None:
    try:
        call()
    except SecureSplitError as error:
        return error.code if isinstance(error, PolicyDenied) else None
    return None


def _unit_is_clipped_whole(site: TinySite) -> bool:
    """However long the gradients of one unit's records, and wherever they stand: it is in a sum once, with norm C at most."""
    claim = next(claim for claim in claims_of(site.policy) if claim.at == "update")
    batches = site.training
    sums = [batches] if site.client.regime == "round" else [(batch,) for batch in batches]
    for within in sums:
        for unit in {key for batch in within for key in batch.records}:
            plus, minus = (_sum_of(site, within, unit, sign * 1000 * claim.clip) for sign in (1, -1))
            for total, records in (plus, minus):
                length = float(np.linalg.norm(total))
                if len(set(records)) != len(records) or unit not in records:
                    return False
                if not 0.9 * claim.clip <= length <= claim.clip * (1 + 1e-9):
                    return False
            if np.linalg.norm(plus[0] - minus[0]) > claim.distance * (1 + 1e-9):
                return False
    return True


class _Probe(Trainer):
    """The product's loop over these batches, with one unit's gradients made up, or with its own gradients shown."""

    def __init__(self, site: TinySite, batches: tuple[Batch, ...], unit: str = "", size: float = 0.0) -> None:
        super().__init__(site.client, batches, (), answers=site.answers, progress=lambda *_: None)
        self._unit, self._size = unit, size

    def _gradients(self, batch: Batch) -> tuple[Tensor, float]:
        if not self._unit:
            return super()._gradients(batch)
        dim = sum(parameter.numel() for parameter in self._client.parameters())
        mine = torch.tensor([float(key == self._unit) for key in batch.records])
        return mine[:, None] * torch.full((dim,), self._size / dim**0.5), 0.0

    def local_work(self) -> None:
        """One round's local work, as :meth:`run` does it."""
        self._client.train("B")
        self._at.ended()  # What an earlier round left.
        try:
            if self._client.regime == "round":
                self._record_gradients(0)
            else:
                self._noised_steps(0, "B", self._client.read("B"))
        finally:
            self._client.train(None)

    def summed(self, batch: Batch) -> Tensor:
        """What of each record would be added up, (B,d)."""
        self._client.train("B")
        gradients, _ = self._gradients(batch)
        for parameter in self._client.parameters():
            parameter.grad = None
        self._client.train(None)
        return gradients


def _sum_of(site: TinySite, batches: tuple[Batch, ...], unit: str, size: float) -> tuple[Floats, Sequence[str]]:
    """The training loop's sum before its noise where only this unit has gradients, each along one dense direction."""
    gate, kept = site.client.gate, list[ClippedSum]()

    def keep(total: object) -> ReleasedUpdate:
        assert isinstance(total, ClippedSum)
        kept.append(total)
        raise _Stop

    release_update = gate.release_update
    gate.release_update = keep  # type: ignore[method-assign,assignment]
    with suppress(_Stop):
        _Probe(site, batches, unit, size).local_work()
    gate.release_update = release_update  # type: ignore[method-assign]
    return kept[0].steps.astype(np.float64) * kept[0].step, tuple(kept[0].records)


def _neighbour_says_nothing(site: TinySite) -> bool:
    """A record's gradients, the one that leaves and the one that is summed, are the same beside a shorter or longer text."""
    batch = site.training[0]
    lengths = [n for n in (2, batch.bucket) if n != batch.lengths[-1]]
    if len(batch.records) < 2:
        return True
    worlds = [_gradients_of(site, batch)]
    worlds += [_gradients_of(site, _beside(site, batch, length)) for length in lengths]
    leaving, summed = worlds[0]
    return all(torch.equal(leaving[0], a[0]) and torch.equal(summed[0], b[0]) for a, b in worlds[1:])


def _beside(site: TinySite, batch: Batch, length: int) -> Batch:
    """The batch with another last row, of so many tokens."""
    tokens, labels = batch.tokens.clone(), batch.labels.clone()
    tokens[-1, :length] = 2 + torch.arange(length) % 7
    tokens[-1, length:] = 0
    if batch.classes is None:
        labels[-1] = IGNORED
        labels[-1, :length] = tokens[-1, :length]
    name = site.ledger.key(b"a neighbour of %d tokens" % length)
    return replace(
        batch, tokens=tokens, labels=labels, lengths=(*batch.lengths[:-1], length), records=(*batch.records[:-1], name),
        contents=(*batch.contents[:-1], name), labelled=(*batch.labelled[:-1], name) if batch.labelled else (),
    )  # fmt: skip


class _Identity(RemoteMiddle):
    """B as the identity, without noise; keeps the gradients that would be released."""

    def __init__(self, client: Client) -> None:
        super().__init__(client.link, client.gate)
        self.kept: list[Tensor] = []

    def forward(self, private: Released) -> Tensor:
        """Clipped rows as they are."""
        return private.graph.detach()

    def backward(self, gradient: Tensor) -> Tensor:
        """The gradient as it is."""
        self.kept.append(gradient.clone())
        return gradient


def _gradients_of(site: TinySite, batch: Batch) -> tuple[Tensor, Tensor]:
    """What the loop would release at ``gradient``, (B,T,D), and what it would sum, (B,d)."""
    identity = _Identity(site.client)
    site.client.remote = site.client.middle = identity
    summed = _Probe(site, (batch,)).summed(batch)
    return identity.kept[0], summed


class _Wire(Link):
    """In place of a link: B is the identity, and what would leave is kept."""

    def __init__(self) -> None:
        self.step = 0
        self.backwards: list[bytes] = []

    def forward(self, released: Released, *, learn: bool, cache: int = 0) -> Tensor:
        """See :meth:`Link.forward`."""
        del learn, cache
        return released.graph.detach()

    def backward(self, released: Released) -> Tensor:
        """See :meth:`Link.backward`."""
        self.backwards.append(released.payload)
        return released.graph.detach()


def _truth_says_nothing(site: TinySite) -> bool:
    """With the stored answers, gradients leave as the same bytes whatever the true classes are."""
    batch = site.training[0]
    assert batch.classes is not None
    count = len(batch.choices)
    worlds = [batch.with_classes((batch.classes + shift) % count) for shift in range(min(count, 3))]
    left = [_backwards(site, world) for world in worlds]
    return bool(left[0]) and all(frames == left[0] for frames in left[1:])


def _backwards(site: TinySite, batch: Batch) -> list[bytes]:
    wire = _Wire()
    site.client.remote = site.client.middle = RemoteMiddle(wire, site.client.gate)
    _Probe(site, (batch,)).summed(batch)
    return wire.backwards
