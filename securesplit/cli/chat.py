"""``securesplit chat``: a conversation through the split; history stays in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from securesplit.cli.claims import claimed
from securesplit.cli.connection import Adapters, Cache, Code, Evidence, Keys, Model, Policy, Server, connection
from securesplit.cli.decoding import (
    EachTurnAlone,
    MaxNewTokens,
    MinP,
    Penalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from securesplit.cli.output import Output, harmless, show
from securesplit.cli.passphrase import KeyPassFd, KeyPassFile
from securesplit.cli.policy_sign import Trusted

if TYPE_CHECKING:
    from securesplit.client.chat.loop import Exchanged
    from securesplit.errors import BudgetExhausted, InputError


def chat(
    policy: Policy,
    keys: Keys,
    server: Server,
    system: Annotated[str | None, typer.Option(help="Instructions for the model. Put nothing private there.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    count_each_turn_alone: EachTurnAlone = False,
    adapters: Adapters = None,
    model: Model = None,
    cache: Cache = None,
    code: Code = None,
    evidence: Evidence = None,
    policy_key: Trusted = None,
    key_pass_file: KeyPassFile = None,
    key_pass_fd: KeyPassFd = None,
    output: Output = "text",
) -> None:
    """Talk to the model. Without a terminal each line of stdin is a turn. Every turn is a release, and charged.

    /reset begins a new conversation, /budget says what is left, /quit ends. Nothing that was said is written to disk.
    """
    site = connection(
        policy, keys, server, policy_key, (key_pass_file, key_pass_fd), model=model, cache=cache, code=code, evidence=evidence,
        adapters=adapters,
    )  # fmt: skip

    from securesplit.client.chat.loop import Talk
    from securesplit.client.chat.toll import Toll
    from securesplit.client.sampling import Sampling

    sampling = Sampling(temperature, seed, top_k, top_p, min_p, repetition_penalty, tuple(stop or ()))
    screen = _Terminal(quiet=output == "json")
    turns: list[Exchanged] = []
    ended = False
    with site.open() as client:
        talk = Talk(client, Toll(count_each_turn_alone), screen, system, max_new_tokens, sampling)
        meaning = claimed(client.policy)
        try:
            for turn in talk.through(screen.lines()):
                turns.append(turn)  # noqa: PERF402 (those before a refusal stay, whatever `extend` makes of it)
            ended = True
        finally:
            # Turns before a refusal are paid for, and would be lost.
            if output == "json" and (turns or ended):
                show(output, "", {**_value(turns), **meaning})


def _value(turns: list[Exchanged]) -> dict[str, object]:
    spent = [turn.epsilon for turn in turns if turn.epsilon is not None]
    return {
        "turns": [
            {
                "user": turn.asked, "assistant": turn.answered, "tokens": turn.tokens, "finish": turn.finish,
                "dropped_turns": turn.dropped, "epsilon": turn.epsilon,
            }
            for turn in turns
        ],
        "tokens": sum(turn.tokens for turn in turns),
        "epsilon": max(spent) if spent else None,
    }  # fmt: skip


class _Terminal:
    """Answers on stdout, all else on stderr."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console

        self._typed = sys.stdin.isatty()
        self._quiet = quiet
        self._notes = Console(
            stderr=True, soft_wrap=True, highlight=False, emoji=False, quiet=quiet and not self._typed
        )

    def lines(self) -> Iterator[str]:
        """What is typed, or stands on stdin.

        Raises:
            InputError: SS-1001 for what is no text.
        """
        from securesplit.errors import InputError

        while True:
            if self._typed:
                sys.stderr.write("> ")
                sys.stderr.flush()
            try:
                line = sys.stdin.readline()
                line.encode()  # Some locales let bytes that are no text through as lone surrogates.
            except UnicodeError:
                raise InputError("SS-1001", "what was typed is no UTF-8", hint="Convert it first.") from None
            if not line:
                return
            yield line

    def piece(self, text: str) -> None:
        self._write(harmless(text))  # As it is; rich would expand tabs and read markup.

    def end(self) -> None:
        self._write("\n")

    def _write(self, text: str) -> None:
        if not self._quiet:
            sys.stdout.write(text)
            sys.stdout.flush()

    def note(self, text: str) -> None:
        self._notes.print(f"[{text}]", style="dim", markup=False)

    def refused(self, error: InputError | BudgetExhausted) -> None:
        if not self._typed:
            raise error
        lines = "\n".join((f"{error.code}: {error.what}", *error.details, error.hint))
        self._notes.print(lines, style="red", markup=False)
