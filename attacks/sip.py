"""BiSR's semi-white-box inverter (SIP): a small GRU, trained through the public partition A to name each row's token.

It is here as the published yardstick that our own inverter must not fall below, with the original's sizes and rates. It
reads left to right, and learns a token's row only from the places where the text holds that token.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.exchange import Recovered
from attacks.knowledge import Knowledge
from attacks.rehearsal import Rehearsal, rehearse, released, windows
from attacks.threat import Threat
from attacks.view import ServerView, batches

__all__ = ["ATTACKS", "Settings", "Sip", "train_sip"]

_BLOCK = 16  # Sequences read at once when nothing is learnt.


class Settings(BaseModel):
    """The original's numbers; bisr_sip.toml says where they stand in its code."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    hidden: Annotated[int, Field(ge=1)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    rate: Annotated[float, Field(gt=0)]
    decay: Annotated[float, Field(ge=0)]
    batch: Annotated[int, Field(ge=1)]
    epochs: Annotated[int, Field(ge=1)]


class _Gru(nn.Module):
    """(B, T, D) rows to (B, T, classes) logits."""

    def __init__(self, width: int, classes: int, settings: Settings) -> None:
        super().__init__()
        self.gru = nn.GRU(width, settings.hidden, batch_first=True)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(settings.hidden, classes)

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.gru(rows)[0]))
        return logits


@dataclass(frozen=True, slots=True)
class Sip:
    """A trained inverter.

    Attributes:
        network: the GRU and its head.
        classes: (C,) the token of each output.
        hits: share of held-out positions that its best checkpoint named, with the noise on.
        epochs: how many were trained.
    """

    network: nn.Module
    classes: Tensor
    hits: float
    epochs: int

    def tokens(self, rows: Tensor) -> Tensor:
        """(N, T, D) released rows to (N, T) tokens."""
        with torch.inference_mode():
            parts = [self.network(part).argmax(-1) for part in torch.split(rows, _BLOCK)]
        return self.classes[torch.cat(parts)]


def train_sip(
    train: Rehearsal, test: Rehearsal, sigma: float, settings: Settings, *, epochs: int, seed: int,
    tick: Callable[[int], None] | None = None,
) -> Sip:  # fmt: skip
    """Train on public rows with fresh noise in every epoch, and keep the epoch that names most held-out tokens.

    Args:
        train, test: public rows, clipped.
        sigma: noise per coordinate, as released.
        settings: the original's.
        epochs: how many; the original's number or a part of it.
        seed: of initial weights, order, dropout and simulated noise.
        tick: told the number of epochs done.
    """
    classes = torch.unique(train.tokens)
    place = torch.zeros(int(classes.max()) + 1, dtype=torch.long)
    place[classes] = torch.arange(len(classes))
    generator = torch.Generator().manual_seed(seed)
    # Layers draw their first weights, and dropout its masks, from torch's own generator: a fork leaves the caller's alone.
    with torch.inference_mode(mode=False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Gru(train.rows.shape[2], len(classes), settings)
        optimiser = torch.optim.Adam(network.parameters(), lr=settings.rate, weight_decay=settings.decay)
        tested = released(test.rows, sigma, generator)
        best, kept = -1.0, copy.deepcopy(network.state_dict())
        for epoch in range(epochs):
            network.train()
            for chosen in torch.split(torch.randperm(len(train.tokens), generator=generator), settings.batch):
                logits = network(released(train.rows[chosen], sigma, generator))
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), place[train.tokens[chosen]].flatten())
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            network.eval()
            hits = float((Sip(network, classes, 0.0, epoch).tokens(tested) == test.tokens).double().mean())
            if hits > best:
                best, kept = hits, copy.deepcopy(network.state_dict())
            if tick is not None:
                tick(epoch + 1)
        network.load_state_dict(kept)
    return Sip(network=network.eval(), classes=classes, hits=best, epochs=epochs)


def _blocked(view: ServerView, threat: Threat) -> str | None:
    if threat.text == "none":
        return "it learns from public text, and the threat model grants none"
    return None if view.sightings else "the recording holds none of the wanted sequences"


def _run(view: ServerView, known: Knowledge, tick: Tick) -> Recovered:
    start = time.perf_counter()
    settings = settings_of("bisr_sip", Settings)
    epochs = max(1, min(settings.epochs, round(settings.epochs * known.profile.steps)))
    generator = torch.Generator().manual_seed(known.seed)
    public = windows(known.prior, known.profile.rows, known.length, generator)
    train, test = rehearse(known.model.front, public, view.noise)
    sip = train_sip(
        train, test, view.noise.sigma, settings, epochs=epochs, seed=known.seed, tick=lambda done: tick(done, epochs)
    )
    found: dict[int, tuple[int, ...]] = {}
    for indices, rows in batches(view, linked=False):
        found.update(zip(indices, map(tuple, sip.tokens(rows).tolist()), strict=True))
    return Recovered(
        attack="bisr-sip", keys=tuple(seen.key for seen in view.sightings),
        tokens=tuple(found[i] for i in range(len(view.sightings))), seconds=time.perf_counter() - start,
    )  # fmt: skip


ATTACKS = (Attack("bisr-sip", _blocked, _run),)
