"""A report, or a sweep, as one self-contained HTML page: style, drawings and data inside, nothing fetched.

Text of a run is private and hostile: jinja2 escapes it, JSON for the script has no angle bracket, and the page's own policy
lets no script run but the one whose digest stands in its head.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from attacks.report import Report
from attacks.sweep import Done, Sweep

__all__ = ["page", "sweep_page"]

_MEASURES = {
    "tokens": "share of token positions named correctly", "bag": "share of a sum's distinct tokens that were named",
    "membership": "area under the ROC curve", "labels": "share of right classes", "links": "F1 of linked pairs",
    "lengths": "share of exact lengths", "pieces": "share of labelled pieces that the trained model gave away",
}  # fmt: skip


def page(report: Report) -> str:
    """The page of one run. Its texts are in it as far as the report has them."""
    curves = [
        {"name": r.name, "auc": r.value, "points": [(p.fpr, p.tpr) for p in r.roc]} for r in report.attacks if r.roc
    ]
    b = report.baselines
    return _render(
        "report.html.j2", json.dumps({"roc": curves}), r=_Shown(report), roc=curves, measures=_MEASURES,
        guess=max(b.unigram, b.positional, b.lm_free),
    )  # fmt: skip


class _Shown:
    """A report with one more question to it, for the template."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def __getattr__(self, name: str) -> object:
        return getattr(self._report, name)

    @property
    def pii_measured(self) -> bool:
        """Whether any text had labelled personal data."""
        return any(r.pii_exact is not None for r in self._report.attacks)


def sweep_page(sweep: Sweep) -> str:
    """The page of a sweep: frontier, heat map, cells."""
    cells = [_cell(done) for done in sweep.cells]
    meanings = "; ".join(dict.fromkeys(done.meaning for done in sweep.cells if done.epsilon is not None))
    return _render("sweep.html.j2", json.dumps({"cells": cells, "meanings": meanings}), s=sweep, cells=cells)


def _cell(done: Done) -> dict[str, object]:
    report = done.report
    low, high = next((r.value_ci95 for r in report.attacks if r.name == report.worst_attack), (0.0, 0.0))
    budget = "none" if done.epsilon is None else f"{done.epsilon:g}"
    words = (
        f"{done.policy}, epsilon {done.budget}, cut {done.cut[0]}/{done.cut[1]}, {done.codec}, K = {done.releases}, seed {done.seed}\n"
        f"{report.worst:.3f} by {report.worst_attack}, guess {report.kappa:.3f}, ceiling {report.ceiling:.3f}, loss {done.loss:.3f}"
    )
    return {
        "policy": done.policy, "epsilon": done.epsilon, "meaning": done.meaning, "budget": f"{done.policy} {budget}", "cut": list(done.cut),
        "codec": done.codec, "releases": done.releases, "seed": done.seed, "loss": done.loss, "worst": report.worst,
        "by": report.worst_attack, "guess": report.kappa, "ceiling": report.ceiling, "low": low, "high": high,
        "words": words,
    }  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _render(template: str, data: str, **values: object) -> str:
    loader = PackageLoader("attacks", "pages")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    num: Callable[[float | None], str] = _number
    environment.globals["num"] = num
    style, script = (loader.get_source(environment, name)[0] for name in ("style.css.j2", "page.js"))
    # The two files are the product's own; no text of a run is ever marked as safe.
    safe = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return environment.get_template(template).render(
        style=Markup(style), script=Markup(script), style_hash=_digest(style), script_hash=_digest(script),  # noqa: S704
        data=Markup(safe), **values,  # noqa: S704
    )  # fmt: skip
