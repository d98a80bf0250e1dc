"""Masked vectors of all-zero updates look like coin tosses: a chi-square test for every byte of the word.

With an update of zeros a masked vector is its masks and nothing else, so whatever is not uniform in it is a fault of the
masks; the smallest weight and the largest one stand in its last word. Tested are the vectors of all clients over 20 seeds,
the differences of two clients' vectors (where their common mask counts twice), and what all seeds give together.

The decision. Each byte position of each vector is one chi-square test with 255 degrees of freedom over 100 001 bytes; both
tails count, because bytes that are too even are not random either. One run of this file makes T tests, and each is made at
FAMILY / T, so that by Bonferroni's inequality a perfect generator fails a run with probability at most FAMILY = 1e-6. Seeds
are fixed: the answer is the same in every run.

The power. A vector in which one bit stands at 1 in 52.5 % of the words is red (a control below), as are words without their
top bit, words whose low bits were lost in a float, and a vector that lacks its own mask once its pair masks are known. That
last one shows what this test cannot see: a vector that lacks one mask of several is still uniform. So every mask is also
tested alone, after all others were taken off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from scipy import stats

from securesplit.aggregate import client as client_module
from securesplit.aggregate.keys import mask_private, pair_key, self_key
from securesplit.aggregate.masks import add_streams
from tests.aggregate.hostile.kit import Masking, Play

DIM, SEEDS, FAMILY = 100_000, 20, 1e-6
MODES = {
    "plain": SEEDS,
    "64-bit": SEEDS,
    "blind": SEEDS,
    "sparse": 1,
}  # In a sparse round forty clients draw forty seeds.
TESTS = 4 * (7 * SEEDS * (4 + 8 + 4) + 40 * 4)
"""More than are made: every vector, every difference, every mask alone and everything together."""


def masked(mode: str, seed: object, *, dim: int = DIM) -> Play:
    """A round of clients that have nothing to say, up to stage 2."""
    play = Play(mode, seed=f"uniform|{mode}|{seed}", dim=dim, w_max=255, session_id=f"{seed!s:>16}".encode()[-16:])
    play.updates = {name: np.zeros(dim) for name in play.config.roster}
    play.weights = {name: (1, 255)[place % 2] for place, name in enumerate(play.config.roster)}
    play.begin()
    play.step()
    play.step()
    assert len(play.maskings) == len(play.config.roster)
    return play


def worst(vectors: Iterable[np.ndarray]) -> float:
    """The smallest p-value of all byte positions of all vectors, both tails."""
    return min((p for vector in vectors for p in by_byte(vector)), default=1.0)


def by_byte(vector: np.ndarray) -> Iterator[float]:
    for place in range(vector.itemsize):
        counts = np.bincount(vector.view("u1")[place :: vector.itemsize], minlength=256)
        expected = vector.size / 256
        statistic = float(((counts - expected) ** 2).sum() / expected)
        yield 2 * min(stats.chi2.sf(statistic, 255), stats.chi2.cdf(statistic, 255))


def uniform(*vectors: np.ndarray) -> bool:
    return worst(vectors) > FAMILY / TESTS


def test_the_statistic_is_scipys():
    vector = np.random.default_rng(3).integers(0, 1 << 32, 5000, dtype=np.uint32)
    low = np.bincount(vector & 255, minlength=256)
    p = stats.chisquare(low).pvalue
    assert next(by_byte(vector)) == pytest.approx(2 * min(p, 1 - p))


@pytest.mark.parametrize("mode", MODES)
def test_masked_zeros_are_uniform_in_every_byte(mode):
    everything = []
    for seed in range(MODES[mode]):
        play = masked(mode, seed)
        vectors = [m.vector for m in play.maskings]
        assert {v.dtype.itemsize for v in vectors} == {play.config.ring_bits // 8}
        assert uniform(*vectors)
        assert uniform(vectors[0] - vectors[1], vectors[-1] - vectors[-2])
        everything += vectors
    assert uniform(np.concatenate(everything))
    assert len({v.tobytes() for v in everything}) == len(everything)


def own_mask(play: Play, masking: Masking) -> bytes:
    return self_key(play.truths[masking.name][0].self_mask, masking.t2, masking.name)


def pair_masks(play: Play, masking: Masking) -> tuple[list[bytes], list[bytes]]:
    """Keys of the streams that the client added and subtracted."""
    private = mask_private(play.truths[masking.name][0].seed, play.config.digest)
    plus, minus = list[bytes](), list[bytes]()
    for other in masking.partners:
        key = pair_key(private, masking.peers.of(other).mask_key, masking.t2, masking.name, other)
        (plus if masking.name < other else minus).append(key)
    return plus, minus


@pytest.mark.parametrize("mode", ["plain", "64-bit", "sparse"])
def test_every_mask_alone_hides_the_vector(mode):
    play = masked(mode, "alone")
    masking = play.maskings[2]
    plus, minus = pair_masks(play, masking)
    alone = masking.vector.copy()
    add_streams(alone, minus, plus)
    assert uniform(alone), "its own mask"
    add_streams(alone, (), [own_mask(play, masking)])
    assert np.array_equal(alone, play.clients[masking.name].contribution), "without any mask it is the update"
    for add, take in [((key,), ()) for key in plus] + [((), (key,)) for key in minus]:
        one = alone.copy()
        add_streams(one, add, take)
        assert uniform(one), "one pair mask"


# Controls: what must be red is.


def test_a_vector_without_its_own_mask_is_red_once_the_pairs_are_known(monkeypatch):
    whole = client_module.mask_keys

    def forgetful(*arguments, **options):
        keys = whole(*arguments, **options)
        return type(keys)(keys.plus[1:], keys.minus)  # The first one is the client's own.

    monkeypatch.setattr(client_module, "mask_keys", forgetful)
    play = masked("plain", "forgetful")
    assert uniform(*(m.vector for m in play.maskings)), "the pair masks still hide it from whoever does not know them"
    for masking in play.maskings:
        plus, minus = pair_masks(play, masking)
        stripped = masking.vector.copy()
        add_streams(stripped, minus, plus)
        assert not uniform(stripped)


@pytest.mark.parametrize("mode", ["plain", "64-bit"])
def test_words_of_fewer_bits_are_red(mode):
    vector = masked(mode, "controls").maskings[0].vector
    size, word = vector.itemsize, vector.dtype.type
    assert uniform(vector)
    assert not uniform(vector % word(1 << (8 * size - 1))), "without the top bit"
    lost = word({4: 8, 8: 11}[size])
    assert not uniform(vector >> lost << lost), "what a float of as many bytes can hold"
    assert not uniform(vector * word(2))
    tilted = vector.copy()
    tilted[::20] |= word(1)
    assert not uniform(tilted), "one bit in 52.5 % of the words"
    assert not uniform(np.resize(vector[:256], vector.size)), "a short stream again and again"
