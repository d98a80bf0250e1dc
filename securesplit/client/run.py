"""A client's whole run: from files and keys to adapters and a record. What it writes stays on this site."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from securesplit.aggregate.answered import AnswerLog
from securesplit.client.alone import train_alone
from securesplit.client.checkpoints import middle_of, round_folder, save_adapters
from securesplit.client.client import Client
from securesplit.client.dial import dial, waiting
from securesplit.client.link import Link
from securesplit.client.memory import EVERY, Remembered
from securesplit.client.middle import Observer
from securesplit.client.noted import begin_notes, held_out_losses
from securesplit.client.records import job_batches
from securesplit.client.resume import clean, is_finished, ready
from securesplit.client.tasked import tasked_batches
from securesplit.client.train import Progress, Trained, Trainer
from securesplit.data.batches import Batch
from securesplit.data.corpus import Record, read_corpus
from securesplit.data.tasks.chosen import Chosen, read_tasked
from securesplit.errors import InputError, PolicyDenied, SecureSplitError
from securesplit.kept.folder import Kept
from securesplit.model.code import read_code
from securesplit.model.export import read_part_adapters, restore_adapters
from securesplit.model.memory import resident_bytes
from securesplit.model.plan import CutPlan
from securesplit.pki.files import write_atomically
from securesplit.pki.passphrase import Passphrase
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.plan import enforced_epsilon
from securesplit.runs.folder import RUN, claim
from securesplit.runs.losses import write_losses
from securesplit.runs.tensorboard import require_tensorboard


@dataclass(frozen=True, slots=True)
class Run:
    """What a run needs; the fields are the options of ``securesplit train``."""

    policy: Policy
    keys: Path
    server: str
    data: Path
    out: Path
    held_out: int
    limit: int | None
    max_tokens: int | None
    truth: Path | None
    alone: bool
    model: str | None
    cache: Path | None
    code: Path | None = None
    evidence: Path | None = None
    watch: int = 0
    tasked: Chosen | None = None
    passphrase: Passphrase | None = None
    overwrite: bool = False
    tensorboard: bool = False
    resume: bool = False
    patience: float = 600.0
    keep_every: int = EVERY


class ChannelSent(BaseModel):
    """What left through one channel in this run; the same bytes count once, however often they left."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    channel: str
    releases: int
    bytes: int


class ChannelSpent(BaseModel):
    """One channel's cost: entries in the ledger, and the most expensive record on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    channel: str
    releases: int
    mu: float
    epsilon: float


class RunRecord(BaseModel):
    """What a run leaves behind, beside the adapters: ``run.json``. It never leaves the site by itself.

    Attributes:
        loss, initial_loss: held-out, nats per token, after and before.
        curve: held-out loss before the first round and after each.
        alone: the same for the client-only model, or None.
        sharing: what of the adapters the job's sums carried.
        exact: whether each sum gave the mean of the clients' updates; not under sharing ``naive``.
        residuals: there, for each round, how much of the mean product was missed by averaging A and B apart, Frobenius norms;
            ``residuals_clipped`` has the share of weight for which it may be more (securesplit/model/sketch.py).
        measured: held-out loss inside the rounds, after so many optimiser steps of this client.
        missed: numbers of the rounds that went on without this client, from 0. Of their ends the curve has the last one's alone.
        stopped: whether this client took no more local steps at the end.
        best: the lowest held-out loss, with the steps before it, where the job has it kept in ``best``; else None.
        accuracy: share of held-out records whose class was named after training; None for a job without a task.
        honest: how many honest clients each sum must have held for epsilon to be true; 1 where nobody else was counted on.
        epsilon, mu: of the record that has spent most, all jobs of this site together; by the policy's unit,
            relation replace-one, at ``delta``. None under UnsafeNoPrivacy.
        released: what the gate let out in this run, by channel, in bytes of rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    client: str
    policy: str
    policy_digest: str
    job: str
    regime: str
    steps: int
    loss: float
    initial_loss: float
    curve: tuple[float, ...]
    alone: tuple[float, ...] | None
    sharing: str = "alternating"
    exact: bool = True
    residuals: tuple[float, ...] = ()
    residuals_clipped: tuple[float, ...] = ()
    measured: tuple[tuple[int, float], ...] = ()
    missed: tuple[int, ...] = ()
    stopped: bool = False
    best: tuple[int, float] | None = None
    accuracy: float | None = None
    epsilon: float | None
    honest: int = 1
    mu: float | None
    delta: float | None
    unit: str = "sequence"
    relation: str = "replace-one"
    channels: tuple[ChannelSpent, ...]
    released: tuple[ChannelSent, ...] = ()
    survivors: tuple[tuple[str, ...], ...]
    bytes_up: int
    bytes_down: int
    tls: str
    resident_bytes: int
    seconds: float


@contextmanager
def open_client(
    policy: Policy,
    keys: Path,
    server: str,
    *,
    model: str | None = None,
    cache: Path | None = None,
    adapters: Path | None = None,
    code: Path | None = None,
    evidence: Path | None = None,
    observe: Observer | None = None,
    watch: int = 0,
    passphrase: Passphrase | None = None,
    within: float = 0.0,
    tell: Callable[[str], None] = lambda _what: None,
) -> Iterator[Client]:
    """Dial a server and load this site's parts; ``adapters`` restores a run's, ``code`` is a file of ``model fit``.

    ``evidence`` is the folder of reports that a policy with ``[leakage]`` limits needs. ``watch`` is as in
    :meth:`securesplit.client.client.Client.from_pretrained`. ``passphrase`` is asked when the client's key is encrypted.
    For ``within`` seconds a server that is not there is tried again, which ``tell`` is told of.

    Raises:
        InputError: before anything is dialled: SS-1414 when ``adapters`` holds none of a client's, SS-1416 for a code
            that cannot be read.
    """
    if adapters is not None and not (adapters / "adapter-back.safetensors").is_file():
        raise InputError(
            "SS-1414",
            f"{adapters} holds no adapters of a client",
            hint="Name the --out directory of `securesplit train`.",
        )
    known = None if code is None else read_code(code)

    def connect() -> Link:
        return dial(server, keys=keys, policy=policy, evidence=evidence, passphrase=passphrase)

    with waiting(connect, within, tell) as link:
        cut = CutPlan(front=link.job.cut.front, back=link.job.cut.back)
        client = Client.from_pretrained(
            model or link.job.model, cut, policy, link, cache=cache, code=known, observe=observe, watch=watch
        )
        try:
            if adapters is not None:
                _restore(client, adapters)
            yield client
        finally:
            if client.ledger is not None:
                with suppress(SecureSplitError):  # A second line of defence; the connection may be gone already.
                    client.keep_anchor()
                client.ledger.close()


def _restore(client: Client, run: Path) -> None:
    """Put a run's adapters into the parts that learnt; in regime ``frozen`` that is C alone.

    Raises:
        InputError: SS-1430 for another model, SS-1305 for parts of two checkpoints. RemoteProtocolError: SS-4095 when the
            server keeps its own part's state no more. PolicyDenied: SS-2013 for adapters that learnt under another policy: what
            they generate was reserved for under that one, and under an unsafe one it would leave without noise or charge.
    """
    if client.regime != "frozen" and (middle := middle_of(run)):
        client.link.use(bytes.fromhex(middle))
    for part in client.trained:
        path = run / f"adapter-{part.role}.safetensors"
        if not path.is_file():
            continue
        saved = read_part_adapters(path)
        if saved.facts.model != client.link.model:
            raise InputError(
                "SS-1430", f"{path} belongs to another model or cut", hint="Use adapters of this job's model."
            )
        if saved.facts.policy != client.policy.digest:
            raise PolicyDenied(
                "SS-2013", f"{path} learnt under another policy", hint="Generate under the policy of the training run."
            )
        restore_adapters(part, saved)
        client.gate.restored(saved.facts.policy)


def run_training(run: Run, progress: Progress) -> RunRecord:
    """Train, write adapters and ``run.json`` into ``run.out``, and return the record.

    A run that was interrupted goes on where it stood with ``run.resume``, and ends as if nothing had been.

    Raises:
        BudgetExhausted: SS-5001, SS-5002, before anything of the record concerned was sent.
        InputError: SS-1290 to SS-1294 for a run that cannot go on, or must not begin here.
        Any error of the tree that the data, the model, the connection or the rounds raise.
    """
    started = time.monotonic()
    if run.resume and is_finished(run.out):
        progress("the run is finished: nothing is left to do", 1, 1, None)
        return RunRecord.model_validate_json((run.out / "run.json").read_bytes())
    state, goes_on = ready(run.out, resume=run.resume)
    tasked = None if run.tasked is None else read_tasked(run.tasked, run.data, run.limit)
    records = read_corpus(run.data, run.limit) if tasked is None else tasked.records
    if run.tensorboard:
        require_tensorboard()
    claim(run.out, overwrite=run.overwrite or goes_on)
    with ExitStack() as files:
        writer = None
        if run.truth is not None:
            writer = files.enter_context(closing(_TruthWriter(run.truth, records, resume=goes_on)))
        client = files.enter_context(
            open_client(
                run.policy, run.keys, run.server, model=run.model, cache=run.cache, code=run.code, evidence=run.evidence,
                observe=writer, watch=run.watch, passphrase=run.passphrase, within=run.patience if run.resume else 0.0,
                tell=lambda what: progress(what, 0, 1, None),
            )
        )  # fmt: skip
        if writer is not None:
            writer.name = client.link.name
        identify = client.ledger.key if client.ledger is not None else _anonymous
        if tasked is None:
            batches, held_out = job_batches(
                records, client.policy, client.job, client.tokenizer, identify, held_out=run.held_out, max_tokens=run.max_tokens
            )  # fmt: skip
        else:
            batches, held_out = tasked_batches(
                tasked, client.policy, client.job, client.tokenizer, identify, model=client.link.model, held_out=run.held_out,
                max_tokens=run.max_tokens,
            )  # fmt: skip
        folder = run.keys if client.link.folder is None else client.link.folder.path
        answers = files.enter_context(closing(AnswerLog(folder / "answered.log")))
        kept = files.enter_context(closing(Kept.open(clean(state), Remembered.facts(client, batches, held_out))))
        client.link.lasting, client.link.waits = run.patience, lambda what: progress(what, 0, 1, None)
        memory = Remembered(kept, every=run.keep_every)
        metrics = begin_notes(
            run, client, records, batches, held_out, folder=folder, now=datetime.now(UTC), after=memory.resumes_at,
            looks=memory.looks,
        )  # fmt: skip
        with closing(metrics):
            trained = Trainer(
                client, batches, held_out, answers=answers, progress=progress, records=run.out, metrics=metrics,
                memory=memory,
            ).run()  # fmt: skip
        _save(run, client, trained)
        write_losses(run.out, held_out_losses(client, held_out))
        accuracy = client.accuracy(held_out)
        alone = train_alone(client, batches, held_out, progress) if run.alone else None
        record = _record(client, trained, alone, accuracy, time.monotonic() - started)
        write_atomically(run.out / RUN, record.model_dump_json(indent=1).encode(), mode=0o600)
        kept.finish(record.job)
    return record


def _anonymous(content: bytes) -> str:
    """Without a ledger nothing is charged, and records need no name."""
    del content
    return "unsafe"


def _save(run: Run, client: Client, trained: Trained) -> None:
    if trained.best is not None:
        last = client.snapshot()
        client.install(trained.best.values)
        (run.out / "best").mkdir(mode=0o700, exist_ok=True)
        save_adapters(run.out / "best", client, trained.best.middle)
        client.install(last)
    save_adapters(run.out, client, middle_of(round_folder(run.out, client.job.schedule.rounds - 1)))
    for record in trained.rounds:
        packed = io.BytesIO()
        np.savez(packed, contribution=record.contribution, ring_sum=record.ring_sum)
        write_atomically(run.out / f"round-{record.number}.npz", packed.getvalue())


def _record(
    client: Client, trained: Trained, alone: tuple[float, ...] | None, accuracy: float | None, seconds: float
) -> RunRecord:
    privacy, ledger = client.policy.privacy, client.ledger
    delta = privacy.delta if isinstance(privacy, Gaussian) else None
    mu = ledger.mu() if ledger is not None else None
    channels: tuple[ChannelSpent, ...] = ()
    if ledger is not None and delta is not None:
        channels = tuple(
            ChannelSpent(channel=s.channel, releases=s.releases, mu=s.mu, epsilon=enforced_epsilon(s.mu, delta))
            for s in ledger.summary()
        )
    residuals = tuple(r.residual for r in trained.rounds if r.residual is not None)
    return RunRecord(
        sharing=client.job.adapters.sharing, exact=not client.job.adapters.inexact, residuals=tuple(r.relative for r in residuals),
        residuals_clipped=tuple(r.clipped for r in residuals), client=client.link.name, policy=client.policy.name, policy_digest=client.policy.digest, job=client.job.digest,
        regime=client.regime, steps=trained.steps, loss=trained.curve[-1], initial_loss=trained.curve[0], curve=trained.curve, alone=alone,
        accuracy=accuracy, epsilon=None if mu is None or delta is None else enforced_epsilon(mu, delta), mu=mu, delta=delta,
        honest=(privacy.updates and privacy.updates.honest) or 1 if isinstance(privacy, Gaussian) else 1,
        unit=privacy.unit if isinstance(privacy, Gaussian) else "sequence", channels=channels,
        released=tuple(ChannelSent(channel=s.channel, releases=s.releases, bytes=s.size) for s in client.link.sent.channels()),
        measured=tuple((m.moves, m.loss) for m in trained.measured), missed=trained.missed, stopped=trained.stopped,
        best=None if trained.best is None else (trained.best.moves, trained.best.loss),
        survivors=tuple(r.survivors for r in trained.rounds), bytes_up=client.link.bytes_up, bytes_down=client.link.bytes_down,
        tls=client.link.tls_version, resident_bytes=resident_bytes(), seconds=seconds,
    )  # fmt: skip


class _TruthWriter:
    """For experiments on this site: which text went out under which step. The server and the attacks never see it."""

    def __init__(self, path: Path, records: tuple[Record, ...], *, resume: bool = False) -> None:
        self.name = ""
        self._records = records
        self._last, self._rows = -1, 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume and path.exists():
                self._last, self._rows = _mend_truth(path)
            self._file = path.open("a" if resume else "x", encoding="utf-8")
        except OSError as error:
            raise InputError(
                "SS-1231",
                f"the truth file {path} cannot be made: {type(error).__name__}",
                hint="Name a file that does not exist yet.",
            ) from None

    def __call__(self, step: int, batch: Batch) -> None:
        if step < self._last:  # Done again after a crash, and written down before it.
            return
        written = self._rows if step == self._last else 0
        rows = list(enumerate(zip(batch.sources, batch.lengths, strict=True)))
        for row, (source, length) in rows[written:]:
            record = self._records[source]
            line = {
                "peer": self.name, "step": step, "row": row, "tokens": batch.tokens[row, :length].tolist(),
                "text": record.text, "pii": list(record.pii),
                **({} if record.label is None else {"label": record.label}),
            }  # fmt: skip
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()  # A step that is over is not done again after a crash, so its lines must not wait in this process.
        self._last, self._rows = step, len(rows)

    def close(self) -> None:
        self._file.close()


def _mend_truth(path: Path) -> tuple[int, int]:
    """Take off a last line that a crash has cut short. Number of the last step, and how many of its rows are there."""
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    write_atomically(path, b"".join(lines), mode=0o600)
    if not lines:
        return -1, 0
    steps = [int(json.loads(line)["step"]) for line in lines]
    return steps[-1], steps.count(steps[-1])
