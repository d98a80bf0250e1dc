"""Planted faults in the defence are each caught from the traffic alone, and an honest one is not accused."""

from __future__ import annotations

import numpy as np
import pytest

from attacks.forensics import examine
from attacks.view import Key, Noise, Passage, ServerView

COUNT, LENGTH, WIDTH, CLIP, SIGMA = 24, 16, 64, 10.0, 12.0
TEXT = 11  # Rows of text; the rest is padding.


@pytest.fixture(scope="module")
def hidden():
    """States as models have them: a common part, a large first row, the rest random; far longer than the clip."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((COUNT, LENGTH, WIDTH)) + 2 * rng.standard_normal((LENGTH, WIDTH))
    rows[:, 0] *= 12
    return rows


def clipped(rows):
    return rows * np.minimum(1, CLIP / np.linalg.norm(rows.reshape(len(rows), -1), axis=1))[:, None, None]


def failed(rows, hidden, sigma=SIGMA, clip=CLIP, row_clip=None):
    seen = tuple(Passage(Key("p", i, 0), i, r.astype(np.float32), 0) for i, r in enumerate(rows))
    findings = examine(ServerView((), Noise(sigma, clip, row_clip), traffic=seen), hidden.mean(0))
    assert {f.name for f in findings} == {"O1 energy", "O1 reuse", "O1 reuse within", "O1 clip"}
    return {f.name for f in findings if not f.passed}


def noise(seed=2, shape=(COUNT, LENGTH, WIDTH)):
    return SIGMA * np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("seed", range(8))
def test_an_honest_defence_is_not_accused(hidden, seed):
    assert failed(clipped(hidden) + noise(seed), hidden) == set()


def test_noise_reused_across_steps(hidden):
    assert "O1 reuse" in failed(clipped(hidden) + noise(shape=(1, LENGTH, WIDTH)), hidden)


def test_noise_reused_once(hidden):
    z = noise()
    z[17, 5] = z[3, 5]
    assert failed(clipped(hidden) + z, hidden) == {"O1 reuse"}


def test_noise_reused_with_the_other_sign(hidden):
    z = noise()
    z[1] = -z[0]
    assert failed(clipped(hidden) + z, hidden) == {"O1 reuse"}


def test_noise_reused_in_the_next_row(hidden):
    assert "O1 reuse within" in failed(clipped(hidden) + noise(shape=(COUNT, 1, WIDTH)), hidden)


@pytest.mark.parametrize("part", [0.1, 0.5])
def test_too_little_noise(hidden, part):
    assert "O1 energy" in failed(clipped(hidden) + part * noise(), hidden)


def test_noise_only_on_padding(hidden):
    z = noise()
    z[:, :TEXT] = 0
    assert "O1 energy" in failed(clipped(hidden) + z, hidden)


def test_one_row_without_noise(hidden):
    z = noise()
    z[5, 3] = 0
    assert failed(clipped(hidden) + z, hidden) == {"O1 energy"}


def test_a_missing_clip(hidden):
    assert failed(hidden + noise(), hidden) == {"O1 clip"}


def test_a_missing_clip_of_single_rows(hidden):
    """Unit token: each row's norm is bounded, and a sequence's may be as long as the square root of its length."""
    bounded = hidden * np.minimum(1, CLIP / np.linalg.norm(hidden, axis=2))[..., None]
    assert failed(bounded + noise(), hidden, clip=None, row_clip=CLIP) == set()
    assert failed(hidden + noise(), hidden, clip=None, row_clip=CLIP) == {"O1 clip"}


def test_a_resent_release_is_no_reuse(hidden):
    rows = clipped(hidden) + noise()
    assert failed(np.concatenate([rows, rows[:4]]), hidden) == set()


def test_false_alarms_are_as_rare_as_is_said():
    """At a threshold of 1e-2 instead of 1e-6 an honest defence fails about as often as that, and not ten times as often."""
    import attacks.forensics as subject

    kept, subject._ALARM = subject._ALARM, 1e-2
    try:
        rows = np.zeros((4, 6, 32))
        seen = 0
        for seed in range(300):
            z = np.random.default_rng(seed).standard_normal(rows.shape)
            view = tuple(Passage(Key("p", i, 0), i, r.astype(np.float32), 0) for i, r in enumerate(z))
            seen += any(not f.passed for f in examine(ServerView((), Noise(1.0, None), traffic=view)))
    finally:
        subject._ALARM = kept
    assert seen <= 20, "three tests at 1e-2 each, over 300 honest recordings"


def test_without_noise_there_is_nothing_to_examine():
    assert examine(ServerView((), Noise(0.0, None))) == ()
