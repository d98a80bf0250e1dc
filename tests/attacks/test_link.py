"""Links by content are right where the content shows, at chance where it does not, and never worse than a kept order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.link import link_by_content, link_releases

N, T, D = 30, 6, 16


def released(passes, sigma, *, shuffled=True, seed=0, count=N, length=T):
    """Rows as sent, and for each release its record: signal of standard deviation 1 about a large shared row."""
    draw = np.random.default_rng(seed)
    shared = 20 * draw.standard_normal((length, D))
    records = shared + draw.standard_normal((count, length, D)) * np.linspace(0.2, 2, D)
    rows, truth = [], []
    for _ in range(passes):
        order = draw.permutation(count) if shuffled else np.arange(count)
        truth += order.tolist()
        rows += [(records[i] + sigma * draw.standard_normal((length, D))).astype(np.float32) for i in order]
    return rows, truth


def right(links, truth):
    """Share of pairs (release, another one of its group) that show one record."""
    pairs = [(i, j) for i, group in enumerate(links) for j in group if j != i]
    return np.mean([truth[i] == truth[j] for i, j in pairs])


@pytest.mark.parametrize("passes", [2, 4])
@pytest.mark.parametrize("sigma", [0.01, 0.5, 1.5])
def test_where_the_content_shows_every_link_is_right(passes, sigma):
    rows, truth = released(passes, sigma)
    for link in (link_by_content, link_releases):
        links = link(rows, passes, sigma=sigma)
        assert right(links, truth) == 1.0
        assert all(i in group and len(group) == passes for i, group in enumerate(links))
        assert all([rows_of // N for rows_of in group] == list(range(passes)) for group in links), "one of each pass"


def test_under_much_noise_the_links_are_at_chance():
    shares = []
    for seed in range(20):
        rows, truth = released(2, 300.0, seed=seed)
        shares.append(right(link_by_content(rows, 2, sigma=300.0), truth))
    # 600 pairs; hits of a random pairing have mean 1 and variance 1 each: 20 +- 4.5 hits of 600.
    assert abs(np.mean(shares) - 1 / N) < 4 * np.sqrt(20) / (20 * N)


def test_more_passes_link_at_a_noise_where_two_fail():
    two, eight = [], []
    for seed in range(4):
        rows, truth = released(8, 2.5, seed=seed)
        eight.append(right(link_by_content(rows, 8, sigma=2.5), truth))
        two.append(right(link_by_content(rows[: 2 * N], 2, sigma=2.5), truth[: 2 * N]))
    assert np.mean(two) < 0.9
    assert np.mean(eight) > np.mean(two) + 0.1


def test_links_get_worse_with_the_noise():
    shares = []
    for sigma in (1.0, 4.0, 8.0, 50.0):
        rows, truth = released(2, sigma, seed=3)
        shares.append(right(link_by_content(rows, 2, sigma=sigma), truth))
    assert shares == sorted(shares, reverse=True), shares
    assert shares[0] == 1.0


@pytest.mark.parametrize("sigma", [0.01, 3.0, 30.0, 1000.0])
def test_a_kept_order_is_kept_at_any_noise(sigma):
    for seed in range(5):
        rows, truth = released(3, sigma, shuffled=False, seed=seed)
        assert right(link_releases(rows, 3, sigma=sigma), truth) == 1.0


def test_a_shared_row_of_great_norm_does_not_hide_the_content():
    """Oracle: nearest neighbours by bare inner products fail where the shared row dominates; ours do not."""
    rows, truth = released(2, 1.0, seed=2)
    flat = np.stack(rows).reshape(2, N, -1)
    bare = (flat[0] @ flat[1].T).argmax(1)
    assert np.mean([truth[i] == truth[N + j] for i, j in enumerate(bare)]) < 0.5
    assert right(link_by_content(rows, 2, sigma=1.0), truth) == 1.0


def test_lengths_are_linked_by_themselves_and_copies_count_once():
    short, truth_short = released(2, 0.5, seed=5, count=4, length=3)
    long, truth_long = released(2, 0.5, seed=6, count=5, length=7)
    rows = short[:4] + long[:5] + short[4:] + long[5:]
    truth = truth_short[:4] + [10 + t for t in truth_long[:5]] + truth_short[4:] + [10 + t for t in truth_long[5:]]
    links = link_by_content([*rows, rows[2].copy()], 2, sigma=0.5)
    assert right(links[:-1], truth) == 1.0
    assert links[-1] == links[2], "the same bytes again are the same release"


def test_what_does_not_come_out_even_is_left_alone():
    rows, _ = released(2, 0.5)
    assert link_by_content(rows[:-1], 2) == [[i] for i in range(2 * N - 1)]
    assert link_by_content(rows, 1) == [[i] for i in range(2 * N)]
    assert link_by_content([], 3) == []
    uneven = [*rows[:N], *[row[:4] for row in rows[N : N + 1]], *rows[N + 1 :]]
    assert link_by_content(uneven, 2) == [[i] for i in range(2 * N)], "no length has as many in both passes"


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 6), st.floats(0.01, 5), st.integers(0, 1000))
def test_links_are_a_partition_with_one_release_of_each_pass(passes, count, sigma, seed):
    rows, _ = released(passes, sigma, seed=seed, count=count, length=2)
    for link in (link_by_content, link_releases):
        links = link(rows, passes, sigma=sigma)
        assert len(links) == len(rows)
        for i, group in enumerate(links):
            assert i in group
            assert all(links[j] == group for j in group)
            assert sorted(j // count for j in group) == list(range(passes))
