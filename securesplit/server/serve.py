"""A job's server: open its files, listen, and write B's adapters when it ends."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from securesplit.admit import admit
from securesplit.errors import InputError, PolicyDenied
from securesplit.journal.checkpoint import Checkpoints
from securesplit.journal.events import Loaded
from securesplit.journal.log import Journal
from securesplit.kept.folder import Facts, Kept
from securesplit.logged import open_journal, signer_of
from securesplit.model.code import save_code
from securesplit.pki.certificate import verify_signature
from securesplit.pki.passphrase import Passphrase
from securesplit.pki.store import KeyFolder
from securesplit.policy.leakage import Proof, read_proofs
from securesplit.policy.schema import Policy
from securesplit.protocol.job import Job
from securesplit.protocol.offer import require_short
from securesplit.server.anchors import KeptAnchors
from securesplit.server.build import build_core
from securesplit.server.closed import ClosedRuns
from securesplit.server.core import ServerCore
from securesplit.server.leaving import leave_middle
from securesplit.server.loading import Named, load_named
from securesplit.server.recording import SumRecords
from securesplit.server.rounds import RoundRecords
from securesplit.server.steps import EVERY
from securesplit.transport.limits import Limits
from securesplit.transport.record import Record
from securesplit.transport.server import CONNECTIONS, MOST_PER_CLIENT, Listen, Shell
from securesplit.transport.tls import ContextHolder


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
    device: str = "cpu",
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
        state: folder from which the same call goes on after a crash. None: a server that is started again has forgotten B.
        every, device: learning steps between snapshots there; where B computes.
        ready: called with host and port once the server listens.
        progress: told of each phase when the model has to be made first.

    Raises:
        PolicyDenied: SS-2003 when the policy is for loopback only and the address is not, SS-2001 with every breach when the
            job breaks the server's own policy, or its sums cannot be made, SS-2027 when the policy limits what attacks may get
            and no fresh report proves it. LeakageExceeded: SS-7002.
        InputError, ConnectionFailed: when files cannot be used; SS-1255 the device, SS-1291 to SS-1295 the state folder.
    """
    host, port = split_listen(listen)
    proofs = _required(policy, job, host, evidence)
    tls = ContextHolder(keys, passphrase=passphrase)
    loaded = load_named(job, policy, model, cache, code, proofs, progress, device)
    with ExitStack() as files:
        journal = files.enter_context(open_journal(tls.folder))
        log = _announced(journal, job, policy, loaded.digest)
        places = _Places(tls.folder, out, record, state, every)
        core = _assembled(files, journal, log, job, policy, loaded, places, limits)
        shell = Shell(core, tls, listen_for(job, policy, host, port, record, limits), log)
        asyncio.run(_until_signal(shell, lambda found: ready(host, found)))
        core.steps.commit()
    if out is not None:
        leave_middle(core, loaded.digest, out)
    return Served(sums=core.sums.finished, aborted=core.sums.aborted)


def _announced(journal: Journal, job: Job, policy: Policy, model: str) -> Record:
    """What writes the audit log; its first rows say what is served."""
    record = Record(journal, signer_of)
    record.note(Loaded(what="policy", digest=policy.digest))
    record.note(Loaded(what="job", digest=job.digest))
    record.note(Loaded(what="model", digest=model))
    return record


@dataclass(frozen=True, slots=True)
class _Places:
    """Where a server reads and writes.

    Attributes:
        keys: the server's key folder.
        out, record, state: as in :func:`serve`; None for nowhere.
        every: learning steps between snapshots of the state.
    """

    keys: KeyFolder
    out: Path | None
    record: Path | None
    state: Path | None
    every: int


def _assembled(
    files: ExitStack,
    journal: Journal,
    log: Record,
    job: Job,
    policy: Policy,
    loaded: Named,
    places: _Places,
    limits: Limits | None,
) -> ServerCore:
    """The core with all that it reads and writes; what has to be closed again is closed with ``files``."""
    keys, out, record = places.keys, places.out, places.record
    worker = None
    if job.sums.backend in {"bfv", "ckks"}:
        from securesplit.aggregate.he_worker import HeWorker

        worker = files.enter_context(HeWorker())
    if out is not None:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
    seen = None if record is None else SumRecords(record, loaded.directory, job)
    kept = None
    if places.state is not None:
        facts = state_facts(job, policy, loaded.digest)
        kept = files.enter_context(closing(Kept.open(places.state, facts)))
    core = build_core(
        job, policy, loaded.middle, loaded.digest, loaded.code, KeptAnchors(keys.path / "anchors"), worker=worker,
        records=None if out is None else RoundRecords(keys, out), seen=seen, limits=limits, note=log.require,
        checkpoints=Checkpoints(journal, verify_signature),
        closed=ClosedRuns(keys.path / "closed-rounds.json", job.digest), state=kept, every=places.every,
    )  # fmt: skip
    if record is not None:
        _write_public(record, job, policy, loaded.digest)
        if loaded.code is not None:
            save_code(loaded.code, record / "code.safetensors")
    return core


def listen_for(
    job: Job, policy: Policy, host: str, port: int, record: Path | None, limits: Limits | None = None
) -> Listen:
    """Where and within which limits a job is served.

    Every client of the roster has room for all of its connections: those that it lost may still count while it comes back.
    """
    room = max(CONNECTIONS, MOST_PER_CLIENT * len(job.sums.roster) + 16)
    asked = (limits or Limits()).sized(room)
    return Listen(host, port, policy.limits.max_message_bytes, max_connections=room, record=record, limits=asked)


async def _until_signal(shell: Shell, ready: Callable[[int], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await shell.run(stop, ready)


def _required(policy: Policy, job: Job, host: str, evidence: Path | None) -> tuple[Proof, ...]:
    """What is refused before anything is opened; the reports that are at hand."""
    _require_loopback(policy, host)
    admit(policy, job, peer="this server")  # Every client would be turned away later, and told no reason.
    require_short(policy)
    return () if evidence is None else read_proofs(evidence)


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
