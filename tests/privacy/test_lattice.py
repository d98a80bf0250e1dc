"""The table is the discrete Gaussian, draws follow it bit for bit, and no record gets longer on its way to the lattice."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import count, pairwise
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from securesplit.privacy import lattice, table

SHARED = Path(__file__).parents[3] / "shared" / "kat" / "dp_kat.json"
SHARED_ONLY = pytest.mark.skipif(
    not SHARED.is_file(), reason="the full table of known answers lies beside the repository only"
)
N = 1_200_000


@pytest.fixture
def keys(monkeypatch):
    """Keys from a counter, so that a statistical test answers the same in every run."""
    numbers = count()
    monkeypatch.setattr(
        lattice, "fresh_key", lambda: hashlib.sha256(b"a test's lattice" + bytes([next(numbers)])).digest()
    )


def pmf(width: float, k: int) -> mpmath.mpf:
    """The discrete Gaussian's probability, its normaliser by Jacobi's theta function."""
    nome = mpmath.exp(-mpmath.mpf(1) / (2 * mpmath.mpf(width) ** 2))
    return mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * mpmath.mpf(width) ** 2)) / mpmath.jtheta(3, 0, nome)


def probabilities(made: table.Table) -> list[int]:
    """The table's own probabilities, in 2^-256."""
    edges = [0, *made.edges, 1 << table.BITS]
    return [high - low for low, high in pairwise(edges)]


def test_the_table_is_exact_to_its_last_bits():
    made = lattice.table()
    mine = probabilities(made)
    with mpmath.workprec(400):
        total = mpmath.nsum(lambda k: mpmath.exp(-(k**2) / (2 * mpmath.mpf(lattice.WIDTH) ** 2)), [-6000, 6000])
        for k in (0, 1, -1, 7, 255, -256, 1000, -2000, 4000, 4700):
            true = mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * mpmath.mpf(lattice.WIDTH) ** 2)) / total
            assert abs(mpmath.mpf(mine[k - made.first]) / 2**256 - true) <= mpmath.mpf(2) ** -255
            assert mpmath.almosteq(true, pmf(lattice.WIDTH, k), mpmath.mpf(2) ** -120)


def test_the_table_is_symmetric_and_complete():
    made = lattice.table()
    mine = probabilities(made)
    assert sum(mine) == 1 << table.BITS
    assert min(mine) >= 0
    middle = -made.first
    assert all(abs(mine[middle + k] - mine[middle - k]) <= 2 for k in range(1, len(mine) - middle))
    assert list(made.edges) == sorted(made.edges)
    assert middle == len(mine) - 1 - middle == 4780
    with mpmath.workprec(400):  # What is cut off at each end is less than the rounding.
        assert mpmath.log(mpmath.erfc(4780.5 / (lattice.WIDTH * mpmath.sqrt(2))) / 2, 2) < -table.BITS


@SHARED_ONLY
def test_closed_forms_of_small_widths():
    for row in json.loads(SHARED.read_text())["J_discrete_gaussian"]:
        width = float(row["sigma"])
        ks = range(-80, 81)
        values = [float(pmf(width, k)) for k in ks]
        assert math.isclose(values[80], float(row["pmf0"]), rel_tol=1e-12)
        assert math.isclose(values[81], float(row["pmf1"]), rel_tol=1e-12)
        # The same weights through the sampler's table: its probabilities are those.
        weights = [int(mpmath.nint(pmf(width, k) * mpmath.mpf(2) ** 50)) for k in ks]
        made = table.Table.of(-80, weights)
        mine = [p / 2**256 for p in probabilities(made)]
        assert mine == pytest.approx(values[made.first + 80 :][: len(mine)], abs=1e-14)
        variance = math.fsum(p * (made.first + i) ** 2 for i, p in enumerate(mine))
        assert math.isclose(variance, float(row["variance"]), rel_tol=1e-9)


@pytest.mark.parametrize(("width", "radix"), [(2.0, 2), (3.0, 4), (4.0, 4), (6.0, 4)])
def test_composed_draws_have_the_law_that_is_claimed(width, radix):
    """radix * Y + Z at small widths, summed exactly: the relative error is the formula's, at every integer."""
    with mpmath.workprec(900):
        smoothing = (mpmath.mpf(width) ** -2 + (radix / mpmath.mpf(width)) ** 2) ** mpmath.mpf(-0.5)
        bound = 2.1 * mpmath.exp(-2 * mpmath.pi**2 * smoothing**2)
        total = mpmath.mpf(width) * mpmath.sqrt(radix**2 + 1)
        span = int(30 * width)
        wide = [pmf(width, k) for k in range(-span, span + 1)]

        def at(k: int) -> mpmath.mpf:
            return wide[k + span] if -span <= k <= span else mpmath.mpf(0)

        worst = max(
            abs(mpmath.fsum(at(y) * at(x - radix * y) for y in range(-span, span + 1)) / pmf(total, x) - 1)
            for x in range(0, int(4 * total), 3)
        )
        assert worst <= bound
        assert worst >= bound / 1000  # The formula is what happens, and no guess from far above.


def test_the_smoothing_and_the_variance_are_what_they_are_called():
    with mpmath.workprec(600):
        for levels in range(1, lattice.LEVELS):
            outer = lattice.WIDTH**2 * sum(lattice.RADIX ** (2 * k) for k in range(levels))
            w2 = 1 / (mpmath.mpf(1) / outer + (mpmath.mpf(lattice.RADIX) / lattice.WIDTH) ** 2)
            assert mpmath.log(2.1 * mpmath.exp(-2 * mpmath.pi**2 * w2), 2) < lattice.SMOOTHING - 0.5
    assert lattice.SIGMA**2 <= lattice.VARIANCE < (lattice.SIGMA + 1) ** 2
    assert lattice.VARIANCE / lattice.SIGMA**2 < 1 + 1e-6


def test_base_draws_fit_their_probabilities(keys):
    made = lattice.table()
    drawn = np.concatenate([made.block(lattice.fresh_key(), index, 300_000) for index in range(4)])
    ks = np.arange(made.first, made.first + len(made.edges) + 1)
    expected = np.array([p / 2**256 for p in probabilities(made)]) * N
    inner = np.abs(ks) <= 900
    seen = np.bincount(drawn[np.abs(drawn) <= 900] + 900, minlength=1801)
    outside = N - seen.sum()
    seen, expected = np.append(seen, outside), np.append(expected[inner], expected[~inner].sum())
    assert stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 1e-4


def test_moments_and_quantiles(keys):
    drawn = lattice.discrete_gaussian((N,)) / math.sqrt(lattice.VARIANCE)
    assert abs(drawn.mean()) < 4 / math.sqrt(N)
    low, high = stats.chi2.ppf([5e-5, 1 - 5e-5], N)
    assert low < np.square(drawn).sum() < high
    assert abs(stats.skew(drawn)) < 4 * math.sqrt(6 / N)
    assert abs(stats.kurtosis(drawn)) < 4 * math.sqrt(24 / N)
    assert stats.kstest(drawn, "norm").pvalue > 1e-4  # A step is a millionth of sigma.
    for at in (3.0, 4.0):
        expected = N * stats.norm.sf(at)
        for side in (drawn, -drawn):
            assert abs((side > at).sum() - expected) < 4.5 * math.sqrt(expected) + 1


def test_the_low_bits_are_uniform(keys):
    drawn = lattice.discrete_gaussian((N,))
    for modulus in (2, 64, 1000):
        assert stats.chisquare(np.bincount(drawn % modulus, minlength=modulus)).pvalue > 1e-4


def test_no_correlation_between_coordinates_blocks_and_calls(keys):
    one, other = (lattice.discrete_gaussian((N,)) / lattice.SIGMA for _ in range(2))
    assert abs(np.dot(one, other)) < 4.5 * math.sqrt(N)
    for lag in (1, 2, 63, 64, 576, 1 << 15, 1 << 16, N // 3, N // 2):
        a, b = one[:-lag], one[lag:]
        assert abs(np.dot(a, b)) < 4.5 * math.sqrt(len(a)), lag
        assert abs(np.dot(a**2 - 1, b**2 - 1)) < 4.5 * 2 * math.sqrt(len(a)), lag


def test_threads_draw_apart():
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda _: lattice.discrete_gaussian((64,)).tobytes(), range(64)))
    assert len(set(drawn)) == 64


def test_a_fork_draws_its_own_noise():
    code = r"""
import os
from securesplit.privacy.lattice import discrete_gaussian
discrete_gaussian((8,))
child = os.fork()
os.write(1, discrete_gaussian((4,)).tobytes().hex().encode() + b"\n")
if child:
    os.waitpid(child, 0)
else:
    os._exit(0)
"""
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(lines) == 2
    one, other = (np.frombuffer(bytes.fromhex(line), dtype="<i4") for line in lines)
    assert not (one == other).any()


def test_each_call_asks_the_system_for_its_own_key_and_seeds_do_not_touch_it(monkeypatch):
    asked = []

    def urandom(length: int) -> bytes:
        asked.append(length)
        return hashlib.sha256(bytes([len(asked)])).digest()

    monkeypatch.setattr(table.os, "urandom", urandom)
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        np.random.seed(7)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        drawn.append(lattice.discrete_gaussian((64,)))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])
    assert asked == [32, 32]
    assert not (drawn[0] == drawn[1]).any()


# --- The sampler against a plain inversion, for streams that are chosen. ---


def plain(made: table.Table, u: int) -> int:
    """first + #{edge <= u}, by looking at every edge."""
    return made.first + sum(edge <= u for edge in made.edges)


def chosen(monkeypatch, draws: list[int], made: table.Table) -> None:
    """A stream that makes :meth:`Table.block` draw these 256-bit numbers."""
    cells = [u >> 240 for u in draws]
    undecided = [u for u, cell in zip(draws, cells, strict=True) if made.coarse[cell] == table._UNDECIDED]

    def stream(key: bytes, block: int, part: int, length: int) -> bytes:
        words = {
            0: b"".join(cell.to_bytes(2, "little") for cell in cells),
            1: b"".join((((u >> 192) << 16) & (2**64 - 1)).to_bytes(8, "little") for u in undecided),
            2: b"".join((u & ((1 << 192) - 1)).to_bytes(24, "little") for u in undecided),
        }[part]
        return words[:length].ljust(length, b"\xa5")

    monkeypatch.setattr(table, "stream", stream)


def at_edges(made: table.Table) -> list[int]:
    """Numbers just below, at and just above edges, from the bulk and from both ends, where many share their top bits."""
    edges = made.edges
    some = [*edges[:40], *edges[1000:1010], *edges[len(edges) // 2 :: 211], *edges[-40:]]
    draws = [u for edge in some for u in (edge - 1, edge, edge + 1, edge ^ (1 << 191), edge ^ (1 << 230))]
    return [u for u in [*draws, 0, (1 << 256) - 1] if 0 <= u < 1 << 256]


def test_draws_at_the_edges_are_decided_by_all_256_bits(monkeypatch):
    made = lattice.table()
    draws = at_edges(made)
    chosen(monkeypatch, draws, made)
    expected = [plain(made, u) for u in draws]
    assert made.block(b"", 0, len(draws)).tolist() == expected
    assert made.block_on(torch.device("cpu"), b"", 0, len(draws)).tolist() == expected


def test_more_undecided_draws_than_a_batch_holds(monkeypatch):
    made = lattice.table()
    draws = [made.edges[len(made.edges) // 2 + 3 * k] ^ (k << 200) for k in range(300)] * 7
    assert len(draws) > made.batch(len(draws))
    chosen(monkeypatch, draws, made)
    expected = [plain(made, u) for u in draws]
    assert made.block(b"", 0, len(draws)).tolist() == expected
    assert made.block_on(torch.device("cpu"), b"", 0, len(draws)).tolist() == expected


@given(
    weights=st.lists(st.integers(0, 50), min_size=2, max_size=40).filter(lambda w: sum(map(bool, w)) > 1),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_table_inverts_its_law(weights, data):
    made = table.Table.of(-3, weights)
    draws = data.draw(st.lists(st.integers(0, 2**256 - 1), min_size=1, max_size=30))
    draws += [u for edge in made.edges for u in (edge - 1, edge) if u >= 0]
    with pytest.MonkeyPatch.context() as patch:
        chosen(patch, draws, made)
        assert made.block(b"", 0, len(draws)).tolist() == [plain(made, u) for u in draws]


def test_a_law_without_noise_is_refused():
    for weights in ([5], [5, 0]):
        with pytest.raises(ValueError, match="one value"):
            table.Table.of(0, weights)


def test_both_paths_give_the_same_samples(monkeypatch):
    monkeypatch.setattr(lattice, "fresh_key", lambda: b"one key for both".ljust(32))
    for shape in ((), (0,), (1,), (7, 11), (70_001,)):
        on_processor = lattice.discrete_gaussian(shape)
        assert on_processor.dtype == np.int32
        assert on_processor.shape == shape
        for made in (lattice._on_device(torch.empty(shape)), lattice.discrete_gaussian_like(torch.empty(shape))):
            assert made.dtype == torch.int32
            assert np.array_equal(made.numpy(), on_processor)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_samples(monkeypatch):
    monkeypatch.setattr(lattice, "fresh_key", lambda: b"one key for both".ljust(32))
    made = lattice.discrete_gaussian_like(torch.empty(70_001, device="cuda"))
    assert made.is_cuda
    assert np.array_equal(made.cpu().numpy(), lattice.discrete_gaussian((70_001,)))


# --- Values. ---


def squared(ints: np.ndarray) -> int:
    return sum(int(value) ** 2 for value in ints.ravel())


@SHARED_ONLY
def test_known_answers_of_the_lattice():
    for row in json.loads(SHARED.read_text())["P_lattice"]:
        ints = lattice.quantise(np.array(row["x"]), row["gamma"], row["C"])
        assert ints.tolist() == row["ints"]
        assert squared(ints) <= row["int_norm_le"] ** 2


RECORDS = st.lists(
    st.one_of(st.floats(-1, 1), st.floats(-1e30, 1e30), st.sampled_from([0.0, -0.0, 5e-324, 1.0, -1.0, 1e300])),
    max_size=24,
)


@given(
    one=RECORDS, other=RECORDS, bound=st.floats(1e-6, 1e6), share=st.floats(1e-8, 4), kind=st.sampled_from("fd"),
    clipped=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_two_records_are_never_further_apart_than_twice_the_bound(one, other, bound, share, kind, clipped):
    """In exact arithmetic, for clipped records, for ones that somebody forgot to clip, and at every scale of the step."""
    step, size = bound * share, min(len(one), len(other))
    made = []
    for record in (one[:size], other[:size]):
        wide = np.array(record, dtype=np.float64)
        if clipped and size and (norm := math.hypot(*wide)) > 1e-300:
            wide *= bound / norm
        with np.errstate(over="ignore"):
            rows = wide.astype(kind)
        made.append(lattice.quantise(np.where(np.isfinite(rows), rows, 0), step, bound))
    limit = (Fraction(bound) / Fraction(step)) ** 2
    assert all(squared(ints) <= limit for ints in made)
    assert squared(made[0].astype(object) - made[1].astype(object)) <= 4 * limit


@given(record=st.lists(st.floats(-1, 1), min_size=1, max_size=30), steps=st.floats(1.5, 1e6))
@settings(max_examples=100, deadline=None)
def test_truncation_toward_zero_within_a_step(record, steps):
    wide = np.array(record) / max(1.0, math.hypot(*record)) * (1 - 1e-9)
    ints = lattice.quantise(wide, 1 / steps, 1.0)
    assert ints.dtype == np.int32
    for value, got in zip(wide.tolist(), ints.tolist(), strict=True):
        exact = Fraction(value) / Fraction(1 / steps)
        assert abs(got) <= abs(exact) + Fraction(1, 10**6)
        assert abs(exact) - abs(got) < 1 + Fraction(1, 10**6)
        assert got == 0 or (got > 0) == (value > 0)


def test_a_rounding_up_of_the_division_is_pulled_in():
    # 0.3 / 0.1 is 2.9999999999999996 exactly divided and 3.0 would be too long for the bound.
    step, bound = 0.1, 0.3
    ints = lattice.quantise(np.array([np.nextafter(0.3, 1)]), step, bound)
    assert Fraction(int(ints[0])) <= Fraction(bound) / Fraction(step)
    many = lattice.quantise(np.full(1 << 12, 1.0), 2.0**-20, 64 * (1 - 2**-40))
    assert squared(many) <= (Fraction(64 * (1 - 2**-40)) * 2**20) ** 2
    assert many.min() >= 2**20 - 2  # and by no more than it takes


def test_zeros_shapes_and_tiny_bounds():
    assert lattice.quantise(np.zeros((2, 3), dtype=np.float32), 0.5, 1.0).shape == (2, 3)
    assert lattice.quantise(np.zeros((0, 4)), 0.5, 1.0).shape == (0, 4)
    assert not lattice.quantise(np.array([0.9]), 2.0, 1.0).any()  # Less than one step: nothing is left of it.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        lattice.quantise(np.array([0.0, bad]), 1.0, 1.0)


@pytest.mark.parametrize(("step", "bound"), [(0, 1), (-1, 1), (math.nan, 1), (1, 0), (1, math.inf), (2.0**-31, 1)])
def test_impossible_steps_and_bounds_are_refused(step, bound):
    with pytest.raises(ValueError, match="step and bound"):
        lattice.quantise(np.zeros(2), step, bound)


@given(sigma=st.floats(1e-290, 1e290))
def test_the_noise_is_never_less_than_sigma(sigma):
    step = Fraction(lattice.step_for(sigma))
    assert step**2 * lattice.VARIANCE >= Fraction(sigma) ** 2
    assert float(step) <= sigma / lattice.SIGMA * (1 + 1e-14)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, 1e-300])
def test_a_sigma_without_a_lattice_is_refused(sigma):
    with pytest.raises(ValueError, match="sigma"):
        lattice.step_for(sigma)


def test_truncation_takes_next_to_nothing():
    """What a million steps are for: 64 rows of 576, at one half and at a tenth of the usual mu."""
    record = np.random.default_rng(1).standard_normal((64, 576))
    record /= np.linalg.norm(record)
    for mu, lost in ((1.67, 2e-4), (0.167, 2e-3)):
        step = lattice.step_for(2 / mu)
        kept = lattice.quantise(record, step, 1.0) * step
        assert np.linalg.norm(kept - record) < lost


def test_the_tables_part_of_delta_is_negligible():
    assert lattice.table_delta(0, 8.0) == 0.0
    assert lattice.table_delta(10**12, 32.0) < 1e-40
    assert lattice.table_delta(4 * 10**5, 128.0) < 1e-11 < lattice.table_delta(4 * 10**5, 145.0)
    assert lattice.table_delta(1, 1e4) == math.inf
    for bad in ((-1, 1.0), (1, -1.0), (1, math.nan)):
        with pytest.raises(ValueError, match="must be"):
            lattice.table_delta(*bad)
    # The table's distance to the law, measured, is inside what the bound counts for it.
    made = lattice.table()
    with mpmath.workprec(400):
        norm = mpmath.sqrt(2 * mpmath.pi) * lattice.WIDTH
        off = mpmath.mpf(0)
        for k, p in enumerate(probabilities(made), made.first):
            off += abs(mpmath.mpf(p) / 2**256 - mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * lattice.WIDTH**2)) / norm)
        assert off / 2 < len(made.edges) * mpmath.mpf(2) ** -256


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.floats(1e-4, 1e2))
def test_the_device_path_gives_the_same_integers(seed, bound, ratio):
    rows = np.random.default_rng(seed).standard_normal((3, 7)) * bound
    expected = lattice.quantise(rows, bound * ratio / 64, bound)
    found = lattice._quantise_on(torch.from_numpy(rows), bound * ratio / 64, bound)
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), expected)


def test_the_table_is_proven_up_to_where_the_lint_says():
    from securesplit.policy.lint import MOST_PROVEN

    assert lattice.table_delta(2**50, MOST_PROVEN) < 1e-13  # coordinates of a whole life, with room
