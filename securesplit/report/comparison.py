"""baseline.html: the table of a comparison and its curves, one self-contained page without a script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from securesplit.report.plots import drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CurveLine", "comparison_page"]

_DASHES = ("-", "--", ":", "-.")
_MARKERS = "os^Dvx"


@dataclass(frozen=True, slots=True)
class CurveLine:
    """Held-out loss before the first round and after each."""

    name: str
    losses: tuple[float, ...]


def comparison_page(
    *, title: str, about: str, head: Sequence[str], rows: Sequence[Sequence[str]], curves: Sequence[CurveLine]
) -> str:
    """The page, as one string of HTML.

    Args:
        title: of the page.
        about: one sentence on what the figures are.
        head, rows: of the table, as text.
        curves: one line of the drawing each.
    """
    environment = Environment(
        loader=PackageLoader("securesplit.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("comparison.html.j2")
    return page.render(title=title, about=about, head=head, rows=rows, plot=_plot(curves))


def _plot(curves: Sequence[CurveLine]) -> Markup:
    def draw(axes: Axes) -> None:
        for i, line in enumerate(curves):
            axes.plot(
                range(len(line.losses)), line.losses, _DASHES[i % len(_DASHES)], marker=_MARKERS[i % len(_MARKERS)],
                markersize=5, label=line.name,
            )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("rounds")
        axes.set_ylabel("held-out loss (nats per token)")
        axes.legend()

    return drawn("curves", "Held-out loss over rounds", draw)
