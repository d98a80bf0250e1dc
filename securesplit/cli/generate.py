"""``securesplit generate``: continue prompts through the split; sampling happens on the client."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from securesplit.cli.output import Cache, Code, Evidence, Keys, Model, Output, Policy, cache_or_default, harmless, show
from securesplit.cli.passphrase import KeyPassFd, KeyPassFile, existing
from securesplit.cli.policy_sign import Trusted, trusted_policy

if TYPE_CHECKING:
    from securesplit.client.client import Client
    from securesplit.client.generate import Generated
    from securesplit.client.sampling import Sampling


def generate(
    policy: Policy,
    keys: Keys,
    server: Annotated[str, typer.Option(help="wss://host:port")],
    prompt: Annotated[list[str], typer.Option(help="Private text to continue; several are continued side by side.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 32,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens.")] = None,
    top_p: Annotated[
        float, typer.Option(help="Draw from the fewest tokens that have this probability together.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Draw from tokens with at least this share of the largest probability.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, what was there before is less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the generation; may be repeated.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    adapters: Annotated[Path | None, typer.Option(help="A training run's output directory, for its adapters.")] = None,
    model: Model = None,
    cache: Cache = None,
    code: Code = None,
    evidence: Evidence = None,
    policy_key: Trusted = None,
    key_pass_file: KeyPassFile = None,
    key_pass_fd: KeyPassFd = None,
    output: Output = "text",
) -> None:
    """Continue prompts. Each prompt and each fed-back token are releases under the policy, and charged."""
    if stream and (len(prompt) > 1 or output == "json"):
        raise typer.BadParameter("--stream prints one text as it comes, and no JSON")
    secret = existing("the client's key", key_pass_file, key_pass_fd)
    rules = trusted_policy(policy, policy_key, keys, "client", passphrase=secret)

    from securesplit.client.run import open_client
    from securesplit.client.sampling import Sampling

    sampling = Sampling(temperature, seed, top_k, top_p, min_p, repetition_penalty, tuple(stop or ()))
    with open_client(
        rules,
        keys,
        server,
        model=model,
        cache=cache_or_default(cache),
        adapters=adapters,
        code=code,
        evidence=evidence,
        passphrase=secret,
    ) as client:
        if stream:
            _print_as_it_comes(client, prompt[0], max_new_tokens, sampling)
            return
        made = client.generate_batch(prompt, max_new_tokens=max_new_tokens, sampling=sampling)
        unit = getattr(client.policy.privacy, "unit", "sequence")
    show(output, harmless(_lines(made)), _values(made, unit))


def _print_as_it_comes(client: Client, prompt: str, max_new_tokens: int, sampling: Sampling) -> None:
    for piece in client.stream(prompt, max_new_tokens=max_new_tokens, sampling=sampling):
        sys.stdout.write(harmless(piece.text))
        sys.stdout.flush()
    sys.stdout.write("\n")


def _lines(made: tuple[Generated, ...]) -> str:
    """The text; of several, each under its number."""
    if len(made) == 1:
        return made[0].text
    return "\n".join(f"[{number}] {one.text}" for number, one in enumerate(made, 1))


def _values(made: tuple[Generated, ...], unit: str) -> dict[str, Any]:
    """The first prompt's, and all of them where there are several; claims are about the policy's unit."""
    first = made[0]
    several = {"completions": [_completion(one) for one in made]} if len(made) > 1 else {}
    claim = {"delta": first.delta, "unit": unit, "relation": "replace-one"}
    return {**_completion(first), **claim, **several}


def _completion(one: Generated) -> dict[str, Any]:
    return {
        "text": one.text, "tokens": len(one.tokens), "epsilon": one.epsilon, "finish": one.finish,
        "prompt_tokens": one.prompt_tokens,
    }  # fmt: skip
