"""``securesplit explain``: what a code means and what to do about it."""

from __future__ import annotations

from typing import Annotated

import typer

from securesplit.cli.output import Output, show


def explain(
    code: Annotated[str, typer.Argument(metavar="CODE", help="Such as SS-3205.")],
    output: Output = "text",
) -> None:
    """Explain an error code."""
    from securesplit.codes import explain_code

    found = explain_code(code)
    show(
        output,
        f"{found.code}: {found.meaning}\n{found.action}",
        {"code": found.code, "meaning": found.meaning, "action": found.action, "exit": found.exit},
    )
