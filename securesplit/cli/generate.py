"""``securesplit generate``: continue a prompt through the split; sampling happens on the client."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from securesplit.cli.output import Cache, Code, Evidence, Keys, Model, Output, Policy, cache_or_default, show
from securesplit.cli.passphrase import KeyPassFd, KeyPassFile, existing
from securesplit.cli.policy_sign import Trusted, trusted_policy


def generate(
    policy: Policy,
    keys: Keys,
    server: Annotated[str, typer.Option(help="wss://host:port")],
    prompt: Annotated[str, typer.Option(help="Private text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 32,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
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
    """Continue a prompt. The prompt and each fed-back token are releases under the policy, and charged."""
    secret = existing("the client's key", key_pass_file, key_pass_fd)
    rules = trusted_policy(policy, policy_key, keys, "client", passphrase=secret)

    from securesplit.client.run import open_client
    from securesplit.client.sampling import Sampling

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
        made = client.generate(prompt, max_new_tokens=max_new_tokens, sampling=Sampling(temperature, seed))
    show(
        output,
        made.text,
        {
            "text": made.text,
            "tokens": len(made.tokens),
            "epsilon": made.epsilon,
            "delta": made.delta,
            "unit": "sequence",
            "relation": "replace-one",
        },
    )
