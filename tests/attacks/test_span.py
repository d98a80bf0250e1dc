"""The span check: everything where theory says so, nothing where there is nothing, and one step of AdamW in between."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from attacks.adamw import EPS, backwards, is_one_step
from attacks.config import config, settings_of
from attacks.knowledge import learn
from attacks.prior import prior_from
from attacks.round_start import round_start, token_readers
from attacks.span import ATTACKS, Rows, Settings, Space, join, span
from attacks.threat import Threat
from attacks.view import Noise, PublicModel, ServerView
from scripts.span.lab import Lab, Noised, job_of
from securesplit.cli.model import default_cache
from securesplit.data.notes import ward_notes
from securesplit.model.lora import adapter_layout, read_adapters
from securesplit.model.plan import CutPlan
from securesplit.model.resolve import resolve_model
from securesplit.model.split import split_model
from securesplit.model.store import load_back, load_front, load_middle, load_tokenizer
from securesplit.server.build import build_core
from securesplit.server.recording import SumRecords
from tests.e2e.house import build_house, policy_of
from tests.e2e.test_rounds import train_all

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# A small alpha makes gradients small, as those of a trained model are; the tiny random one's are a thousand times larger.
SMALL = 0.05


@pytest.fixture(scope="module")
def parts(model_dirs):
    """Fresh A, B and C of the tiny model, cut after two layers."""
    directory = model_dirs(2)
    return lambda: (load_front(directory), load_middle(directory), load_back(directory))


@pytest.fixture(scope="module")
def tuned():
    return settings_of("dager", Settings)


@pytest.fixture(scope="module")
def lab(parts):
    def make(**options):
        options = {"rank": 24, "cut": (2, 1), "targets": ATTENTION, **options}
        return Lab(*parts(), job_of(**options))

    return make


@pytest.fixture(scope="module")
def attack(parts, tuned):
    """``attack(found, *earlier)``: bag and sequences, from public facts alone."""

    front, _, back = parts()  # Whoever attacks copies them.

    def run(found, *earlier):
        return span(found, round_start(front, back, found, [*earlier, found]), tuned)

    return run


def texts(count, length, seed=0):
    """Records of distinct tokens, so that their number is known."""
    order = torch.randperm(119, generator=torch.Generator().manual_seed(seed)) + 1
    return [order[i * length : (i + 1) * length].tolist() for i in range(count)]


def shown(records):
    """The tokens that a gradient shows: the last one of a record predicts nothing."""
    return {token for record in records for token in record[:-1]}


@pytest.mark.parametrize("sharing", ["alternating", "core"])
@pytest.mark.parametrize("clients", [1, 2])
def test_the_textbook_gradient_shows_every_token_and_its_place(lab, attack, sharing, clients):
    made = lab(sharing=sharing)
    records = texts(clients, 8)
    found = made.round([[record] for record in records], 0, "gradient")
    bag, grown = attack(found)
    assert set(bag) == shown(records)
    assert {tuple(record[:-1]) for record in records} <= set(grown)


def test_a_later_round_shows_inputs_through_factor_a(lab, attack):
    made, records = lab(), texts(2, 8)
    first = made.round([[record] for record in texts(3, 6, seed=5)], 0, "steps")
    made.advance(first)
    found = made.round([[record] for record in records], 1, "gradient")
    assert all("lora_A" in name for name in found.names)
    bag, grown = attack(found, first)
    assert set(bag) == shown(records)
    assert {tuple(record[:-1]) for record in records} <= set(grown)


def test_factor_a_has_no_gradient_before_b_has_moved(lab, attack):
    found = lab(sharing="share-a").round([[record] for record in texts(1, 8)], 0, "gradient")
    assert not any(tensor.any() for tensor in found.tensors)
    assert attack(found) == ((), ())


def test_the_spans_of_an_attention_are_joined_for_factor_a(lab, attack):
    """Rank 4 by itself holds 4 tokens; three projections of one input hold 9 of them together."""
    made, records = lab(rank=4), texts(1, 10)
    first = made.round([[record] for record in texts(3, 6, seed=5)], 0, "steps")
    made.advance(first)
    bag, _ = attack(made.round([records], 1, "gradient"), first)
    assert set(bag) == shown(records)


@pytest.mark.parametrize("length", [12, 30])
def test_with_more_tokens_than_rank_nothing_is_claimed_rather_than_something_wrong(lab, attack, length):
    records = texts(1, length)
    bag, _ = attack(lab(rank=4).round([records], 0, "gradient"))
    assert len(set(bag) - set(records[0])) == 0
    assert len(bag) <= 1


@pytest.mark.parametrize("number", [0, 1])
def test_one_step_of_adamw_is_read_backwards(lab, attack, number):
    made, records = lab(alpha=SMALL, weights="uniform"), texts(1, 8)
    earlier = []
    if number:
        earlier = [made.round([[record] for record in texts(3, 6, seed=5)], 0, "steps")]
        made.advance(earlier[0])
    found = made.round([records], number, "steps")
    assert is_one_step(map(torch.from_numpy, found.tensors), found.job.optimiser.client_lr)
    bag, grown = attack(found, *earlier)
    assert set(bag) == shown(records)
    assert tuple(records[0][:-1]) in grown


def test_two_steps_are_seen_to_be_no_one_step(lab):
    found = lab(epochs=2).round([texts(1, 8)], 0, "steps")
    assert not is_one_step(map(torch.from_numpy, found.tensors), found.job.optimiser.client_lr)


def test_a_mean_of_steps_or_a_second_step_is_not(lab, attack):
    for made, clients in ((lab(alpha=SMALL, weights="uniform"), 3), (lab(alpha=SMALL, weights="uniform", epochs=3), 1)):
        records = texts(clients, 8)
        found = made.round([[record] for record in records], 0, "steps")
        bag, _ = attack(found)
        assert len(set(bag) & shown(records)) <= len(shown(records)) // 3


def test_recovery_falls_with_the_number_of_clients_once_the_span_is_full(lab, attack):
    shares = []
    for clients in (1, 2, 4, 8):
        records = texts(clients, 10)
        bag, _ = attack(lab(rank=16).round([[record] for record in records], 0, "gradient"))
        assert set(bag) <= shown(records)
        shares.append(len(bag) / len(shown(records)))
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.2


def test_recovery_falls_with_the_noise_and_ends_at_nothing(lab, attack):
    records = texts(2, 8)
    hits = []
    for sigma in (0.0, 1e-4, 1e-2, 1.0):
        found = lab().round([[record] for record in records], 0, "clipped", Noised(clip=1.0, sigma=sigma))
        bag, _ = attack(found)
        assert len(set(bag) - shown(records)) <= 1, "noise makes it silent, not wrong"
        hits.append(len(set(bag) & shown(records)))
    assert hits[0] == len(shown(records))
    assert hits == sorted(hits, reverse=True)
    assert hits[-1] == 0


def test_the_update_of_other_text_says_nothing_of_this_one(lab, attack):
    mine, other = texts(2, 8)
    bag, _ = attack(lab().round([[other]], 0, "gradient"))
    assert not set(bag) & set(mine)


def test_an_update_of_noise_claims_nothing(lab, attack):
    found = lab().round([texts(1, 8)], 0, "gradient")
    generator = np.random.default_rng(3)
    for sent in ("steps", "gradients"):
        noise = tuple(generator.normal(0, 1e-3, tensor.shape).astype(np.float32) for tensor in found.tensors)
        bag, _ = attack(replace(found, tensors=noise, sent=sent, sigma=1e-3 if sent == "gradients" else 0.0))
        assert bag == ()


def test_the_round_start_is_what_the_clients_hold(lab, parts):
    made = lab()
    sums = []
    for number in range(3):
        sums.append(made.round([[record] for record in texts(3, 6, seed=number)], number, "steps"))
        made.advance(sums[-1])
    front, _, back = parts()
    start = round_start(front, back, replace(sums[-1], round=3), sums)
    for rebuilt, held in ((start.front, made._parts[0]), (start.back, made._parts[1])):
        layout = adapter_layout(held)
        assert adapter_layout(rebuilt) == layout
        assert np.allclose(read_adapters(rebuilt, layout), read_adapters(held, layout), atol=1e-8)
    assert all(".lora_" not in name for name, _ in front.named_parameters()), "the public model is left as it was"


def test_the_round_start_of_gradients_is_one_common_step(lab, parts):
    found = lab().round([texts(2, 8)], 0, "gradient")
    front, _, back = parts()
    start = round_start(front, back, replace(found, round=1), [found])
    name, gradient = found.names[0], torch.from_numpy(found.tensors[0])
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    optimiser = torch.optim.AdamW([parameter], lr=found.job.optimiser.client_lr, weight_decay=0.0)
    parameter.grad = gradient.clone()
    optimiser.step()
    assert torch.allclose(start.factors[name], parameter.detach(), atol=1e-8)


@given(exponent=st.floats(-9, -4), rate=st.sampled_from([1e-3, 2e-3, 1e-2]), seed=st.integers(0, 1 << 20))
@settings(deadline=None, max_examples=40)
def test_backwards_undoes_what_torch_does(exponent, rate, seed):
    """Oracle: torch's own optimiser. An error is stated for each value, and holds."""
    gradient = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    optimiser = torch.optim.AdamW([parameter], lr=rate, weight_decay=0.0)
    parameter.grad = gradient.clone()
    optimiser.step()
    found = backwards(parameter.detach(), rate, rounding=0.0)
    wrong = (found.values - gradient.double()).abs()
    assert not bool(found.capped.any()) or exponent > -6
    assert bool((wrong <= 4 * found.error + 1e-4 * gradient.abs() + EPS * 1e-3)[~found.capped].all())
    assert bool((found.values.sign() == gradient.sign())[gradient.abs() > EPS].all())


@given(q=st.integers(1, 30), rest=st.integers(1, 30), beyond=st.floats(1e-6, 1.0))
@settings(deadline=None, max_examples=100)
def test_the_chance_of_a_random_direction_is_bounded(q, rest, beyond):
    """Oracle: the Beta distribution of scipy."""
    basis = torch.eye(q + rest, dtype=torch.float64)[:q]
    bound = float(Space(basis, None).chance(torch.tensor([beyond], dtype=torch.float64)))
    assert bound >= stats.beta.logcdf(beyond**2, rest / 2, q / 2) - 1e-6


def test_a_span_is_found_in_noise_of_known_size_and_no_larger_than_it_is():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    rows = torch.randn(200, 5, generator=generator, dtype=torch.float64) @ truth
    noise = 0.1 * torch.randn(200, 40, generator=generator, dtype=torch.float64)
    edge = 0.1 * (math.sqrt(200) + math.sqrt(40))
    space = join([Rows(rows + noise, edge)], None, 0.03)
    assert space.basis.shape == (5, 40)
    assert float(space.beyond(truth).max()) < 0.1
    assert join([Rows(noise, edge * 1.05)], None, 0.03) is None


def test_learned_positions_have_no_token_readers():
    size = {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).eval()
    front = split_model(model, CutPlan(front=1, back=1)).front
    names = [front.global_name(name) for name, _ in front.module.named_modules() if name.endswith("c_attn")]
    assert names
    assert token_readers(front, names)[0] == ()


class TestInTheSuite:
    def view(self, *sums):
        return ServerView(sightings=(), noise=Noise(0.0, None), cut=(2, 1), sums=sums)

    def test_its_answer(self, lab, parts):
        made, records = lab(), texts(2, 8)
        found = made.round([[record] for record in records], 0, "gradient")
        front, _, back = parts()
        public = PublicModel(front, front.base.get_input_embeddings().weight.detach(), back=lambda: back)
        view = self.view(found)
        known = learn(public, prior_from([], lambda _: [], 120), view, config().profiles["smoke"])
        (attack,) = ATTACKS
        assert attack.blocked(view, Threat()) is None
        answer = attack.run(view, known, lambda done, total: None)
        assert (answer.attack, answer.rounds, answer.peers) == ("span", (0,), (found.peers,))
        assert set(answer.bags[0]) == shown(records)

    def test_why_it_cannot_run(self, lab):
        (attack,) = ATTACKS
        assert "no secure sum" in attack.blocked(self.view(), Threat())
        found = lab().round([texts(1, 4)], 0, "gradient")
        behind = replace(found, names=tuple(name.replace("layers.0.", "layers.3.") for name in found.names))
        assert "A does not learn" in attack.blocked(self.view(behind), Threat())


def test_a_recorded_run_of_the_shipped_protocol_is_attacked(tmp_path, tuned):
    """Three clients over TLS, sums opened and recorded by the server, read back and attacked."""
    from attacks.sums import read_sums
    from attacks.view import PublicFacts

    house = build_house(tmp_path / "house")
    (tmp_path / "recording").mkdir()
    job, policy = house.job(blind=False, epochs=1), policy_of()
    seen = SumRecords(tmp_path / "recording", house.model, job)
    outcome = train_all(house, build_core(job, policy, load_middle(house.model), house.digest, seen=seen), policy)
    assert not outcome.errors
    sums = read_sums(tmp_path / "recording", PublicFacts(policy=policy, model=house.digest, passes=1, job=job))
    assert [found.round for found in sums] == [0, 1]
    for found in sums:
        start = round_start(load_front(house.model), load_back(house.model), found, sums)
        assert all(name in start.factors for name in found.names)
        bag, _ = span(found, start, tuned)
        assert len(bag) <= 64


@pytest.mark.slow
def test_the_pretrained_model_gives_its_clients_text_away():
    """Notes made for the purpose, rank 64, one record: the gradient shows all, and so does one step of AdamW."""
    directory = resolve_model("smollm2-135m", default_cache(), CutPlan(2, 2))
    tokenizer, tuned = load_tokenizer(directory), settings_of("dager", Settings)
    record = tokenizer.encode(ward_notes(1, seed=7)[0].text, truncation=True, max_length=32)

    def load():
        return load_front(directory), load_middle(directory), load_back(directory)

    made = Lab(*load(), job_of(rank=64, cut=(2, 2), targets=ATTENTION, weights="uniform"))
    for how, least in (("gradient", 1.0), ("steps", 0.9)):
        found = made.round([[record]], 0, how)
        bag, grown = span(found, round_start(load_front(directory), None, found, []), tuned)
        assert len(set(bag) & shown([record])) >= least * len(shown([record]))
        assert len(set(bag) - set(record)) <= 3
        if how == "gradient":
            assert tuple(record[:-1]) in grown
