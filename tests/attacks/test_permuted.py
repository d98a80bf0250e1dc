"""Permutations hide nothing: every token, the rows' order and the columns' order come back."""

from __future__ import annotations

import pytest
import torch

from attacks.config import config
from attacks.knowledge import learn
from attacks.permuted import ATTACKS, decode_permuted
from attacks.prior import prior_from
from attacks.ridge import fit
from attacks.threat import Threat
from attacks.view import Key, Noise, PublicModel, ServerView, Sighting

V, T, N = 120, 9, 4
NONE = Noise(0.0, None)


@pytest.fixture(scope="module")
def world(fronts, draw):
    def make(layers):
        front, embedding = fronts(layers)
        tokens = draw(N, T, seed=1)
        with torch.inference_mode():
            return front, embedding, tokens, front(tokens), draw(150, T, seed=2)

    return make


def shuffled(rows, kind, seed):
    """(T, D) with rows, columns or both in a secret order; and the two orders."""
    generator = torch.Generator().manual_seed(seed)
    order, columns = (
        torch.randperm(rows.shape[0], generator=generator),
        torch.randperm(rows.shape[1], generator=generator),
    )
    order = order if kind != "columns" else torch.arange(rows.shape[0])
    columns = columns if kind != "rows" else torch.arange(rows.shape[1])
    return rows[order][:, columns], order, columns


@pytest.mark.parametrize("kind", ["rows", "columns", "both"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_permuted_sequence_is_read_whole(world, search, layers, kind):
    front, embedding, tokens, hidden, public = world(layers)
    inverter, layer = fit(front, embedding, public, NONE)
    for number in range(N):
        rows, order, columns = shuffled(hidden[number], kind, number)
        found = decode_permuted(front, rows, inverter.propose, layer, search, kind, vocabulary=V)
        assert torch.equal(found.tokens, tokens[number])
        assert found.unresolved == 0
        assert torch.equal(order[found.order], torch.arange(T)), "the row that each token was matched with"
        if kind != "rows":
            assert torch.equal(columns[found.columns], torch.arange(rows.shape[1]))


def test_at_an_embedding_cut_shuffled_rows_give_the_bag_of_tokens(world, search):
    """There every order explains the rows equally: nothing but the bag can be had, and the bag is."""
    front, embedding, tokens, hidden, public = world(0)
    inverter, layer = fit(front, embedding, public, NONE)
    rows, _, _ = shuffled(hidden[0], "both", 5)
    found = decode_permuted(front, rows, inverter.propose, layer, search, "both", vocabulary=V)
    assert sorted(found.tokens.tolist()) == sorted(tokens[0].tolist())


def test_rows_of_no_text_are_not_resolved(world, search):
    front, embedding, _, hidden, public = world(1)
    inverter, layer = fit(front, embedding, public, NONE)
    noise = 3 * torch.randn(hidden[0].shape, generator=torch.Generator().manual_seed(0)) * hidden.std()
    found = decode_permuted(front, noise, inverter.propose, layer, search, "both", vocabulary=V)
    assert found.unresolved == T


def test_the_attacks_run_where_the_view_says_so_and_nowhere_else(world):
    front, embedding, tokens, hidden, public = world(1)
    prior = prior_from([str(i) for i in range(len(public))], lambda i: public[int(i)].tolist(), V)
    profile = config().profiles["smoke"].model_copy(update={"rows": 1200})
    for attack, kind in zip(ATTACKS, ("rows", "columns", "both"), strict=True):
        assert attack.name in config().attacks
        rows = [shuffled(one, kind, i)[0].contiguous().numpy() for i, one in enumerate(hidden)]
        sightings = tuple(Sighting(Key("a", 0, i), row, row, 1) for i, row in enumerate(rows))
        view = ServerView(sightings, NONE, permuted=kind)
        assert "nothing is permuted" in str(attack.blocked(ServerView(sightings, NONE), Threat()))
        assert "noise" in str(attack.blocked(ServerView(sightings, Noise(1.0, None), permuted=kind), Threat()))
        assert [other.blocked(view, Threat()) is None for other in ATTACKS] == [other is attack for other in ATTACKS]
        answer = attack.run(view, learn(PublicModel(front, embedding), prior, view, profile), lambda *_: None)
        assert torch.equal(torch.tensor(answer.tokens), tokens)
        assert answer.unresolved == 0
