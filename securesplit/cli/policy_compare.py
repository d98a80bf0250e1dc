"""``securesplit policy diff``, ``negotiate`` and ``explain``: two policies, or a policy and what a server asks for."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from securesplit.cli.connection import Evidence
from securesplit.cli.output import Output, show

if TYPE_CHECKING:
    from securesplit.agree import Budget
    from securesplit.client.verdict import Verdict
    from securesplit.policy.schema import Policy

Before = Annotated[Path, typer.Argument(metavar="BEFORE", help="A policy file.")]
After = Annotated[Path, typer.Argument(metavar="AFTER", help="Another one.")]
Own = Annotated[Path, typer.Argument(metavar="OWN", help="The client's policy file.")]
Offered = Annotated[Path, typer.Argument(metavar="OTHER", help="The server's.")]


def diff(
    before: Before,
    after: After,
    forbid: Annotated[
        Literal["loosens", "tightens"] | None,
        typer.Option(help="End with status 1 when a change does this; for a review that a machine holds up."),
    ] = None,
    output: Output = "text",
) -> None:
    """Every key that differs, and whether that loosens, tightens or neither; with the noise that follows from it.

    A share of the budget that grows while the budget shrinks counts as what it costs.
    """
    from securesplit.agree import compare
    from securesplit.errors import CheckFailed
    from securesplit.policy.load import load_policy

    old, new = load_policy(before), load_policy(after)
    found = compare(old, new)
    value = {
        "effect": found.effect, "changes": [asdict(change) for change in found.changes], "budget": asdict(found.budget),
        "before": {"name": old.name, "digest": old.digest}, "after": {"name": new.name, "digest": new.digest},
    }  # fmt: skip
    lines = [f"{change.effect:8}  {change.line()}" for change in found.changes]
    head = f"from '{old.name}' to '{new.name}': {found.effect}, {len(found.changes)} change(s)"
    show(output, "\n".join((head, *lines, *_budget_lines(found.budget))), value)
    refused = [change for change in found.changes if change.effect == forbid]
    if refused:
        raise CheckFailed(
            "SS-1591",
            f"{len(refused)} change(s) that {'loosen' if forbid == 'loosens' else 'tighten'} are forbidden here",
            hint="Have the policy's owner accept the change, or take it back.",
            details=tuple(change.line() for change in refused),
        )


def _budget_lines(budget: Budget) -> list[str]:
    def pair(values: tuple[float | None, float | None]) -> str:
        return " -> ".join("none" if v is None else f"{v:.4g}" for v in values)

    if budget.delta is None:
        return ["budget: none before, none after: both are UNSAFE"]
    said = [str(meaning) for meaning in dict.fromkeys(budget.meaning) if meaning is not None]
    lines = [f"budget: mu {pair(budget.mu)}, epsilon {pair(budget.epsilon)} {' -> '.join(said)}"]
    if len(said) > 1:
        lines.append(
            "  the two differ in unit or relation: they are not one quantity, and the larger one may protect more"
        )
    lines += [
        f"  {c.channel:11} mu {pair(c.mu)}, each {pair(c.mu_each)}, noise/clip {pair(c.sigma_over_clip)}, releases {pair(c.releases)}"
        for c in budget.channels
    ]
    return lines


def negotiate(
    own: Own,
    other: Offered,
    out: Annotated[Path | None, typer.Option(help="Write the outcome to this new file.")] = None,
    output: Output = "text",
) -> None:
    """The strictest of two policies, or exit 3 with every rule on which no value suits both.

    What a session does is stricter yet: a client that OWN belongs to refuses a server whose policy is looser anywhere;
    `would_join` says whether it would.
    """
    from securesplit.agree import compare, strictest
    from securesplit.policy.load import load_policy
    from securesplit.policy.written import write_new, written

    mine, theirs = load_policy(own), load_policy(other)
    made = strictest(mine, theirs)
    looser = compare(mine, theirs).loosened
    if out is not None:
        write_new(out, written(made))
    value = {
        "digest": made.digest, "policy": made.model_dump(mode="json"), "would_join": not looser,
        "from_own": [asdict(c) for c in compare(mine, made).changes], "from_other": [asdict(c) for c in compare(theirs, made).changes],
        "looser_offer": [asdict(c) for c in looser],
    }  # fmt: skip
    lines = [f"strictest of '{mine.name}' and '{theirs.name}': digest {made.digest}"]
    lines += [f"  own      {change.line()}" for change in compare(mine, made).changes]
    lines += [f"  other    {change.line()}" for change in compare(theirs, made).changes]
    lines.append(
        "a client with OWN would join a server with OTHER, under this"
        if not looser
        else f"a client with OWN refuses a server with OTHER, which is looser by {len(looser)} rule(s): "
        + ", ".join(change.path for change in looser)
    )
    show(output, "\n".join(lines) + (f"\nwritten to {out}" if out else ""), value)


def explain(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The client's policy file.")],
    job: Annotated[Path | None, typer.Option(help="The server's job file.")] = None,
    offer: Annotated[Path | None, typer.Option(help="The server's policy file.")] = None,
    evidence: Evidence = None,
    model_digest: Annotated[
        str | None, typer.Option("--model-digest", help="Of the model's manifest, as `model inspect` prints it.")
    ] = None,
    output: Output = "text",
) -> None:
    """Why a server would be refused, rule by rule with both sides' values: exit 3. Exit 0 when it would be joined.

    Without --job and --offer: the rules that this policy holds a server to.
    """
    from securesplit.client.verdict import Evidence as Facts
    from securesplit.client.verdict import judge
    from securesplit.errors import InputError
    from securesplit.policy.leakage import read_proofs
    from securesplit.policy.load import load_policy
    from securesplit.policy.rules import RULES
    from securesplit.protocol.job import load_job

    if (evidence is None) != (model_digest is None):
        raise InputError("SS-1001", "--evidence and --model-digest belong together", hint="Give both or neither.")
    policy = load_policy(file)
    facts = None
    if evidence is not None and model_digest is not None:
        facts = Facts(read_proofs(evidence), model_digest, datetime.now(UTC))
    found = judge(
        policy, job=None if job is None else load_job(job), offer=None if offer is None else load_policy(offer),
        evidence=facts,
    )  # fmt: skip
    value = {
        "admitted": found.admitted, "refusals": [asdict(breach) for breach in found.refusals],
        "agreed": None if found.agreed is None else found.agreed.digest, "open": list(found.open_questions),
        "rules": [{"rule": rule, "asks": asks, "policy": _stated(policy, rule)} for rule, asks in RULES.items()],
    }  # fmt: skip
    show(output, "\n".join(_told(policy, found, listed=job is None and offer is None)), value)
    if not found.admitted:
        raise typer.Exit(code=3)


def _told(policy: Policy, found: Verdict, *, listed: bool) -> list[str]:
    from securesplit.policy.rules import RULES

    if listed:
        lines = [f"policy '{policy.name}' holds every server to these rules, and its policy to being no looser:"]
        return lines + [f"  {rule:24} {_value(policy, rule)}{asks}" for rule, asks in RULES.items()]
    if not found.admitted:
        lines = [f"refused, by {len(found.refusals)} rule(s) of policy '{policy.name}':"]
        lines += [f"  [{breach.source}] {breach.line()}" for breach in found.refusals]
    else:
        lines = [f"admitted under policy '{policy.name}'"]
        if found.agreed is not None and found.agreed != policy:
            lines = [
                f"admitted; the server's policy is stricter, and the session is bound to {found.agreed.digest[:16]}"
            ]
    return lines + [f"  not decided: {question}" for question in found.open_questions]


def _stated(policy: Policy, rule: str) -> object:
    from securesplit.policy.table import at

    value = at(policy, *rule.split("."))
    return list(value) if isinstance(value, tuple) else value


def _value(policy: Policy, rule: str) -> str:
    from securesplit.policy.compare import said

    value = _stated(policy, rule)
    return "" if value is None else f"{said(value)}: "
