"""``securesplit privacy``: noise for a budget, what a job will cost, what a site has spent, and a check from outside."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from securesplit.cli.connection import Policy
from securesplit.cli.output import Output, show
from securesplit.cli.privacy_audit import audit

if TYPE_CHECKING:
    from securesplit.client.forecast import Forecast

app = typer.Typer(
    help="Privacy: noise for a budget, costs ahead, what is spent, and an audit.", no_args_is_help=True,
    add_completion=False,
)  # fmt: skip
app.command("audit")(audit)

LedgerDirectory = Annotated[Path, typer.Option("--ledger", help="The site's ledger, such as keys/alice/ledger.")]
Delta = Annotated[float, typer.Option(help="At which epsilon is shown.")]


@app.command()
def calibrate(
    epsilon: Annotated[float, typer.Option(help="Budget of all releases together.")],
    delta: Annotated[float, typer.Option(help="Of the same budget.")],
    unit: Annotated[Literal["sequence", "token", "user"], typer.Option(help="What is protected.")],
    releases: Annotated[
        int, typer.Option(help="How many releases share the budget; under unit user, of all of a user's records.")
    ] = 1,
    relation: Annotated[
        Literal["replace-one"], typer.Option(help="What may differ between neighbours.")
    ] = "replace-one",
    rows: Annotated[
        int, typer.Option(help="Unit token: rows that one token moves; 1 only when A is the embedding alone.")
    ] = 1,
    output: Output = "text",
) -> None:
    """Gaussian noise for a budget, against a server that sees every release; no amplification is counted.

    The figures are exact for the continuous Gaussian. On the lattice, where the product draws its noise, the Renyi
    accountant is enforced besides: `enforced_*` are the figures that a policy gets.
    """
    from securesplit.errors import InputError
    from securesplit.privacy.calibrate import mu_for, sigma_for
    from securesplit.privacy.plan import enforced_mu

    if rows < 1 or (rows > 1 and unit != "token"):
        raise InputError("SS-1531", "--rows counts what one token moves", hint="Use it with --unit token, at least 1.")
    sensitivity = 2.0 * math.sqrt(rows)
    try:
        mu, sigma = mu_for(epsilon, delta), sigma_for(epsilon, delta, sensitivity, releases)
        enforced = enforced_mu(epsilon, delta)
    except ValueError as error:
        raise InputError("SS-1531", str(error), hint="epsilon > 0, 0 < delta < 1, releases >= 1.") from None
    value = {
        "mu": mu, "sigma_over_clip": sigma, "noise_multiplier": sigma / sensitivity, "sensitivity_over_clip": sensitivity,
        "epsilon": epsilon, "delta": delta, "unit": unit, "relation": relation, "releases": releases,
        "enforced_mu": enforced, "enforced_sigma_over_clip": sensitivity * math.sqrt(releases) / enforced,
    }  # fmt: skip
    text = (
        f"sigma = {sigma:.6g} x clip per release; mu = {mu:.6g} for all {releases}; epsilon {epsilon:g} at delta {delta:g}, unit {unit}, {relation}\n"
        f"enforced on the lattice: sigma = {value['enforced_sigma_over_clip']:.6g} x clip, mu = {enforced:.6g}"
    )
    show(output, text, value)


@app.command()
def plan(
    policy: Policy,
    job: Annotated[Path, typer.Option(help="The server's job file.")],
    records_per_user: Annotated[int, typer.Option(min=1, help="Unit user: records of the busiest user.")] = 1,
    batches: Annotated[
        int | None,
        typer.Option(
            min=1, help="Batches of an epoch at this site; matters where the job has schedule.evaluate_every."
        ),
    ] = None,
    output: Output = "text",
) -> None:
    """What a job will cost each record under a policy: channel by channel, and how far the budget reaches.

    Every release of a run is counted, those of held-out records inside the rounds included: for these say --batches.
    """
    from securesplit.client.forecast import forecast
    from securesplit.policy.load import load_policy
    from securesplit.policy.meaning import meaning_of
    from securesplit.policy.schema import Gaussian
    from securesplit.protocol.job import load_job

    rules = load_policy(policy)
    ahead = forecast(rules, load_job(job), records_per_user=records_per_user, batches=batches)
    if ahead is None or not isinstance(rules.privacy, Gaussian):
        show(output, f"policy '{rules.name}' is UnsafeNoPrivacy: everything leaves as it is", {"unsafe": True})
        return
    privacy = rules.privacy
    value = {
        "unsafe": False, "regime": privacy.regime, "unit": privacy.unit, "relation": privacy.relation, "delta": privacy.delta,
        "fits": ahead.fits, "mu": ahead.mu, "eps_server": ahead.epsilon, "eps_peer": ahead.epsilon_peer, "budget": ahead.budget,
        "channels": [
            {"channel": c.channel, "needed": c.needed, "allowed": c.allowed, "mu": c.mu, "sigma_over_clip": c.sigma_over_clip,
             "bits": c.bits, "yes_or_no": c.right, "fits": c.fits}
            for c in ahead.costs
        ],
        "held_out_releases": ahead.held_out, "mu_held_out": ahead.mu_held_out, "eps_held_out": ahead.epsilon_held_out,
        "exact": ahead.exact, "max_batches": ahead.batches, "max_rounds": ahead.rounds, "max_epochs": ahead.epochs, "tokens": ahead.tokens, "warnings": [],
        "useless": ahead.useless, "honest": ahead.honest, "refusals": list(ahead.refusals), "verdict": _verdict(ahead),
    }  # fmt: skip
    lines = [
        f"policy '{rules.name}': unit {privacy.unit}, {privacy.relation}, regime {privacy.regime}, delta {privacy.delta:g}",
        f"{'channel':9}{'needed':>8}{'allowed':>9}{'mu':>9}{'noise/clip':>12}{'bits <=':>10}{'yes/no <=':>11}",
    ]
    lines += [
        f"{c.channel:9}{c.needed:8}{c.allowed:9}{c.mu:9.4f}{c.sigma_over_clip:12.4g}{c.bits:10.3g}{c.right:11.1%}"
        + ("" if c.fits else "  the policy refuses this")
        for c in ahead.costs
    ]
    meaning = meaning_of(privacy)
    peer = (
        "no noise protects against the other clients"
        if ahead.epsilon_peer is None
        else f"{ahead.epsilon_peer:.3f} {meaning}"
    )
    lines += [
        f"eps_server {ahead.epsilon:.3f} of {ahead.budget:.3f} {meaning} for one training record; eps_peer: {peer}",
        *_counted_on(ahead.honest),
        *_of_peers(c.channel for c in ahead.costs),
        *_held_out(ahead, str(meaning)),
        f"reach: rounds {_most(ahead.rounds)}, epochs {_most(ahead.epochs)}, generated tokens {ahead.tokens} at this site",
        *ahead.refusals,
        _verdict(ahead),
    ]
    if (
        privacy.updates is not None
        and (noise := _update_noise(ahead) * privacy.updates.clip) > rules.aggregation.max_update / 3
    ):
        saturated = (
            f"the updates' noise, {noise:.3g} per coordinate, is beyond a third of aggregation.max_update "
            f"({rules.aggregation.max_update:g}): most of it is cut off, and little of an update is left"
        )
        lines.append(f"warning: {saturated}")
        value["warnings"] = [saturated]
    show(output, "\n".join(lines), value)
    if not ahead.fits:
        raise typer.Exit(code=6)


def _held_out(ahead: Forecast, meaning: str) -> tuple[str, ...]:
    """What a held-out record pays, and how far all figures may be trusted."""
    least = "" if ahead.batches is None else "at least "
    lines = [
        f"held-out records: {least}{ahead.held_out} release(s) each, eps_server {least}{ahead.epsilon_held_out:.3f} {meaning}"
    ]
    if ahead.batches is not None:
        lines.append(
            "not known: how often schedule.evaluate_every measures inside rounds, because a job does not say how many batches an "
            f"epoch has at this site. The policy pays for at most {ahead.batches}; --batches N counts exactly"
        )
    elif ahead.exact:
        lines.append("exact for a client that is there to the end; one that ends early or misses rounds spends less")
    else:
        lines.append(
            "bounds: where a step moves nothing, a user's records share a batch, clients take turns or one stops early, a run spends less"
        )
    return tuple(lines)


def _of_peers(channels: Iterable[str]) -> list[str]:
    """What the row of that name is; a reader finds it in no policy."""
    said = "peers: releases of channel decode, paid for ahead: tokens that the other clients generate with what learnt from the record"
    return [said] if "peers" in channels else []


def _counted_on(honest: int) -> tuple[str, ...]:
    """What an epsilon rests on besides this site's own noise."""
    return (
        ()
        if honest == 1
        else (f"these hold for sums with at least {honest} honest clients in them; others are refused",)
    )


@app.command()
def ledger(directory: LedgerDirectory, delta: Delta = 1e-5, output: Output = "text") -> None:
    """What a site has spent, by channel; the chain of entries and its anchor are verified first."""
    from securesplit.privacy.plan import enforced_epsilon

    book = _open(directory)
    mu, rows = book.mu(), book.summary()
    lines = [
        f"worst record: mu {mu:.4f}, epsilon {enforced_epsilon(mu, delta):.4f} at delta {delta:g}, unit {book.unit or 'of the policy'}, replace-one"
    ]
    lines += [f"  {r.channel:9} {r.releases} release(s), worst record mu {r.mu:.4f}" for r in rows]
    if any(r.channel == "bare" for r in rows):
        lines.append("  bare: updates entered blind sums without noise; no epsilon holds against the other clients")
    value = {
        "mu": mu, "epsilon": enforced_epsilon(mu, delta), "delta": delta, "unit": book.unit or "sequence", "relation": "replace-one", "head": book.head(),
        "channels": [{"channel": r.channel, "releases": r.releases, "mu": r.mu, "epsilon": enforced_epsilon(r.mu, delta)} for r in rows],
    }  # fmt: skip
    show(output, "\n".join(lines), value)


@app.command()
def report(
    directory: LedgerDirectory,
    policy: Policy,
    out: Annotated[Path | None, typer.Option(help="Where to write the page, such as privacy.html.")] = None,
    output: Output = "text",
) -> None:
    """What left the site: noise, mu and epsilon by channel, and what an attacker may reach at most; as a page and as JSON."""
    from securesplit.errors import InputError
    from securesplit.policy.load import load_policy
    from securesplit.policy.schema import Gaussian
    from securesplit.report.spending import render_spending, spending

    rules = load_policy(policy)
    if not isinstance(rules.privacy, Gaussian):
        raise InputError("SS-1532", f"policy '{rules.name}' keeps no ledger", hint="Name the policy of the runs.")
    found = spending(_open(directory), rules)
    if out is not None:
        out.write_text(render_spending(found), encoding="utf-8")
    show(output, found.text() + (f"\nwritten to {out}" if out else ""), found.model_dump(mode="json"))


@app.command()
def adopt(
    directory: LedgerDirectory,
    destroyed: Annotated[
        bool,
        typer.Option("--every-other-copy-is-destroyed", help="You say so; nothing on this machine can check it."),
    ] = False,
    output: Output = "text",
) -> None:
    """Accept a ledger that was moved to this disk or machine, or whose client has a new key. Stays visible for ever."""
    from securesplit.errors import PolicyDenied
    from securesplit.privacy.ledger import Ledger

    if not destroyed:
        raise PolicyDenied(
            "SS-2015",
            "two copies of a ledger could spend its budget twice",
            hint="Destroy every other copy, then say so with --every-other-copy-is-destroyed.",
        )
    book = Ledger.adopt(directory)
    show(output, f"adopted; head {book.head()}", {"head": book.head(), "mu": book.mu()})


def _open(directory: Path):  # type: ignore[no-untyped-def]  # The type would import torch before a command runs.
    from securesplit.errors import InputError
    from securesplit.privacy.anchor import Anchors, Footing, default_anchors, owner_tag
    from securesplit.privacy.ledger import Ledger

    if not (directory / "ledger.sqlite").is_file():  # To look at a ledger must not make one.
        place = directory.resolve()
        if place.parent.is_dir():
            key = place.parent / "key.pem"
            owner = owner_tag(key.read_bytes() if key.is_file() else None)
            Anchors(default_anchors()).require_free(Footing(place, owner))
        raise InputError(
            "SS-1532",
            f"{directory} holds no ledger",
            hint="It lies in the client's key folder, as KEYS/ledger, from the first release on; UnsafeNoPrivacy keeps none.",
        )
    return Ledger(directory)


def _update_noise(ahead: Forecast) -> float:
    return next((c.sigma_over_clip for c in ahead.costs if c.channel == "update"), 0.0)


def _most(number: int | None) -> str:
    return "any number" if number is None else f"at most {number}"


def _verdict(ahead: Forecast) -> str:
    bits = ahead.mu**2 / 8 / math.log(2)
    if not ahead.fits:
        return "verdict: the policy refuses this job; nothing would be sent"
    if ahead.useless:
        return (
            f"verdict: information-theoretically useless for the text itself: the server can learn at most {bits:.2g} bits of a record "
            "from everything that leaves, and adds nothing measurable to what the client's own layers can do. Expect the "
            "client-only loss: `securesplit train --alone` measures it on your data, docs/benchmarks/frontier.md has ours"
        )
    return (
        f"verdict: the server can learn up to {bits:.3g} bits of a record; compare with the client-only baseline "
        "(`securesplit train --alone`) before you pay for it"
    )
