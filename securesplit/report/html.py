"""report.html: one self-contained page for people who sign off, not for machines.

Everything is inside the page: style and drawings included, no script, nothing fetched. Text of the run is escaped by
jinja2; the page forbids itself any outside resource besides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from securesplit.report.plots import budget_plot, leakage_plot, loss_plot, phase_plot
from securesplit.report.record import Report

__all__ = ["figure", "render_html", "write_html"]

_CLEAR = 0.02
"""Smaller differences of losses, in nats per token, are called no difference."""

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True)
class _Word:
    text: str
    found: bool


@dataclass(frozen=True, slots=True)
class _Row:
    """An attacked text, and the words recovered from it."""

    run: str
    truth: str
    recovered: tuple[_Word, ...]


def render_html(report: Report) -> str:
    """The page, as one string of HTML.

    Args:
        report: a whole run.
    """
    environment = Environment(
        loader=PackageLoader("securesplit.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, loss=_loss, size=_size, figure=figure)
    return environment.get_template("template.html.j2").render(
        r=report,
        guess=_best_guess(report.privacy.mu),
        server_gain=_gain(report.train.client_only[-1], report.train.protected[-1]),
        noise_cost=report.train.protected[-1] - report.train.unprotected[-1],
        rows=tuple(_Row(e.run, e.truth, _marked(e.truth, e.recovered)) for e in report.examples),
        loss_plot=loss_plot(report.train),
        leakage_plot=leakage_plot(report.leakage),
        budget_plot=budget_plot(report.privacy) if report.privacy.channels and not report.policy.unsafe else "",
        phase_plot=phase_plot(report.phases) if report.phases else "",
    )


def write_html(report: Report, path: Path) -> None:
    """Write :func:`render_html` to a file, in UTF-8."""
    path.write_text(render_html(report), encoding="utf-8")


def _best_guess(mu: float | None) -> float | None:
    """How often the best test tells two equally likely texts apart: ``Phi(mu / 2)``, Dong, Roth and Su 2022."""
    return None if mu is None else 0.5 * math.erfc(-mu / 2 / math.sqrt(2))


def _gain(without: float, protected: float) -> float:
    """By how many nats per token the server helps; 0 when the difference is too small to call."""
    return without - protected if abs(without - protected) >= _CLEAR else 0.0


def _marked(truth: str, recovered: str) -> tuple[_Word, ...]:
    """The recovered words, each with whether it stands in the truth in the same order."""
    words = recovered.split()
    found = {
        block.b + offset
        for block in SequenceMatcher(None, truth.split(), words, autojunk=False).get_matching_blocks()
        for offset in range(block.size)
    }
    return tuple(_Word(word, index in found) for index, word in enumerate(words))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _loss(nats: float) -> str:
    return f"{nats:.3f}"


def figure(value: float) -> str:
    """Three significant figures; below a thousandth as a power of ten, which is how delta is read."""
    if not value or abs(value) >= 1e-3:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    power = "10" + str(int(exponent)).translate(_RAISED)
    digits = mantissa.rstrip("0").rstrip(".")
    return power if digits == "1" else f"{digits} · {power}"


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
