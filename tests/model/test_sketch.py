"""The measured residual against the true one from whole matrices, through fixed-point sums of the test's own."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.model.lora import AdapterTensor, Layout
from securesplit.model.sketch import sketch_size, sketched, unsketched


def layout_of(shapes, rank):
    """A and B of some layers, in the order of a flat vector: by layer, A before B."""
    rows = []
    for i, (out, columns) in enumerate(shapes):
        stem = f"model.layers.{i}.self_attn.q_proj"
        rows += [
            AdapterTensor(f"{stem}.lora_A.weight", i, (rank, columns)),
            AdapterTensor(f"{stem}.lora_B.weight", i, (out, rank)),
        ]
    return Layout(tuple(rows))


def matrices(flat, shapes, rank):
    found, start = [], 0
    for out, columns in shapes:
        a = flat[start : start + rank * columns].reshape(rank, columns)
        start += rank * columns
        found.append((a, flat[start : start + out * rank].reshape(out, rank)))
        start += out * rank
    return found


def true_residual(start, moves, weights, shapes, rank):
    """||mean(BA) - mean(B) mean(A)|| / ||mean(BA)|| with every weight of every layer."""
    held = [matrices(start + move, shapes, rank) for move in moves]
    mean = matrices(start + np.average(moves, axis=0, weights=weights), shapes, rank)
    missed = wanted = 0.0
    for i, (a, b) in enumerate(mean):
        products = sum(w * (h[i][1] @ h[i][0]) for w, h in zip(weights, held, strict=True)) / sum(weights)
        missed += ((products - b @ a) ** 2).sum()
        wanted += (products**2).sum()
    return np.sqrt(missed / wanted)


def ring_mean(vectors, weights, *, clip, steps):
    """What a secure sum gives: rounded to a grid, then added with integer weights."""
    words = [np.rint(np.clip(v, -clip, clip) / clip * steps).astype(np.int64) for v in vectors]
    total = sum(w * v for w, v in zip(weights, words, strict=True))
    return total * clip / (steps * sum(weights))


def measured(start, moves, weights, layout, *, clip=1.0, steps=1 << 21, number=0):
    told = {"seed": 7, "number": number, "bound": clip}
    vectors = [sketched(move, layout, **told) for move in moves]
    assert all(v.shape == (layout.size + sketch_size(layout),) for v in vectors)
    assert all(np.array_equal(v[: layout.size], m) for v, m in zip(vectors, moves, strict=True))
    assert all(np.abs(v[layout.size :]).max() <= clip for v in vectors)
    return unsketched(start, ring_mean(vectors, weights, clip=clip, steps=steps), layout, **told)


def case(seed, *, clients, rank, shapes, size, spread=1.0):
    generator = np.random.default_rng(seed)
    layout = layout_of(shapes, rank)
    start = generator.normal(scale=0.1, size=layout.size)
    common = generator.normal(scale=size, size=layout.size)
    moves = [common + generator.normal(scale=spread * size, size=layout.size) for _ in range(clients)]
    weights = generator.integers(1, 256, size=clients).tolist()
    return layout, start, moves, weights


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    clients=st.integers(3, 8),
    rank=st.integers(1, 6),
    layers=st.integers(1, 6),
    size=st.sampled_from([1e-1, 1e-2, 1e-3]),
)
def test_the_measured_residual_is_the_true_one(seed, clients, rank, layers, size):
    shapes = [(int(out), int(columns)) for out, columns in np.random.default_rng(seed).integers(8, 60, (layers, 2))]
    layout, start, moves, weights = case(seed, clients=clients, rank=rank, shapes=shapes, size=size)
    mean, residual = measured(start, moves, weights, layout)
    assert np.abs(mean - np.average(moves, axis=0, weights=weights)).max() <= 1 / (2 << 21) + 1e-12
    truth = true_residual(start, moves, weights, shapes, rank)
    assert truth > 0
    assert residual.clipped == 0
    assert (
        0.5 * truth <= residual.relative <= 1.8 * truth
    )  # One layer of rank one is the worst for 32 by 32 directions.


def test_over_many_layers_it_is_right_to_a_few_percent():
    shapes = [(64, 48)] * 28
    layout, start, moves, weights = case(3, clients=5, rank=8, shapes=shapes, size=1e-2)
    truth = true_residual(start, moves, weights, shapes, 8)
    found = [measured(start, moves, weights, layout, number=n)[1].relative for n in range(5)]
    assert len(set(found)) == 5, "every round looks along directions of its own"
    assert found == pytest.approx([truth] * 5, rel=0.08)
    assert truth > 1e-3


def test_moves_below_the_grid_of_a_coordinate_are_still_seen():
    """Products of 1e-4 and 1e-4 are a fiftieth of a step of the ring; the fine part of the sketch sees them."""
    shapes = [(64, 48)] * 6
    layout, start, moves, weights = case(4, clients=4, rank=4, shapes=shapes, size=3e-4)
    truth = true_residual(start, moves, weights, shapes, 4)
    assert measured(start, moves, weights, layout)[1].relative == pytest.approx(truth, rel=0.2)


@pytest.mark.parametrize("still", ["A", "B", "clients"])
def test_where_one_factor_stands_still_or_all_move_alike_nothing_is_missed(still):
    shapes = [(40, 32)] * 4
    layout, start, moves, weights = case(
        5, clients=4, rank=3, shapes=shapes, size=1e-2, spread=0.0 if still == "clients" else 1.0
    )
    if still != "clients":
        for move in moves:
            for a, b in matrices(move, shapes, 3):
                (a if still == "A" else b)[:] = 0
    assert true_residual(start, moves, weights, shapes, 3) < 1e-12
    assert measured(start, moves, weights, layout)[1].relative < 1e-4
    different = case(5, clients=4, rank=3, shapes=shapes, size=1e-2)
    assert measured(*different[1:], different[0])[1].relative > 1e-3


@pytest.mark.parametrize("bound", [1e-3, 1.0, 50.0])
def test_the_scale_follows_the_bound(bound):
    """Moves of the size of the bound fit; one client beyond it is told, by its weight."""
    shapes = [(40, 32)] * 4
    layout, start, moves, weights = case(6, clients=3, rank=3, shapes=shapes, size=bound / 8)
    start = start * 0
    moves = [np.clip(move, -bound, bound) for move in moves]
    residual = measured(start, moves, weights, layout, clip=bound)[1]
    assert residual.clipped == 0
    assert residual.relative == pytest.approx(true_residual(start, moves, weights, shapes, 3), rel=0.25)
    moves[1][0] = 1.5 * bound
    residual = measured(start, moves, weights, layout, clip=bound)[1]
    assert residual.clipped == pytest.approx(weights[1] / sum(weights))
    assert "may be more" in residual.told


def test_products_that_do_not_fit_are_clipped_and_told():
    """All coordinates at the bound and along the directions that are asked for: the worst there is."""
    shapes = [(64, 64)]
    layout = layout_of(shapes, 1)
    from securesplit.model import sketch

    left, right = sketch._pairs(layout)[0].signs(7, 0)
    move = np.concatenate([right[:, 0], left[:, 0]])
    residual = measured(np.zeros(layout.size), [move, 0 * move, 0 * move], [1, 1, 2], layout)[1]
    assert residual.clipped == pytest.approx(0.25)


def test_nothing_at_all_is_zero_and_no_warning():
    layout = layout_of([(8, 8)], 2)
    zero = np.zeros(layout.size)
    assert measured(zero, [zero] * 3, [1] * 3, layout)[1].relative == 0
    broken = zero.copy()
    broken[3], broken[4] = np.nan, np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = sketched(broken, layout, seed=7, number=0, bound=1.0)
    assert np.isnan(out[3]), "left to the gate, which makes all of it zeros"
    assert np.isinf(out[4])
