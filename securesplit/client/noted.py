"""What a run writes down for its own site: how it began, every step's numbers, each held-out record's loss. None of it is sent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from securesplit.client.step import cross
from securesplit.data.batches import Batch
from securesplit.data.corpus import Record
from securesplit.model.persample import record_losses
from securesplit.policy.meaning import meaning_of
from securesplit.policy.schema import Gaussian
from securesplit.privacy.plan import enforced_epsilon
from securesplit.runs.about import About, DataNote, Option, Seeds, versions, write_about
from securesplit.runs.fingerprint import fingerprint, run_key
from securesplit.runs.folder import clear
from securesplit.runs.losses import RecordLoss
from securesplit.runs.metrics import Metrics, Reading, Sink
from securesplit.runs.tensorboard import TensorBoard

if TYPE_CHECKING:
    from securesplit.client.client import Client
    from securesplit.client.run import Run

__all__ = ["Meters", "begin_notes", "held_out_losses", "record_losses_of"]

_NO_OPTIONS = frozenset({"policy", "passphrase"})


def begin_notes(
    run: Run,
    client: Client,
    records: Sequence[Record],
    batches: tuple[Batch, ...],
    held_out: tuple[Batch, ...],
    *,
    folder: Path,
    now: datetime,
    after: int | None = None,
    looks: int | None = None,
) -> Metrics:
    """Write ``about.json`` and open the metrics; close them when the run is over. What an earlier run left goes first.

    Args:
        run, client: of this run.
        records: all of the site's, in order.
        batches, held_out: what is made of them.
        folder: the party's key folder, where the key for names of data lies.
        now: with a time zone.
        after: the step of the checkpoint that a run goes on from; ``about.json`` stays as it was then.
        looks: how many evaluations that checkpoint knows of.
    """
    if after is None:
        clear(run.out, results=run.overwrite)
        data = DataNote(
            digest=fingerprint(records, run_key(folder)), records=sum(len(b.records) for b in batches),
            held_out=sum(len(b.records) for b in held_out), batches=len(batches),
        )  # fmt: skip
        write_about(run.out, _about(run, client, data, now))
    sink: Sink | None = TensorBoard(run.out) if run.tensorboard else None
    return Metrics(run.out, Meters(client), after=after, looks=looks, lr=client.job.optimiser.client_lr, sink=sink)


def _about(run: Run, client: Client, data: DataNote, now: datetime) -> About:
    job, policy = client.job, client.policy
    return About(
        started=now, client=client.link.name, job=job.canonical(), job_digest=job.digest, job_name=job.name,
        policy=policy.canonical().decode(), policy_digest=policy.digest, policy_name=policy.name, model=client.link.model,
        regime=client.regime, options=_options(run), versions=versions(), data=data, tls=client.link.tls_version,
        seeds=Seeds(adapters=job.adapters.seed, batches=job.adapters.seed),
    )  # fmt: skip


def _options(run: Run) -> tuple[Option, ...]:
    """Every option of the run that is set, by its name; secrets are none of them."""
    found: list[Option] = []
    for field in fields(run):
        value = getattr(run, field.name)
        if field.name in _NO_OPTIONS or value is None:
            continue
        if field.name == "tasked":
            chosen = ("task", "template", "ids", "split", "kept")
            said = [(name, getattr(value, name)) for name in chosen]
            found += [Option(name=name, value=str(what)) for name, what in said if what is not None]
            continue
        found.append(
            Option(name=field.name, value=value if isinstance(value, str | int | float | bool) else str(value))
        )
    return tuple(found)


class Meters:
    """Reads a client's meters. The ledger is asked again only where something has been sent since."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._known: tuple[int, float | None] | None = None

    def __call__(self) -> Reading:
        """Bytes and budget now."""
        link, ledger, privacy = self._client.link, self._client.ledger, self._client.policy.privacy
        if self._known is None or self._known[0] != link.bytes_up:
            epsilon = None
            if ledger is not None and isinstance(privacy, Gaussian):
                epsilon = enforced_epsilon(ledger.mu(), privacy.delta)
            self._known = (link.bytes_up, epsilon)
        meaning = meaning_of(privacy) if isinstance(privacy, Gaussian) else None
        up, down = link.carried  # The rows from before an interruption count these.
        return Reading(link.bytes_up - up, link.bytes_down - down, self._known[1], meaning)


@torch.no_grad()
def held_out_losses(client: Client, batches: tuple[Batch, ...]) -> tuple[RecordLoss, ...]:
    """Each held-out record's loss now. Releases like those of an evaluation: in the same state the same bytes go out again."""
    client.train(None)
    found: list[RecordLoss] = []
    for batch in batches:
        client.remote.about(batch)
        mixed = cross(batch, client.coded_front, client.gate, client.middle)
        found += record_losses_of(batch, client.coded_back(mixed))
    return tuple(sorted(found, key=lambda loss: loss.source))


def record_losses_of(batch: Batch, logits: torch.Tensor) -> list[RecordLoss]:
    """A batch's losses, record by record, from its logits, (B, T, V)."""
    nats = record_losses(logits, batch.labels).double().tolist()
    counts = (batch.labels[:, 1:] != -100).sum(1).tolist()
    return [
        RecordLoss(source=source, nats=max(0.0, lost) if math.isfinite(lost) else None, tokens=count)
        for source, lost, count in zip(batch.sources, nats, counts, strict=True)
    ]
