"""List decoding, against enumeration of every sequence."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from securesplit.model.bayes import Channel, Prior
from securesplit.model.hypotheses import Hypotheses, list_decode, vote

V, T, SENTINEL = 5, 3, 0
ALL = torch.tensor(list(itertools.product(range(V), repeat=T)))


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", tied=True, vocab_size=V)


@pytest.fixture(scope="module")
def prior():
    weights = torch.arange(1.0, V + 1)
    return Prior((weights / weights.sum()).log(), 0.3)


@pytest.fixture(scope="module")
def channel(model):
    return Channel(model.get_input_embeddings().weight.detach(), 0.05)


@pytest.fixture(scope="module")
def rows(channel):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(V, (4, T), generator=generator)
    return channel.codes[tokens] + channel.sigma * torch.randn(4, T, channel.codes.shape[1], generator=generator)


@torch.no_grad()
def exact(model, channel, rows, prior):
    """(N, V^T) posterior of every sequence, from whole forward passes in double precision."""
    ids = torch.cat([torch.full((len(ALL), 1), SENTINEL), ALL], 1)
    p = model(ids).logits[:, :-1].double().softmax(-1).gather(-1, ALL[..., None])[..., 0]
    mixed = (1 - prior.share) * p + prior.share * prior.log_unigram.double().exp()[ALL]
    squares = (rows.double()[:, None] - channel.codes.double()[ALL]).square().sum((-1, -2))
    weight = mixed.prod(-1) * torch.exp(-squares / (2 * channel.sigma**2))
    return weight / weight.sum(-1, keepdim=True)


def find(tokens):
    return (tokens * torch.tensor([V**2, V, 1])).sum(-1)


def test_a_list_as_wide_as_everything_is_the_exact_posterior(model, channel, rows, prior):
    found = list_decode(model, channel, rows, prior, sentinel=SENTINEL, width=V**T)
    truth = exact(model, channel, rows, prior)
    assert torch.equal(find(found.tokens).sort(-1).values, torch.arange(V**T).expand(4, -1))
    assert torch.allclose(found.log_weight.double().exp(), truth.gather(1, find(found.tokens)), atol=1e-5)
    # And so is the vote: the marginal of each position.
    marginal = torch.stack([truth[:, ALL[:, t] == v].sum(-1) for t in range(T) for v in range(V)], -1)
    assert torch.equal(vote(found), marginal.view(4, T, V).argmax(-1))


def test_a_list_of_one_is_greedy_decoding(model, channel, rows, prior):
    found = list_decode(model, channel, rows, prior, sentinel=SENTINEL, width=1)
    for row, tokens in zip(rows, found.tokens[:, 0], strict=True):
        prefix = [SENTINEL]
        for y in row:
            with torch.no_grad():
                p = model(torch.tensor([prefix])).logits[0, -1].double().softmax(-1)
            mixed = (1 - prior.share) * p + prior.share * prior.log_unigram.double().exp()
            score = mixed.log() - (y - channel.codes).double().square().sum(-1) / (2 * channel.sigma**2)
            prefix.append(int(score.argmax()))
        assert prefix[1:] == tokens.tolist()
    assert torch.equal(found.log_weight, torch.zeros(4, 1))


@pytest.mark.parametrize("width", [3, 7])
def test_a_list_keeps_what_a_plain_beam_search_keeps(model, channel, rows, prior, width):
    found = list_decode(model, channel, rows, prior, sentinel=SENTINEL, width=width)
    for n, row in enumerate(rows):
        beam = [(0.0, [SENTINEL])]
        for y in row:
            likelihood = -(y - channel.codes).double().square().sum(-1) / (2 * channel.sigma**2)
            grown = []
            for score, prefix in beam:
                with torch.no_grad():
                    p = model(torch.tensor([prefix])).logits[0, -1].double().softmax(-1)
                mixed = (1 - prior.share) * p + prior.share * prior.log_unigram.double().exp()
                grown += [(score + float(mixed[v].log() + likelihood[v]), [*prefix, v]) for v in range(V)]
            beam = sorted(grown, reverse=True)[:width]
        assert [prefix[1:] for _, prefix in beam] == found.tokens[n].tolist()
        total = math.log(sum(math.exp(score - beam[0][0]) for score, _ in beam)) + beam[0][0]
        assert [score - total for score, _ in beam] == pytest.approx(found.log_weight[n].tolist(), abs=1e-4)


def test_visits_carry_the_models_own_prediction_after_each_prefix(model, channel, rows, prior):
    seen = []

    def visit(hypotheses, probability):
        seen.append((hypotheses, probability.clone()))

    list_decode(model, channel, rows, prior, sentinel=SENTINEL, width=6, recombine=1, visit=visit)
    assert [h.tokens.shape[-1] for h, _ in seen] == [1, 2, 3]
    for hypotheses, probability in seen:
        flat = hypotheses.tokens.flatten(0, 1)
        with torch.no_grad():
            logits = model(torch.cat([torch.full((len(flat), 1), SENTINEL), flat], 1)).logits[:, -1]
        there = hypotheses.log_weight.isfinite().flatten()
        assert torch.allclose(probability.flatten(0, 1)[there], logits.softmax(-1)[there], atol=1e-5)
        assert torch.allclose(hypotheses.log_weight.exp().sum(-1), torch.ones(4), atol=1e-5)


@pytest.mark.parametrize("recombine", [1, 2])
def test_recombination_leaves_no_two_equal_tails_and_loses_no_weight(model, channel, rows, prior, recombine):
    width = V**T  # Wide enough that only merging removes anything.
    found = list_decode(model, channel, rows, prior, sentinel=SENTINEL, width=width, recombine=recombine)
    for n in range(len(rows)):
        there = found.log_weight[n].isfinite()
        tails = [tuple(tail) for tail in found.tokens[n, there, -recombine:].tolist()]
        assert len(tails) == len(set(tails)) == V**recombine
    assert torch.allclose(found.log_weight.exp().sum(-1), torch.ones(4), atol=1e-5)


def test_recombination_longer_than_the_text_changes_nothing(model, channel, rows, prior):
    plain = list_decode(model, channel, rows, prior, sentinel=SENTINEL, width=6)
    same = list_decode(model, channel, rows, prior, sentinel=SENTINEL, width=6, recombine=9)
    assert torch.equal(plain.tokens, same.tokens)
    assert torch.allclose(plain.log_weight, same.log_weight, atol=1e-5)


def test_a_list_wider_than_the_vocabulary_starts_with_empty_places(model, channel, rows, prior):
    filled = []
    list_decode(
        model,
        channel,
        rows,
        prior,
        sentinel=SENTINEL,
        width=9,
        visit=lambda h, _: filled.append(h.log_weight.isfinite()),
    )
    assert filled[0].sum(-1).tolist() == [V] * 4
    assert filled[1].all()


def test_a_vote_weighs_hypotheses():
    tokens = torch.tensor([[[1, 2], [3, 2], [3, 4]]])
    hypotheses = Hypotheses(tokens, torch.tensor([[0.4, 0.35, 0.25]]).log())
    assert vote(hypotheses).tolist() == [[3, 2]]
