"""``securesplit policy``: is a policy file legal, and what does it say?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from securesplit.cli.output import Output, show

app = typer.Typer(help="Policies: what may leave this site.", no_args_is_help=True, add_completion=False)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A policy file.")]


@app.command()
def check(file: File, output: Output = "text") -> None:
    """Check a policy file; every fault is reported at once. Exit 2 when it has any."""
    from securesplit.errors import InputError
    from securesplit.policy.lint import lint
    from securesplit.policy.load import load_policy

    try:
        policy = load_policy(file)
    except InputError as error:
        if output == "text":
            raise
        errors = list(error.details) or [error.what]
        show(output, "", {"valid": False, "errors": errors, "warnings": [], "digest": None})
        sys.exit(error.exit_code)
    warnings = lint(policy)
    lines = [f"{file}: valid", f"digest {policy.digest}", *(f"warning: {w}" for w in warnings)]
    show(output, "\n".join(lines), {"valid": True, "errors": [], "warnings": list(warnings), "digest": policy.digest})


@app.command("show")
def show_policy(file: File, output: Output = "text") -> None:
    """Print what a policy means: whom it is for, what it costs, the noise that follows from its budget."""
    from securesplit.policy.load import load_policy
    from securesplit.policy.schema import Gaussian
    from securesplit.privacy.plan import plan_for, rows_moved

    policy = load_policy(file)
    lines = [f"{policy.name} ({policy.digest[:16]})", f"for:  {policy.purpose}", f"cost: {policy.cost}"]
    channels: list[dict[str, object]] = []
    if isinstance(policy.privacy, Gaussian):
        privacy = policy.privacy
        plan = plan_for(privacy, rows=rows_moved(policy.limits.min_front, policy.limits.buckets))
        lines.append(
            f"budget: epsilon {privacy.epsilon:g} at delta {privacy.delta:g}, unit {privacy.unit}, {privacy.relation}, regime {privacy.regime}"
        )
        for at in ("cut", "gradient", "decode", "update"):
            if (channel := plan.channel(at)) is not None:
                channels.append(
                    {
                        "channel": at,
                        "clip": channel.clip,
                        "sigma": channel.sigma,
                        "mu": channel.mu,
                        "releases": channel.releases,
                    }
                )
                lines.append(
                    f"  {at:9} clip {channel.clip:g}  sigma {channel.sigma:.4g}  mu {channel.mu:.4g} each, {channel.releases} release(s)"
                )
    else:
        lines.append("budget: none. UNSAFE: everything leaves as it is.")
    show(
        output,
        "\n".join(lines),
        {"name": policy.name, "digest": policy.digest, "policy": policy.model_dump(mode="json"), "channels": channels},
    )
