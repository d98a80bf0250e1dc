"""A job's server: load B, listen, and write B's adapters when it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from securesplit.admit import admit, require_proof, round_config
from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.encryption import SumWorker
from securesplit.aggregate.server import ServerRound
from securesplit.errors import InputError, PolicyDenied
from securesplit.journal.checkpoint import Checkpoints
from securesplit.journal.events import Event, Loaded, Round
from securesplit.kept.folder import Facts, Kept
from securesplit.learning import prepare, recipe_of
from securesplit.logged import open_journal, signer_of
from securesplit.model.code import CutCode, read_code, refuse_other_code, save_code
from securesplit.model.manifest import read_manifest
from securesplit.model.parts import Middle
from securesplit.model.plan import CutPlan
from securesplit.model.resolve import resolve_model
from securesplit.model.store import load_middle
from securesplit.pki.certificate import verify_signature
from securesplit.pki.passphrase import Passphrase
from securesplit.policy.leakage import read_proofs
from securesplit.policy.schema import Policy
from securesplit.protocol.job import Job
from securesplit.protocol.messages import RoundReady
from securesplit.protocol.offer import require_short
from securesplit.server.anchors import KeptAnchors
from securesplit.server.core import ServerCore
from securesplit.server.endings import ClosedRuns
from securesplit.server.engine import Engine
from securesplit.server.former import FormerStates
from securesplit.server.leaving import leave_middle
from securesplit.server.marks import slots_of
from securesplit.server.recording import SumRecords
from securesplit.server.rounds import RoundRecords
from securesplit.server.steps import EVERY, Steps
from securesplit.server.sums import Patience, Sums
from securesplit.transport.limits import Limits
from securesplit.transport.record import Record
from securesplit.transport.server import CONNECTIONS, MOST_PER_CLIENT, Listen, Shell
from securesplit.transport.tls import ContextHolder

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """What a server did.

    Attributes:
        sums: secure sums that ended with a result, and those that were aborted.
    """

    sums: int
    aborted: int


def split_listen(listen: str) -> tuple[str, int]:
    """``host:port``; an IPv6 host stands in brackets.

    Raises:
        InputError: SS-1141.
    """
    host, _, port = listen.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise InputError("SS-1141", "the address to listen on is not HOST:PORT", hint="For example 127.0.0.1:8443.")
    return host.strip("[]"), int(port)


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
    prepare(middle, job)
    copies = job.mode.lanes(job.sums.roster) if job.mode.replicated else ()
    caches = None if limits is None else limits.caches
    engine = Engine(middle, recipe=recipe_of(job, "server"), code=code, caches=caches, copies=copies)

    keep = tuple(kept_by for kept_by in (records, seen) if kept_by is not None)
    sums = _sums(job, model, worker=worker, keep=keep, note=note, closed=closed)
    return ServerCore(
        job,
        policy,
        model=model,
        engine=engine,
        sums=sums,
        randomness=os.urandom,
        kept=kept,
        limits=limits,
        note=note,
        checkpoints=checkpoints,
        steps=Steps(lambda: engine, job.codec, state, every=every, uniform=job.mode.weighting == "uniform"),
        former=FormerStates(None if state is None or not slots_of(job) else state.path / "former"),
    )


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


def state_facts(job: Job, policy: Policy, model: str) -> Facts:
    """What a server's state belongs to."""
    return Facts(party="server", job=job.digest, model=model, policy=policy.digest)


def serve(
    job: Job,
    policy: Policy,
    *,
    keys: str | Path,
    listen: str,
    model: str | Path | None = None,
    cache: Path | None = None,
    code: Path | None = None,
    record: Path | None = None,
    out: Path | None = None,
    evidence: Path | None = None,
    limits: Limits | None = None,
    passphrase: Passphrase | None = None,
    state: Path | None = None,
    every: int = EVERY,
    ready: Callable[[str, int], None] = lambda _host, _port: None,
    progress: Callable[[str, float], None] = lambda _phase, _fraction: None,
) -> Served:
    """Serve a job until SIGINT or SIGTERM.

    Args:
        job, policy: what is served, and the server's own rules.
        keys: the server's key folder.
        listen: ``host:port``; port 0 picks a free one.
        model: a model directory that replaces the job's name for it.
        cache: where pulled models lie; by default under the home directory.
        code: file of the public code that the job names.
        record: directory for a transcript of everything that the server sees.
        out: directory for B's trained adapters.
        evidence: folder with the server's reports of the attack suite, for a policy with ``[leakage]`` limits.
        limits: what the server takes from whom; the defaults when absent.
        passphrase: asked once, when the server's key is encrypted.
        state: folder of the learning's state: after a crash the same call goes on where it stood. None: a server that is
            started again has forgotten what B learnt.
        every: learning steps between snapshots there.
        ready: called with host and port once the server listens.
        progress: told of each phase when the model has to be made first.

    Raises:
        PolicyDenied: SS-2003 when the policy is for loopback only and the address is not, SS-2001 with every breach when the
            job breaks the server's own policy, or its sums cannot be made.
            SS-2027 when the policy limits what attacks may get, and no fresh report proves it. LeakageExceeded: SS-7002.
        InputError, ConnectionFailed: when files cannot be used. SS-1291, SS-1292, SS-1293, SS-1295 for the state folder.
    """
    host, port = split_listen(listen)
    _require_loopback(policy, host)
    admit(policy, job, peer="this server")  # Every client would be turned away later, and told no reason.
    require_short(policy)
    proofs = () if evidence is None else read_proofs(evidence)
    tls = ContextHolder(keys, passphrase=passphrase)
    known = None if code is None else read_code(code)
    plan = CutPlan(front=job.cut.front, back=job.cut.back)
    directory = resolve_model(
        str(model or job.model), cache or Path.home() / ".cache" / "securesplit" / "models", plan, progress=progress
    )
    digest = read_manifest(directory).digest
    require_proof(policy, job, model=digest, proofs=proofs)
    middle = load_middle(directory)
    files = ExitStack()
    journal = files.enter_context(open_journal(tls.folder))
    record_of = Record(journal, signer_of)
    record_of.note(Loaded(what="policy", digest=policy.digest))
    record_of.note(Loaded(what="job", digest=job.digest))
    record_of.note(Loaded(what="model", digest=digest))
    worker = None
    if job.sums.backend in {"bfv", "ckks"}:
        from securesplit.aggregate.he_worker import HeWorker

        worker = files.enter_context(HeWorker())
    if out is not None:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
    records = None if out is None else RoundRecords(tls.folder, out)
    anchors = KeptAnchors(tls.folder.path / "anchors")
    closed = ClosedRuns(tls.folder.path / "closed-rounds.json")
    seen = None if record is None else SumRecords(record, directory, job)
    kept = None if state is None else files.enter_context(closing(Kept.open(state, state_facts(job, policy, digest))))
    core = build_core(
        job, policy, middle, digest, known, anchors, worker=worker, records=records, seen=seen, limits=limits,
        note=record_of.require, checkpoints=Checkpoints(journal, verify_signature), closed=closed,
        state=kept, every=every,
    )  # fmt: skip
    if record is not None:
        _write_public(record, job, policy, digest)
        if known is not None:
            save_code(known, record / "code.safetensors")
    shell = Shell(core, tls, listen_for(job, policy, host, port, record, limits), record_of)
    with files:
        asyncio.run(_until_signal(shell, lambda found: ready(host, found)))
        core.steps.commit()
    if out is not None:
        leave_middle(core, digest, out)
    return Served(sums=core.sums.finished, aborted=core.sums.aborted)


def listen_for(
    job: Job, policy: Policy, host: str, port: int, record: Path | None, limits: Limits | None = None
) -> Listen:
    """Where and within which limits a job is served.

    Every client of the roster has room for all of its connections: those that it lost may still count while it comes back.
    """
    room = max(CONNECTIONS, MOST_PER_CLIENT * len(job.sums.roster) + 16)
    asked = (limits or Limits()).sized(room)
    return Listen(host, port, policy.limits.max_message_bytes, max_connections=room, record=record, limits=asked)


def _signed(_name: str, certificate: bytes, signature: bytes, data: bytes) -> None:
    """Whose certificate it is the clients check; here a fault is to be found before it spoils the sum."""
    verify_signature(certificate, signature, data)


async def _until_signal(shell: Shell, ready: Callable[[int], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await shell.run(stop, ready)


def _require_loopback(policy: Policy, host: str) -> None:
    try:
        local = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        local = False
    if policy.transport.loopback_only and not local:
        raise PolicyDenied(
            "SS-2003",
            f"policy '{policy.name}' is for loopback only",
            hint="Listen on 127.0.0.1, or use a policy that protects.",
        )


def _write_public(record: Path, job: Job, policy: Policy, model: str) -> None:
    public = {
        "version": 1,
        "policy": policy.model_dump(mode="json"),
        "policy_digest": policy.digest,
        "job": job.model_dump(mode="json"),
        "model": model,
    }
    try:
        record.mkdir(parents=True, exist_ok=False)
        (record / "transcript.json").write_text(json.dumps(public, indent=1, sort_keys=True), encoding="utf-8")
    except OSError as error:
        raise InputError(
            "SS-1303",
            f"cannot record into {record}: {type(error).__name__}",
            hint="Name a directory that does not exist yet.",
        ) from None
