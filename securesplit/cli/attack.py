"""``securesplit attack``: play the server against recorded traffic, and measure what it gets.

``attacks`` stands above the command line in the layers; commands that start it import it when they run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from securesplit.cli import attack_report, attack_sweep
from securesplit.cli.connection import Cache
from securesplit.cli.output import Output
from securesplit.cli.progress import ProgressStyle, reporting

if TYPE_CHECKING:
    from attacks.config import ProfileName
    from attacks.report import Report
    from attacks.threat import Text, Weights
    from securesplit.policy.schema import Policy

__all__ = ["app"]

app = typer.Typer(help="Attacks: what recorded traffic gives away.", no_args_is_help=True, add_completion=False)
app.command("sweep")(attack_sweep.sweep)
app.command("report")(attack_report.report)
app.command("compare")(attack_report.compare)


@app.command("list")
def list_attacks(output: Output = "text") -> None:
    """Name the attacks of this release, what each of them needs, and where it was published."""
    from attacks.config import config

    settings = config()
    if output == "json":
        rows = [
            {
                "name": name, "family": file, **note.model_dump(), "published": family.published.model_dump(),
                "deviations": family.deviations,
            }
            for file, family in settings.families.items()
            for name, note in family.attacks.items()
        ]  # fmt: skip
        typer.echo(json.dumps({"attacks": rows, "profiles": list(settings.profiles)}))
        return
    for family in settings.families.values():
        paper = family.published
        for name, note in family.attacks.items():
            typer.echo(f"{name} ({note.channel})\n  {note.summary}\n  adversary: {note.threat}")
            typer.echo(f"  after {paper.authors}, {paper.title}, {paper.venue}, {paper.arxiv}")


@app.command()
def run(
    *,
    transcript: Annotated[Path, typer.Option(help="Recording that `serve --record` or `demo` wrote.")],
    model: Annotated[
        str, typer.Option(help="Alias, model directory or hub id; public weights, with the cut of the run.")
    ],
    truth: Annotated[Path, typer.Option(help="The clients' truth.jsonl; only the scorer opens it.")],
    aux: Annotated[Path | None, typer.Option(help="Public text, jsonl or plain. Never the private text.")] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="An attack of `attack list`; may be repeated. All that fit when absent."),
    ] = None,
    profile: Annotated[str, typer.Option(help="smoke (12 sequences), standard (60) or full (all).")] = "smoke",
    policy: Annotated[
        Path | None, typer.Option(help="Policy of the recording; its limits on leakage decide the exit status.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="What the adversary knows of A and C: none, pre-trained, round-start or exact.")
    ] = "pre-trained",
    text: Annotated[
        str | None, typer.Option(help="What --aux is: other-domain, same-domain or fifty; colluder; none.")
    ] = None,
    releases: Annotated[int, typer.Option(min=1, help="At most so many fresh releases of a record are used.")] = 10**6,
    adapter: Annotated[
        Path | None, typer.Option(help="The trained model's adapter, as `model export-adapter` writes it.")
    ] = None,
    candidates: Annotated[
        Path | None, typer.Option(help='Texts whose membership is asked: {"text": ..., "member": true} a line.')
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that an attack draws at random.")] = 0,
    out: Annotated[Path | None, typer.Option(help="New directory for report.json, report.md and report.html.")] = None,
    texts: Annotated[bool, typer.Option(help="Put true and recovered texts into --out. They are private.")] = False,
    output: Output = "text",
    progress: ProgressStyle = "auto",
    cache: Cache = None,
) -> None:
    """Attack a recording with public knowledge alone, and score the answer against the truth."""
    from attacks.evaluate import Order, evaluate
    from attacks.report import require_below_ceiling, require_noise
    from attacks.threat import Text, Threat, Weights

    known_weights: Weights = _one_of("weights", weights, get_args(Weights))  # type: ignore[assignment]
    default = "none" if aux is None else "same-domain"
    known_text: Text = _one_of("text", text or default, get_args(Text))  # type: ignore[assignment]
    rules = None if policy is None else _require_policy(policy, transcript)
    if out is not None:
        _require_new(out)
    order = Order(
        transcript=transcript, model=_resolve(model, transcript, cache), truth=truth, aux=aux, adapter=adapter,
        candidates=candidates, profile=_profile(profile), attacks=_names(attack or []), seed=seed,
        threat=Threat(weights=known_weights, text=known_text, releases=releases),
    )  # fmt: skip
    with reporting(progress) as show:
        report = evaluate(order, lambda p: show(p.attack, p.done, p.total, None))
    if out is not None:
        from attacks.folder import write_folder

        write_folder(report, out, texts=texts)
    typer.echo(report.to_json() if output == "json" else _text(report))
    require_noise(report)
    require_below_ceiling(report)
    if rules is not None and rules.leakage is not None:
        from attacks.report import require_within_limits

        limits = rules.leakage
        require_within_limits(
            report, token_recovery=limits.token_recovery, pii_exact=limits.pii_exact, membership=limits.membership_auc,
            profile=limits.profile,
        )  # fmt: skip


def _one_of(option: str, asked: str, known: tuple[str, ...]) -> str:
    from securesplit.errors import InputError

    if asked not in known:
        raise InputError("SS-1704", f"--{option} {asked!r} is not known", hint=f"One of: {', '.join(known)}.")
    return asked


def _names(asked: list[str]) -> tuple[str, ...]:
    from attacks.config import config
    from securesplit.errors import InputError

    known = config().attacks
    if unknown := [name for name in asked if name not in known]:
        raise InputError("SS-1704", f"there is no attack {unknown[0]!r}", hint=f"This release has: {', '.join(known)}.")
    return tuple(asked)


def _profile(asked: str) -> ProfileName:
    from attacks.config import ProfileName

    return _one_of("profile", asked, get_args(ProfileName))  # type: ignore[return-value]


def _require_new(out: Path) -> None:
    from securesplit.errors import InputError

    if out.exists():
        raise InputError("SS-1712", f"{out} exists", hint="Name a directory that does not exist yet.")


def _require_policy(path: Path, transcript: Path) -> Policy:
    """The stated policy, which must make the noise that was recorded.

    A policy that differs in words or in its leakage limits alone is the same mechanism.
    """
    from attacks.view import public_facts
    from securesplit.errors import InputError
    from securesplit.policy.load import load_policy
    from securesplit.protocol.transcript import Transcript

    stated, recorded = load_policy(path), public_facts(Transcript.load(transcript)).policy
    if stated.mechanism_digest != recorded.mechanism_digest:
        raise InputError(
            "SS-1705",
            f"the recording was made under policy '{recorded.name}' ({recorded.digest[:12]}), not '{stated.name}' ({stated.digest[:12]})",
            hint="Give the policy of the run, or leave --policy out.",
        )
    return stated


def _resolve(model: str, transcript: Path, cache: Path | None) -> Path:
    """The model directory, with the cut that the recording's job names."""
    from attacks.view import public_facts
    from securesplit.cli.model import default_cache
    from securesplit.model.plan import CutPlan
    from securesplit.model.resolve import resolve_model
    from securesplit.protocol.transcript import Transcript

    cut = public_facts(Transcript.load(transcript)).cut
    plan = None if cut is None else CutPlan(front=cut[0], back=cut[1])
    return resolve_model(model, cache or default_cache(), plan)


def _text(report: Report) -> str:
    head = f"{'attack':20} {'gets':>6} {'95 % interval':>13} {'guess':>6} {'ceiling':>7} {'PII':>5} {'ROUGE-L':>7} {'seconds':>7}  measure"
    rows = [
        f"{r.name:20} {r.value:6.3f} {f'{r.value_ci95[0]:.3f}-{r.value_ci95[1]:.3f}':>13} {r.value_prior:6.3f} "
        f"{_cell(r.ceiling, 7)} {_cell(r.pii_exact, 5, 2)} {_cell(r.rouge_l, 7)} {r.seconds:7.1f}  {r.measure}"
        for r in report.attacks
    ]
    b = report.baselines
    forced = "" if b.lm_forced is None else f", by a language model that is told all tokens before {b.lm_forced:.3f}"
    guesses = f"Without looking: commonest token {b.unigram:.3f}, by place {b.positional:.3f}, language model alone {b.lm_free:.3f}{forced}."
    if report.epsilon is None:
        bound = f"Policy '{report.policy}' bounds nothing: UnsafeNoPrivacy."
    else:
        bound = f"Policy '{report.policy}': epsilon {report.epsilon:g}, delta {report.delta:g}, unit {report.unit}, relation {report.relation}. "
        bound += (
            "The guessable share given all other tokens is not known, so that no ceiling is computed."
            if report.unit == "token"
            else f"No attack that starts from a guess as good as {report.kappa:.3f} can exceed {report.ceiling:.3f} on average."
        )
    worst = f"Worst: {report.worst:.3f} by {report.worst_attack}, share of tokens named correctly."
    untested = [f"Not tested: {u.name}: {u.why}." for u in report.untested]
    return "\n".join((head, *rows, "", worst, guesses, bound, *(f"Beware: {f}." for f in report.flags), *untested))


def _cell(value: float | None, width: int, digits: int = 3) -> str:
    return f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"
