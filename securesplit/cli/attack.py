"""``securesplit attack``: play the curious server against recorded traffic, and measure what it gets.

``attacks`` stands above the command line in the layers; commands that start it import it when they run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from securesplit.cli.output import Cache, Output
from securesplit.cli.progress import ProgressStyle, reporting

if TYPE_CHECKING:
    from attacks.report import Report

__all__ = ["app"]

app = typer.Typer(help="Attacks: what recorded traffic gives away.", no_args_is_help=True, add_completion=False)


@app.command("list")
def list_attacks(output: Output = "text") -> None:
    """Name the attacks of this release and what each of them needs."""
    from attacks.config import config

    settings = config()
    if output == "json":
        paper = settings.published.model_dump()
        rows = [{"name": name, **note.model_dump(), "published": paper} for name, note in settings.attacks.items()]
        typer.echo(json.dumps({"attacks": rows, "profiles": list(settings.profiles)}))
        return
    for name, note in settings.attacks.items():
        typer.echo(f"{name}\n  {note.summary}\n  adversary: {note.threat}")
    typer.echo(
        f"\nAfter {settings.published.authors}, {settings.published.title}, {settings.published.venue}, arXiv {settings.published.arxiv}."
    )


@app.command()
def run(
    *,
    transcript: Annotated[Path, typer.Option(help="Recording that `serve --record` or `demo` wrote.")],
    model: Annotated[
        str, typer.Option(help="Alias, model directory or hub id; public weights, with the cut of the run.")
    ],
    truth: Annotated[Path, typer.Option(help="The clients' truth.jsonl; only the scorer opens it.")],
    aux: Annotated[
        Path | None, typer.Option(help="Public text of the same kind, jsonl or plain. Never the private text.")
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="An attack of `attack list`; may be repeated. All that fit when absent."),
    ] = None,
    profile: Annotated[str, typer.Option(help="smoke (12 sequences), standard (60) or full (all).")] = "smoke",
    policy: Annotated[Path | None, typer.Option(help="Policy under which the recording must have been made.")] = None,
    output: Output = "text",
    progress: ProgressStyle = "auto",
    cache: Cache = None,
) -> None:
    """Attack a recording with public knowledge alone, and score the answer against the truth."""
    from attacks.evaluate import evaluate, require_below_ceiling

    names, work = _names(attack or []), _profile(profile)
    if policy is not None:
        _require_policy(policy, transcript)
    directory = _resolve(model, transcript, cache)
    with reporting(progress) as show:
        report = evaluate(
            transcript, directory, truth, aux, work, lambda p: show(p.attack, p.done, p.total, None), attacks=names
        )
    typer.echo(report.to_json() if output == "json" else _text(report))
    require_below_ceiling(report)


def _names(asked: list[str]) -> tuple[Literal["ridge", "vocabulary-nn", "vocabulary-map", "averaged-map"], ...]:
    from attacks.config import config
    from securesplit.errors import InputError

    known = {str(name): name for name in config().attacks}
    if unknown := [name for name in asked if name not in known]:
        raise InputError("SS-1704", f"there is no attack {unknown[0]!r}", hint=f"This release has: {', '.join(known)}.")
    return tuple(known[name] for name in asked)


def _profile(asked: str) -> Literal["smoke", "standard", "full"]:
    from attacks.config import config
    from securesplit.errors import InputError

    known = {str(name): name for name in config().profiles}
    if asked not in known:
        raise InputError("SS-1704", f"there is no profile {asked!r}", hint=f"Profiles are: {', '.join(known)}.")
    return known[asked]


def _require_policy(path: Path, transcript: Path) -> None:
    from attacks.view import public_facts
    from securesplit.errors import InputError
    from securesplit.policy.load import load_policy
    from securesplit.protocol.transcript import Transcript

    stated, recorded = load_policy(path), public_facts(Transcript.load(transcript)).policy
    if stated.digest != recorded.digest:
        raise InputError(
            "SS-1705",
            f"the recording was made under policy '{recorded.name}' ({recorded.digest[:12]}), not '{stated.name}' ({stated.digest[:12]})",
            hint="Give the policy of the run, or leave --policy out.",
        )


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
    head = f"{'attack':16} {'recovered':>9} {'95 % interval':>15} {'guess':>6} {'PII':>6} {'ROUGE-L':>7} {'seconds':>7}"
    rows = [
        f"{r.name:16} {r.token_recovery:9.3f} {f'{r.ci95[0]:.3f}-{r.ci95[1]:.3f}':>15} {r.prior:6.3f} "
        f"{'-' if r.pii_exact is None else f'{r.pii_exact:.2f}':>6} {r.rouge_l:7.3f} {r.seconds:7.1f}"
        for r in report.attacks
    ]
    if report.epsilon is None:
        bound = f"Policy '{report.policy}' bounds nothing: UnsafeNoPrivacy."
    else:
        bound = (
            f"Policy '{report.policy}': epsilon {report.epsilon:g}, delta {report.delta:g}, unit {report.unit}, relation {report.relation}. "
            f"No attack that starts from a guess as good as {report.kappa:.3f} can exceed {report.ceiling:.3f} on average."
        )
    return "\n".join(
        (
            head,
            *rows,
            "",
            f"Worst: {report.worst:.3f} by {report.worst_attack}, share of tokens named correctly.",
            bound,
        )
    )
