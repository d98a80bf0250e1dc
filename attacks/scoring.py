"""From an attack's answer and the truth to a scored result. One function per kind of answer; the scorer's process only.

Repeated answers of one attack, from several seeds, are scored together: hits are averaged over seeds, and the interval is
still over sequences, because noise of the seeds is no evidence about other texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attacks.asked import Asked
from attacks.baselines import Forced, extra_bits
from attacks.bounds import best_guess, ceiling, membership_ceiling, share_of
from attacks.config import AttackNote, config
from attacks.exchange import Known, Recovered
from attacks.metrics import Decode, SequenceScore, interval, recovery, score_sequence, wilson
from attacks.report import Baselines, Result
from attacks.truth import Truth
from attacks.view import Key
from securesplit.errors import CheckFailed

__all__ = ["Scorer", "score_tokens"]

_SHIFTS = 5
_FALSE = 1e-3


@dataclass(frozen=True, slots=True)
class Scorer:
    """What answers are compared with.

    Attributes:
        truths: the sequences that were attacked. everything: all sequences whose truth is known.
        known: what the attacker guesses without looking. baselines: the same, scored.
        special: ids that do not count. decode: ids to text.
        told: the language model's view of the truths; None without a whole model.
        mu: of one record's life in the server's view; None where the policy bounds nothing.
        by_token: whether a neighbour differs in one token only, so that the rest of the text counts as known.
        classes: names of a task's labels, in the job's order. attributes: names of the labels of the auxiliary text, sorted.
        asked: the texts whose membership was asked, with the answers.
    """

    truths: tuple[Truth, ...]
    everything: tuple[Truth, ...]
    known: Known
    baselines: Baselines
    special: frozenset[int]
    decode: Decode
    told: Forced | None
    mu: float | None
    by_token: bool
    classes: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    asked: tuple[Asked, ...] = ()

    @property
    def kappa(self) -> float:
        """The best guess of a token without observation that we know; it errs upwards, as a bound's prior may."""
        tokens = [t.tokens for t in self.truths]
        b = self.baselines
        rest = b.lm_forced or 0.0 if self.by_token else 0.0
        return max(
            best_guess(tokens, self.known.positional, self.special),
            b.unigram,
            b.positional,
            b.lm_free,
            b.nearest_text,
            rest,
        )

    def bound(self, kappa: float) -> float | None:
        """The ceiling of a guess that is right with chance ``kappa`` beforehand; None where nothing is bounded.

        Under unit ``token`` mu bounds what is learnt about one token by somebody who knows all the others. How well those
        alone tell it is not known, and what depends on the whole text is not bounded: None for both.
        """
        return None if self.mu is None or self.by_token else ceiling(min(1.0, kappa), self.mu)

    @property
    def membership_bound(self) -> float | None:
        """The largest AUC; None where nothing is bounded, as under unit ``token``, where a whole text may be told."""
        return None if self.mu is None or self.by_token else membership_ceiling(self.mu)


def verdict() -> float:
    """Two-sided error of the interval whose lower end is held against a ceiling, so that of all the attacks of the suite
    together none breaks a true one by chance more than once in a thousand runs (Bonferroni).
    """
    return 2 * _FALSE / len(config().attacks)


def note_of(attack: str) -> AttackNote:
    """What is known of an attack beforehand."""
    return config().attacks[attack]


def score_tokens(answers: Sequence[Recovered], scorer: Scorer) -> Result:
    """Score the answers of one attack, one per seed.

    Raises:
        CheckFailed: SS-1571 when a metric cannot be computed or an answer lacks a sequence.
    """
    found = [_sequences(answer, scorer) for answer in answers]
    first, name = answers[0].first, answers[0].attack
    totals = [s.total for s in found[0]]
    hits = np.mean([[s.hits for s in scores] for scores in found], axis=0).tolist()
    flat = [s for scores in found for s in scores]
    share, spread = recovery(hits, totals), interval(hits, totals)
    base = scorer.baselines
    best = max(base.unigram, base.positional, base.lm_free)
    content, pii = sum(s.content_total for s in flat), sum(s.pii_total for s in flat)
    pii_hits = sum(s.pii_hits for s in flat)
    note = note_of(name)
    return Result(
        name=name, threat=note.threat, channel=note.channel, measure="tokens",
        value=share, value_ci95=spread, value_prior=base.unigram, token_recovery=share, ci95=spread, prior=base.unigram,
        shuffled=_shuffled(answers[0], scorer, first),
        advantage=(share - best) / (1 - best) if best < 1 else 0.0,
        bits_per_token=_bits(answers[0], scorer, first),
        content_recovery=sum(s.content_hits for s in flat) / content if content else None,
        pii_exact=pii_hits / pii if pii else None,
        pii_ci95=wilson(pii_hits // len(found), pii // len(found)) if pii else None,
        pii_total=pii // len(found),
        rouge_1=_mean([s.rouge_1 for s in flat]), rouge_2=_mean([s.rouge_2 for s in flat]),
        rouge_l=_mean([s.rouge_l for s in flat]), bleu=_mean([s.bleu for s in flat]),
        exact_match=_mean([float(s.exact) for s in flat]),
        ceiling=scorer.bound(max(scorer.kappa, best)), floor=interval(hits, totals, alarm=verdict())[0],
        seconds=_mean([a.seconds for a in answers]), seeds=len(answers), sequences=len(totals), tokens=sum(totals),
        unresolved=answers[0].unresolved, certified=answers[0].certified,
        note="" if first == 0 else f"positions before {first} are outside of its reach and count nowhere",
    )  # fmt: skip


def guesses_of(answer: Recovered, truths: Sequence[Truth]) -> dict[Key, tuple[int, ...]]:
    """The answer by key.

    Raises:
        CheckFailed: SS-1571 when it lacks a sequence.
    """
    guesses = dict(zip(answer.keys, answer.tokens, strict=True))
    if missing := [t for t in truths if t.key not in guesses]:
        raise CheckFailed(
            "SS-1571", f"{len(missing)} sequence(s) were not attacked", hint="This is a defect; report it."
        )
    return guesses


def _sequences(answer: Recovered, scorer: Scorer) -> list[SequenceScore]:
    guesses = guesses_of(answer, scorer.truths)
    common = frozenset(scorer.known.common)
    return [
        score_sequence(
            t.tokens, guesses[t.key], special=scorer.special, common=common, decode=scorer.decode, pii=t.pii,
            first=answer.first,
        )
        for t in scorer.truths
        if any(token not in scorer.special for token in t.tokens[answer.first :])
    ]  # fmt: skip


def _shuffled(answer: Recovered, scorer: Scorer, first: int) -> float | None:
    """Every answer against the truth of another sequence with another text, over up to five shifts; None with one text."""
    guesses = guesses_of(answer, scorer.truths)
    count, pairs = len(scorer.truths), []
    for shift in range(1, min(count, _SHIFTS + 1)):
        for place, truth in enumerate(scorer.truths):
            other = scorer.truths[(place + shift) % count]
            if other.tokens != truth.tokens:
                pairs.append((truth.tokens[first:], guesses[other.key][first:]))
    if not pairs:
        return None
    return share_of([truth for truth, _ in pairs], [guess for _, guess in pairs], scorer.special)


def _bits(answer: Recovered, scorer: Scorer, first: int) -> float | None:
    guesses = guesses_of(answer, scorer.truths)
    hits, counted = [], []
    for truth in scorer.truths:
        guess = [*guesses[truth.key][: len(truth.tokens)]]
        guess += [-1] * (len(truth.tokens) - len(guess))
        hits.append([g == t for g, t in zip(guess, truth.tokens, strict=True)])
        counted.append([i >= first and token not in scorer.special for i, token in enumerate(truth.tokens)])
    return extra_bits(scorer.told, hits, counted)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
