"""``securesplit privacy audit``: does what the server decodes keep the policy's claims?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from securesplit.cli.output import Output, show
from securesplit.cli.progress import ProgressStyle, reporting

if TYPE_CHECKING:
    from securesplit.audit.run import AuditReport


def audit(
    policy: Annotated[
        Path | None, typer.Option("--policy", help="Policy file; a built-in one with every channel open when absent.")
    ] = None,
    profile: Annotated[Literal["smoke", "standard"], typer.Option(help="smoke: seconds; standard: about a minute.")] = (
        "standard"
    ),
    codec: Annotated[Literal["f32", "bf16", "int8"], typer.Option(help="Type of rows on the wire; the job's.")] = "f32",
    progress: ProgressStyle = "auto",
    output: Output = "text",
) -> None:
    """Attack the production send path and compare lower bounds with the claims; exit 1 when one is broken."""
    import torch

    from securesplit.audit.builtin import builtin_policy
    from securesplit.audit.run import run_audit
    from securesplit.errors import CheckFailed
    from securesplit.policy.load import load_policy

    torch.set_num_threads(1)
    audited = builtin_policy() if policy is None else load_policy(policy)
    with reporting(progress) as told:
        report = run_audit(
            audited, profile=profile, codec=codec, progress=lambda test: told(f"audit: {test}", 0, 1, None)
        )
    show(output, _text(report), report.as_json())
    if not report.ok:
        raise CheckFailed(
            "SS-1550",
            f"the audit of policy '{report.policy}' is red: {', '.join(report.red)}",
            hint="Do not use this build on private text. Run it once more; a right one is red once in a thousand runs.",
        )


def _text(report: AuditReport) -> str:
    lines = [f"policy {report.policy}, codec {report.codec}, profile {report.profile}, {report.seconds:.0f} s", ""]
    lines.append(
        f"{'channel':10}{'claimed mu':>12}{'mu >=':>9}{'trials':>8}  two-point   distribution (farthest |z| of limit)"
    )
    noise = {v.channel: v for v in report.distribution}
    for v in report.channels:
        line = f"{v.channel:10}{v.claimed_mu:12.4f}{v.mu_lower:9.4f}{v.trials:8d}  {_word(v.ok, decided=v.decided):12}"
        if (d := noise.get(v.channel)) is not None:
            line += f"{_word(d.ok):5} {abs(d.worst_z):.1f} of {d.limit:.1f} ({d.worst}), sigma x {d.sigma_ratio:.4f}"
        lines.append(line)
        if v.releases != v.policy_releases:
            lines.append(
                f"          (budget divided over {v.releases} releases here, over {v.policy_releases} in the policy)"
            )
    c, j, o = report.completeness, report.joint, report.one_run
    lines += [
        "",
        f"completeness  {_word(c.ok):5} {c.blocks} blocks of rows left, {c.unknown} unknown to the ledger, {c.silent} release(s) with wrong noise, {c.unknown_sums} of {c.sums} sum(s) unaccounted for, {c.undercharged} undercharged, resent alike: {c.resent}, learnt from noise alone: {'not tested' if c.learnt is None else c.learnt}, probes failed: {', '.join(c.probes) or 'none'}",
        f"joint         {_word(j.ok):5} mu >= {j.mu_lower:.4f}, by path {j.mu_path:.4f}, claimed {j.claimed_mu:.4f}; {j.jobs} jobs a world, {j.others} other records, regime {j.regime}",
        f"one run       {_word(o.ok):5} epsilon >= {o.epsilon_lower:.3f}, claimed {o.claimed_epsilon:.3f} of one release at delta {o.delta:g}, unit {o.unit}, {o.relation}; {o.correct} of {o.guesses} guesses right",
        "",
        "Lower bounds: red is a broken claim, but for one run in a thousand; green is no proof.",
    ]
    if report.codec != "f32":
        lines.append(
            f"{report.codec} rounds noised rows before they leave, so the lattice and the law of their noise were not looked at. Audit f32 too."
        )
    return "\n".join(lines)


def _word(ok: bool, *, decided: bool = True) -> str:
    return ("ok" if decided else "not refuted") if ok else "RED"
