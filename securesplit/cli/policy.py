"""``securesplit policy``: is a policy file legal, what does it say, and what would an expert ask?"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from securesplit.cli.output import Output, show
from securesplit.cli.policy_compare import diff, explain, negotiate
from securesplit.cli.policy_new import new
from securesplit.cli.policy_sign import keygen, sign, verify

app = typer.Typer(help="Policies: what may leave this site.", no_args_is_help=True, add_completion=False)
app.command()(explain)
app.command()(diff)
app.command()(negotiate)
app.command()(new)
app.command()(keygen)
app.command()(sign)
app.command()(verify)

File = Annotated[Path, typer.Argument(metavar="FILE", help="A policy file.")]


@app.command()
def check(
    file: File,
    records: Annotated[
        int | None, typer.Option(min=1, help="Records of the largest site, which delta is compared with.")
    ] = None,
    fail_on: Annotated[
        Literal["note", "warning", "danger"] | None,
        typer.Option("--fail-on", help="End with status 1 when a finding is as severe as this, or worse."),
    ] = None,
    output: Output = "text",
) -> None:
    """Check a policy file; every fault is reported at once, with its table, key and line. Exit 2 when it has any.

    A legal policy is then looked over for what is weak, contradictory or dangerous; that alone fails nothing, unless asked to.
    """
    from securesplit.errors import CheckFailed, InputError
    from securesplit.policy.lint import at_least, lint
    from securesplit.policy.load import load_policy

    try:
        policy = load_policy(file)
    except InputError as error:
        _faulty(file, error, output)
    findings = lint(policy, records=records)
    warnings = [f.line() for f in at_least(findings, "warning")]
    value = {
        "valid": True, "errors": [], "faults": [], "warnings": warnings, "findings": [asdict(f) for f in findings],
        "digest": policy.digest,
    }  # fmt: skip
    lines = [f"{file}: valid", f"digest {policy.digest}", *(f"{f.severity}: {f.line()}" for f in findings)]
    show(output, "\n".join(lines), value)
    if fail_on is not None and (found := at_least(findings, fail_on)):
        raise CheckFailed(
            "SS-1590",
            f"policy '{policy.name}' has {len(found)} finding(s) of severity {fail_on} or worse",
            hint="Change the keys that are named, or ask for less by --fail-on.",
        )


def _faulty(file: Path, error: Exception, output: str) -> NoReturn:
    """Report every fault and end with its status; text goes the way of all errors, each fault with its line."""
    from securesplit.errors import InputError
    from securesplit.policy.place import located

    assert isinstance(error, InputError)
    errors = list(error.details) or [error.what]
    try:
        text = file.read_text(encoding="utf-8") if error.details else ""
    except (OSError, UnicodeDecodeError):
        text = ""
    faults = located(text, tuple(errors)) if error.details else ()
    if output == "text":
        said = tuple(
            f"line {fault.line}: {line}" if fault.line else line for fault, line in zip(faults, errors, strict=False)
        )
        raise InputError(error.code, error.what, hint=error.hint, details=said or error.details)
    value = {
        "valid": False, "errors": errors, "faults": [{"file": str(file), **asdict(f)} for f in faults], "warnings": [],
        "findings": [], "digest": None,
    }  # fmt: skip
    show(output, "", value)
    sys.exit(error.exit_code)


@app.command()
def schema() -> None:
    """Print the JSON Schema of policy files, for editors; docs/policy.schema.json is this."""
    from securesplit.policy.published import policy_schema

    sys.stdout.write(policy_schema())


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
