"""The Skellam bound against the divergence itself, its samples against two Poissons, its shares against lost clients."""

from __future__ import annotations

import hashlib
import json
import math
from itertools import count
from pathlib import Path

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from securesplit.privacy import skellam
from securesplit.privacy.calibrate import epsilon_for, epsilon_rdp_for

SHARED = Path(__file__).parents[3] / "shared" / "kat" / "dp_kat.json"
N = 400_000


@pytest.fixture
def keys(monkeypatch):
    numbers = count()
    monkeypatch.setattr(skellam, "fresh_key", lambda: hashlib.sha256(b"a test's sum" + bytes([next(numbers)])).digest())


def log_pmf(k: np.ndarray, variance: float) -> np.ndarray:
    return np.log(special.ive(np.abs(k), variance))


def divergence(alpha: float, shift: int, variance: float) -> float:
    """The Renyi divergence of order alpha between one coordinate shifted and not, summed over all integers that matter."""
    reach = int((alpha + 14) * (abs(shift) + math.sqrt(variance)) + 60)
    while special.ive(reach + abs(shift), variance) < 1e-290:
        reach -= 1
    x = np.arange(-reach, reach + 1)
    terms = alpha * log_pmf(x - shift, variance) + (1 - alpha) * log_pmf(x, variance)
    assert max(terms[0], terms[-1]) < terms.max() - 25  # The sum is not cut short.
    return float(special.logsumexp(terms)) / (alpha - 1)


@pytest.mark.skipif(not SHARED.is_file(), reason="the full table of known answers lies beside the repository only")
def test_known_answers():
    for row in json.loads(SHARED.read_text())["J_skellam_rdp"]:
        got = skellam.rdp(row["alpha"], row["l1"], row["l2"], row["variance"])
        assert math.isclose(got, float(row["rdp"]), rel_tol=1e-9)


@pytest.mark.parametrize("alpha", [2, 3, 8, 32])
@pytest.mark.parametrize(("shift", "variance"), [(1, 4), (1, 16), (2, 16), (3, 100), (10, 100), (1, 400), (20, 400)])
def test_the_bound_lies_above_the_divergence(alpha, shift, variance):
    true = divergence(alpha, shift, variance)
    bound = skellam.rdp(alpha, shift, shift, variance)
    assert bound >= true
    assert true >= alpha * shift**2 / (2 * variance) * 0.75 or alpha * shift > variance  # The oracle is no empty sum.


@pytest.mark.parametrize("alpha", [2, 4, 8, 16])
@pytest.mark.parametrize(("shift", "variance"), [(10, 2500), (30, 2500), (16, 4096), (64, 4096)])
def test_the_bound_is_within_two_per_cent_for_much_noise(alpha, shift, variance):
    true = divergence(alpha, shift, variance)
    assert true <= skellam.rdp(alpha, shift, shift, variance) <= 1.02 * true


@given(
    vector=st.lists(st.integers(-12, 12), min_size=1, max_size=6).filter(any),
    variance=st.sampled_from([60, 250, 1000]),
    alpha=st.sampled_from([2, 3, 6, 12]),
)
@settings(max_examples=40, deadline=None)
def test_the_bound_holds_for_whole_vectors(vector, variance, alpha):
    """Coordinates have independent noise, so that their divergences add up."""
    true = math.fsum(divergence(alpha, shift, variance) for shift in vector)
    l1, l2 = sum(map(abs, vector)), math.hypot(*vector)
    assert skellam.rdp(alpha, l1, l2, variance) >= true
    assert l1 <= skellam.most_l1(l2, len(vector)) * (1 + 1e-12)


@given(l2=st.floats(0.5, 1e4), spread=st.floats(0, 1), variance=st.floats(1, 1e8))
@settings(max_examples=100, deadline=None)
def test_the_equivalent_mu_dominates_at_every_order_and_no_more_than_it_must(l2, spread, variance):
    l1 = l2 + spread * (l2 * l2 - l2) if l2 > 1 else l2
    mu = skellam.mu_equivalent(l1, l2, variance)
    orders = [*range(2, 60), 100, 10**3, 10**6, 10**9]
    ratios = [2 * skellam.rdp(alpha, l1, l2, variance) / alpha / mu**2 for alpha in orders]
    assert max(ratios) <= 1 + 1e-12
    near, far = 3 * l2**2 + 6 * l1, 4 * l2**2
    if (near >= far) == (near / (4 * variance**2) <= 3 * l1 / (2 * variance)):
        assert max(ratios) >= 0.9  # The two branches may cross between orders; elsewhere one of them is met.


def test_epsilon_of_rounds():
    l2, variance, delta = 30.0, 4000, 1e-5
    l1 = skellam.most_l1(l2, 10**5)
    epsilon = skellam.epsilon_for(10, l1, l2, variance, delta)
    plain = [
        10 * skellam.rdp(a, l1, l2, variance) + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1)
        for a in range(2, 100)
    ]
    assert math.isclose(epsilon, min(plain), rel_tol=1e-9)
    mu = math.sqrt(10) * skellam.mu_equivalent(l1, l2, variance)
    assert epsilon <= epsilon_rdp_for(mu, delta, whole_orders=True) <= epsilon * 1.02
    assert epsilon > epsilon_for(math.sqrt(10) * l2 / math.sqrt(variance), delta)  # Never below a Gaussian's.


def test_the_table_is_two_poissons():
    for variance in (1, 4, 100):
        made = skellam.table(variance)
        edges = [0, *made.edges, 1 << 256]
        with mpmath.workprec(420):
            for k in (0, 1, -1, 5, int(3 * variance**0.5), -int(8 * variance**0.5)):
                mine = mpmath.mpf(edges[k - made.first + 1] - edges[k - made.first]) / 2**256
                true = mpmath.besseli(k, variance) * mpmath.exp(-variance)
                assert abs(mine - true) <= mpmath.mpf(2) ** -254
    rate, js = 50.0, np.arange(400)
    for k in (0, 3, 20):
        poissons = float((stats.poisson.pmf(js, rate) * stats.poisson.pmf(js + k, rate)).sum())
        assert math.isclose(float(special.ive(k, 2 * rate)), poissons, rel_tol=1e-12)


@pytest.mark.parametrize("variance", [1, 7, 4096, 10**6])
def test_samples(keys, variance):
    drawn = skellam.sample((N,), variance)
    assert drawn.dtype == np.int32
    assert abs(drawn.mean()) < 4 * math.sqrt(variance / N)
    kurtosis = 3 + 1 / variance
    assert abs(np.square(drawn.astype(np.float64)).mean() / variance - 1) < 4 * math.sqrt((kurtosis - 1) / N)
    reach = int(3 * math.sqrt(variance)) + 1
    ks = np.arange(-reach, reach + 1)
    expected = N * special.ive(np.abs(ks), variance)
    seen = np.bincount(drawn[np.abs(drawn) <= reach] + reach, minlength=len(ks)).astype(float)
    bins = np.array_split(np.arange(len(ks)), min(len(ks), 60))
    seen = np.array([*(seen[b].sum() for b in bins), N - seen.sum()])
    expected = np.array([*(expected[b].sum() for b in bins), N - expected.sum()])
    assert stats.chisquare(seen, expected).pvalue > 1e-4


def test_sums_of_shares_have_the_law_of_the_whole(keys):
    share = skellam.share_variance(100, clients=7, dropouts=2, colluders=0)
    assert share == 20
    together = sum(skellam.sample((N,), share) for _ in range(5))  # Two of seven have vanished.
    ks = np.arange(-25, 26)
    seen = np.bincount(together[np.abs(together) <= 25] + 25, minlength=51).astype(float)
    expected = N * special.ive(np.abs(ks), 100)
    both = np.append(seen, N - seen.sum()), np.append(expected, N - expected.sum())
    assert stats.chisquare(*both).pvalue > 1e-4


@given(
    total=st.integers(1, 10**9),
    clients=st.integers(1, 200),
    dropouts=st.integers(0, 200),
    colluders=st.integers(0, 200),
)
def test_the_honest_who_stay_carry_the_whole_variance(total, clients, dropouts, colluders):
    if clients - dropouts - colluders < 1:
        with pytest.raises(ValueError, match="no honest client"):
            skellam.share_variance(total, clients, dropouts, colluders)
        return
    share = skellam.share_variance(total, clients, dropouts, colluders)
    assert share * (clients - dropouts - colluders) >= total
    assert (share - 1) * (clients - dropouts - colluders) < total


@pytest.mark.parametrize("variance", [1, 10, 100, 10_000, 10**6])
def test_the_reserve_of_the_ring_is_never_used_up(variance):
    beyond = math.ceil(8.5 * math.sqrt(variance) + 12)
    tail = np.arange(beyond, beyond + int(4 * math.sqrt(variance)) + 40)
    assert 2 * float(special.ive(tail, variance).sum()) < 2**-46


def test_rings():
    skellam.fits(32, 1000, 2.0**20, 1 << 24)
    with pytest.raises(ValueError, match="half of a ring"):
        skellam.fits(32, 1000, 2.0**21.1, 1 << 24)
    edge = 2**15 - 1 - 12 - 85
    skellam.fits(16, 1, edge, 100)
    with pytest.raises(ValueError, match="half of a ring"):
        skellam.fits(16, 1, edge + 1, 100)


def test_calls_draw_apart():
    assert not np.array_equal(skellam.sample((64,), 100), skellam.sample((64,), 100))
    assert skellam.sample((2, 0, 3), 5).shape == (2, 0, 3)
    assert skellam.sample((), 5).shape == ()


@pytest.mark.parametrize("call", [
    lambda: skellam.rdp(1, 1, 1, 4), lambda: skellam.rdp(2.5, 1, 1, 4), lambda: skellam.rdp(2, 1, 1, 0),
    lambda: skellam.rdp(2, -1, 1, 4), lambda: skellam.rdp(2, 1, math.nan, 4), lambda: skellam.mu_equivalent(1, 1, -1),
    lambda: skellam.most_l1(-1, 3), lambda: skellam.most_l1(1, 0), lambda: skellam.epsilon_for(0, 1, 1, 4, 1e-5),
    lambda: skellam.epsilon_for(1, 1, 1, 4, 0), lambda: skellam.sample((3,), 0), lambda: skellam.sample((3,), 2.5),
    lambda: skellam.sample((3,), skellam.MOST + 1), lambda: skellam.share_variance(0, 3, 0, 0),
    lambda: skellam.share_variance(5, 3, -1, 0), lambda: skellam.fits(32, 0, 1, 1), lambda: skellam.fits(32, 1, math.inf, 1),
])  # fmt: skip
def test_numbers_out_of_range_are_refused(call):
    with pytest.raises(ValueError, match=r"must be|at least"):
        call()
