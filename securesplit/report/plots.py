"""The report's plots as inline SVG, drawn once and readable in light, in dark and on paper.

Matplotlib writes fixed colours. The ones used here are place-holders which are replaced by CSS variables and
``currentColor`` afterwards, so that the page decides. Text stays text; nothing refers outside the page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from securesplit.report.record import Leakage, Phase, Privacy, Train

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Bar", "budget_plot", "drawn", "leakage_plot", "loss_plot", "phase_plot", "share_plot"]

# Place-holders: unlikely to be written by matplotlib itself. The names are CSS variables of template.html.j2.
_INK, _FAINT = "#010203", "#010204"
_UNPROTECTED, _PROTECTED, _CLIENT = "#010205", "#010206", "#010207"
_CSS = {
    _INK: "currentColor",
    _FAINT: "var(--faint)",
    _UNPROTECTED: "var(--unprotected)",
    _PROTECTED: "var(--protected)",
    _CLIENT: "var(--client)",
}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.alpha": 0.5,
    "grid.linewidth": 0.6,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.linewidth": 2.2,
    "legend.frameon": False,
}


def loss_plot(train: Train) -> Markup:
    """Loss in nats per token over rounds, one line per run."""

    def draw(axes: Axes) -> None:
        runs = (
            ("client only", train.client_only, _CLIENT, ":", "s"),
            ("split, protected", train.protected, _PROTECTED, "-", "o"),
            ("split, unprotected", train.unprotected, _UNPROTECTED, "--", "^"),
        )
        for name, losses, colour, dashes, marker in runs:
            axes.plot(range(len(losses)), losses, dashes, color=colour, marker=marker, markersize=5, label=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("rounds")
        axes.set_ylabel("loss (nats per token)")
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower left", ncols=3, bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.2)

    return drawn("loss", "Loss over rounds of the unprotected split, the protected split and the client alone", draw)


def leakage_plot(leakage: Leakage) -> Markup:
    """Share of tokens recovered, with its interval, beside the prior and the ceiling."""
    ceiling = leakage.protected.ceiling

    def draw(axes: Axes) -> None:
        rows = (("protected", leakage.protected, _PROTECTED), ("unprotected", leakage.unprotected, _UNPROTECTED))
        for height, (_, found, colour) in enumerate(rows):
            share, (low, high) = found.token_recovery, found.ci95
            axes.barh(height, share, color=colour, height=0.5)
            axes.plot([low, high], [height, height], color=_INK, linewidth=1.4, marker="|", markersize=9)
            axes.text(max(share, high) + 0.015, height, _percent(share), va="center")
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.set_ylim(-0.75, 1.75)
        marks = [(leakage.protected.prior, f"guess without traffic {_percent(leakage.protected.prior)}", "--")]
        marks += [] if ceiling is None else [(ceiling, f"ceiling for any attack {_percent(ceiling)}", ":")]
        for place, name, dashes in marks:
            axes.axvline(place, color=_INK, linewidth=1.4, linestyle=dashes, label=name)
        axes.legend(loc="lower left", ncols=2, bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.2)
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("tokens of the private text that the attack named correctly")
        axes.grid(visible=False, axis="y")

    return drawn(
        "leakage", "Share of tokens recovered from the unprotected and the protected traffic", draw, height=2.5
    )


@dataclass(frozen=True, slots=True)
class Bar:
    """A share of a whole, 0 to 1, with its name."""

    name: str
    share: float


def budget_plot(privacy: Privacy) -> Markup:
    """Parts of one record's squared budget that each channel has spent; what is left fills up to 100 %."""
    total = privacy.budget.mu**2 if privacy.budget else 0.0
    bars = [
        Bar(f"{spend.channel} ({spend.releases} releases)", spend.mu**2 / total if total else 0.0)
        for spend in privacy.channels
    ]
    bars.append(Bar("together", (privacy.mu or 0.0) ** 2 / total if total else 0.0))
    return share_plot("budget", "Budget spent per channel", tuple(bars))


def share_plot(name: str, label: str, bars: tuple[Bar, ...]) -> Markup:
    """Shares of one record's squared budget, one bar each; the last one is the whole.

    Args:
        name: unique on the page.
        label: what a screen reader says.
        bars: from top to bottom.
    """

    def draw(axes: Axes) -> None:
        for height, bar in enumerate(reversed(bars)):
            axes.barh(height, 1, color=_FAINT, alpha=0.35, height=0.5)
            axes.barh(height, bar.share, color=_INK if height == 0 else _PROTECTED, height=0.5)
            axes.text(1.015, height, _percent(bar.share), va="center")
        axes.set_yticks(range(len(bars)), [bar.name for bar in reversed(bars)])
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("share of the squared budget of one unit")
        axes.grid(visible=False, axis="y")

    return drawn(name, label, draw, height=_height(len(bars)))


def phase_plot(phases: tuple[Phase, ...]) -> Markup:
    """Seconds per phase, in the order of the run."""

    def draw(axes: Axes) -> None:
        longest = max((phase.seconds for phase in phases), default=1.0) or 1.0
        for height, phase in enumerate(reversed(phases)):
            axes.barh(height, phase.seconds, color=_CLIENT, height=0.6)
            axes.text(phase.seconds + 0.012 * longest, height, f"{phase.seconds:.1f} s", va="center")
        axes.set_yticks(range(len(phases)), [phase.name for phase in reversed(phases)])
        axes.set_xlim(0, 1.12 * longest)
        axes.set_xlabel("seconds")
        axes.grid(visible=False, axis="y")

    return drawn("phases", "Time per phase", draw, height=_height(len(phases)))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _height(rows: int) -> float:
    return 0.9 + 0.38 * max(rows, 1)


@contextmanager
def _style(name: str) -> Iterator[None]:
    """Fixed style and a fixed salt: equal reports give equal bytes."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        yield


def drawn(name: str, label: str, draw: Callable[[Any], None], *, height: float = 3.4) -> Markup:
    """Draw on fresh axes, 7.6 inches wide, and return markup for an HTML page.

    Args:
        name: unique on the page; prefixed to every id in the drawing.
        label: what a screen reader says.
        draw: fills the axes.
        height: inches.
    """
    with _style(name), warnings.catch_warnings():
        # Text stays text in the drawing, and the browser has fonts for it; matplotlib's own font only measures it.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        figure = Figure(figsize=(7.6, height), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(?::\w+)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for placeholder, variable in _CSS.items():
        text = text.replace(placeholder, variable)
    # The drawing scales with the page: its view box says the proportions.
    text = re.sub(r'<svg width="[^"]*" height="[^"]*"', f'<svg role="img" aria-label="{label}"', text, count=1)
    # Every part was written by matplotlib from figures and fixed words; names of phases and channels it has escaped.
    return Markup(text)  # noqa: S704
