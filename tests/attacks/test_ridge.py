"""The inverter ranks well where it can, and its form is chosen on held-out rows with the noise on."""

from __future__ import annotations

import pytest
import torch

from attacks.ridge import fit, layer_statistics
from attacks.view import Noise


def test_at_an_embedding_cut_the_inverse_is_exact(fronts, draw):
    front, embedding = fronts(0)
    inverter, _ = fit(front, embedding, draw(100, 12, seed=2), Noise(0.0, None))
    every = torch.arange(1, len(embedding))
    assert torch.equal(inverter.propose(embedding[every], 3, 1)[:, 0], every)
    assert torch.equal(inverter.propose(embedding[every], 0, 1)[:, 0], every)


def test_at_an_embedding_cut_the_estimate_is_the_embedding(fronts, draw):
    front, embedding = fronts(0)
    inverter, _ = fit(front, embedding, draw(100, 12, seed=2), Noise(0.0, None))
    seen = torch.unique(draw(100, 12, seed=2))
    assert torch.allclose(inverter.estimate(embedding[seen], 3), embedding[seen], atol=1e-2)


def test_proposals_are_different_tokens_best_first(fronts, draw):
    front, embedding = fronts(1)
    inverter, _ = fit(front, embedding, draw(100, 12, seed=2), Noise(0.0, None))
    rows = front(draw(5, 12, seed=3))[:, 4].detach()
    ten, all_ = inverter.propose(rows, 4, 10), inverter.propose(rows, 4, 10_000)
    assert torch.equal(ten, all_[:, :10])
    assert all(len(set(row.tolist())) == len(embedding) for row in all_)


def test_recall_on_held_out_rows_falls_with_the_noise(fronts, draw):
    front, embedding = fronts(1)
    public = draw(150, 12, seed=2)
    recalls = [fit(front, embedding, public, Noise(sigma, 1e9))[0].recall for sigma in (0.0, 2.0, 50.0)]
    assert recalls[0] > 1.5 * recalls[2]
    assert recalls == sorted(recalls, reverse=True)


def test_the_clipping_factor_is_estimated_from_public_norms():
    hidden = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[6.0, 8.0], [0.0, 0.0]]])  # Frobenius norms 5 and 10.
    layer = layer_statistics(hidden, hidden[:, 0], Noise(1.0, 5.0))
    assert layer.factor == pytest.approx(0.75)  # (1 + 1/2) / 2
    assert layer.factor_std == pytest.approx(0.35355, abs=1e-4)
    assert layer_statistics(hidden, hidden[:, 0], Noise(0.0, None)).factor == 1.0
