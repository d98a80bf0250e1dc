"""A proof says what a walk over the vocabulary says, and recovery is exact under any error below the radius."""

from __future__ import annotations

import pytest
import torch

from attacks.certify import certified_radius, proofs, prove
from attacks.likelihood import Errors, errors_of

V, T = 120, 6


@pytest.fixture(scope="module", params=[0, 2])
def world(fronts, draw, request):
    front, _ = fronts(request.param)
    tokens = draw(5, T, seed=1)
    with torch.inference_mode():
        return front, tokens, front(tokens)


def every(front, prefix):
    """Oracle: no cache: the states of all tokens after a prefix, (V, D)."""
    with torch.inference_mode():
        return front(torch.cat([prefix.expand(V, -1), torch.arange(V)[:, None]], 1))[:, -1]


def test_the_radius_is_half_the_distance_to_the_nearest_other_token(world):
    front, tokens, _ = world
    for sequence, position in ((0, 0), (1, 3)):
        prefix, token = tokens[sequence, :position], int(tokens[sequence, position])
        states = every(front, prefix)
        others = [i for i in range(V) if i != token]
        expected = float((states[others] - states[token]).norm(dim=1).min()) / 2
        assert certified_radius(front, prefix, token, vocabulary=V) == pytest.approx(expected, rel=1e-3)
        assert certified_radius(front, prefix, token, vocabulary=V, factor=0.5) == pytest.approx(expected / 2, rel=1e-3)


def test_below_the_radius_the_nearest_state_is_always_the_right_one(world):
    """SIPIT, Theorem 3.2; and just above it, in the worst direction, it no longer is."""
    front, tokens, hidden = world
    prefix, token = tokens[2, :4], int(tokens[2, 4])
    radius = certified_radius(front, prefix, token, vocabulary=V)
    states, generator = every(front, prefix), torch.Generator().manual_seed(1)
    for _ in range(200):
        error = torch.randn(hidden.shape[-1], generator=generator)
        seen = hidden[2, 4] + 0.999 * radius * error / error.norm()
        assert int((states - seen).norm(dim=1).argmin()) == token
    distance = (states - states[token]).norm(dim=1)
    distance[token] = torch.inf
    worst = states[int(distance.argmin())] - states[token]
    seen = states[token] + 1.01 * radius * worst / worst.norm()
    assert int((states - seen).norm(dim=1).argmin()) != token


def test_noiseless_rows_are_proved_and_wrong_tokens_are_not(world):
    front, tokens, hidden = world
    found = proofs(front, hidden, tokens, codec="f32", vocabulary=V, most=4)
    assert len(found) == 4
    assert all(proof.proven and proof.rivals == 0 for proof in found)
    wrong = proofs(front, hidden, (tokens + 1) % V, codec="f32", vocabulary=V, most=4)
    assert not any(proof.proven for proof in wrong)
    assert proofs(front, hidden, tokens, codec="f32", vocabulary=V, most=0) == []


def test_rows_rounded_to_a_byte_are_proved_by_the_box(world):
    front, tokens, hidden = world
    scale = hidden.abs().amax(-1, keepdim=True) / 127
    found = proofs(front, (hidden / scale).round() * scale, tokens, codec="int8", vocabulary=V, most=6)
    assert all(proof.proven for proof in found)


def test_noise_beyond_the_radius_leaves_rivals(world):
    front, tokens, hidden = world
    prefix, token = tokens[0, :2], int(tokens[0, 2])
    radius = certified_radius(front, prefix, token, vocabulary=V)
    for share, proven in ((0.01, True), (20.0, False)):
        sigma = share * radius / hidden.shape[-1] ** 0.5
        row = hidden[0, 2] + sigma * torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(3))
        proof = prove(front, prefix, token, row, errors_of(row, sigma, "f32"), vocabulary=V)
        assert proof.proven is proven
        assert proof.radius == pytest.approx(radius, rel=1e-4)


def test_a_box_that_holds_two_states_proves_neither(world):
    front, tokens, hidden = world
    prefix, token = tokens[0, :2], int(tokens[0, 2])
    wide = Errors(0.0, torch.full_like(hidden[0, 2], 1e3), torch.tensor(1.0))
    proof = prove(front, prefix, token, hidden[0, 2], wide, vocabulary=V)
    assert proof.explains
    assert proof.rivals == V - 1
    assert not proof.proven
