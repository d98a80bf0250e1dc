"""Copies of B's adapters that share one base: each learns as if it were alone."""

from __future__ import annotations

import copy

import pytest
import torch

from securesplit.errors import InputError, RemoteProtocolError
from securesplit.model.descent import NamedTensor, Recipe
from securesplit.model.lora import add_adapters
from securesplit.model.store import load_middle
from securesplit.server.fleet import Fleet
from securesplit.server.learner import Learner, Rows

RECIPE = Recipe(1e-2)


@pytest.fixture
def middle(house):
    part = load_middle(house.model)
    add_adapters(part, 2, 4.0, ("q_proj", "v_proj"), seed=7)
    return part


def rows(seed: int) -> torch.Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed))


def learn(learner: Learner, middle: torch.nn.Module, seed: int) -> torch.Tensor:
    forward(learner, middle, seed, rows(seed))
    return backward(learner, seed, rows(seed + 50))


def forward(learner: Learner, middle: torch.nn.Module, step: int, values: torch.Tensor, who: str = "a") -> torch.Tensor:
    (output,) = learner.forward([Rows(who, step, values)], lambda leaves: tuple(middle(leaf) for leaf in leaves))
    return output


def backward(learner: Learner, step: int, values: torch.Tensor, who: str = "a") -> torch.Tensor:
    (gradient,) = learner.backward([Rows(who, step, values)])
    return gradient


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
    forward(one, middle, 0, rows(0))
    forward(two, middle, 0, rows(1), "b")
    backward(two, 0, rows(3), "b")
    got = backward(one, 0, rows(2))
    forward(apart, middle, 0, rows(0))
    assert torch.equal(got, backward(apart, 0, rows(2)))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, apart.parameters, strict=True))


def test_a_gradient_of_another_step_or_client_is_refused(middle):
    learner = Learner(middle, RECIPE)
    for who, step in (("a", 1), ("b", 0)):
        forward(learner, middle, 0, rows(0))
        with pytest.raises(RemoteProtocolError) as caught:
            backward(learner, step, rows(1), who)
        assert caught.value.code == "SS-4014"
    forward(learner, middle, 0, rows(0))
    learner.forget("b")
    assert learner.waits_for == ("a",)
    learner.forget("a")
    assert learner.waits_for == ()


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


def test_several_as_one_step_learn_what_one_batch_of_all_would(middle):
    """Weights 3 to 1: B meets the weighted mean of the losses, and each client the gradient of its own."""
    whole = copy.deepcopy(middle)
    learner = Learner(middle, RECIPE, own=True)
    sent = [Rows("a", 0, rows(1)), Rows("b", 4, rows(2))]
    outputs = learner.forward(sent, lambda leaves: tuple(torch.split(middle(torch.cat(leaves)), 2)))
    pulls = rows(3), rows(4)
    got = learner.backward([Rows("a", 0, pulls[0], 0.75), Rows("b", 4, pulls[1], 0.25)])
    leaves = [rows(1).requires_grad_(), rows(2).requires_grad_()]
    optimiser = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    total = torch.zeros(())
    for leaf, pull, weight, output, gradient in zip(leaves, pulls, (0.75, 0.25), outputs, got, strict=True):
        mine = whole(leaf)
        torch.testing.assert_close(output, mine.detach())
        loss = (mine * pull).sum()
        (own,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        torch.testing.assert_close(gradient, own, rtol=1e-4, atol=1e-6)
        total = total + weight * loss
    total.backward()
    wanted = [p for p in whole.parameters() if p.requires_grad]
    held = [p for p in wanted if p.grad is not None and p.grad.abs().max() > 1e-6]
    optimiser.step()
    assert held
    for ours, theirs in zip(learner.parameters, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_who_brings_no_gradient_has_no_part_in_the_step(middle):
    both, alone = Learner(middle, RECIPE, own=True), Learner(middle, RECIPE, own=True)

    def one_by_one(leaves):
        return tuple(middle(leaf) for leaf in leaves)

    both.forward([Rows("a", 0, rows(1)), Rows("b", 0, rows(2))], one_by_one)
    alone.forward([Rows("a", 0, rows(1))], one_by_one)
    both.backward([Rows("a", 0, rows(3))])
    alone.backward([Rows("a", 0, rows(3))])
    assert all(torch.equal(a, b) for a, b in zip(both.parameters, alone.parameters, strict=True))


@pytest.mark.parametrize("uniform", [False, True])
def test_a_mean_is_by_sequences_or_uniform_and_leaves_out_who_learnt_nothing(middle, uniform):
    fleet = Fleet(middle, RECIPE, (("a", "b"), ("c",), ("d",)))
    assert fleet.of("a") is fleet.of("b")
    assert fleet.of("guest") is fleet.common
    for number, who in enumerate("acd"):
        learn(fleet.of(who), middle, number)
    fleet.learnt("a", 4)
    fleet.learnt("b", 2)
    fleet.learnt("c", 2)
    kept = [[p.detach().clone() for p in fleet.of(who).parameters] for who in "ac"]
    fleet.average(uniform=uniform)
    share = 0.5 if uniform else 0.75
    for i, parameter in enumerate(fleet.common.parameters):
        torch.testing.assert_close(parameter, share * kept[0][i] + (1 - share) * kept[1][i])
        assert all(torch.equal(parameter, fleet.of(who).parameters[i]) for who in "acd")
    before = [p.detach().clone() for p in fleet.common.parameters]
    fleet.average(uniform=uniform)
    assert all(torch.equal(a, b) for a, b in zip(before, fleet.common.parameters, strict=True)), (
        "nobody has learnt since"
    )


def test_a_fleet_kept_and_restored_goes_on_bit_for_bit(middle):
    copies = (("a",), ("b",))
    straight, first = Fleet(middle, RECIPE, copies), Fleet(middle, RECIPE, copies)
    for fleet in (straight, first):
        learn(fleet.of("a"), middle, 0)
        fleet.learnt("a", 3)
    second = Fleet(middle, RECIPE, copies)
    second.restore(first.state())
    for fleet in (straight, second):
        learn(fleet.of("b"), middle, 1)
        fleet.learnt("b", 1)
        fleet.average(uniform=False)
        learn(fleet.of("a"), middle, 2)
    assert all(torch.equal(a, b) for a, b in zip(straight.of("a").parameters, second.of("a").parameters, strict=True))


@pytest.mark.parametrize("uniform", [False, True])
def test_a_copy_that_diverged_is_left_out_of_the_mean_and_gets_it(middle, uniform):
    fleet = Fleet(middle, RECIPE, (("a",), ("b",), ("c",)))
    for number, name in enumerate("abc"):
        learn(fleet.of(name), middle, number)
        fleet.learnt(name, 2)
    with torch.no_grad():
        fleet.of("b").parameters[0][0, 0] = float("nan")
    pairs = zip(fleet.of("a").parameters, fleet.of("c").parameters, strict=True)
    wanted = [((a.detach().double() + c.detach().double()) / 2).float() for a, c in pairs]
    fleet.average(uniform=uniform)
    for learner in (fleet.common, *map(fleet.of, "abc")):
        for value, expected in zip(learner.parameters, wanted, strict=True):
            torch.testing.assert_close(value.detach(), expected)
