"""A job's server put together from its parts, without a network and without opening a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from securesplit.admit import round_config
from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.encryption import SumWorker
from securesplit.aggregate.server import ServerRound
from securesplit.journal.checkpoint import Checkpoints
from securesplit.journal.events import Event, Round
from securesplit.kept.folder import Kept
from securesplit.learning import prepare, recipe_of
from securesplit.model.code import CutCode, refuse_other_code
from securesplit.model.parts import Middle
from securesplit.pki.certificate import verify_signature
from securesplit.policy.schema import Policy
from securesplit.protocol.job import Job
from securesplit.protocol.messages import RoundReady
from securesplit.server.anchors import KeptAnchors
from securesplit.server.closed import ClosedRuns
from securesplit.server.core import ServerCore
from securesplit.server.engine import Engine
from securesplit.server.former import FormerStates
from securesplit.server.marks import slots_of
from securesplit.server.recording import SumRecords
from securesplit.server.rounds import RoundRecords
from securesplit.server.steps import EVERY, Steps
from securesplit.server.sums import Patience, Sums
from securesplit.transport.limits import Limits

__all__ = ["build_core"]


def build_core(
    job: Job,
    policy: Policy,
    middle: Middle,
    model: str,
    code: CutCode | None = None,
    kept: KeptAnchors | None = None,
    *,
    worker: SumWorker | None = None,
    records: RoundRecords | None = None,
    seen: SumRecords | None = None,
    limits: Limits | None = None,
    note: Callable[[Event], None] = lambda _event: None,
    checkpoints: Checkpoints | None = None,
    closed: ClosedRuns | None = None,
    state: Kept | None = None,
    every: int = EVERY,
) -> ServerCore:
    """The server's core, without a network.

    Args:
        job: what is served.
        policy: the server's own.
        middle: B, without adapters; the job's are added.
        model: digest of the model's manifest.
        code: what the job's ``code`` names.
        kept: what clients asked to keep; in memory alone when absent.
        worker: adds ciphertexts, for jobs with homomorphic encryption.
        records: keeps what can be verified of each secure sum.
        seen: keeps what this server sees of each sum, as a part of its recording.
        limits: what each client may use, and how much memory generation may.
        note: writes a row of the audit log.
        closed: the rounds that are over, for jobs with ``sums.attempts``; in memory alone when absent.
        state: folder from which the learning goes on, and where it is kept, with the states that checkpoints name.
        every: learning steps between snapshots there.

    Raises:
        InputError: SS-1431 when the job names another code, or none; SS-1295 and as :class:`Steps` for a state that does not
            fit.
    """
    digest, width = (None, None) if job.code is None else (job.code.digest, job.code.width)
    refuse_other_code(code, digest=digest, width=width, model=model)
    engine = _engine(job, middle, code, limits)
    keep = tuple(kept_by for kept_by in (records, seen) if kept_by is not None)
    return ServerCore(
        job,
        policy,
        model=model,
        engine=engine,
        sums=_sums(job, model, worker=worker, keep=keep, note=note, closed=closed),
        randomness=os.urandom,
        kept=kept,
        limits=limits,
        note=note,
        checkpoints=checkpoints,
        steps=Steps(lambda: engine, job.codec, state, every=every, uniform=job.mode.weighting == "uniform"),
        former=FormerStates(None if state is None or not slots_of(job) else state.path / "former"),
    )


def _engine(job: Job, middle: Middle, code: CutCode | None, limits: Limits | None) -> Engine:
    """B at work, with the job's adapters in as many copies as its mode has."""
    prepare(middle, job)
    copies = job.mode.lanes(job.sums.roster) if job.mode.replicated else ()
    caches = None if limits is None else limits.caches
    return Engine(middle, recipe=recipe_of(job, "server"), code=code, caches=caches, copies=copies)


def _sums(
    job: Job,
    model: str,
    *,
    worker: SumWorker | None,
    keep: Sequence[Callable[[ServerRound], None]],
    note: Callable[[Event], None],
    closed: ClosedRuns | None,
) -> Sums:
    """The job's secure sums; each is a row of the audit log when it begins, and when it ends."""

    def config_of(run: bytes, ready: RoundReady) -> RoundConfig:
        config = round_config(
            job, model=model, run=run, number=ready.round, dim=ready.dim, frozen=ready.frozen, step=ready.step
        )
        note(Round(state="started", number=ready.round, run=run.hex()))
        return config

    def over(ended: ServerRound) -> None:
        number, run, result = ended.config.round, ended.config.session_id.hex(), ended.result
        if result is None:
            note(Round(state="refused", number=number, run=run, code=ended.aborted or "SS-6001"))
        else:
            note(Round(state="ended", number=number, run=run, clients=len(result.survivors)))
        for keep_by in keep:
            keep_by(ended)

    wait = job.sums.stage_seconds
    return Sums(
        roster=job.sums.roster, quorum=job.sums.fewest, config_of=config_of,
        patience=Patience(stage=wait, gather=10 * wait, reconnect=job.sums.patience),
        randomness=os.urandom, worker=worker, verify=_signed, keep=over,
        closed=None if job.sums.attempts is None else closed or ClosedRuns(),
        late=job.sums.late is not None,
    )  # fmt: skip


def _signed(_name: str, certificate: bytes, signature: bytes, data: bytes) -> None:
    """Whose certificate it is the clients check; here a fault is to be found before it spoils the sum."""
    verify_signature(certificate, signature, data)
