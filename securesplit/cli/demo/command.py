"""``securesplit demo``: argv to values, one call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from securesplit.cli.connection import Cache, cache_or_default
from securesplit.cli.output import Output, show


def demo(
    model: Annotated[str, typer.Option(help="An alias, a model directory or a hub id.")] = "smollm2-135m",
    data: Annotated[
        Path | None, typer.Option(help="Your own text (jsonl, json or plain) instead of synthetic ward notes.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write; a new directory under runs/ when absent.")] = None,
    policy: Annotated[
        Path | None, typer.Option(help="The protecting policy; policies/balanced.toml when absent.")
    ] = None,
    show_text: Annotated[
        bool, typer.Option("--show-text", help="Put pieces of your own text into the report.")
    ] = False,
    cache: Cache = None,
    output: Output = "text",
) -> None:
    """Train three clients over mutual TLS, unprotected and protected, sum securely, generate, attack, and report."""
    from securesplit.cli.demo.story import Setting, run_demo

    report, directory = run_demo(
        Setting(model=model, data=data, out=out, policy=policy, show_text=show_text, cache=cache_or_default(cache))
    )
    low, high = report.leakage.unprotected, report.leakage.protected
    lines = [
        (
            f"held-out loss       {report.train.initial_loss:.3f} -> {report.train.final_loss:.3f} protected; "
            f"{report.train.unprotected[-1]:.3f} unprotected; {report.train.client_only[-1]:.3f} client-only"
        ),
        f"tokens recovered    {low.token_recovery:.1%} unprotected, {high.token_recovery:.1%} protected (prior {high.prior:.1%})",
        f"budget spent        epsilon {report.privacy.epsilon:.3f} at delta {report.privacy.delta:g}, unit {report.privacy.unit}, {report.privacy.relation}"
        if report.privacy.epsilon is not None
        else "budget spent        none: UNSAFE policy",
        f"secure sums         {report.aggregation.rounds} rounds, exact: {report.aggregation.exact}; {report.tls.version}",
        f"report              {directory / 'report.html'}  ({report.seconds:.0f} s)",
    ]
    show(output, "\n".join(lines), report.model_dump(mode="json"))
