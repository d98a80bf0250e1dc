"""A report as Markdown: the figures for a pull request or a file that is kept. Texts appear only where the report has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attacks.report import Check, Report, Result
from attacks.sweep import Sweep

__all__ = ["markdown", "sweep_markdown", "table"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A pipe table; bars and line ends inside of cells are taken out."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join((line(head), "|" + "---|" * len(head), *map(line, rows)))


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def markdown(report: Report) -> str:
    """The whole report."""
    setting, bounds, b = report.setting, report.bounds, report.baselines
    worst = f"**{number(report.worst)}** of the tokens, by {report.worst_attack}" if report.worst_attack else "nothing"
    parts = [
        f"# What the attacks got: policy '{report.policy}'",
        f"Worst of the suite: {worst}. Without looking: {number(max(b.unigram, b.positional, b.lm_free))}. "
        + _guarantee(report),
        table(
            ("attack", "channel", "gets", "95 % interval", "guess", "shuffled", "ceiling", "content", "PII", "bits/token", "ROUGE-1/2/L", "BLEU", "exact", "s"),
            map(_row, report.attacks),
        ),
        "`gets` is the share of token positions named correctly where the last columns are filled; " + _others(report.attacks),
        "## Without looking",
        table(
            ("uniform", "commonest token", "by place", "language model alone", "nearest public text", "language model, told all before", "its surprise, bits/token"),
            [(f"{b.uniform:.2e}", number(b.unigram), number(b.positional), number(b.lm_free), number(b.nearest_text), number(b.lm_forced), number(b.lm_bits, 2))],
        ),
        "## What theory says",
        table(
            ("best guess, kappa", "ceiling per token", "ceiling of membership AUC", "certain without noise", "capacity of a row, bits", "a token, bits"),
            [(number(bounds.kappa), number(bounds.ceiling), number(bounds.membership_ceiling), number(bounds.certified_floor), number(bounds.capacity_bits, 2), number(bounds.token_bits, 1))],
        ),
    ]  # fmt: skip
    if report.checks:
        parts += ["## The noise that arrived", _checks(report.checks)]
    if report.flags:
        parts += ["## Distrust", "\n".join(f"* {flag}." for flag in report.flags)]
    notes = [f"* {r.name}: {r.note}." for r in report.attacks if r.note]
    if notes:
        parts += ["## Notes", "\n".join(notes)]
    if report.untested:
        parts += ["## Not tested", "\n".join(f"* {u.name}: {u.why}." for u in report.untested)]
    parts += [
        "## Setting",
        f"Adversary: {setting.threat.words()}. Profile {setting.profile}, seed {setting.seed}. Cut "
        + ("unknown" if setting.cut is None else f"{setting.cut[0]} layers in front, {setting.cut[1]} behind")
        + f", codec {setting.codec}, sigma {setting.sigma:.4g}, clip {number(setting.clip)}, {setting.releases} fresh release(s). "
        f"Transcript `{setting.transcript}`, model `{setting.model}`, policy `{setting.policy_digest}`. Made {setting.created}.",
        "An attack that fails proves nothing. The guarantee is the ceiling, and it holds for attacks that are not built yet.",
    ]
    if report.examples:
        parts.append("## Texts\n\nPrivate. True text first, then what the worst attack made of it.")
        parts += [f"> {_flat(e.truth)}\n>\n> {_flat(e.recovered)}" for e in report.examples]
    return "\n\n".join(parts) + "\n"


def _guarantee(report: Report) -> str:
    if report.epsilon is None:
        return "The policy bounds nothing (UnsafeNoPrivacy)."
    stated = f"Guarantee: epsilon {report.epsilon:g}, delta {report.delta:g}, unit {report.unit}, relation {report.relation}: "
    if report.unit == "token":
        return stated + "the guessable share given all other tokens is not known, so that no ceiling is computed."
    return f"{stated}no attack that starts from a guess as good as {number(report.kappa)} exceeds {number(report.ceiling)} on average."


def _checks(checks: Sequence[Check]) -> str:
    """What forensics found, what failed first and in bold."""
    rows = []
    for check in sorted(checks, key=lambda check: check.passed):
        cells = (check.name, number(check.statistic), number(check.threshold), "yes" if check.passed else "NO")
        rows.append(cells if check.passed else tuple(f"**{cell}**" for cell in cells))
    return table(("check", "statistic", "threshold", "passed"), rows)


def _row(r: Result) -> tuple[str, ...]:
    rouge = "-" if r.rouge_l is None else f"{number(r.rouge_1, 2)}/{number(r.rouge_2, 2)}/{number(r.rouge_l, 2)}"
    pii = "-" if r.pii_exact is None else f"{number(r.pii_exact, 2)} of {r.pii_total}"
    return (
        r.name, r.channel, number(r.value), f"{number(r.value_ci95[0])} to {number(r.value_ci95[1])}", number(r.value_prior),
        number(r.shuffled), number(r.ceiling), number(r.content_recovery), pii, number(r.bits_per_token, 2), rouge,
        number(r.bleu, 2), number(r.exact_match, 2), f"{r.seconds:.1f}",
    )  # fmt: skip


_MEASURES = {
    "bag": "the share of a sum's distinct tokens that were named", "membership": "the area under the ROC curve",
    "labels": "the share of right classes", "links": "the F1 of linked pairs", "lengths": "the share of exact lengths",
    "pieces": "the share of labelled pieces that the trained model gave away",
}  # fmt: skip


def _others(results: Sequence[Result]) -> str:
    other = [f"for {r.name} it is {_MEASURES[r.measure]}" for r in results if r.measure in _MEASURES]
    return "; ".join((*other, "a dash means that the measure has no such figure.")) if other else "there are no others."


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")


def sweep_markdown(sweep: Sweep) -> str:
    """A sweep as one table, seeds together."""
    groups: dict[tuple[str, float, tuple[int, int], str, int], list[int]] = {}
    for index, cell in enumerate(sweep.cells):
        epsilon = float("inf") if cell.epsilon is None else cell.epsilon
        groups.setdefault((cell.policy, epsilon, cell.cut, cell.codec, cell.releases), []).append(index)
    rows = []
    for (policy, _, cut, codec, releases), members in sorted(groups.items()):
        cells = [sweep.cells[i] for i in members]
        worst = [c.report.worst for c in cells]
        best = max(cells, key=lambda c: c.report.worst).report
        low = min(_interval(c.report)[0] for c in cells)
        high = max(_interval(c.report)[1] for c in cells)
        rows.append(
            (
                policy, cells[0].budget, f"{cut[0]}/{cut[1]}", codec, str(releases),
                str(len(cells)), number(sum(worst) / len(worst)), f"{number(low)} to {number(high)}", best.worst_attack,
                number(best.kappa), number(best.ceiling), number(sum(c.loss for c in cells) / len(cells)),
            )
        )  # fmt: skip
    head = (
        "policy",
        "epsilon",
        "cut",
        "codec",
        "K",
        "seeds",
        "worst recovery",
        "intervals",
        "by",
        "guess",
        "ceiling",
        "held-out loss",
    )
    return f"# Sweep '{sweep.name}'\n\n{table(head, rows)}\n\nMade {sweep.created}. Recovery is the best attack's, mean over seeds; the interval spans all seeds' intervals.\n"


def _interval(report: Report) -> tuple[float, float]:
    return next((r.value_ci95 for r in report.attacks if r.name == report.worst_attack), (0.0, 0.0))
