"""The optimiser against torch's own: equal steps, and a state that goes on bit for bit."""

from __future__ import annotations

import pytest
import torch
import transformers

from securesplit.errors import InputError
from securesplit.model.descent import Descent, NamedTensor, Recipe


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]


def pull(held: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for parameter in held:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_it_is_adamw():
    ours, theirs = parameters(), parameters()
    descent, oracle = Descent(ours, Recipe(1e-2)), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0)
    for number in range(5):
        pull(ours, number)
        pull(theirs, number)
        descent.step()
        oracle.step()
    assert descent.steps == 5
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(parameter.grad is None for parameter in ours)


def test_a_kept_state_goes_on_bit_for_bit():
    whole, first, second = parameters(), parameters(), parameters(1)
    straight, before = Descent(whole, Recipe(1e-2)), Descent(first, Recipe(1e-2))
    for number in range(6):
        pull(whole, number)
        straight.step()
        if number < 3:
            pull(first, number)
            before.step()
    after = Descent(second, Recipe(1e-2))
    after.restore(before.state())
    with torch.no_grad():
        for old, new in zip(first, second, strict=True):
            new.copy_(old)
    for number in range(3, 6):
        pull(second, number)
        after.step()
    assert after.steps == 6
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, -3e38])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_that_overflows_moves_nothing_and_is_forgotten(bad, clip, accumulate):
    """As a scaler of torch's would skip it: neither values nor moments nor the schedule take any part of it."""
    ours, theirs = parameters(), parameters()
    recipe = Recipe(1e-2, schedule="linear", span=9, warmup=2, accumulate=accumulate, max_grad_norm=clip)
    descent, oracle = Descent(ours, recipe), Descent(theirs, recipe)
    for number in range(3 * accumulate):
        if number // accumulate == 1:
            for _ in range(number % accumulate + 1):
                pull(ours, number)
            ours[1].grad.view(-1)[0] = bad
            assert descent.step() is False
            continue
        for held in (ours, theirs):
            pull(held, number)
        assert descent.step() is oracle.step()
    assert (descent.moves, descent.skipped) == (2, 1)
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(ours, theirs, strict=True))
    kept = {piece.name for piece in oracle.state()}
    assert "skipped" not in kept, "what nothing hangs on is not kept"


def test_a_step_that_float16_skipped_takes_no_part_of_the_schedule_either():
    """It leaves no gradient at all (securesplit/model/precision.py)."""
    ours = parameters()
    descent = Descent(ours, Recipe(1e-2, schedule="linear", span=4, weight_decay=0.5))
    before = [parameter.detach().clone() for parameter in ours]
    assert descent.step() is False
    assert (descent.steps, descent.moves, descent.skipped) == (1, 0, 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


@pytest.mark.parametrize("name", ["7.exp_avg", "x.exp_avg", "0.exp_avg", "."])
def test_another_optimisers_state_is_refused(name):
    descent = Descent(parameters(), Recipe(1e-2))
    pull(descent._parameters, 0)
    descent.step()
    wrong = [*descent.state(), NamedTensor(name, torch.zeros(2, 2))]
    with pytest.raises(InputError) as caught:
        descent.restore(wrong)
    assert caught.value.code == "SS-1250"
    with pytest.raises(InputError):
        descent.restore([piece for piece in wrong if piece.name != "steps"])


def test_old_states_of_another_kind_are_refused():
    descent = Descent(parameters(), Recipe(1e-2))
    with pytest.raises(InputError):
        descent.restore([piece for piece in descent.state() if piece.name != "moves"])


def test_the_rate_is_0_at_the_end_of_the_span_also_where_the_warm_up_fills_it():
    for schedule in ("linear", "cosine"):
        recipe = Recipe(0.5, schedule=schedule, warmup=4, span=4)
        assert [recipe.rate(n) for n in range(7)] == [0.0, 0.125, 0.25, 0.375, 0.0, 0.0, 0.0]
        assert Recipe(0.5, schedule=schedule, warmup=0, span=1).rate(1) == 0.0


NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize("schedule", list(NAMES))
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_rate_is_that_of_transformers(schedule, warmup):
    held = parameters()
    optimiser = torch.optim.AdamW(held, lr=0.5)
    oracle = transformers.get_scheduler(NAMES[schedule], optimiser, num_warmup_steps=warmup, num_training_steps=11)
    recipe = Recipe(0.5, schedule=schedule, warmup=warmup, span=11)
    for number in range(12):
        assert recipe.rate(number) == pytest.approx(oracle.get_last_lr()[0], abs=1e-15)
        optimiser.step()
        oracle.step()
    assert recipe.rate(99) == (0.5 if schedule == "constant" else 0.0), "beyond its end it stays there"


def test_a_whole_recipe_is_what_torch_and_transformers_do():
    """Accumulation, clipping, decay, betas and warm-up together, against the pieces that everybody uses."""
    ours, theirs = parameters(), parameters()
    recipe = Recipe(
        1e-2, weight_decay=0.1, betas=(0.8, 0.95), schedule="cosine", warmup=1, span=4, accumulate=3, max_grad_norm=0.7
    )
    descent = Descent(ours, recipe)
    oracle = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95))
    schedule = transformers.get_scheduler("cosine", oracle, num_warmup_steps=1, num_training_steps=4)
    moved = []
    for number in range(11):
        generator = torch.Generator().manual_seed(100 + number)
        for held, share in ((ours, 1.0), (theirs, 1 / 3 if number < 9 else 1 / 2)):
            generator.manual_seed(100 + number)
            sum((p * torch.randn(p.shape, generator=generator)).sum() for p in held).mul(share).backward()
        moved.append(descent.step())
        if number % 3 == 2 or number == 10:
            torch.nn.utils.clip_grad_norm_(theirs, 0.7)
            oracle.step()
            schedule.step()
            oracle.zero_grad()
    assert moved == [False, False, True] * 3 + [False, False]
    assert descent.finish()
    assert not descent.finish()
    assert (descent.steps, descent.moves) == (11, 4)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_half_an_accumulation_is_kept_too():
    recipe = Recipe(1e-2, schedule="linear", span=9, accumulate=3)
    whole, first, second = parameters(), parameters(), parameters(1)
    straight, before = Descent(whole, recipe), Descent(first, recipe)
    after = Descent(second, recipe, moves=5)
    for number in range(7):
        for held in (whole, first) if number < 4 else (whole,):
            generator = torch.Generator().manual_seed(number)
            sum((p * torch.randn(p.shape, generator=generator)).sum() for p in held).backward()
        straight.step()
        if number < 4:
            before.step()
    after.restore(before.state())
    with torch.no_grad():
        for old, new in zip(first, second, strict=True):
            new.copy_(old)
    for number in range(4, 7):
        generator = torch.Generator().manual_seed(number)
        sum((p * torch.randn(p.shape, generator=generator)).sum() for p in second).backward()
        after.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))
    assert [p.value for p in after.state() if p.name in {"moves", "rate"}] == [2, straight.rate]
