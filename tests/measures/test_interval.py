"""The cluster bootstrap: against the normal theory where it holds, against single examples where it does not, and again."""

from __future__ import annotations

import math

import numpy as np
import pytest

from securesplit.measures.interval import estimate, mean


def test_of_independent_examples_it_is_the_normal_interval():
    rows = [(1.0, 1.0)] * 140 + [(0.0, 1.0)] * 60
    found = estimate(rows, [str(i) for i in range(200)], mean)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 200)
    assert found.value == pytest.approx(0.7)
    assert found.groups == 200
    assert found.low == pytest.approx(0.7 - half, abs=0.012)
    assert found.high == pytest.approx(0.7 + half, abs=0.012)


def test_groups_that_fall_together_widen_it_by_the_root_of_their_size():
    rows = [(float(i % 2), 1.0) for i in range(40) for _ in range(16)]
    apart = estimate(rows, [str(i) for i in range(640)], mean)
    together = estimate(rows, [str(i // 16) for i in range(640)], mean)
    assert apart.value == together.value == 0.5
    ratio = (together.high - together.low) / (apart.high - apart.low)
    assert ratio == pytest.approx(4, rel=0.15)


def test_it_holds_the_truth_as_often_as_it_says():
    # 300 samples of 40 groups with a common part; the true mean is 0.
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(300):
        values = (generator.normal(size=(40, 1)) + 0.3 * generator.normal(size=(40, 3))).ravel()
        found = estimate([(v, 1.0) for v in values], [str(i // 3) for i in range(120)], mean, resamples=300)
        held += found.low <= 0 <= found.high
    assert 0.89 < held / 300 < 0.98


def test_it_is_the_same_every_time_and_needs_two_groups():
    rows = [(0.0, 1.0), (1.0, 1.0), (1.0, 1.0)]
    assert estimate(rows, ["a", "b", "c"], mean) == estimate(rows, ["a", "b", "c"], mean)
    alone = estimate(rows, ["a", "a", "a"], mean)
    assert (alone.low, alone.high, alone.groups) == (None, None, 1)
    with pytest.raises(ValueError, match="one row"):
        estimate([], [], mean)
