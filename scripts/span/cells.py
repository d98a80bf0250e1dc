"""The cells of the span benchmark: which clients, which update, which attack, and how a claim is scored against the truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from attacks.config import settings_of
from attacks.lenses import Public, lenses
from attacks.prior import Prior, prior_from
from attacks.round_start import RoundStart, round_start, shallow
from attacks.span import Settings as SpanSettings
from attacks.span import span
from attacks.sparse import Lens
from attacks.sums import RecordedSum
from attacks.update_bag import Settings as BagSettings
from attacks.update_bag import bag, distinct, log_odds
from attacks.view import Noise
from scripts.span.lab import How, Lab, Noised, job_of
from securesplit.model.parts import Back, Front, Middle
from securesplit.model.store import load_back, load_front, load_middle

__all__ = ["CELLS", "Cell", "Score", "World", "measure", "paired", "score"]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of a table.

    Attributes:
        table: which one. attack: "span" or "update-bag".
        rank: of the adapters. length: tokens of a record. clients: in the sum. records: of each client.
        how: what a client sends. epochs, batch: its local steps. weights: as in a job. number: the round.
        sigma: deviation of the noise in one client's sum, relative to the clip; for ``clipped``.
        joint: the rounds before are over the same records, and are attacked together with this one.
    """

    table: str
    attack: str
    rank: int
    length: int
    clients: int = 1
    records: int = 1
    how: How = "steps"
    epochs: int = 1
    batch: int = 4
    weights: str | None = None
    number: int = 0
    sigma: float = 0.0
    joint: bool = False

    @property
    def steps(self) -> int:
        """Local steps of AdamW."""
        return self.epochs * -(-self.records // self.batch)


def _cells() -> tuple[Cell, ...]:
    uniform = {"weights": "uniform"}
    return (
        *(Cell("textbook", "span", r, t, how="gradient") for r in (8, 32, 64, 256) for t in (16, 32, 64)),
        *(Cell("textbook clients", "span", r, 16, clients=n, how="gradient") for r in (64, 256) for n in (2, 4, 8)),
        *(Cell("first", "span", r, 32, weights=w) for r in (32, 64, 256) for w in (None, "uniform")),
        *(Cell("first", "span", 64, 32, clients=2, **uniform), Cell("first", "span", 64, 32, epochs=4, **uniform)),
        *(Cell("bag", "update-bag", 8, 32, clients=n) for n in (1, 2, 4, 8)),
        Cell("bag", "update-bag", 64, 32),
        Cell("bag", "update-bag", 8, 32, epochs=4),
        Cell("bag", "update-bag", 8, 32, clients=3, records=4, epochs=3, batch=2),
        Cell("later", "span", 64, 32, number=1, **uniform),
        Cell("later", "span", 64, 32, number=1, how="gradient"),
        *(Cell("later", "update-bag", 8, 32, clients=n, number=1) for n in (1, 4)),
        Cell("later", "update-bag", 8, 32, clients=4, number=1, joint=True),
        *(Cell("noise", "span", 64, 16, how="clipped", sigma=s) for s in (0.0, 1e-4, 1e-3, 1e-2, 3.3)),
        *(Cell("noise", "update-bag", 8, 32, how="clipped", sigma=s) for s in (0.0, 1e-3, 1e-2, 3.3)),
    )


CELLS = _cells()


@dataclass(frozen=True, slots=True)
class Score:
    """One draw of a cell.

    Attributes:
        recall, precision: of the claimed bag, over distinct tokens; precision is 1 where nothing is claimed.
        prior: recall of as many tokens as are claimed (or, for span, as there are) by public text alone.
        positions: share of all positions that the claimed sequences name, sequences paired without replacement.
        claimed, total: distinct tokens. seconds: of the attack, lenses apart.
    """

    recall: float
    precision: float
    prior: float
    positions: float
    claimed: int
    total: int
    seconds: float


@dataclass
class World:
    """What all cells have in common.

    Attributes:
        directory: of the model, with its cut. public, private: (N, 64) chunks of disjoint sources.
        say: told what goes on.
    """

    directory: Path
    public: Tensor
    private: Tensor
    say: Callable[[str], None]
    cut: tuple[int, int] = (2, 2)
    _known: dict[tuple[int, int], list[Lens]] = field(default_factory=dict)

    @cached_property
    def parts(self) -> tuple[Front, Middle, Back]:
        """The public A, B and C; whoever changes one copies it."""
        return load_front(self.directory), load_middle(self.directory), load_back(self.directory)

    @cached_property
    def embedding(self) -> Tensor:
        """(V, E)."""
        found: Tensor = self.parts[0].base.get_input_embeddings().weight.detach()
        return found

    def prior(self, length: int) -> Prior:
        """Of public text, cut at this length."""
        texts = [" ".join(map(str, row[:length].tolist())) for row in self.public]
        return prior_from(texts, lambda text: [int(word) for word in text.split()], len(self.embedding))

    def lab(self, cell: Cell) -> Lab:
        """Fresh clients."""
        job = job_of(
            rank=cell.rank, cut=self.cut, targets=TARGETS, epochs=cell.epochs, batch=cell.batch, weights=cell.weights,
            clients=cell.clients,
        )  # fmt: skip
        front, middle, back = self.parts
        own = shallow(front, Front), shallow(back, Back)
        assert isinstance(own[0], Front)
        assert isinstance(own[1], Back)
        return Lab(own[0], middle, own[1], job)

    def start(self, found: RecordedSum, earlier: Sequence[RecordedSum]) -> RoundStart:
        """As the attacker rebuilds it."""
        return round_start(self.parts[0], self.parts[2], found, earlier)

    def first(self, cell: Cell, lab: Lab, clients: Sequence[Sequence[Sequence[int]]]) -> list[RecordedSum]:
        """What comes before a later round: one sum, over these clients where it is attacked as well, else over other text."""
        if not cell.number:
            return []
        others = [[row[:32].tolist()] for row in self.private[-3:]]
        return [lab.round(clients if cell.joint else others, 0, "steps")]

    def lenses(self, cell: Cell, found: RecordedSum, earlier: Sequence[RecordedSum]) -> list[Lens]:
        """Learnt once for each rank and round: every draw starts alike, but where the rounds before are attacked, too."""
        key = (cell.rank, found.round)
        if key not in self._known or (cell.joint and found.round):
            began, settings = time.perf_counter(), settings_of("update_bag", BagSettings)
            start = self.start(found, earlier)
            assert start.front is not None
            assert start.back is not None
            rows = self.public[:96, : cell.length]
            public = Public(start.front, self.parts[1], start.back, rows, Noise(0.0, None), torch.Generator())
            made = lenses(found, start, public, self.prior(cell.length), self.embedding, settings.regression)
            self._known = {k: v for k, v in self._known.items() if k[1] == 0 and k[0] == cell.rank} | {key: made}
            self.say(
                f"{len(made)} lenses for rank {cell.rank}, round {found.round + 1}: {time.perf_counter() - began:.0f} s"
            )
        return self._known[key]


def measure(world: World, cell: Cell, draw: int) -> Score:
    """One draw: other private text than in any other draw of the cell."""
    lab = world.lab(cell)
    count = cell.clients * cell.records
    rows = [row[: cell.length].tolist() for row in world.private[draw * count : (draw + 1) * count]]
    clients = [rows[i * cell.records : (i + 1) * cell.records] for i in range(cell.clients)]
    earlier = world.first(cell, lab, clients)
    for found in earlier:
        lab.advance(found)
    noise = None
    if cell.how == "clipped":
        clip = 0.1  # Below the norm of every record's gradient that was met: all of them are clipped.
        noise = Noised(clip=clip, sigma=cell.sigma * clip)
    found = lab.round(clients, cell.number, cell.how, noise)
    prior = world.prior(cell.length)
    odds = log_odds(prior, count * cell.length)
    grown: tuple[tuple[int, ...], ...] = ()
    if cell.attack == "span":
        began = time.perf_counter()
        claimed, grown = span(found, world.start(found, earlier), settings_of("dager", SpanSettings))
    else:
        seen = [*earlier, found] if cell.joint else [found]
        through = [(one, world.lenses(cell, one, earlier)) for one in seen]
        began = time.perf_counter()
        claimed = bag(through, odds, distinct(prior, count, cell.length), settings_of("update_bag", BagSettings))
    return score(rows, claimed, grown, odds, seconds=time.perf_counter() - began)


def score(
    rows: Sequence[Sequence[int]],
    claimed: Sequence[int],
    grown: Sequence[Sequence[int]],
    odds: Tensor,
    *,
    seconds: float,
) -> Score:
    """Compare a claim with the truth; every distinct token counts once, and every sequence is used once."""
    truth = {token for row in rows for token in row}
    guess = set(odds.topk(len(claimed) or len(truth)).indices.tolist())
    hits = len(truth & set(claimed))
    return Score(
        recall=hits / len(truth), precision=hits / len(claimed) if claimed else 1.0, prior=len(truth & guess) / len(truth),
        positions=paired(rows, grown), claimed=len(claimed), total=len(truth), seconds=seconds,
    )  # fmt: skip


def paired(rows: Sequence[Sequence[int]], grown: Sequence[Sequence[int]]) -> float:
    """Share of positions named rightly, when each claimed sequence is given to one record, the best pair first.

    As many sequences count as there are records, the closest first: what is claimed besides is noise.
    """
    hits = {
        (i, j): sum(a == b for a, b in zip(row, claim, strict=False))
        for i, row in enumerate(rows)
        for j, claim in enumerate(grown[: len(rows)])
    }
    total = 0
    while hits:
        (i, j), most = max(hits.items(), key=lambda item: item[1])
        total += most
        hits = {(a, b): value for (a, b), value in hits.items() if a != i and b != j}
    return total / sum(map(len, rows))


def mean(scores: Sequence[Score], name: str) -> float:
    """Of one figure over draws."""
    return fmean(getattr(found, name) for found in scores)
