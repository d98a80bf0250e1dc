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


ROWS_ALONE = {"energy", "energy of all", "energy of a column", "energy of a place", "reuse", "reuse within"}
NAMES = {f"O1 {name}" for name in (*ROWS_ALONE, "clip", "clip of one")}


def passages(rows):
    return tuple(Passage(Key("p", i, 0), i, r.astype(np.float32), 0) for i, r in enumerate(rows))


def failed(rows, hidden, sigma=SIGMA, clip=CLIP, row_clip=None, codec="f32"):
    view = ServerView((), Noise(sigma, clip, row_clip), traffic=passages(rows), codec=codec)
    findings = examine(view, hidden.mean(0))
    assert {f.name for f in findings} == NAMES
    assert all(np.isfinite([f.statistic, f.threshold]).all() for f in findings)
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


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_too_little_noise(hidden, part):
    assert "O1 energy of all" in failed(clipped(hidden) + part * noise(), hidden)


def test_noise_only_on_padding(hidden):
    z = noise()
    z[:, :TEXT] = 0
    assert {"O1 energy", "O1 energy of a place"} <= failed(clipped(hidden) + z, hidden)


def test_one_row_without_noise(hidden):
    z = noise()
    z[5, 3] = 0
    assert failed(clipped(hidden) + z, hidden) == {"O1 energy"}


def test_a_missing_clip(hidden):
    assert failed(hidden + noise(), hidden) == {"O1 clip", "O1 clip of one"}


def test_a_missing_clip_of_single_rows(hidden):
    """Unit token: each row's norm is bounded, and a sequence's may be as long as the square root of its length."""
    bounded = hidden * np.minimum(1, CLIP / np.linalg.norm(hidden, axis=2))[..., None]
    assert failed(bounded + noise(), hidden, clip=None, row_clip=CLIP) == set()
    assert failed(hidden + noise(), hidden, clip=None, row_clip=CLIP) == {"O1 clip", "O1 clip of one"}


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
    assert seen <= 10, "1e-2 in all, over 300 honest recordings"


def test_without_noise_there_is_nothing_to_examine():
    assert examine(ServerView((), Noise(0.0, None))) == ()


def test_noise_that_comes_back_two_rows_later(hidden):
    """The rows of a release have two different noises in all; neighbours share none."""
    z = noise()
    z[:, 2::2], z[:, 3::2] = z[:, :1], z[:, 1:2]
    assert "O1 reuse within" in failed(clipped(hidden) + z, hidden)


def test_noise_that_moves_by_a_row_from_release_to_release(hidden):
    z = np.stack([np.roll(noise(shape=(LENGTH, WIDTH)), i % LENGTH, 0) for i in range(COUNT)])
    assert "O1 reuse" in failed(clipped(hidden) + z, hidden)


def test_noise_shared_late_in_a_long_recording(hidden):
    z = noise(shape=(200, LENGTH, WIDTH))
    z[64:] = z[64]
    assert "O1 reuse" in failed(clipped(np.tile(hidden, (9, 1, 1))[:200]) + z, hidden)


def test_coordinates_without_noise(hidden):
    z = noise()
    z[..., :12] = 0
    assert "O1 energy of a column" in failed(clipped(hidden) + z, hidden)


def test_one_record_that_was_not_clipped(hidden):
    rows = np.concatenate([hidden[:1], clipped(hidden)[1:]])
    assert "O1 clip of one" in failed(rows + noise(), hidden)


def test_a_wider_clip_as_far_as_the_public_direction_shows_it(hidden):
    rows = np.tile(clipped(hidden), (9, 1, 1))
    assert failed(2 * rows + noise(shape=rows.shape), hidden) == {"O1 clip"}
    assert failed(rows + noise(shape=rows.shape), hidden) == set()


@pytest.mark.parametrize("clip", [CLIP, 50 * SIGMA])
@pytest.mark.parametrize("codec", ["int8", "bf16"])
def test_rounding_accuses_nobody(hidden, codec, clip):
    """Rounded rows of padding, which are near zero, and rows with one coordinate as large as the clip allows."""
    x = np.zeros_like(hidden)
    x[:, :TEXT] = 0.01 * hidden[:, :TEXT]
    x[:12, 0, 3] = clip * 0.99
    rows = (x + noise()).astype(np.float32)
    if codec == "int8":
        scale = np.abs(rows).max(2, keepdims=True) / np.float32(127)
        rows = np.round(rows / scale) * scale
    else:
        rows = (rows.view(np.uint32) + np.uint32(0x8000) & np.uint32(0xFFFF0000)).view(np.float32)
    assert failed(rows, hidden, clip=clip, codec=codec) == set()


def test_rows_whose_rounding_swallows_the_noise_are_left_out(hidden):
    """One coordinate of 5000 sigma: int8 makes zeros of all others, under an honest defence with a huge clip."""
    rows = noise().astype(np.float32)
    rows[:2, 0, 3] = 5000 * SIGMA
    scale = np.abs(rows).max(2, keepdims=True) / np.float32(127)
    rows = np.round(rows / scale) * scale
    assert failed(rows, hidden, clip=6000 * SIGMA, codec="int8") == set()
    assert "O1 reuse" in failed(rows, hidden, clip=6000 * SIGMA), "under f32 two such rows are equal for no good reason"


def found_in(**fields):
    view = ServerView((), Noise(SIGMA, CLIP), **fields)
    findings = examine(view)
    return {f.name for f in findings}, {f.name for f in findings if not f.passed}


def test_all_gradients_of_the_traffic_are_examined():
    """They have noise of their own size, and must not carry that of the activations."""
    z, own = noise(), noise(seed=3) / SIGMA

    def look(gradients):
        traffic = tuple(
            Passage(Key("p", i, 0), i, r.astype(np.float32), 0, gradient=(0.5 * g).astype(np.float32))
            for i, (r, g) in enumerate(zip(z, gradients, strict=True))
        )
        return found_in(traffic=traffic, gradient_noise=Noise(0.5, 1.0))

    names, bad = look(own)
    assert names == {f"{at} {name}" for at in ("O1", "O3") for name in ROWS_ALONE} | {"O1-O3 reuse"}
    assert bad == set()
    bare = own.copy()
    bare[COUNT - 1] = 0
    assert "O3 energy" in look(bare)[1]
    assert look(np.concatenate([own[:-1], z[:1] / SIGMA]))[1] == {"O1-O3 reuse"}


def test_decoded_tokens_are_examined():
    rows = noise(seed=4, shape=(40, 1, WIDTH)) / SIGMA
    own = Noise(3.0, 2.0)
    names, bad = found_in(traffic=passages(noise()), decoded=passages(3 * rows), decode_noise=own)
    assert {"O8 energy", "O8 reuse", "O1-O8 reuse"} <= names
    assert bad == set()
    assert "O8 energy" in found_in(traffic=passages(noise()), decoded=passages(0.1 * rows), decode_noise=own)[1]
    same = passages(3 * np.concatenate([rows, rows[:1] + 1e-3]))
    assert found_in(traffic=passages(noise()), decoded=same, decode_noise=own)[1] == {"O8 reuse"}


def test_decoded_tokens_that_no_policy_pays_for():
    assert found_in(traffic=passages(noise()), decoded=passages(noise(shape=(3, 1, WIDTH))))[1] == {"O8 unpaid"}
