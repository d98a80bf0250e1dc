"""``securesplit policy new``: a complete, commented policy from a few answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from securesplit.cli.output import Output, show

_ASKED = {
    "use": "What will be done: train, generate, both, or adapt (the client's first layers learn too)?",
    "data": "What is in the text: public, internal, personal (people), or special (health, legal, financial)?",
}


def new(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The new policy file; an existing one is not replaced.")],
    use: Annotated[
        Literal["train", "generate", "both", "adapt"] | None,
        typer.Option(help="What is done. adapt: the client's first layers learn too. Asked for at a terminal."),
    ] = None,
    data: Annotated[
        Literal["public", "internal", "personal", "special"] | None,
        typer.Option(help="What is in the text; decides epsilon: 16, 8, 4 or 2. Asked for at a terminal."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Lower-case letters, digits and hyphens; the file's name when absent.")
    ] = None,
    unit: Annotated[
        Literal["sequence", "user"], typer.Option(help="What one budget protects whole: an example, or a person.")
    ] = "sequence",
    clients: Annotated[int, typer.Option(help="Sites that take part, 3 to 256.")] = 3,
    records: Annotated[int, typer.Option(help="Of the largest site; decides delta.")] = 1000,
    clip: Annotated[
        float, typer.Option(help="Norm of one record's hidden states at the cut, measured on public text.")
    ] = 600.0,
    tokens: Annotated[int, typer.Option(help="Generated in the life of the records.")] = 256,
    rounds: Annotated[int, typer.Option(help="Secure sums of an adapting run.")] = 4,
    epsilon: Annotated[float | None, typer.Option(help="In place of the data's own, 0.1 to 16.")] = None,
    output: Output = "text",
) -> None:
    """Write a policy that `policy check` accepts without a warning, each line with its reason. Noise is never off in it."""
    from securesplit.errors import InputError
    from securesplit.policy.draft import Answers, draft
    from securesplit.policy.lint import lint
    from securesplit.policy.load import parse_policy
    from securesplit.policy.written import write_new

    if sys.stdin.isatty() and output == "text":
        use = use or _ask("use", ("train", "generate", "both", "adapt"))  # type: ignore[assignment]
        data = data or _ask("data", ("public", "internal", "personal", "special"))  # type: ignore[assignment]
    if use is None or data is None:
        missing = tuple(
            f"--{option}: {_ASKED[option]}" for option, value in (("use", use), ("data", data)) if not value
        )
        hint = "Give each option; at a terminal the command asks."
        raise InputError("SS-1122", f"{len(missing)} answer(s) are missing", hint=hint, details=missing)
    answers = Answers(
        name=name or out.stem, use=use, sensitivity=data, unit=unit, clients=clients, records=records, clip=clip,
        tokens=tokens, rounds=rounds, epsilon=epsilon,
    )  # fmt: skip
    text = draft(answers)
    policy = parse_policy(text, source=str(out))
    write_new(out, text)
    notes = [finding.line() for finding in lint(policy, records=records)]
    meaning = answers.meaning
    lines = [
        f"wrote {out}: epsilon {answers.budget:g} {meaning}",
        f"digest {policy.digest}",
        *(f"note: {note}" for note in notes),
        f"Read it, then: securesplit policy show {out}; securesplit policy sign {out} --key OFFICER",
    ]
    value = {"path": str(out), "name": policy.name, "digest": policy.digest, "epsilon": answers.budget,
             "delta": meaning.delta, "unit": meaning.unit, "relation": meaning.relation, "notes": notes}  # fmt: skip
    show(output, "\n".join(lines), value)


def _ask(option: str, allowed: tuple[str, ...]) -> str:
    while True:
        answer = str(typer.prompt(_ASKED[option], err=True)).strip().lower()
        if answer in allowed:
            return answer
        typer.echo(f"one of {', '.join(allowed)}", err=True)
