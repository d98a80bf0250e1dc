"""Copies of B's adapters that share one base: each learns as if it were alone."""

from __future__ import annotations

import copy

import pytest
import torch

from securesplit.errors import InputError, RemoteProtocolError
from securesplit.model.descent import NamedTensor, Recipe
from securesplit.model.lora import add_adapters
from securesplit.model.store import load_middle
from securesplit.server.learner import Learner

RECIPE = Recipe(1e-2)


@pytest.fixture
def middle(house):
    part = load_middle(house.model)
    add_adapters(part, 2, 4.0, ("q_proj", "v_proj"), seed=7)
    return part


def rows(seed: int) -> torch.Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed))


def learn(learner: Learner, middle: torch.nn.Module, seed: int) -> torch.Tensor:
    learner.forward("a", seed, rows(seed), middle)
    return learner.backward("a", seed, rows(seed + 50))


def test_one_of_its_own_learns_what_a_model_of_its_own_would(middle):
    alone = copy.deepcopy(middle)
    first, second = Learner(middle, RECIPE, own=True), Learner(middle, RECIPE, own=True)
    before = [p.detach().clone() for p in middle.parameters()]
    optimiser = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for seed in range(4):
        got = learn(first, middle, seed)
        learn(second, middle, seed + 10)  # Between its steps another one's move nothing of it.
        leaf = rows(seed).requires_grad_()
        alone(leaf).backward(rows(seed + 50))
        optimiser.step()
        optimiser.zero_grad()
        torch.testing.assert_close(got, leaf.grad, rtol=0, atol=0)
    wanted = [p for p in alone.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters, wanted, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters, second.parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, middle.parameters(), strict=True)), "B itself stands still"


def test_graphs_of_two_wait_at_once(middle):
    one, two = Learner(middle, RECIPE, own=True), Learner(middle, RECIPE, own=True)
    apart = Learner(middle, RECIPE, own=True)
    one.forward("a", 0, rows(0), middle)
    two.forward("b", 0, rows(1), middle)
    two.backward("b", 0, rows(3))
    assert torch.equal(one.backward("a", 0, rows(2)), learn_like(apart, middle))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, apart.parameters, strict=True))


def learn_like(learner: Learner, middle: torch.nn.Module) -> torch.Tensor:
    learner.forward("a", 0, rows(0), middle)
    return learner.backward("a", 0, rows(2))


def test_a_gradient_of_another_step_or_client_is_refused(middle):
    learner = Learner(middle, RECIPE)
    for who, step in (("a", 1), ("b", 0)):
        learner.forward("a", 0, rows(0), middle)
        with pytest.raises(RemoteProtocolError) as caught:
            learner.backward(who, step, rows(1))
        assert caught.value.code == "SS-4014"
    learner.forward("a", 0, rows(0), middle)
    learner.forget("b")
    assert learner.waits_for == "a"
    learner.forget("a")
    assert learner.waits_for is None


def test_kept_and_restored_it_goes_on_bit_for_bit(middle):
    straight, first = Learner(middle, RECIPE, own=True), Learner(middle, RECIPE, own=True)
    for seed in range(4):
        learn(straight, middle, seed)
        if seed < 2:
            learn(first, middle, seed)
    second = Learner(middle, RECIPE, own=True)
    second.restore(first.state())
    for seed in range(2, 4):
        learn(second, middle, seed)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters, second.parameters, strict=True))


def test_the_state_of_other_adapters_is_refused(middle):
    learner = Learner(middle, RECIPE)
    state = learner.state()
    before = [p.detach().clone() for p in learner.parameters]
    for wrong in (state[1:], [NamedTensor(s.name, torch.zeros(1)) for s in state]):
        with pytest.raises(InputError) as caught:
            learner.restore(wrong)
        assert caught.value.code == "SS-1250"
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True))
