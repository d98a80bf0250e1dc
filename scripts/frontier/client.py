"""The client-only model: what a client reaches with its own layers and public text, without any server."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

_SAMPLED = 4096  # Rows outside the public text that stand for all such rows in one step.


def pruned(model: Any, layers: Sequence[int]) -> Any:
    """A copy of the model with these decoder layers alone."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    small = type(model)(config)
    state = model.state_dict()
    chosen = {}
    for name in small.state_dict():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(layers[int(parts[2])])
        chosen[name] = state[".".join(parts)].clone()
    small.load_state_dict(chosen)
    return small


def with_sentinel(tokens: Tensor, sentinel: int) -> Tensor:
    """(N, T) to (N, T + 1): the public sentinel first."""
    return torch.cat([torch.full((len(tokens), 1), sentinel), tokens], dim=1)


class _Head:
    """The cross-entropy against the frozen embedding, normalised over a part of the vocabulary.

    A step normalises over the rows that public text uses and a random sample of the others, weighted up to stand for
    all of them; over the whole vocabulary it would take thrice as long. The embedding stays frozen because training it
    on 100 000 tokens only memorises them: held-out public text had 6.36 nats after 300 such steps, 6.04 after 250 of these.
    """

    def __init__(self, table: Tensor, used: Tensor) -> None:
        self.index = torch.full((len(table),), -1)
        self.index[used] = torch.arange(len(used))
        others = torch.ones(len(table), dtype=torch.bool)
        others[used] = False
        self.rows, self.others = table[used].bfloat16(), table[others].bfloat16()

    def loss(self, hidden: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Mean cross-entropy of hidden states (M, D) against token ids (M,) that are all among the used ones."""
        some = torch.randperm(len(self.others), generator=generator)[:_SAMPLED]
        weight = math.log(len(self.others) / len(some))
        hidden = hidden.bfloat16()
        logits = torch.cat([hidden @ self.rows.T, hidden @ self.others[some].T + weight], dim=-1)
        return functional.cross_entropy(logits.float(), self.index[target])


def train_client(
    model: Any,
    chunks: Tensor,
    *,
    seed: int,
    sentinel: int,
    layers: Sequence[int],
    steps: int,
    batch: int,
    rate: float,
    progress: Callable[[int, float], None],
) -> Any:
    """Train the pruned model on public chunks; bfloat16 products, float32 weights, AdamW, cosine schedule.

    Args:
        model: the whole pretrained model; not changed.
        chunks: (S, T) public token ids.
        seed: order of the batches.
        sentinel: public first token.
        layers: which decoder layers the client has.
        steps, batch, rate: sequences a step, and the peak learning rate.
        progress: told of the step and its loss.
    """
    small = pruned(model, layers)
    table = small.get_input_embeddings().weight.detach()
    used = torch.unique(with_sentinel(chunks, sentinel))
    head = _Head(table, used)
    small.get_input_embeddings().weight.requires_grad_(requires_grad=False)
    trained = [p for p in small.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(seed)  # Which public batch comes when is no secret.
    small.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 30) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        ids = with_sentinel(chunks[torch.randint(len(chunks), (batch,), generator=generator)], sentinel)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = small.model(ids, use_cache=False).last_hidden_state[:, :-1]
            loss = head.loss(hidden.flatten(0, 1), ids[:, 1:].flatten(), generator)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(step, float(loss.detach()))
    return small.eval()


def cached_client(file: Path, model: Any, layers: Sequence[int], train: Callable[[], Any]) -> Any:
    """The trained client from its safetensors file, or trained now and written there."""
    if not file.exists():
        small = train()
        part = file.with_suffix(".part")
        save_file(
            {name: tensor.contiguous() for name, tensor in small.state_dict().items() if name != "lm_head.weight"}, part
        )
        part.replace(file)
        return small
    small = pruned(model, layers)
    small.load_state_dict(load_file(file), strict=False)
    small.tie_weights()
    return small.eval()
