"""The page of the documentation, from finished cells; every number and every verdict is computed, none is typed in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scripts.defences.curves import Matched, Measured, Point, curves, difference, matched, mean_interval, read
from scripts.defences.defence import sequence_mu
from securesplit.privacy.calibrate import epsilon_for

DELTA = 1e-5
KEPT = (0.75, 0.5, 0.25, 0.0)  # Parts of the server's value, from client-only up to the noiseless split.
_SAME = 0.03  # Recoveries that differ by less are called the same, however small their interval.
BEYOND = 1.0  # Nats above client-only, where the server is a net harm and the attack at last gets less.

_NAMES = {
    "none": "no defence",
    "gaussian": "plain Gaussian",
    "denoised": "plain Gaussian, denoised at the client",
    "centred": "Gaussian on centred states, k = 576",
    "bottleneck": "bottleneck (PCA) and noise",
    "whitened": "shaped noise: whitened PCA code",
    "shaped": "shaped noise: code and A trained for the task",
    "vib": "VIB (A, mean and variance trained)",
    "nopeek": "NoPeek (A trained)",
    "quantised": "quantisation",
    "topk": "top-k",
    "permuted S": "permuted rows (S)",
    "permuted D": "permuted columns (D)",
    "permuted SD": "permuted rows and columns (SD)",
}
_LEVELS = {
    "quantised": "{:g} bit",
    "topk": "k = {:g}",
    "nopeek": "alpha {:g}",
    "vib": "beta {:g}",
    "none": "",
    "permuted": "",
}
_ATTACKS = ("ridge, unaware", "ridge", "codebook", "beam", "match")


def page(file: Path) -> str:
    """Markdown."""
    measured = read(file)
    found = curves(measured.points)
    found = {name: found[name] for name in _NAMES if name in found}
    tables = (_summary, _matched, _verdicts, _points)
    parts = [_head(measured), *(write(measured, found) for write in tables), _training(found), _tail(measured)]
    return "\n".join(parts)


def _number(value: float, low: float, high: float, digits: int = 2) -> str:
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _targets(measured: Measured) -> list[tuple[str, float]]:
    noiseless, client = float(measured.noiseless.mean()), float(measured.client.mean())
    named = [(f"{share:.0%} kept" if share else "client-only", client - share * (client - noiseless)) for share in KEPT]
    return [*named, (f"client-only + {BEYOND:g}", client + BEYOND)]


def _head(measured: Measured) -> str:
    s = measured.setting
    total = int(s["test"] * s["seeds"])
    priors = {name: _number(*mean_interval(values)) for name, values in measured.priors.items()}
    return _HEAD.format(
        test=s["test"], seeds=s["seeds"], total=total, length=s["length"], targets=s["length"] - 1, public=s["public"],
        steps=s["steps"], training=s["training"], k=s["k"], width=s["width"], candidates=s["candidates"],
        noiseless=_number(*mean_interval(measured.noiseless)), client=_number(*mean_interval(measured.client)),
        **priors,
    )  # fmt: skip


def _shown(value: Matched | None) -> str:
    if value is None:
        return "not at this loss"
    return ("" if value.inside else "&le; ") + _number(value.value, value.low, value.high)


def _matched(measured: Measured, found: dict[str, tuple[Point, ...]]) -> str:
    targets = _targets(measured)
    rows = [
        "## Recovery at equal loss",
        "",
        "Best attack, linear between neighbouring levels. *n % kept*: the loss at which so much of the way from client-only to",
        "the noiseless split is left. `<=`: the strongest level measured costs less than this loss.",
        "",
        "| defence | guarantee | " + " | ".join(f"{name} ({loss:.2f})" for name, loss in targets) + " |",
        "|---" * (len(targets) + 2) + "|",
    ]
    for name, curve in found.items():
        guarantee = "mu, see levels" if any(p.mu for p in curve) else "none"
        rows.append(
            f"| {_NAMES[name]} | {guarantee} | " + " | ".join(_shown(matched(curve, t)) for _, t in targets) + " |"
        )
    return "\n".join([*rows, ""])


def _verdicts(measured: Measured, found: dict[str, tuple[Point, ...]]) -> str:
    rows = ["## Against plain Gaussian noise at the same loss", ""]
    plain = found.get("gaussian")
    if plain is None:
        return "\n".join([*rows, "Plain Gaussian noise has no finished cell.", ""])
    rows += ["Paired differences of recovery on the same texts; negative leaks less than plain Gaussian noise.", ""]
    for name, curve in found.items():
        if name in {"gaussian", "none"}:
            continue
        said = []
        for label, target in _targets(measured):
            gap = difference(curve, plain, target)
            if gap is not None:
                said.append(f"{label}: {_number(gap.value, gap.low, gap.high)} ({_verdict(gap)})")
        rows.append(f"* **{_NAMES[name]}**: " + ("; ".join(said) or "no loss in common") + ".")
    return "\n".join([*rows, "", *_denoising(found), ""])


def _denoising(found: dict[str, tuple[Point, ...]]) -> list[str]:
    """What the client's denoiser gains at equal mu, where the released bytes and hence the recovery are the same."""
    plain = {point.level: point for point in found.get("gaussian", ())}
    pairs = [(plain[p.level], p) for p in sorted(found.get("denoised", ()), key=lambda p: -p.level) if p.level in plain]
    gains = [f"mu {p.level:g}: {_number(*mean_interval(before.losses - p.losses))}" for before, p in pairs]
    return (
        [f"Denoising at the client gains, at equal mu and the same released bytes, in nats: {'; '.join(gains)}."]
        if gains
        else []
    )


def _summary(measured: Measured, found: dict[str, tuple[Point, ...]]) -> str:
    """The finding in one sentence for each loss: which defence, at its best, leaves how much."""
    rows = ["## In short", ""]
    for label, target in _targets(measured):
        here = {name: got for name, curve in found.items() if (got := matched(curve, target)) is not None}
        if here:
            best = min(here, key=lambda name: here[name].value)
            rows.append(
                f"* At {label} (loss {target:.2f}) {len(here)} of {len(found)} can be had; the least recovery is {_shown(here[best])}, "
                f"by {_NAMES[best]}; the most {max(got.value for got in here.values()):.2f}."
            )
    return "\n".join([*rows, ""])


def _verdict(gap: Matched) -> str:
    if max(abs(gap.low), abs(gap.high)) < _SAME:
        return f"the same within {_SAME:g}"
    if gap.high < 0:
        return "leaks less"
    return "leaks more" if gap.low > 0 else "no difference shown"


def _points(measured: Measured, found: dict[str, tuple[Point, ...]]) -> str:
    rows = [
        "## Every level",
        "",
        f"mu of one row and of a text of {measured.setting['length']} rows, replace-one; behind two layers of attention the unit *token* costs as",
        f"much as the text, since the first token moves every row. epsilon is the text's, at delta {DELTA:g}. Attacks: share of tokens named.",
        "",
        "| defence | level | mu row | mu text | epsilon text | loss | best attack | "
        + " | ".join(_ATTACKS)
        + " | without match |",
        "|---" * (8 + len(_ATTACKS)) + "|",
    ]
    for name, curve in found.items():
        for point in curve:
            attacks = " | ".join(f"{point.hits[a].mean() / point.of:.2f}" if a in point.hits else "" for a in _ATTACKS)
            best = _number(point.recovery, *point.recovery_interval())
            missed = "" if point.unresolved is None else str(point.unresolved)
            rows.append(
                f"| {_NAMES[name]} | {_LEVELS.get(point.kind, 'mu {:g}').format(point.level)} | {_guarantee(measured, point)} | "
                f"{_number(*mean_interval(point.losses))} | **{best}** | {attacks} | {missed} |"
            )
    return "\n".join([*rows, ""])


def _guarantee(measured: Measured, point: Point) -> str:
    if point.mu is None:
        return "none | none | none"
    whole = sequence_mu(point.mu, int(measured.setting["length"]))
    return f"{point.mu:.3g} | {whole:.4g} | {epsilon_for(whole, DELTA):.3g}"


def _training(found: dict[str, tuple[Point, ...]]) -> str:
    rows = ["## What training and the server's decoder did", "", "| defence | level | facts |", "|---|---|---|"]
    for name, curve in found.items():
        if name != "denoised":
            for point in curve:
                facts = "; ".join(f"{key} {value:.4g}" for key, value in point.facts.items())
                level = _LEVELS.get(point.kind, "mu {:g}").format(point.level)
                rows.append(f"| {_NAMES[name]} | {level} | {facts} |")
    return "\n".join([*rows, ""])


def _tail(measured: Measured) -> str:
    points = measured.points
    exact = [p for p in points if p.unresolved is not None]
    lines = ["## What failed, and why", ""]
    groups = {
        "Quantisation": "a rounded row is still a public function of the prefix, and one bit of 576 coordinates still tells tokens apart",
        "Top-k": "which coordinates survive names the token as well as their values do; the rest of the row is not needed",
        "Permutation": "sorted values are what a permutation of columns cannot change, and the prefix says which shuffled row comes next",
        "NoPeek": "the regulariser lowers a correlation, not the number of tokens that a row can be told apart from; the trained A is known to all clients and thereby to the server, and matching runs through it",
    }
    kinds = {"Quantisation": "quantised", "Top-k": "topk", "Permutation": "permuted", "NoPeek": "nopeek"}
    for title, why in groups.items():
        mine = [p for p in exact if p.kind == kinds[title]]
        if mine:
            worst, naive = (
                min(mine, key=lambda p: p.recovery),
                min(mine, key=lambda p: float(p.hits["ridge, unaware"].mean())),
            )
            lines.append(
                f"* **{title}**: recovery at least {worst.recovery:.3f} at every level measured (an attacker who has not read the code: down to "
                f"{naive.hits['ridge, unaware'].mean() / naive.of:.2f}). Why: {why}. Guarantee: none."
            )
    vib = [p for p in points if p.kind == "vib"]
    if vib:
        lines.append(
            "* **VIB** has no guarantee at any level: its mean has no bound and its variance depends on the secret. What it hides, "
            f"noise hides; recovery {min(p.recovery for p in vib):.2f} to {max(p.recovery for p in vib):.2f} over its levels."
        )
    lines += _weaker(points)
    hours = sum(p.seconds for p in points if p.kind != "denoised") / 3600
    absent = [title for name, title in _NAMES.items() if name not in curves(points)]
    if absent:
        lines.append(f"* **Not measured, so that nothing is said of it here: {'; '.join(absent)}.**")
    return "\n".join([*lines, "", _TAIL.format(hours=f"{hours:.1f}", seeds=measured.setting["seeds"])])


def _weaker(points: Sequence[Point]) -> list[str]:
    """Cells in which an attack that knows more got less: the maximum counts there, and the cell is named."""
    odd = []
    for point in points:
        if point.kind == "denoised":
            continue
        strong = max(float(point.hits[a].mean()) for a in ("beam", "match") if a in point.hits) / point.of
        weak = max(float(point.hits[a].mean()) for a in ("ridge, unaware", "ridge", "codebook")) / point.of
        if weak > strong + 1e-9:
            odd.append(f"{point.kind} {point.level:g} ({weak:.3f} against {strong:.3f})")
    if not odd:
        return ["* No cell in which the attack that knows most got less than one that knows less."]
    return [f"* Cells in which a weaker attack got more than beam or match; the maximum is reported: {', '.join(odd)}."]


_HEAD = """\
# Defences, attacked by somebody who has read them

Written by `scripts/bench-defences --table`; do not edit.

SmolLM2-135M-Instruct, cut after 2 layers; a public sentinel stands before every text, and its row is not sent. Private text:
{test} MultiRC val passages of {length} tokens for each of {seeds} seeds of the noise ({total} in all, no eight words in common with the public text).
Public text: MultiRC train passages; {public} chunks for fits, others held out for every choice. Loss: nats per token over {targets}
tokens a sequence whose context holds a private row. Intervals are 95 % bootstrap over sequences. Noise here is a seeded
generator of the benchmark; nothing is released.

**References.** Noiseless split {noiseless}; client-only (four layers, fine-tuned on public text) {client}. Named without
looking: the commonest token {unigram}; the language model alone {alone}, after the *true* prefix {told}.

* **Utility** is one measure for all: the server decodes what it got with an affine map (least squares to the clean states on public
  text, raw, or the map that the defence was trained with; then {steps} steps through the frozen B and C; the best on public
  tuning text), and runs B and C. *Denoised at the client*: B's answer is corrected by a linear map of that answer, the
  client's clean states and its noise, trained through C; the released bytes are those of plain Gaussian noise, and so is the recovery.
* **Attacks.** *ridge, unaware*: inverter fitted without the defence. *ridge*: fitted on defended public text. *codebook*: Gaussian model of
  a defended row given its token, unigram prior. *beam*: exact likelihood through A and the defence, language-model prior,
  {width} prefixes of {candidates} candidates. *match*: where there is no noise, exact search through the defence, up to the whole
  vocabulary. A trained A and its maps are known to the server.
* **Trained** defences: {training} steps at each level, from the level before; public text; B and C frozen. Codes have k = {k}.
"""

_TAIL = """\
## What is thin

* Recovery is a lower bound: a beam is no sum over texts, and candidates are pruned by the codebook.
* One model of 135M parameters, one cut, one kind of text, short texts, {seeds} seeds. The best attack of a cell was chosen on the attacked text.
* The server is an affine map and a frozen B: a trained B would use strong noise better, for every defence alike.
* Trained defences also adapt A to the kind of text, which plain noise does not; `NoPeek alpha 0` shows by how much. Their
  levels build on each other, so that strong ones had more steps. Step counts are small, learning rates not searched.
* The trained A stands still while it is attacked. One release of each text: averaging over releases is not measured here.
* Client-only has four layers and public text alone; a better one shrinks the server's value, and every figure of *kept* with it.

How to repeat it: `scripts/bench-defences --data DIR --out FILE` ({hours} hours on a shared core), then `scripts/bench-defences --table FILE`.
"""
