"""Options that several commands share to choose tokens; the choice is made on the client."""

from __future__ import annotations

from typing import Annotated

import typer

MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="At most so many new tokens.", min=1, max=4096)]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.", min=0)]
Seed = Annotated[int, typer.Option("--seed", help="For temperatures above 0.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Only so many likeliest tokens.", min=1)]
TopP = Annotated[float, typer.Option("--top-p", help="Only the likeliest tokens with this probability.", min=0, max=1)]
MinP = Annotated[float, typer.Option("--min-p", help="Only tokens at least so likely, against the best.", min=0, max=1)]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1, what was there comes again less often.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="A text that ends the answer; may be repeated.")]
EachTurnAlone = Annotated[
    bool,
    typer.Option(
        "--count-each-turn-alone",
        help="Count each prompt as a record of its own, although later turns repeat what earlier ones said.",
    ),
]
