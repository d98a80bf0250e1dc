"""The closest pair of many rows: against all pairs one by one, and where only a part of them can be compared."""

from __future__ import annotations

import numpy as np
import pytest

import attacks.reuse as subject
from attacks.reuse import across, between, within


def drawn(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_hand(pairs):
    return min(min(np.square(a - b).sum(), np.square(a + b).sum()) / 2 for a, b in pairs)


@pytest.mark.parametrize("block", [3, 2048])
def test_every_pair_is_looked_at(block, monkeypatch):
    monkeypatch.setattr(subject, "_BLOCK", block)
    releases = [*list(drawn(5, 4, 8)), drawn(7, 8, seed=2)]
    flat = [(i, row) for i, release in enumerate(releases) for row in release.astype(np.float64)]
    pairs = [(i, a, j, b) for n, (i, a) in enumerate(flat) for j, b in flat[:n]]
    found = between(releases)
    assert found.least == pytest.approx(by_hand((a, b) for i, a, j, b in pairs if i != j), rel=1e-5)
    assert found.tests == 2 * sum(i != j for i, _, j, _ in pairs)
    found = within(releases)
    assert found.least == pytest.approx(by_hand((a, b) for i, a, j, b in pairs if i == j), rel=1e-5)
    assert found.tests == 2 * sum(i == j for i, _, j, _ in pairs)
    found = across(releases[:2], releases[2:])
    assert found.least == pytest.approx(by_hand((a, b) for i, a, j, b in pairs if j < 2 <= i), rel=1e-5)
    assert found.tests == 2 * 8 * 19


def test_with_many_rows_a_sketch_finds_the_pair(monkeypatch):
    monkeypatch.setattr(subject, "_WORK", 0)
    rows = drawn(300, 4, 512)
    rows[271, 1] = -rows[13, 3] + 0.3 * drawn(512, seed=5)
    assert between(list(rows)).least < 0.1 * 512
    rows[40, 3] = rows[40, 0]
    assert within(list(rows)).least == 0


def test_of_too_many_rows_the_first_releases_whole_and_the_first_rows_of_the_others(monkeypatch):
    monkeypatch.setattr(subject, "ROWS", 100)
    rows = drawn(60, 8, 16)
    assert between(list(rows)).least > 0
    rows[55, 0] = rows[1, 5]
    assert between(list(rows)).least == 0
    rows = drawn(300, 8, 16)
    assert between(list(rows)).tests < 2 * 100**2, "no more rows than that"


def test_where_there_is_no_pair():
    assert between([drawn(4, 8)]) is None
    assert within([drawn(1, 8)] * 3) is None
    assert across([drawn(1, 8)], []) is None
    assert across([drawn(1, 8)], [drawn(1, 9)]) is None
