"""The optimiser against torch's own: equal steps, and a state that goes on bit for bit."""

from __future__ import annotations

import pytest
import torch

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
