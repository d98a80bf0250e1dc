"""Options that several commands share to choose tokens; the choice is made on the client, which names all faults of it at once."""

from __future__ import annotations

from typing import Annotated

import typer

MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="At most so many new tokens.", min=1)]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
Seed = Annotated[int, typer.Option("--seed", help="For temperatures above 0.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Draw from so many likeliest tokens.")]
TopP = Annotated[
    float, typer.Option("--top-p", help="Draw from the fewest tokens that have this probability together.")
]
MinP = Annotated[
    float, typer.Option("--min-p", help="Draw from tokens with at least this share of the largest probability.")
]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1, what was there comes again less often.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="A text that ends the answer; may be repeated.")]
EachTurnAlone = Annotated[
    bool,
    typer.Option(
        "--count-each-turn-alone",
        help="Count each prompt as a record of its own, although later turns repeat what earlier ones said.",
    ),
]
