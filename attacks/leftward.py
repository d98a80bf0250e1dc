"""Labels through C's layers (O3), from right to left.

    labels-right-to-left   C has layers: row t of the gradient knows the labels of t + 1 and of everything after it

Attention is causal, so row t depends on the labels of rows t, t + 1, ... alone, and linearly. The last labelled row is
the closed form of labels.py. Whatever is found is pulled back through C's layers and taken out of the rows before it,
which makes their case closed as well. A label that is uncertain is taken out by its expectation. At the end every
position is looked at once more, with all rows at once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attacks.attack import Attack
from attacks.evidence import Evidence, Fit, Mechanism, fit, improve, joined, posterior
from attacks.head import Around
from attacks.labels import Labels, bare, closed, judged, recover
from attacks.outputs import Outlook
from attacks.prepared import Prepared
from attacks.threat import Threat
from attacks.view import ServerView

__all__ = ["ATTACKS", "leftward"]

_ZERO = 1e-12  # Of the largest row's energy: float32's rounding.


def leftward(ready: Prepared, outlook: Outlook, mechanism: Mechanism) -> Labels:
    """All labels of one sequence, the later ones first."""
    if not ready.head.layers:
        return closed(ready, outlook, mechanism)
    log_prior = outlook.log_prior(ready.logits[:-1])
    around = Around(ready.head, ready.hidden)
    settings = ready.settings
    if not mechanism.sigma:
        labels = _exactly(ready, around, log_prior, mechanism)
        if not labels.unresolved:
            return labels
    found = fit(ready.alone(log_prior, None), log_prior, mechanism)
    for _ in range(settings.passes):
        evidence, weight = _walk(ready, around, log_prior, found)
        found = improve(evidence, log_prior, found, mechanism)
    labels = judged(evidence, log_prior, found, settings)
    for _ in range(settings.sweeps if mechanism.sigma else 0):  # Without noise one row proves its label.
        evidence = _together(ready, around, log_prior, found, weight)
        weight = posterior(evidence, log_prior, found)
        labels = replace(judged(evidence, log_prior, found, settings), unresolved=labels.unresolved)
    return labels


def _exactly(ready: Prepared, around: Around, log_prior: Tensor, mechanism: Mechanism) -> Labels:
    """Where nothing is noised: the scale from the last labelled row, of which it is exact, but for rounding.

    Rows behind that one are zero, since nothing after them has a label. A row whose label C was sure of is nearly zero
    too, and tells the scale to few digits: then a second walk, with the scale of the whole first one.
    """
    sizes = ready.gradient[:-1].square().sum(1)
    labelled = int(torch.nonzero(sizes >= _ZERO * sizes.max()).flatten()[-1]) + 1
    last, nothing = slice(labelled - 1, labelled), torch.zeros_like(ready.hidden[0])
    evidence = ready.evidence(labelled - 1)
    ready.sharpen(evidence, labelled - 1, log_prior[labelled - 1], None, nothing)
    found = replace(fit(evidence, log_prior[last], mechanism), labelled=labelled)
    for _ in range(2):
        evidence, _weight = _walk(ready, around, log_prior, found, learn=True)
        found = improve(evidence, log_prior, found, mechanism)
        labels = judged(evidence, log_prior, found, ready.settings)
        if not labels.unresolved:
            break
    return labels


def _walk(
    ready: Prepared, around: Around, log_prior: Tensor, found: Fit, *, learn: bool = False
) -> tuple[Evidence, Tensor]:
    """From the last row to the first, each time taking out what is known by then.

    Args:
        learn: let every row that has been explained sharpen the scale for the next.

    Returns:
        The evidence of all rows given what was found of the later ones, and the labels' probabilities, (T - 1, V).
    """
    later = torch.zeros_like(ready.hidden)  # What labels after a row give to it, over the scale.
    weight = torch.empty_like(log_prior)
    rows: list[Evidence] = []
    above = below = 0.0
    for position in reversed(range(len(ready.heres))):
        row = slice(position, position + 1)
        rows.append(ready.evidence(position, later[position]))
        ready.sharpen(rows[-1], position, log_prior[position], found, later[position])
        weight[row] = posterior(rows[-1], log_prior[row], found)
        if position >= found.labelled:
            continue
        later += around.pull(_at(ready, position, weight[row]))
        above, below = (
            above + float((weight[row] * rows[-1].along).sum()),
            below + float((weight[row] * rows[-1].size).sum()),
        )
        if learn and above > 0 and below > 0:
            found = replace(found, scale=above / below)
    rows.reverse()
    return joined(rows), weight


def _at(ready: Prepared, position: int, weight: Tensor) -> Tensor:
    """What a position adds to the gradient over the scale, at the head's input: (T, D), zero at all other rows."""
    out = torch.zeros_like(ready.hidden)
    row = slice(position, position + 1)
    out[row] = ready.chances[row] - ready.cotangent(weight, row)
    return out


def _together(ready: Prepared, around: Around, log_prior: Tensor, found: Fit, weight: Tensor) -> Evidence:
    """Evidence of every position from all rows that its label reaches, all others being as expected.

    A position's rows are one long row here, so that the same two numbers per label serve. What a label's own rows have of
    size beyond the position's is taken in proportion, since it is a few per cent of it.
    """
    scale, weight = found.scale, weight.clone()
    nothing = torch.zeros_like(ready.hidden)
    parts = {t: around.pull(_at(ready, t, weight[t : t + 1])) for t in range(found.labelled)}
    left = ready.gradient - scale * sum(parts.values(), nothing)
    rows: list[Evidence] = []
    for position in reversed(range(len(ready.heres))):
        row = slice(position, position + 1)
        seen = left + scale * parts.get(position, nothing)
        rows.append(_long_row(ready, around, position, seen))
        if position in parts:
            weight[row] = posterior(rows[-1], log_prior[row], found)
            parts[position] = around.pull(_at(ready, position, weight[row]))
            left = seen - scale * parts[position]
    rows.reverse()
    return joined(rows)


def _long_row(ready: Prepared, around: Around, position: int, seen: Tensor) -> Evidence:
    """One position's evidence in all rows: seen (T, D) = s u_y + noise, u_y having rows up to the position."""
    row = slice(position, position + 1)
    chance = torch.zeros_like(ready.hidden)
    chance[row] = ready.chances[row]
    field = around.pull(chance)
    beyond = float(field.square().sum() / field[position].square().sum().clamp_min(1e-38))
    return Evidence(
        along=ready.beyond_chance(around.push(seen)[row], row), size=ready.evidence(position).size * beyond,
        row=seen[: position + 1].square().sum()[None], width=seen.shape[1],
    )  # fmt: skip


def _blocked(view: ServerView, threat: Threat) -> str | None:
    if view.cut is not None and not view.cut[1]:
        return "C has no layers: the closed form says it all"
    return bare(view, threat)


ATTACKS = (
    Attack(
        "labels-right-to-left", _blocked,
        lambda view, known, tick: recover("labels-right-to-left", view, known, tick, leftward),
    ),
)  # fmt: skip
