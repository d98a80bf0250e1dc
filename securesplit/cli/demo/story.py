"""The demo's order of events, and the report that comes of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from securesplit import __version__
from securesplit.cli.demo.bars import Bars, bars
from securesplit.cli.demo.parties import Party, server
from securesplit.cli.demo.scene import CLIENTS, HELD_OUT, MAX_TOKENS, Scene, prepare
from securesplit.client.run import RunRecord
from securesplit.model.manifest import read_manifest
from securesplit.model.resolve import resolve_model
from securesplit.policy.schema import Gaussian
from securesplit.privacy.ledger import Ledger
from securesplit.privacy.plan import enforced_epsilon, enforced_mu
from securesplit.privacy.purse import BARE
from securesplit.report import record as report
from securesplit.report.html import write_html

if TYPE_CHECKING:
    from attacks.report import Report as AttackReport
    from attacks.report import Result


_CHANNELS = {
    "cut": "records and prompts, O1",
    "gradient": "gradients, O3",
    "decode": "tokens generated here, O1",
    "peers": "tokens that peers may generate, O1",
    "update": "updates, O5",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """The command's options."""

    model: str
    data: Path | None
    out: Path | None
    policy: Path | None
    show_text: bool
    cache: Path


@dataclass(frozen=True, slots=True)
class Outcome:
    """One of the two runs: what each client recorded, and whether its sums were exact."""

    records: tuple[RunRecord, ...]
    exact: bool
    rounds: int
    generated: report.Generated | None


@dataclass(slots=True)
class Clock:
    """Seconds per phase, and since the start."""

    started: float = field(default_factory=time.monotonic)
    phases: list[report.Phase] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase."""
        begun = time.monotonic()
        yield
        self.phases.append(report.Phase(name=name, seconds=time.monotonic() - begun))


def run_demo(setting: Setting) -> tuple[report.Report, Path]:
    """Run everything and write report.html and report.json.

    Returns:
        The report, and the directory that holds it.

    Raises:
        Any error of the tree; a party's failure names its log.
    """
    from attacks.evaluate import Order, evaluate
    from attacks.report import require_below_ceiling, require_noise

    clock = Clock()
    with bars() as watched:
        with clock.phase("model"):
            model = resolve_model(setting.model, setting.cache, progress=watched.phase("model"))
        with clock.phase("certificates and data"):
            scene = prepare(setting.out, setting.data, setting.policy, setting.model)
        with clock.phase("unprotected run"):
            open_run = _run(scene, "unprotected", model, watched)
        with clock.phase("protected run"):
            private_run = _run(scene, "protected", model, watched)
        found = {}
        for run in ("unprotected", "protected"):
            with clock.phase(f"attack on the {run} run"):
                place = scene.directory / "transcripts" / run
                found[run] = evaluate(
                    Order(transcript=place, model=model, truth=place / "truth.jsonl", aux=scene.public),
                    watched.attack(run),
                )
    for result in found.values():
        require_noise(result)
        require_below_ceiling(result)
    whole = _report(setting, scene, model, clock, open_run, private_run, found)
    report.write_report(whole, scene.directory / "report.json")
    write_html(whole, scene.directory / "report.html")
    return whole, scene.directory


def _run(scene: Scene, run: str, model: Path, watched: Bars) -> Outcome:
    """One server and three clients; in the protected run also the client-only model and one generated answer."""
    place = scene.directory / run
    place.mkdir()
    private = run == "protected"
    policy = scene.policy if private else scene.lab
    transcript = scene.directory / "transcripts" / run
    generated = None
    with server(
        "--job", scene.job(run), "--policy", policy, "--keys", scene.keys("gpu"), "--listen", "127.0.0.1:0", "--model", model,
        "--record", transcript, "--out", place / "server", log=place / "server.log",
    ) as port:  # fmt: skip
        address = f"wss://localhost:{port}"
        # Unprotected clients take turns at B, so each may use both cores; protected ones train side by side.
        options = ["--alone", "--threads", "1"] if private else []
        parties = [
            Party(
                client, "train", "--policy", policy, "--keys", scene.keys(client), "--server", address, "--data", scene.data(client),
                "--out", place / client, "--held-out", str(HELD_OUT), "--max-tokens", str(MAX_TOKENS), "--truth",
                place / client / "truth.jsonl", "--model", model, "--progress", "json", *options,
                log=place / f"{client}.log", watch=watched.party(run),
            )
            for client in CLIENTS
        ]  # fmt: skip
        try:
            records = tuple(RunRecord.model_validate(party.result()) for party in parties)
        finally:
            for party in parties:
                party.stop()
        if private and isinstance(scene.rules.privacy, Gaussian) and scene.rules.privacy.generation is not None:
            writer = Party(
                CLIENTS[0], "generate", "--policy", policy, "--keys", scene.keys(CLIENTS[0]), "--server", address, "--prompt", scene.prompt,
                "--max-new-tokens", "12", "--adapters", place / CLIENTS[0], "--model", model,
                log=place / "generate.log", watch=watched.party(run),
            )  # fmt: skip
            generated = report.Generated(prompt=scene.prompt, text=str(writer.result()["text"]))
    truths = "".join((place / client / "truth.jsonl").read_text(encoding="utf-8") for client in CLIENTS)
    (transcript / "truth.jsonl").write_text(truths, encoding="utf-8")
    rounds = len(records[0].survivors)
    return Outcome(
        records, exact=all(_exact(place, number) for number in range(rounds)), rounds=rounds, generated=generated
    )


def _exact(place: Path, number: int) -> bool:
    """Whether the opened sum is the plain sum of the clients' own quantised updates, bit for bit in the ring."""
    files = [np.load(place / client / f"round-{number}.npz", allow_pickle=False) for client in CLIENTS]
    plain = sum(1 * file["contribution"].astype(np.uint64) for file in files) % np.uint64(1 << 32)
    return all(np.array_equal(file["ring_sum"].astype(np.uint64), plain) for file in files)


def _report(
    setting: Setting,
    scene: Scene,
    model: Path,
    clock: Clock,
    unprotected: Outcome,
    protected: Outcome,
    found: dict[str, AttackReport],
) -> report.Report:
    manifest, rules = read_manifest(model), scene.rules
    shown = scene.synthetic or setting.show_text
    worst = {run: next(a for a in r.attacks if a.name == r.worst_attack) for run, r in found.items()}
    return report.Report(
        release=__version__,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        seconds=time.monotonic() - clock.started,
        clients=len(CLIENTS),
        data=report.Data(synthetic=scene.synthetic, shown=setting.show_text, records=sum(_count(scene, c) for c in CLIENTS)),
        model=report.Model(name=setting.model, front=manifest.plan.front, middle=manifest.layers - manifest.plan.front - manifest.plan.back, back=manifest.plan.back),
        policy=report.PolicyNote(name=rules.name, digest=rules.digest, purpose=rules.purpose, cost=rules.cost, unsafe=rules.unsafe),
        train=report.Train.of(
            unprotected=_mean(r.curve for r in unprotected.records),
            protected=_mean(r.curve for r in protected.records),
            client_only=_mean(r.alone or r.curve for r in protected.records),
        ),
        privacy=_privacy(scene),
        aggregation=report.Aggregation(
            rounds=protected.rounds, exact=protected.exact and unprotected.exact, blind=rules.aggregation.blind,
            noised=isinstance(rules.privacy, Gaussian) and rules.privacy.updates is not None,
        ),
        leakage=report.Leakage(
            attack=f"best of {', '.join(sorted({a.name for r in found.values() for a in r.attacks}))}",
            unprotected=report.Recovery(**_recovery(worst["unprotected"])),
            protected=report.Protected(
                **_recovery(worst["protected"]), kappa=found["protected"].kappa, ceiling=None if rules.unsafe else found["protected"].ceiling),
        ),
        tls=report.Tls(version=protected.records[0].tls),
        traffic=report.Traffic(
            bytes_up=sum(r.bytes_up for r in protected.records), bytes_down=sum(r.bytes_down for r in protected.records),
            client_resident_bytes=max(r.resident_bytes for r in protected.records),
        ),
        phases=tuple(clock.phases),
        generated=protected.generated if shown else None,
        examples=tuple(
            report.Example(run=run, truth=e.truth, recovered=e.recovered)
            for run, result in found.items()
            for e in result.examples[:2]
        )
        if shown
        else (),
        checks=_checks(scene, setting),
    )  # fmt: skip


def _privacy(scene: Scene) -> report.Privacy:
    privacy = scene.rules.privacy
    if not isinstance(privacy, Gaussian):
        return report.Privacy(epsilon=None, delta=None, unit="sequence", relation="replace-one", mu=None, budget=None)
    ledgers = [Ledger(scene.keys(client) / "ledger") for client in CLIENTS]
    mu = max(ledger.mu() for ledger in ledgers)
    channels: dict[str, tuple[int, float]] = {}
    for spent in (spent for ledger in ledgers for spent in ledger.summary()):
        count, most = channels.get(spent.channel, (0, 0.0))
        channels[spent.channel] = (count + spent.releases, max(most, spent.mu))
    for ledger in ledgers:
        ledger.close()
    return report.Privacy(
        epsilon=enforced_epsilon(mu, privacy.delta), delta=privacy.delta, unit=privacy.unit, relation=privacy.relation, mu=mu,
        budget=report.Budget(epsilon=privacy.epsilon, mu=enforced_mu(privacy.epsilon, privacy.delta)),
        channels=tuple(
            report.ChannelSpend(channel=_CHANNELS.get(name, name), releases=count, mu=most, epsilon=enforced_epsilon(most, privacy.delta))
            for name, (count, most) in channels.items() if name != BARE
        ),
    )  # fmt: skip


def _recovery(result: Result) -> dict[str, object]:
    return {
        "token_recovery": result.value, "ci95": result.value_ci95, "prior": result.prior, "pii_exact": result.pii_exact,
        "tokens": result.tokens,
    }  # fmt: skip


def _mean(curves: Iterator[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(float(value) for value in np.mean(list(curves), axis=0))


def _count(scene: Scene, client: str) -> int:
    return len(scene.data(client).read_text(encoding="utf-8").splitlines())


def _checks(scene: Scene, setting: Setting) -> tuple[report.Check, ...]:
    place = scene.directory
    attack = f"securesplit attack run --model {setting.model} --aux {scene.public}"
    return tuple(
        report.Check(command=command, shows=shows)
        for command, shows in (
            (
                f"{attack} --transcript {place}/transcripts/unprotected --truth {place}/transcripts/unprotected/truth.jsonl",
                "what the server reads without protection",
            ),
            (
                f"{attack} --transcript {place}/transcripts/protected --truth {place}/transcripts/protected/truth.jsonl",
                "what it reads under the policy",
            ),
            (f"securesplit privacy ledger --ledger {scene.keys(CLIENTS[0])}/ledger", "what the first client has spent"),
            (f"securesplit policy show {scene.policy}", "the noise that follows from the budget"),
        )
    )
