"""Which ceiling stands beside a result: none where theory bounds nothing, and none of another unit than the policy's."""

from __future__ import annotations

import pytest

from attacks.bounds import ceiling, membership_ceiling
from attacks.config import config
from attacks.exchange import Known, Labelled, Measured
from attacks.outcomes import score_labels, score_lengths
from attacks.report import Baselines
from attacks.scoring import Scorer, verdict
from attacks.truth import Truth


def scorer(*, mu, by_token):
    truths = tuple(
        Truth(peer="p", step=i, row=0, tokens=(1,) * (3 + i % 2), text="a", label="ab"[i % 2]) for i in range(8)
    )
    known = Known(common=(), frequent=(), positional=(), informed=False)
    guesses = Baselines(
        uniform=0.01, unigram=0.2, positional=0.1, lm_free=0.1, lm_forced=0.3, lm_bits=5.0, nearest_text=0.1
    )
    return Scorer(
        truths=truths, everything=truths, known=known, baselines=guesses, special=frozenset(), decode=str, told=None, mu=mu,
        by_token=by_token, classes=("a", "b"), attributes=("a", "b"),
    )  # fmt: skip


def answered(kind, name, values, scored):
    return kind(attack=name, seconds=1.0, keys=tuple(t.key for t in scored.truths), **values)


def results(scored):
    labels = next(name for name, note in config().attacks.items() if note.measure == "labels")
    lengths = next(name for name, note in config().attacks.items() if note.measure == "lengths")
    return (
        score_labels([answered(Labelled, labels, {"labels": (0, 1) * 4}, scored)], scored),
        score_lengths([answered(Measured, lengths, {"lengths": (3, 4) * 4}, scored)], scored),
    )


def test_a_ceiling_of_a_whole_text_stands_under_unit_sequence():
    scored = scorer(mu=1.0, by_token=False)
    assert scored.bound(0.3) == ceiling(0.3, 1.0)
    assert scored.membership_bound == membership_ceiling(1.0)
    for result in results(scored):
        assert (result.value, result.ceiling) == (1.0, ceiling(0.5, 1.0))
        assert result.floor < result.value_ci95[0] == pytest.approx(8 / (8 + 1.96**2), abs=1e-3)


def test_under_unit_token_no_ceiling_is_stated():
    scored = scorer(mu=1.0, by_token=True)
    assert scored.bound(0.3) is None
    assert scored.membership_bound is None
    assert all(result.ceiling is None for result in results(scored))


def test_nothing_is_bounded_without_noise():
    assert scorer(mu=None, by_token=False).bound(0.3) is None


def test_the_verdict_allows_for_every_attack_of_the_suite():
    assert verdict() / 2 * len(config().attacks) == pytest.approx(1e-3)
