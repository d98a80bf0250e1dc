"""What needs no defence: the model without noise, the client without a server, and what one can name without looking."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scripts.defences.attacker import expectations
from scripts.defences.cells import Bench
from scripts.defences.utility import opening, sequence_losses
from scripts.defences.world import SENTINEL, with_sentinel
from scripts.frontier.client import cached_client, train_client

CLIENT_LAYERS = (0, 1, 2, 29)  # Of the client-only model, chosen on public text by scripts/bench-frontier.


@dataclass(frozen=True, slots=True)
class References:
    """Lists run over sequences, seed after seed.

    Attributes:
        noiseless, client: losses in nats per token, of the split without noise and of the client-only model.
        unigram: tokens named by always saying the commonest public one.
        told: by the language model after the true prefix. alone: by the language model from the sentinel on.
        of: tokens of a sequence.
    """

    noiseless: list[float]
    client: list[float]
    unigram: list[int]
    told: list[int]
    alone: list[int]
    of: int


def references(bench: Bench, client_steps: int) -> References:
    """Measure them on the private text; the client-only model is trained on public text, once."""
    world, tokens = bench.world, bench.texts.test.flatten(0, 1)
    noiseless = sequence_losses(world, opening(world.front), bench.states("test", len(tokens)), tokens)
    client = _client(bench, client_steps)
    told, alone = expectations(world, tokens)
    common = int(world.log_unigram.argmax())
    return References(
        [round(float(v), 5) for v in noiseless],
        [round(float(v), 5) for v in _losses(client, tokens)],
        (tokens == common).sum(1).tolist(),
        (told == tokens).sum(1).tolist(),
        (alone == tokens).sum(1).tolist(),
        tokens.shape[1],
    )


def _client(bench: Bench, steps: int) -> Any:
    train = bench.texts.train
    digest = hashlib.sha256(train.numpy().tobytes() + repr((CLIENT_LAYERS, steps)).encode()).hexdigest()[:16]
    start = time.time()

    def progress(step: int, loss: float) -> None:
        if step % 50 == 49:
            bench.say(f"client-only step {step + 1}, loss {loss:.2f}, {time.time() - start:.0f} s")

    def make() -> Any:
        whole = bench.world.whole.float()  # The trainer keeps weights in float32.
        try:
            return train_client(
                whole, train, seed=0, sentinel=SENTINEL, layers=CLIENT_LAYERS, steps=steps, batch=12, rate=1e-3,
                progress=progress,
            )  # fmt: skip
        finally:
            bench.world.whole.to(torch.bfloat16)

    small = cached_client(bench.work / f"client-{digest}.safetensors", bench.world.whole, CLIENT_LAYERS, make)
    return small.to(torch.bfloat16)


@torch.inference_mode()
def _losses(model: Any, tokens: Tensor) -> Tensor:
    """(N,) mean loss of tokens 1.., as :func:`scripts.defences.utility.token_losses` counts them."""
    out = []
    for part in torch.split(tokens, 24):
        logits = model(with_sentinel(part)).logits[:, 1:-1].float()
        flat = functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        out.append(flat.view(len(part), -1).mean(1))
    return torch.cat(out)
