"""Which tokens were trained on, from what AdamW made of them: lenses learnt on public text, and sparse Bayesian learning.

AdamW leaves little more than signs of a gradient, and several steps, several records and several clients are added up: too
much for a span check, and still a sum of few known directions. This attack

1. rebuilds the round's start from public facts, and runs public sequences through it, with the policy's noise at the cut;
2. learns for each adapter what direction a token leaves there, and what stays unexplained (attacks/lenses.py);
3. asks which few tokens explain the rows of all adapters, and of all rounds of the same clients, together (attacks/sparse.py);
4. adds that gain in likelihood to the odds that public text gives, and claims as many tokens as a text of that length has.

Where an update says nothing the odds decide, and the answer is the prior's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.exchange import Bagged
from attacks.knowledge import Knowledge
from attacks.lenses import Public, Regression, lenses
from attacks.prior import Prior
from attacks.round_start import round_start
from attacks.span import usable
from attacks.sparse import Effort, Lens, explain
from attacks.sums import RecordedSum
from attacks.threat import Threat
from attacks.view import ServerView

__all__ = ["ATTACKS", "Settings", "bag", "distinct", "log_odds", "records_in"]


class Settings(BaseModel):
    """Numbers of configs/update_bag.toml, which explains each."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    rounds: Annotated[int, Field(ge=1)]
    rows: Annotated[int, Field(ge=64)]
    ridge: Annotated[float, Field(gt=0)]
    explained: Annotated[float, Field(ge=0, lt=1)]
    widest: Annotated[int, Field(ge=8)]
    temperature: Annotated[float, Field(gt=0)]
    effort: Effort

    @property
    def regression(self) -> Regression:
        """How lenses are learnt."""
        return Regression(self.ridge, self.explained, self.widest)


def log_odds(prior: Prior, positions: int) -> Tensor:
    """(V,) natural logarithm of the odds that a token occurs at all among so many positions of public text."""
    probability = prior.log_probability.double().exp()
    absent = positions * torch.log1p(-probability.clamp(max=1 - 1e-12))
    return (torch.log(-torch.expm1(absent)) - absent).float()


def bag(
    seen: Sequence[tuple[RecordedSum, Sequence[Lens]]], odds: Tensor, claimed: int, settings: Settings
) -> tuple[int, ...]:
    """The tokens that are claimed for one text, most certain first.

    Args:
        seen: the sums that the text is in, each with its lenses: clients train on the same records in every round.
        odds: of :func:`log_odds`.
        claimed: how many tokens to name.
        settings: of the attack.
    """
    through: list[Lens] = []
    tensors: list[Tensor] = []
    for found, made in seen:
        held = dict(zip(found.names, map(torch.from_numpy, found.tensors), strict=True))
        through += made
        tensors += [held[lens.name] for lens in made]
    gain = explain(through, tensors, odds, settings.effort)
    return tuple((gain / settings.temperature + odds).topk(min(claimed, len(odds))).indices.tolist())


def records_in(found: RecordedSum, view: ServerView) -> int:
    """How many records a sum is over, as far as the server can tell: by its weight, or by what its clients sent."""
    if found.job.sums.weights != "uniform" and found.sent == "steps":
        return found.weight
    passes = found.job.schedule.rounds * found.job.schedule.epochs
    sent = sum(passage.key.peer in found.peers for passage in view.traffic)
    return max(len(found.peers), sent // passes)


def distinct(prior: Prior, records: int, length: int) -> int:
    """How many different tokens so many public texts of this length have together; or a guess without public text."""
    cut = [text[:length] for text in prior.texts[:records]]
    held = sum(map(len, cut))
    if not held:
        return records * length
    kinds = len({token for text in cut for token in text})
    return max(1, round(kinds * records * length / held)) if held < records * length else kinds


def _blocked(view: ServerView, _: Threat) -> str | None:
    if not usable(view):
        return "the recording holds no secure sum that the server could open"
    return "labels are classes there, not tokens" if view.classes else None


def _run(view: ServerView, known: Knowledge, tick: Tick) -> Bagged:
    began, settings = time.perf_counter(), settings_of("update_bag", Settings)
    groups: dict[tuple[str, ...], list[RecordedSum]] = {}
    for found in usable(view):
        groups.setdefault(found.peers, []).append(found)
    groups = {peers: sums[: settings.rounds] for peers, sums in groups.items()}
    seen: list[RecordedSum] = []
    total = sum(map(len, groups.values()))
    answers: dict[tuple[str, ...], tuple[int, ...]] = {}
    for peers, sums in groups.items():
        learnt = []
        for found in sums:
            learnt.append((found, _learn(found, view, known, settings)))
            tick(len(seen) + len(learnt), total)
        records = records_in(sums[0], view)
        odds = log_odds(known.prior, records * known.length)
        answers[peers] = bag(learnt, odds, distinct(known.prior, records, known.length), settings)
        seen += sums
    return Bagged(
        attack="update-bag", rounds=tuple(s.round for s in seen), peers=tuple(s.peers for s in seen),
        bags=tuple(answers[s.peers] for s in seen), sequences=((),) * len(seen), seconds=time.perf_counter() - began,
    )  # fmt: skip


def _learn(found: RecordedSum, view: ServerView, known: Knowledge, settings: Settings) -> list[Lens]:
    model = known.model
    back = model.back() if model.back is not None else None
    start, public = round_start(model.front, back, found, usable(view)), None
    if start.front is not None and start.back is not None and model.middle is not None:
        wanted = max(2, round(settings.rows * min(1.0, known.profile.steps) / known.length))
        generator = torch.Generator().manual_seed(known.seed)
        public = Public(start.front, model.middle(), start.back, known.public[:wanted], known.noise, generator)
    return lenses(found, start, public, known.prior, model.embedding, settings.regression)


ATTACKS = (Attack("update-bag", _blocked, _run),)
