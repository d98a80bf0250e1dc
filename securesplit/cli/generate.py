"""``securesplit generate``: continue prompts through the split; sampling happens on the client."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from securesplit.cli.claims import claimed
from securesplit.cli.connection import Adapters, Cache, Code, Evidence, Keys, Model, Policy, Server, connection
from securesplit.cli.decoding import MaxNewTokens, MinP, Penalty, Seed, Stop, Temperature, TopK, TopP
from securesplit.cli.output import Output, harmless, show
from securesplit.cli.passphrase import KeyPassFd, KeyPassFile
from securesplit.cli.policy_sign import Trusted
from securesplit.errors import InputError

if TYPE_CHECKING:
    from securesplit.client.client import Client
    from securesplit.client.generate import Generated
    from securesplit.client.sampling import Sampling


def generate(
    policy: Policy,
    keys: Keys,
    server: Server,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to continue; several are continued side by side. Other users of this machine can list a program's "
            "arguments."
        ),
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(help="Private text to continue: a whole file, or - for stdin; may be repeated."),
    ] = None,
    max_new_tokens: MaxNewTokens = 32,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
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
    """Continue prompts. Each prompt and each fed-back token are releases under the policy, and charged."""
    if not prompt and not prompt_file:
        raise typer.BadParameter("give --prompt or --prompt-file")
    if stream and (len(prompt or ()) + len(prompt_file or ()) > 1 or output == "json"):
        raise typer.BadParameter("--stream prints one text as it comes, and no JSON")
    prompts = (*(prompt or ()), *map(_read, prompt_file or ()))
    site = connection(
        policy, keys, server, policy_key, (key_pass_file, key_pass_fd), model=model, cache=cache, code=code, evidence=evidence,
        adapters=adapters,
    )  # fmt: skip

    from securesplit.client.sampling import Sampling

    sampling = Sampling(temperature, seed, top_k, top_p, min_p, repetition_penalty, tuple(stop or ()))
    with site.open() as client:
        if stream:
            _print_as_it_comes(client, prompts[0], max_new_tokens, sampling)
            return
        made = client.generate_batch(prompts, max_new_tokens=max_new_tokens, sampling=sampling)
        meaning = claimed(client.policy)
    show(output, harmless(_lines(made)), {**_values(made), **meaning})


def _read(path: Path) -> str:
    """A prompt from a file, without the line end that an editor puts behind it.

    Raises:
        InputError: SS-1001 for what is no text. OSError: when it cannot be read.
    """
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise InputError("SS-1001", f"{path} is no UTF-8", hint="Convert it first.") from None


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


def _values(made: tuple[Generated, ...]) -> dict[str, Any]:
    """The first prompt's, and all of them where there are several."""
    several = {"completions": [_completion(one) for one in made]} if len(made) > 1 else {}
    return {**_completion(made[0]), **several}


def _completion(one: Generated) -> dict[str, Any]:
    return {
        "text": one.text, "tokens": len(one.tokens), "epsilon": one.epsilon, "finish": one.finish,
        "prompt_tokens": one.prompt_tokens,
    }  # fmt: skip
