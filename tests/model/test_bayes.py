"""The server's decoder, against enumeration and against a loop without cache; nothing here shares its formulae."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.model.bayes import Channel, Prior, causal_filter, linear_mean, posterior, posterior_mean

V, D, SENTINEL = 11, 32, 0


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", tied=True, vocab_size=V)


@pytest.fixture(scope="module")
def log_unigram():
    weights = torch.arange(1.0, V + 1)
    return (weights / weights.sum()).log()


def noised(codes, tokens, sigma, seed=3):
    generator = torch.Generator().manual_seed(seed)
    rows = codes[tokens]
    return rows + sigma * torch.randn(rows.shape, generator=generator)


def some_tokens(count, length, seed=5):
    return torch.randint(V, (count, length), generator=torch.Generator().manual_seed(seed))


def test_the_likelihood_is_that_of_a_normal_distribution_up_to_a_constant_of_the_row():
    codes, sigma = torch.randn(V, 6, generator=torch.Generator().manual_seed(1)), 0.7
    rows = noised(codes, some_tokens(2, 4), sigma)
    ours = Channel(codes, sigma).log_likelihood(rows)
    theirs = torch.distributions.Normal(codes, sigma).log_prob(rows[..., None, :]).sum(-1)
    difference = ours - theirs
    assert ours.shape == (2, 4, V)
    assert torch.allclose(difference, difference[..., :1].expand_as(difference), atol=1e-4)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_a_channel_has_noise(sigma):
    with pytest.raises(ValueError, match="finite and positive"):
        Channel(torch.zeros(3, 2), sigma)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_is_a_share(share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Prior(torch.zeros(3), share)


@settings(deadline=None, max_examples=30)
@given(st.floats(-1e4, 1e4), st.sampled_from([0.0, 1.0, 1e2, 1e5]), st.integers(0, 99))
def test_a_posterior_is_a_distribution_whatever_the_scale(shift, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    likelihood = shift + scale * torch.randn(3, V, generator=generator)
    found = posterior(likelihood, torch.full((V,), -math.log(V)))
    assert found.exp().sum(-1).sub(1).abs().max() < 1e-4
    assert not found.isnan().any()
    assert torch.equal(found.gather(-1, likelihood.argmax(-1, keepdim=True))[..., 0], found.amax(-1))


def test_the_posterior_mean_weighs_embeddings_by_bayes_rule(log_unigram):
    table = torch.randn(V, 5, generator=torch.Generator().manual_seed(2))
    row, sigma = torch.randn(5, generator=torch.Generator().manual_seed(3)), 0.9
    numerators = [
        math.exp(float(log_unigram[v]) - float((row - table[v]).double().square().sum()) / (2 * sigma**2))
        for v in range(V)
    ]
    expected = sum(n / sum(numerators) * table[v].double() for v, n in enumerate(numerators))
    found = posterior_mean(posterior(Channel(table, sigma).log_likelihood(row), log_unigram), table)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_the_linear_guess_leaves_an_error_that_no_linear_map_of_the_row_explains(log_unigram):
    generator = torch.Generator().manual_seed(4)
    codes, table, sigma = torch.randn(V, 4, generator=generator), torch.randn(V, 6, generator=generator), 0.8
    channel, weight = Channel(codes, sigma), log_unigram.exp().double()
    # The map is affine; read it off at the origin and the unit vectors.
    origin = linear_mean(channel, torch.zeros(4), log_unigram, table).double()
    gain = linear_mean(channel, torch.eye(4), log_unigram, table).double() - origin
    error = table.double() - (codes.double() @ gain + origin)
    # E[error] = 0 and E[error y^T] = 0; the noise is independent of the token and adds -sigma^2 gain.
    assert (weight[:, None] * error).sum(0).abs().max() < 1e-5
    moment = torch.einsum("v,vd,vk->kd", weight, error, codes.double()) - sigma**2 * gain
    assert moment.abs().max() < 1e-5


def naive_filter(model, codes, sigma, rows, prior):
    """Double loop over positions, whole prefix again each time, plain probabilities in double precision."""
    table = model.get_input_embeddings().weight.double()
    out = []
    for row in rows.double():
        prefix = [table[SENTINEL]]
        for y in row:
            logits = model(inputs_embeds=torch.stack(prefix)[None].float()).logits[0, -1].double()
            expected = (1 - prior.share) * logits.softmax(-1) + prior.share * prior.log_unigram.double().exp()
            weight = expected * torch.exp(-(y - codes.double()).square().sum(-1) / (2 * sigma**2))
            prefix.append((weight / weight.sum()) @ table)
        out.append(torch.stack(prefix[1:]))
    return torch.stack(out)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_filter_equals_a_loop_without_cache(model, log_unigram, share):
    table = model.get_input_embeddings().weight.detach()
    sigma, prior = 0.03, Prior(log_unigram, share)
    rows = noised(table, some_tokens(2, 5), sigma)
    found = causal_filter(model, Channel(table, sigma), rows, prior, sentinel=SENTINEL)
    with torch.no_grad():
        assert torch.allclose(found.embeddings.double(), naive_filter(model, table, sigma, rows, prior), atol=1e-4)
    assert found.embeddings.shape == (2, 5, D)
    assert ((found.confidence > 0) & (found.confidence <= 1 + 1e-6)).all()


def test_a_position_does_not_depend_on_later_rows(model, log_unigram):
    table = model.get_input_embeddings().weight.detach()
    rows = noised(table, some_tokens(2, 6), 0.05)
    changed = rows.clone()
    changed[:, 4:] += 1.0
    channel, prior = Channel(table, 0.05), Prior(log_unigram)
    one, other = (causal_filter(model, channel, r, prior, sentinel=SENTINEL) for r in (rows, changed))
    assert torch.equal(one.embeddings[:, :4], other.embeddings[:, :4])
    assert not torch.equal(one.embeddings[:, 4:], other.embeddings[:, 4:])


def test_visits_see_the_prediction_before_each_row_is_read(model, log_unigram):
    table, tokens, seen = model.get_input_embeddings().weight.detach(), some_tokens(2, 4), []
    channel = Channel(table, 1e-4)  # No noise to speak of: the decoded prefix is the true one.
    causal_filter(
        model, channel, table[tokens], Prior(log_unigram), sentinel=SENTINEL, visit=lambda p: seen.append(p.clone())
    )
    with torch.no_grad():
        truth = model(torch.cat([torch.full((2, 1), SENTINEL), tokens], 1)).logits[:, :-1].softmax(-1)
    assert torch.allclose(torch.stack(seen, 1), truth, atol=1e-4)


def test_without_noise_all_is_recovered_and_under_noise_nothing(model, log_unigram):
    table, tokens = model.get_input_embeddings().weight.detach(), some_tokens(3, 6)
    clear = causal_filter(model, Channel(table, 1e-4), table[tokens], Prior(log_unigram), sentinel=SENTINEL)
    assert torch.equal(clear.tokens, tokens)
    assert torch.allclose(clear.embeddings, table[tokens], atol=1e-5)
    deaf = causal_filter(model, Channel(table, 1e6), table[tokens], Prior(log_unigram, 1.0), sentinel=SENTINEL)
    assert (deaf.tokens == log_unigram.argmax()).all()
    assert torch.allclose(deaf.embeddings, (log_unigram.exp() @ table).expand_as(deaf.embeddings), atol=1e-5)
