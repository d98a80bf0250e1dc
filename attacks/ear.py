"""A small network that re-reads what the discriminant made of a sequence, with the rows on both sides of each one.

Per row it is given the row and the mean embedding of the discriminant's posterior; a bidirectional GRU turns them into a
correction of the posterior, zero before training, over the discriminant's favourites alone: what was nearly certain stays
so, and what was open is settled by the neighbours, later rows included, which carry traces of earlier tokens. It is trained
by cross-entropy on public rows with the noise on, fresh in several draws, and the epoch is kept that names most held-out
tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from attacks.discriminant import Discriminant
from attacks.rehearsal import Rehearsal, released

__all__ = ["Ear", "EarSettings", "train_ear"]

_BLOCK = 16  # Sequences that are listened to at once, when nothing is learnt.


class EarSettings(BaseModel):
    """Numbers of inverter.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    hidden: Annotated[int, Field(ge=1)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    rate: Annotated[float, Field(gt=0)]
    decay: Annotated[float, Field(ge=0)]
    batch: Annotated[int, Field(ge=1)]
    epochs: Annotated[int, Field(ge=1)]
    draws: Annotated[int, Field(ge=1)]
    candidates: Annotated[int, Field(ge=2)]
    patience: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class _Heard:
    """One draw of released sequences, as the discriminant leaves them.

    Attributes:
        inputs: (N, T, D + E) rows and mean embeddings, each of about unit size.
        ids: (N, T, K) the discriminant's favourites. scores: (N, T, K) their log posteriors.
    """

    inputs: Tensor
    ids: Tensor
    scores: Tensor


class _Network(nn.Module):
    def __init__(self, width: int, embedding: int, settings: EarSettings) -> None:
        super().__init__()
        self.dropout = nn.Dropout(settings.dropout)
        self.gru = nn.GRU(width, settings.hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * settings.hidden, embedding)
        self.sharpness = nn.Parameter(torch.ones(()))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, heard: _Heard, table: Tensor) -> Tensor:
        """(N, T, K) logits; table: (V, E)."""
        wish = self.head(self.dropout(self.gru(heard.inputs)[0]))
        logits: Tensor = heard.scores * self.sharpness + (table[heard.ids] @ wish[..., None])[..., 0]
        return logits


@dataclass(frozen=True, slots=True)
class Ear:
    """A trained network and what it needs.

    Attributes:
        table: (V, E) centred embeddings of about unit size per coordinate.
        scale: rows are divided by it. hits: share of held-out positions named.
    """

    network: _Network
    reader: Discriminant
    table: Tensor
    scale: float
    candidates: int
    hits: float

    def tokens(self, rows: Tensor) -> Tensor:
        """(N, T, D) released rows to (N, T) tokens."""
        found = []
        with torch.inference_mode():
            for part in torch.split(rows, _BLOCK):
                heard = _listen(self.reader, part, self.table, self.scale, self.candidates)
                best = self.network(heard, self.table).argmax(-1, keepdim=True)
                found.append(heard.ids.gather(-1, best)[..., 0])
        return torch.cat(found)


def _listen(reader: Discriminant, rows: Tensor, table: Tensor, scale: float, count: int) -> _Heard:
    """Run the discriminant over released rows, (N, T, D), and keep its favourites."""
    many, length, width = rows.shape
    count = min(count, len(table))
    ids, scores = torch.empty(many, length, count, dtype=torch.long), torch.empty(many, length, count)
    for position in range(length):
        prior = reader.prior(position)
        for start in range(0, many, 128):
            part = slice(start, start + 128)
            score = reader.likelihood(rows[part, position], position).add_(prior)
            top = score.topk(count, dim=1)
            ids[part, position], scores[part, position] = top.indices, top.values - top.values[:, :1]
    mean = torch.empty(many, length, table.shape[1])
    for start in range(0, many, _BLOCK):  # In parts: the favourites' embeddings are many times the rows.
        part = slice(start, start + _BLOCK)
        mean[part] = (scores[part].softmax(-1)[..., None, :] @ table[ids[part]])[..., 0, :]
    # A row many times longer than the others (position 0, a few separators) would drown them in the recurrence.
    small = rows / scale
    small = small * (2 * width**0.5 / small.norm(dim=-1, keepdim=True).clamp_min(1e-6)).clamp_max(1.0)
    return _Heard(torch.cat([small, mean], dim=-1), ids, scores)


def train_ear(
    reader: Discriminant,
    embedding: Tensor,
    train: Rehearsal,
    test: Rehearsal,
    sigma: float,
    settings: EarSettings,
    *,
    steps: float,
    seed: int,
    tick: Callable[[int], None] | None = None,
) -> Ear:
    """Train on public rows.

    Args:
        reader: the discriminant at this noise. embedding: (V, E).
        train, test: public rows, clipped.
        sigma: noise per coordinate, as released.
        settings: sizes and rates. steps: a factor on the epochs, at most 1.
        seed: of weights, order, dropout and simulated noise.
        tick: told the number of epochs done.
    """
    generator = torch.Generator().manual_seed(seed)
    # The inverter may be called by attacks under inference mode; what is trained must not be made there.
    with torch.inference_mode(mode=False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        table = embedding.detach().float().clone()
        table = table - table.mean(0)
        table /= table.square().mean().sqrt().clamp_min(1e-9)
        scale = float((train.rows[:, 1:] if train.rows.shape[1] > 1 else train.rows).square().mean() + sigma**2) ** 0.5
        epochs = max(1, round(settings.epochs * min(1.0, steps)))
        with torch.no_grad():
            draws = [
                _listen(reader, released(train.rows, sigma, generator), table, scale, settings.candidates)
                for _ in range(min(settings.draws, epochs) if sigma else 1)
            ]
            tested = released(test.rows, sigma, generator)
        width = train.rows.shape[2] + table.shape[1]
        ear = Ear(_Network(width, table.shape[1], settings), reader, table, scale, settings.candidates, 0.0)
        hits = _fit(ear, draws, train.tokens, tested, test.tokens, settings, epochs, generator, tick)
    return Ear(ear.network.eval(), reader, table, scale, settings.candidates, hits)


def _fit(
    ear: Ear,
    draws: list[_Heard],
    tokens: Tensor,
    tested: Tensor,
    truth: Tensor,
    settings: EarSettings,
    epochs: int,
    generator: torch.Generator,
    tick: Callable[[int], None] | None,
) -> float:
    """Train, stop when the held-out hits have not risen for a while, and put the best epoch's weights back."""
    network = ear.network
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.rate, weight_decay=settings.decay)
    heard = _listen(ear.reader, tested, ear.table, ear.scale, settings.candidates)
    best, since, kept = -1.0, 0, copy.deepcopy(network.state_dict())
    with torch.enable_grad():
        for epoch in range(epochs):
            network.train()
            draw = draws[epoch % len(draws)]
            for chosen in torch.split(torch.randperm(len(tokens), generator=generator), settings.batch):
                part = _Heard(draw.inputs[chosen], draw.ids[chosen], draw.scores[chosen])
                right = part.ids == tokens[chosen][..., None]
                logits = network(part, ear.table)
                # Where the token is not among the favourites there is nothing to learn.
                there = right.any(-1)
                if not bool(there.any()):
                    continue
                loss = nn.functional.cross_entropy(logits[there], right[there].long().argmax(-1))
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            network.eval()
            with torch.no_grad():
                choice = network(heard, ear.table).argmax(-1, keepdim=True)
            hits = float((heard.ids.gather(-1, choice)[..., 0] == truth).double().mean())
            since += 1
            if hits > best:
                best, since, kept = hits, 0, copy.deepcopy(network.state_dict())
            if tick is not None:
                tick(epoch + 1)
            if since >= settings.patience:
                break
    network.load_state_dict(kept)
    return best
