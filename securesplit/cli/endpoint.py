"""``securesplit endpoint``: OpenAI's HTTP interface on this machine's loopback, for programs that speak it already."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securesplit.cli.connection import Adapters, Cache, Code, Evidence, Keys, Model, Policy, Server, connection
from securesplit.cli.decoding import EachTurnAlone, MaxNewTokens, MinP, Penalty, Stop, Temperature, TopK, TopP
from securesplit.cli.output import Output, show
from securesplit.cli.passphrase import KeyPassFd, KeyPassFile
from securesplit.cli.policy_sign import Trusted

if TYPE_CHECKING:
    from securesplit.client.endpoint.run import Ready


def endpoint(
    policy: Policy,
    keys: Keys,
    server: Server,
    listen: Annotated[str, typer.Option(help="HOST:PORT of the loopback; port 0 picks a free one.")] = "127.0.0.1:8080",
    token_file: Annotated[
        Path | None, typer.Option(help="Write the token of this start there, mode 0600, instead of printing it.")
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    count_each_turn_alone: EachTurnAlone = False,
    unsafe_listen_beyond_this_machine: Annotated[
        bool,
        typer.Option(
            "--unsafe-listen-beyond-this-machine", help="Allow other addresses. Private text then crosses in the clear."
        ),
    ] = False,
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
    """Serve /v1/models, /v1/chat/completions and /v1/completions until interrupted.

    Sampling options hold where a request does not say. With --output json the one object is printed when it listens.
    """
    site = connection(
        policy, keys, server, policy_key, (key_pass_file, key_pass_fd), model=model, cache=cache, code=code, evidence=evidence,
        adapters=adapters,
    )  # fmt: skip

    from securesplit.client.chat.toll import Toll
    from securesplit.client.endpoint.asked import Defaults
    from securesplit.client.endpoint.run import run_endpoint
    from securesplit.client.sampling import Sampling
    from securesplit.server.serve import split_listen

    host, port = split_listen(listen)
    sampling = Sampling(temperature, 0, top_k, top_p, min_p, repetition_penalty, tuple(stop or ()))
    run_endpoint(
        site.open,
        host,
        port,
        defaults=Defaults(max_new_tokens, sampling),
        toll=Toll(count_each_turn_alone),
        ready=functools.partial(_ready, output, token_file),
        stop=lambda: False,
        beyond=unsafe_listen_beyond_this_machine,
    )


def _ready(output: str, token_file: Path | None, ready: Ready) -> None:
    value: dict[str, object] = {"url": ready.url, "model": ready.model}
    if token_file is None:
        where = f"token {ready.token}"
        value["token"] = ready.token
    else:
        from securesplit.pki.files import write_atomically

        write_atomically(token_file, ready.token.encode() + b"\n", mode=0o600)
        where = f"token in {token_file}"
        value["token_file"] = str(token_file)
    show(output, f"{ready.url}, model {ready.model}, {where}", value)
