"""``securesplit privacy``: the maths, and what a site has spent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from securesplit.cli.output import Output, show

app = typer.Typer(help="Privacy: noise for a budget, and the ledger.", no_args_is_help=True, add_completion=False)


@app.command()
def calibrate(
    epsilon: Annotated[float, typer.Option(help="Budget of all releases together.")],
    delta: Annotated[float, typer.Option(help="Of the same budget.")],
    unit: Annotated[Literal["sequence"], typer.Option(help="What is protected.")],
    releases: Annotated[int, typer.Option(help="How many releases share the budget.")] = 1,
    relation: Annotated[
        Literal["replace-one"], typer.Option(help="What may differ between neighbours.")
    ] = "replace-one",
    output: Output = "text",
) -> None:
    """Gaussian noise for a budget, against a server that sees every release; no amplification is counted."""
    from securesplit.errors import InputError
    from securesplit.privacy.calibrate import mu_for, sigma_for

    try:
        mu, sigma = mu_for(epsilon, delta), sigma_for(epsilon, delta, 2.0, releases)
    except ValueError as error:
        raise InputError("SS-1531", str(error), hint="epsilon > 0, 0 < delta < 1, releases >= 1.") from None
    value = {
        "mu": mu, "sigma_over_clip": sigma, "noise_multiplier": sigma / 2, "sensitivity_over_clip": 2.0,
        "epsilon": epsilon, "delta": delta, "unit": unit, "relation": relation, "releases": releases,
    }  # fmt: skip
    text = f"sigma = {sigma:.6g} x clip per release; mu = {mu:.6g} for all {releases}; epsilon {epsilon:g} at delta {delta:g}, unit {unit}, {relation}"
    show(output, text, value)


@app.command()
def ledger(
    directory: Annotated[Path, typer.Option("--ledger", help="The site's ledger, such as keys/alice/ledger.")],
    delta: Annotated[float, typer.Option(help="At which epsilon is shown.")] = 1e-5,
    output: Output = "text",
) -> None:
    """What a site has spent, by channel; the chain of entries is verified first."""
    from securesplit.errors import InputError
    from securesplit.privacy.calibrate import epsilon_for
    from securesplit.privacy.ledger import Ledger

    if not (directory / "ledger.sqlite").is_file():
        raise InputError(
            "SS-1532", f"{directory} holds no ledger", hint="It lies in the client's key folder, as KEYS/ledger."
        )
    book = Ledger(directory)
    mu = book.mu()
    rows = book.summary()
    lines = [
        f"worst record: mu {mu:.4f}, epsilon {epsilon_for(mu, delta):.4f} at delta {delta:g}, unit sequence, replace-one"
    ]
    lines += [f"  {r.channel:9} {r.releases} release(s), worst record mu {r.mu:.4f}" for r in rows]
    value = {
        "mu": mu, "epsilon": epsilon_for(mu, delta), "delta": delta, "unit": "sequence", "relation": "replace-one", "head": book.head(),
        "channels": [{"channel": r.channel, "releases": r.releases, "mu": r.mu, "epsilon": epsilon_for(r.mu, delta)} for r in rows],
    }  # fmt: skip
    show(output, "\n".join(lines), value)
