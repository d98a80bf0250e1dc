"""beam-lm: the noise-aware decoder with a language model as its prior, and how it chooses among its own answers.

Which answer names the most tokens depends on the noise: the best hypothesis while the rows say much, the marginals when
they say little. The attacker finds out without the victims: on public sequences, with noise of the same law put on.
"""

from __future__ import annotations

import time

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.config import Part, settings_of
from attacks.exchange import Recovered
from attacks.knowledge import Knowledge
from attacks.language import Reader
from attacks.particles import Breadth, search
from attacks.prior import public_sequences
from attacks.refine import Effort, refine
from attacks.ridge import hidden_of
from attacks.shortlist import proposals
from attacks.threat import Threat
from attacks.view import Noise, ServerView, batches
from attacks.vocabulary import Scoring, decode
from securesplit.model.bayes import Prior

__all__ = ["ATTACKS", "RULES", "Settings", "answers", "best_rule"]

# Earlier ones win ties.
RULES = ("refined", "best", "marginal", "greedy")
_AT_ONCE = 16  # Sequences: a table of priors holds so many times the hypotheses times the vocabulary.


class Settings(BaseModel):
    """configs/beamclean.toml explains each number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    hypotheses: int = Field(ge=1)
    language: int = Field(ge=1)
    narrow: int = Field(ge=1)
    share: Part
    shortlist: int = Field(ge=1)
    sweeps: int = Field(ge=0)
    window: int = Field(ge=0)
    spoken: int = Field(ge=0)
    margin: float = Field(ge=0)
    validation: int = Field(ge=1)


def _reader(known: Knowledge, settings: Settings, count: int) -> Reader:
    whole = known.model.whole() if known.model.whole is not None else None
    with torch.inference_mode():
        return Reader(whole, known.model.sentinel, Prior(known.prior.log_probability, settings.share), count)


def answers(
    known: Knowledge, rows: Tensor, noise: Noise, settings: Settings, *, codec: str, releases: int = 1
) -> dict[str, Tensor]:
    """Every rule's answer for sequences of one length.

    Args:
        known: public knowledge.
        rows: (N, T, D), as received, or the means of releases.
        noise: that is left in the rows; sigma above 0.
        settings: of the family.
        codec: how the rows crossed.
        releases: of how many releases the rows are the mean.

    Returns:
        (N, T) tokens by each of ``RULES``.
    """
    many = known.profile.candidates
    scoring = Scoring(
        sigma=noise.sigma, layer=known.layer, log_prior=known.prior.log_probability,
        favourites=known.prior.favourites[:many], codec=codec, releases=releases,
    )  # fmt: skip
    breadth = Breadth(
        hypotheses=settings.hypotheses, inverter=min(many, known.vocabulary),
        language=min(settings.language, known.vocabulary), favourites=many, narrow=settings.narrow,
        shortlist=settings.shortlist,
    )  # fmt: skip
    front, propose = known.model.front, proposals(known, noise.sigma)
    greedy = decode(
        front, rows, propose, scoring, known.search, vocabulary=known.vocabulary, budget=known.profile.budget,
        candidates=many, estimate=known.inverter.estimate,
    ).tokens  # fmt: skip
    found = search(
        front, _reader(known, settings, len(rows) * settings.hypotheses), rows, propose, scoring, breadth, hints=greedy,
        generator=torch.Generator().manual_seed(known.seed),
    )  # fmt: skip
    effort = Effort(settings.sweeps, settings.window, settings.spoken, settings.margin)
    tried = torch.cat([greedy[..., None], found.shortlist], dim=2)
    refined = refine(front, _reader(known, settings, len(rows)), rows, found.best, tried, scoring, effort)
    return {"refined": refined, "best": found.best, "marginal": found.marginal, "greedy": greedy}


def best_rule(known: Knowledge, length: int, noise: Noise, settings: Settings, *, codec: str, releases: int = 1) -> str:
    """The rule that names the most tokens of public sequences with simulated noise (a seeded generator: no release).

    Without public text the language model writes the sequences itself.
    """
    generator = torch.Generator().manual_seed(known.seed + 1)
    tokens = _public(known, settings, length, generator)
    hidden = hidden_of(known.model.front, tokens)
    norms = hidden.flatten(1).norm(dim=1)[:, None, None]
    factor = torch.ones_like(norms) if noise.clip is None else (noise.clip / norms).clamp_max(1)
    rows = factor * hidden + noise.sigma * torch.randn(hidden.shape, generator=generator)
    # The codec of a mean of releases is far finer than its noise, and rounds nothing here.
    found = answers(known, rows, noise, settings, codec=codec, releases=releases)
    hits = {rule: int((found[rule] == tokens).sum()) for rule in RULES}
    return max(RULES, key=lambda rule: hits[rule])


def _public(known: Knowledge, settings: Settings, length: int, generator: torch.Generator) -> Tensor:
    """(validation, length) tokens, without the random sequences that inverters are fitted on besides."""
    count = settings.validation
    if known.prior.informed:
        drawn = public_sequences(known.prior, 2 * count * length, length, generator=generator)
        return drawn[[row for row in range(len(drawn)) if row % 3][:count]]
    reader, written = _reader(known, settings, count), []
    with torch.inference_mode():
        for _ in range(length):
            written.append(torch.multinomial(reader.next.exp(), 1, generator=generator)[:, 0])
            reader.read(written[-1])
    return torch.stack(written, dim=1)


def _run(name: str, view: ServerView, known: Knowledge, tick: Tick) -> Recovered:
    start, settings = time.perf_counter(), settings_of("beamclean", Settings)
    linked = name == "averaged-beam"
    groups = [
        (part, rows[begin : begin + _AT_ONCE])
        for indices, rows in batches(view, linked=linked)
        for begin in range(0, len(indices), _AT_ONCE)
        for part in [indices[begin : begin + _AT_ONCE]]
    ]
    total = sum(rows.shape[0] * rows.shape[1] for _, rows in groups)
    done, rules = 0, dict[tuple[int, int], str]()
    tokens: dict[int, tuple[int, ...]] = {}
    for indices, rows in groups:
        releases = view.sightings[indices[0]].releases if linked else 1
        noise, case = view.noise.averaged(releases), (rows.shape[1], releases)
        if case not in rules:
            rules[case] = best_rule(known, rows.shape[1], noise, settings, codec=view.codec, releases=releases)
        found = answers(known, rows, noise, settings, codec=view.codec, releases=releases)[rules[case]]
        tokens.update(zip(indices, map(tuple, found.tolist()), strict=True))
        tick(done := done + found.numel(), total)
    return Recovered(
        attack=name, keys=tuple(seen.key for seen in view.sightings),
        tokens=tuple(tokens[i] for i in range(len(view.sightings))), seconds=time.perf_counter() - start,
    )  # fmt: skip


def _noised(view: ServerView, threat: Threat) -> str | None:
    del threat
    if not view.sightings:
        return "the recording holds none of the wanted sequences"
    return (
        None if view.noise.sigma else "there is no noise: the nearest neighbour proves its tokens, and needs no prior"
    )


def _repeated(view: ServerView, threat: Threat) -> str | None:
    if threat.releases < 2:
        return "the threat model grants one release"
    if not any(seen.releases > 1 for seen in view.sightings):
        return "there is nothing to average: every record has one fresh release"
    return _noised(view, threat)


ATTACKS = (
    Attack("beam-lm", _noised, lambda view, known, tick: _run("beam-lm", view, known, tick)),
    Attack("averaged-beam", _repeated, lambda view, known, tick: _run("averaged-beam", view, known, tick)),
)
