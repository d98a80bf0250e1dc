"""The sparse graph's bounds against the protocol played out in symbols, exact enumeration, SciPy and Monte Carlo."""

import math
import random
import re
import time
from collections import Counter
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from securesplit.aggregate import graph
from securesplit.aggregate.graph import (
    COMPLETE_UP_TO,
    LEAK_LOG2,
    STUCK_LOG2,
    Graph,
    graph_for,
    leak_log2,
    require_graph,
    stuck_log2,
)
from securesplit.errors import InputError


def subsets(items):
    return (frozenset(chosen) for size in range(len(items) + 1) for chosen in combinations(sorted(items), size))


# The protocol in symbols: what a server gets that says who is in U2 and U3 and routes boxes as it likes.


def sum_is_bare(draws, honest, colluders, t, *, u2, u3, wanted, views=None, rule=True):
    """Whether the vectors of ``wanted`` add up to something without a mask that the server does not know.

    ``views`` has the U2 that was shown to a wanted client where it is another; ``rule`` is the holders' rule about that.
    """
    everybody, views = honest | colluders, views or {}
    # The boxes that only tie a wanted client to an unwanted survivor are kept back; all others are delivered.
    kept_back = {(j, i) for j in (u3 & honest) - wanted for i in wanted}
    held = {(i, j) for i in everybody for j in draws[i] if (i, j) not in kept_back} | {(i, i) for i in everybody}
    answering = (u3 & honest) - views.keys()
    b_shares, s_shares = Counter(), Counter()
    for owner, holder in held:
        if holder in colluders:
            b_shares[owner] += 1
            s_shares[owner] += 1
        elif holder in answering and owner in u3:
            b_shares[owner] += owner not in views or not rule
        elif holder in answering and owner in u2:
            s_shares[owner] += 1
    bare = Counter()
    for i in wanted:
        bare["b", i] += b_shares[i] < t
        for j in views.get(i, u2) - {i}:
            if j in draws[i] or (j, i) in held:
                known = j in colluders or s_shares[i] >= t or s_shares[j] >= t
                bare["pair", min(i, j), max(i, j)] += 0 if known else (1 if i < j else -1)
    return not any(bare.values())


def closed(draws, colluders, t, chosen, others):
    """The condition of graph.py: enough holders inside, and no draw to a survivor outside."""
    return all(len(draws[i] & (chosen | colluders)) >= t - 1 and not draws[i] & others for i in chosen)


def draw(coins, members, k):
    return {i: frozenset(coins.sample(sorted(members - {i}), k)) for i in members}


@pytest.mark.parametrize(("clients", "corrupt", "k", "t"), [(6, 1, 3, 3), (6, 1, 2, 2), (6, 2, 4, 4), (5, 0, 2, 2)])
def test_what_opens_is_what_the_condition_says(clients, corrupt, k, t):
    coins = random.Random(clients * 10 + k)
    colluders = frozenset(range(corrupt))
    honest = frozenset(range(corrupt, clients))
    seen = Counter()
    for _ in range(25):
        draws = draw(coins, honest | colluders, k)
        if any(len(draws[i] & colluders) >= t for i in honest):
            continue
        for survivors in subsets(honest):
            for chosen in subsets(survivors):
                if not chosen:
                    continue
                u3 = survivors | colluders
                want = closed(draws, colluders, t, chosen, survivors - chosen)
                for u2 in (u3, honest | colluders):
                    got = sum_is_bare(draws, honest, colluders, t, u2=u2, u3=u3, wanted=chosen)
                    # A dropped client whose own secret lacks shares still masks; then only fewer sums open.
                    assert got == want or (want and u2 != u3)
                    seen[got] += 1
    assert seen[True] > 50
    assert seen[False] > 50


def test_enough_colluding_holders_open_a_client_whatever_the_others_do():
    draws = {0: frozenset({1, 2}), 1: frozenset({2, 3}), 2: frozenset({3, 0}), 3: frozenset({0, 1})}
    honest, colluders, everybody = frozenset({2, 3}), frozenset({0, 1}), frozenset(range(4))
    # Client 3 drew both colluders: t = 2 of its shares are known, and its partner 2 does not help it.
    args = {"u2": everybody, "u3": everybody, "wanted": frozenset({3})}
    assert sum_is_bare(draws, honest, colluders, 2, **args)
    assert not sum_is_bare(draws, honest, colluders, 4, **args)


def test_without_the_rule_on_signatures_another_list_of_members_opens_any_client():
    everybody = frozenset(range(9))
    draws = draw(random.Random(1), everybody, 3)
    for victim in everybody:
        args = {"u2": everybody, "u3": everybody, "wanted": frozenset({victim})}
        views = {victim: everybody - draws[victim]}  # 6 of 9, none of whom holds its shares
        assert sum_is_bare(draws, everybody, frozenset(), 3, **args, views=views, rule=False)
        assert not sum_is_bare(draws, everybody, frozenset(), 3, **args, views=views)
        assert not sum_is_bare(draws, everybody, frozenset(), 3, **args)


# The event itself, over all graphs or many.


def broken(draws, honest, colluders, t, smallest, quorum):
    """Whether the server can open more than one sum, a sum over too few, or a client's both secrets; draws by member."""
    if any(len(draws[i] & colluders) >= t for i in honest):
        return True
    for chosen in subsets(honest):
        s = len(chosen)
        others = honest - chosen - frozenset().union(*(draws[i] for i in chosen)) if s else frozenset()
        enough = len(others) >= quorum - len(colluders) - s
        if s and enough and (s < smallest or len(others) >= s) and closed(draws, colluders, t, chosen, others):
            return True
    return False


@pytest.mark.parametrize(
    ("clients", "corrupt", "k", "t", "smallest", "quorum"),
    [(5, 1, 2, 2, 2, 4), (5, 1, 2, 3, 3, 4), (5, 0, 2, 2, 3, 3), (4, 1, 2, 2, 2, 3), (5, 2, 3, 4, 2, 5), (4, 0, 3, 2, 3, 3)],
)  # fmt: skip
def test_the_bound_holds_over_all_graphs(clients, corrupt, k, t, smallest, quorum):
    bound = leak_log2(clients, k, t, corrupt, smallest, quorum=quorum)
    for u in range(quorum, clients + 1):  # The server may leave honest clients out of U1, before the draw.
        members, colluders = frozenset(range(u)), frozenset(range(corrupt))
        honest = members - colluders
        choices = [[frozenset(c) for c in combinations(sorted(members - {i}), min(k, u - 1))] for i in sorted(honest)]
        bad = total = 0
        for drawn in product(*choices):
            total += 1
            bad += broken(dict(zip(sorted(honest), drawn, strict=True)), honest, colluders, t, smallest, quorum)
        exact = Fraction(bad, total)
        assert exact <= Fraction(2.0**bound) + Fraction(1, 10**9)


def broken_often(rng, u, corrupt, k, t, smallest, quorum, rounds):
    """The share of broken rounds: :func:`broken` on bit masks, many graphs at once; colluders are members 0..corrupt-1."""
    honest = list(range(corrupt, u))
    bits = np.zeros((rounds, u), dtype=np.int64)
    for i in honest:
        order = np.argsort(rng.random((rounds, u - 1)), axis=1)[:, : min(k, u - 1)]
        bits[:, i] = (1 << (order + (order >= i))).sum(axis=1)
    count = np.array([value.bit_count() for value in range(1 << u)])
    c_mask, h_mask = (1 << corrupt) - 1, sum(1 << i for i in honest)
    bad = (count[bits[:, honest] & c_mask] >= t).any(axis=1)
    for chosen in subsets(honest):
        s = len(chosen)
        if not s:
            continue
        mask = sum(1 << i for i in chosen)
        drawn = bits[:, sorted(chosen)]
        fits = (count[drawn & (mask | c_mask)] >= t - 1).all(axis=1)
        others = count[h_mask & ~mask & ~np.bitwise_or.reduce(drawn, axis=1)]
        bad |= fits & (others >= quorum - corrupt - s) & ((others >= s) | (s < smallest))
    return bad.mean()


@pytest.mark.parametrize(
    ("clients", "corrupt", "k", "t", "smallest", "quorum"),
    [
        (12, 3, 4, 3, 1, 12),  # colluders alone
        (11, 1, 4, 4, 2, 7),  # sums of one
        (12, 0, 2, 3, 2, 8),  # two sums
        (12, 0, 6, 3, 4, 7),  # the draws of a few avoid the others
        (12, 1, 7, 3, 2, 7),
    ],
)
def test_the_bound_is_above_what_is_seen(clients, corrupt, k, t, smallest, quorum):
    rng, rounds = np.random.default_rng(7), 2000
    bound = 2.0 ** leak_log2(clients, k, t, corrupt, smallest, quorum=quorum)
    sizes = range(max(quorum, k + 1), clients + 1)
    seen = max(broken_often(rng, u, corrupt, k, t, smallest, quorum, rounds) for u in sizes)
    assert seen > 0.01  # else this shows nothing
    assert seen <= bound < 0.6


# Larger numbers, where the event is too rare to be seen: the formulae, by SciPy, with every U1 and U3 tried.


def tail_log2(population, marked, drawn, least):
    return float(hypergeom.logsf(least - 1, population, marked, drawn)) / math.log(2)


def leak_by_scipy(n, k, t, c, smallest, quorum):
    bound = n * max(2.0 ** tail_log2(u - 1, c, min(k, u - 1), t) for u in range(quorum, n + 1))
    for s in range(1, max(smallest, n // 2 + 1)):
        least = quorum if s < smallest else max(quorum, 2 * s)
        shares = masks = -math.inf
        for u in range(max(least, k + 1), n + 1):
            for left in range(least, u + 1):
                shares = max(shares, s * tail_log2(u - 1, min(s - 1 + c, u - 1), k, max(t - 1, k - (u - left))))
            avoided = max(quorum - c - s, 0 if s < smallest else s)
            pairs = math.log2(math.comb(n - s, avoided))
            masks = max(masks, pairs + s * tail_log2(u - 1, max(0, u - 1 - avoided), k, k))
        bound += 2.0 ** (math.log2(math.comb(n, s)) + min(shares, masks))
    return bound


@pytest.mark.parametrize(
    ("n", "k", "t", "c", "smallest"),
    [(33, 12, 7, 3, 3), (40, 15, 8, 4, 12), (50, 10, 7, 5, 10), (40, 39, 27, 8, 3), (48, 30, 12, 2, 20)],
)
def test_the_worst_set_sizes_are_the_ones_that_are_used(n, k, t, c, smallest):
    quorum = 2 * n // 3 + 1
    want, got = leak_by_scipy(n, k, t, c, smallest, quorum), leak_log2(n, k, t, c, smallest, quorum=quorum)
    assert got == (pytest.approx(math.log2(want), abs=1e-6) if want else -math.inf)


@settings(deadline=None, max_examples=80)
@given(st.integers(4, 120), st.data())
def test_the_bound_rises_with_colluders_and_smallest_and_falls_with_threshold(n, data):
    quorum = data.draw(st.integers(n // 2 + 1, n))
    k = data.draw(st.integers(1, n - 1))
    t = data.draw(st.integers(1, min(k + 1, quorum)))
    c = data.draw(st.integers(0, quorum - 1))
    smallest = data.draw(st.integers(1, quorum - c))
    leak = leak_log2(n, k, t, c, smallest, quorum=quorum)
    assert leak <= 0
    slack = 1e-9
    if c:
        assert leak_log2(n, k, t, c - 1, smallest, quorum=quorum) <= leak + slack
    if smallest > 1:
        assert leak_log2(n, k, t, c, smallest - 1, quorum=quorum) <= leak + slack
    if t < min(k + 1, quorum):
        assert leak_log2(n, k, t + 1, c, smallest, quorum=quorum) <= leak + slack


def test_a_round_gets_stuck_as_often_as_the_tails_say():
    for u, k, t, d in [(20, 8, 4, 6), (40, 12, 5, 12), (30, 29, 20, 9), (12, 20, 5, 7)]:
        drawn = min(k, u - 1)
        want = d * hypergeom.sf(drawn - t, u - 1, d - 1, drawn) + (u - d) * hypergeom.sf(drawn + 1 - t, u - 1, d, drawn)
        assert 2.0 ** stuck_log2(u, k, t, d) == pytest.approx(min(1.0, want), rel=1e-9)
    assert stuck_log2(40, 12, 13, 0) == -math.inf
    assert stuck_log2(40, 12, 14, 0) == 0.0  # more shares than there are
    assert stuck_log2(40, 12, 13, 1) == 0.0  # a client that vanished has lost its own
    with pytest.raises(InputError):
        stuck_log2(40, 12, 5, 41)


def test_stuck_rounds_are_no_more_frequent_than_the_bound():
    coins, u, k, t, d = random.Random(3), 14, 6, 4, 4
    stuck = 0
    for _ in range(3000):
        draws = draw(coins, frozenset(range(u)), k)
        left = set(range(d, u))
        stuck += any(len((draws[i] | {i}) & left) < t for i in range(u))
    bound = 2.0 ** stuck_log2(u, k, t, d)
    assert bound / 4 < stuck / 3000 <= bound < 1


@settings(deadline=None, max_examples=60)
@given(st.integers(5, 80), st.data())
def test_who_vanishes_before_stage_1_harms_less(n, data):
    d = data.draw(st.integers(1, n // 2))
    k = data.draw(st.integers(1, n - d - 1))
    t = data.draw(st.integers(1, min(k + 1, n - d)))
    late = stuck_log2(n, k, t, d)
    assert all(stuck_log2(n - early, k, t, d - early) <= late + 1e-9 for early in range(1, d + 1))


# The choice.

ROUNDS = [
    {"clients": n, "quorum": 2 * n // 3 + 1, "colluders": n // c, "smallest": m, "dropouts": n // d}
    for n, c, m, d in [(33, 10, 3, 5), (50, 5, 10, 10), (64, 20, 3, 5), (100, 10, 10, 5), (100, 5, 20, 4), (150, 20, 30, 5)]
]  # fmt: skip


@pytest.mark.parametrize("asked", ROUNDS)
def test_the_graph_keeps_both_bounds_and_a_sparser_one_does_not(asked):
    n, c, m, d, quorum = (asked[name] for name in ("clients", "colluders", "smallest", "dropouts", "quorum"))
    chosen = graph_for(**asked)
    k = chosen.degree
    assert COMPLETE_UP_TO / 8 < k < n - 1

    def kept(degree, threshold):
        leak = leak_log2(n, degree, threshold, c, m, quorum=quorum)
        return leak <= LEAK_LOG2 and stuck_log2(n, degree, threshold, d) <= STUCK_LOG2

    def room(threshold):
        leak = leak_log2(n, k, threshold, c, m, quorum=quorum)
        return min(LEAK_LOG2 - leak, STUCK_LOG2 - stuck_log2(n, k, threshold, d))

    assert kept(k, chosen.threshold)
    assert not any(kept(k - 1, t) for t in range(1, min(k, n - d, quorum) + 1))
    assert room(chosen.threshold) == max(room(t) for t in range(1, k + 2) if kept(k, t))
    require_graph(k, chosen.threshold, clients=n, quorum=quorum, colluders=c, smallest=m)


@pytest.mark.parametrize("clients", [3, 10, COMPLETE_UP_TO])
def test_up_to_32_clients_the_graph_is_complete(clients):
    quorum = 2 * clients // 3 + 1
    chosen = graph_for(clients, quorum=quorum, colluders=clients // 10, smallest=2, dropouts=clients // 5)
    assert chosen == Graph(clients - 1, min(quorum, clients - clients // 5))
    require_graph(clients - 1, chosen.threshold, clients=clients, quorum=quorum, colluders=clients // 10, smallest=2)


def test_where_no_sparse_graph_will_do_it_is_complete():
    # 12 colluders and 20 dropouts of 34: no draw of fewer than all bears both.
    chosen = graph_for(34, quorum=23, colluders=11, smallest=12, dropouts=20)
    assert chosen == Graph(33, 14)
    assert leak_log2(34, 33, 14, 11, 12, quorum=23) == -math.inf
    assert stuck_log2(34, 33, 14, 20) == -math.inf
    with pytest.raises(InputError, match="no graph bears both") as refused:
        graph_for(34, quorum=23, colluders=14, smallest=3, dropouts=20)
    assert refused.value.code == "SS-1601"


def test_the_complete_graph_needs_more_shares_than_colluders():
    assert leak_log2(40, 39, 9, 8, 3, quorum=27) == -math.inf
    assert leak_log2(40, 39, 8, 8, 3, quorum=27) == 0.0


def test_a_graph_that_leaks_is_refused_with_both_bounds():
    args = {"clients": 100, "quorum": 67, "colluders": 10, "smallest": 10}
    require_graph(28, 13, **args)
    with pytest.raises(InputError, match=r"2\^-\d+\.\d per round; at most 2\^-40") as refused:
        require_graph(28, 11, **args)
    assert refused.value.code == "SS-1601"
    assert refused.value.hint
    with pytest.raises(InputError):
        require_graph(28, 13, **args | {"colluders": 20})


@pytest.mark.parametrize(
    ("degree", "threshold", "change"),
    [
        (0, 1, {}), (100, 13, {}), (-1, 1, {}), (28, 0, {}), (28, 30, {}), (99, 68, {}), (28, 13, {"quorum": 0}),
        (28, 13, {"quorum": 101}), (28, 13, {"colluders": -1}), (28, 13, {"smallest": 0}), (28, 13, {"smallest": 58}),
        (28, 13, {"clients": 28}),
    ],
)  # fmt: skip
def test_contradictory_numbers_are_refused(degree, threshold, change):
    args = {"clients": 100, "quorum": 67, "colluders": 10, "smallest": 10} | change
    with pytest.raises(InputError) as refused:
        require_graph(degree, threshold, **args)
    assert refused.value.code == "SS-1601"


@pytest.mark.parametrize(
    "change", [{"dropouts": 100}, {"dropouts": -1}, {"quorum": 101}, {"smallest": 58}, {"colluders": -1}]
)
def test_contradictory_wishes_are_refused(change):
    with pytest.raises(InputError):
        graph_for(**{"clients": 100, "quorum": 67, "colluders": 10, "smallest": 10, "dropouts": 20} | change)


def test_it_is_quick():
    for cached in (graph_for, leak_log2, stuck_log2, graph._tail_log2):
        cached.cache_clear()
    begin = time.process_time()
    graph_for(256, quorum=171, colluders=51, smallest=51, dropouts=76)
    assert time.process_time() - begin < 1.0


ADR = Path(__file__).parents[2] / "docs" / "adr" / "0005-sparse-graph.md"


def test_the_table_of_the_decision_is_what_the_code_gives():
    rows = re.findall(r"^\|\s*(\d+)\s*\|" + r"\s*(\d+)\s*\|" * 6 + r"$", ADR.read_text(), re.MULTILINE)
    assert len(rows) >= 6
    for row in rows:
        n, quorum, c, d, k, t, partners = map(int, row)
        assert graph_for(n, quorum=quorum, colluders=c, smallest=(quorum - c) // 2, dropouts=d) == Graph(k, t)
        assert partners == round((n - 1) * (1 - (1 - k / (n - 1)) ** 2))
