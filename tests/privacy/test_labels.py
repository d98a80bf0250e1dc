"""Labels by randomised response: answered once, charged once, and a gradient leaves bare only when made from the answers."""

from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from securesplit.errors import BudgetExhausted, PolicyDenied
from securesplit.policy.schema import Channel, Gaussian, Labels
from securesplit.privacy import response
from securesplit.privacy.gate import Gate
from securesplit.privacy.plan import UNITS, plan_for
from securesplit.privacy.released import Responded
from tests.privacy.released import LABELLED, ROUND, values

ROOT = Path(__file__).parents[2]


def names(count):
    return tuple(f"r{i}" for i in range(count))


def answered(gate, labels, contents=None):
    records = names(len(labels))
    return gate.respond(torch.tensor(labels), records=records, contents=contents or records)


@pytest.fixture
def fixed_coins(monkeypatch) -> None:
    """Coins from a seeded generator, for a test that counts answers. No production path has this."""
    generator = np.random.default_rng(17)
    monkeypatch.setattr(response, "os", SimpleNamespace(urandom=generator.bytes))
    monkeypatch.setattr(response, "secrets", SimpleNamespace(randbelow=lambda n: int(generator.integers(n))))


# ---- the answer ------------------------------------------------------------------------------------------------------


def test_an_answer_is_charged_once_and_kept_for_ever(policy_of, open_ledger):
    policy = policy_of(epsilon=2.0, **LABELLED)
    plan, ledger = plan_for(policy.privacy), open_ledger()
    first = answered(Gate(policy, ledger), [0, 1, 2, 3] * 8)
    assert [(e.channel, e.units) for e in ledger.entries()] == [("labels", plan.labels.units)] * 32
    assert ledger.mu("r5") == pytest.approx(math.sqrt(0.2) * plan.mu, rel=1e-9)
    head = ledger.head()
    ledger.close()
    again = open_ledger()
    # Also when the label was corrected meanwhile: a second answer would be a second release.
    second = answered(Gate(policy, again), [3, 2, 1, 0] * 8)
    assert torch.equal(first.labels, second.labels)
    assert again.head() == head
    again.verify()


def test_equal_records_in_one_batch_get_one_answer(policy_of, ledger):
    gate = Gate(policy_of(epsilon=1.0, **LABELLED), ledger)
    found = gate.respond(torch.tensor([1] * 20), records=["a"] * 20, contents=["x"] * 20)
    assert len(set(found.labels.tolist())) == 1
    assert len(list(ledger.entries())) == 1


def test_the_answers_have_the_stated_law(policy_of, ledger, fixed_coins):
    policy = policy_of(epsilon=6.0, regime="round", labels=(0.5, 4), activations=(1.0, 0.2, 1), updates=(1.0, 0.2, 1))
    epsilon, count = plan_for(policy.privacy).labels.epsilon, 3000
    found = answered(Gate(policy, ledger), [2] * count).labels
    keep = math.exp(epsilon) / (math.exp(epsilon) + 3)
    assert 0.3 < keep < 0.9, "the test would see nothing otherwise"
    seen = np.bincount(found.numpy(), minlength=4)
    assert stats.binomtest(int(seen[2]), count, keep).pvalue > 1e-3
    others = np.delete(seen, 2)
    assert stats.chisquare(others).pvalue > 1e-3


@given(epsilon=st.floats(0.1, 1000), size=st.floats(-6, 0), classes=st.integers(2, 1000))
@settings(max_examples=100, deadline=None)
def test_the_epsilon_of_an_answer_is_paid_for_by_its_units(epsilon, size, classes):
    """The smallest mu that implies (epsilon, 0)-DP, in 60 digits, is at most the mu that is charged; and not far below."""
    share = 10**size
    rest = Channel(clip=1.0, share=share, releases=1)
    privacy = Gaussian(
        mechanism="gaussian", unit="sequence", relation="replace-one", epsilon=epsilon, delta=1e-5, regime="round",
        activations=rest.model_copy(update={"share": 1e-7}), updates=rest.model_copy(update={"share": 1e-7}),
        labels=Labels(share=share * (1 - 1e-6), classes=classes),
    )  # fmt: skip
    plan = plan_for(privacy).labels
    with mpmath.workdps(60):
        tail = 1 / (1 + mpmath.exp(mpmath.mpf(plan.epsilon)))
        charged = mpmath.sqrt(mpmath.mpf(plan.units) / UNITS)
        # Phi(-mu/2) falls with mu: the charged mu is large enough when its tail is at most epsilon-DP's.
        assert mpmath.ncdf(-charged / 2) <= tail
        assert mpmath.ncdf(-charged / 2 * (1 - mpmath.mpf(10) ** -8)) >= tail
    assert 0 <= response.respond(classes - 1, classes, plan.epsilon) < classes


@pytest.mark.parametrize("labels", [[4], [-1], [0, 1, 7]])
def test_a_label_that_does_not_exist_is_refused_and_costs_nothing(policy_of, ledger, labels):
    gate = Gate(policy_of(**LABELLED), ledger)
    with pytest.raises(ValueError, match="one of the classes") as caught:
        answered(gate, labels)
    assert not any(character.isdigit() for character in str(caught.value))
    assert list(ledger.entries()) == []


def test_no_labels_without_their_channel(policy_of, ledger):
    for policy in (policy_of(), policy_of(**ROUND)):
        with pytest.raises(PolicyDenied) as caught:
            answered(Gate(policy, ledger), [1])
        assert caught.value.code == "SS-2010"
    assert list(ledger.entries()) == []


def test_a_budget_that_is_spent_answers_nothing(policy_of, ledger):
    policy = policy_of(regime="round", labels=(0.6, 4), activations=(1.0, 0.2, 1), updates=(3.0, 0.2, 1))
    gate = Gate(policy, ledger)
    answered(gate, [1])
    with pytest.raises(BudgetExhausted) as caught:  # The same record under another content would be asked again.
        answered(gate, [1], contents=("changed",))
    assert caught.value.code == "SS-5001"
    assert len(list(ledger.entries())) == 1


def test_no_labels_are_no_answers(policy_of, ledger):
    found = answered(Gate(policy_of(**LABELLED), ledger), [])
    assert (found.labels.dtype, tuple(found.labels.shape), found.records) == (torch.int64, (0,), ())
    assert list(ledger.entries()) == []


def test_without_privacy_the_labels_are_what_they_are(policy_of):
    found = answered(Gate(policy_of(epsilon=None), None), [3, 1, 0])
    assert found.labels.tolist() == [3, 1, 0]


# ---- the gradient ----------------------------------------------------------------------------------------------------


def gradient(count=2):
    return torch.arange(1.0, 1.0 + count * 6).reshape(count, 2, 3)


def test_a_gradient_of_the_answers_leaves_as_it_is_and_free(policy_of, ledger):
    gate = Gate(policy_of(**LABELLED), ledger)
    found = answered(gate, [1, 2])
    head = ledger.head()
    released = gate.release(gradient(), at="gradient", records=found.records, responded=found)
    assert np.array_equal(values(released), gradient().numpy())
    assert ledger.head() == head


def refused(gate, ledger, tensor, records, responded):
    before = ledger.head()
    with pytest.raises(PolicyDenied) as caught:
        gate.release(tensor, at="gradient", records=records, responded=responded, memoise=False)
    assert caught.value.code == "SS-2010"
    assert ledger.head() == before


def test_no_other_gradient_leaves(policy_of, ledger):
    gate = Gate(policy_of(**LABELLED), ledger)
    found, nobody = answered(gate, [1, 2]), answered(gate, [])
    refused(gate, ledger, gradient(), found.records, None)
    refused(gate, ledger, gradient(), found.records[::-1], found)
    refused(gate, ledger, gradient(1), found.records[:1], found)
    refused(gate, ledger, gradient(), ("r0", "r9"), found)
    refused(gate, ledger, gradient(3), found.records, found)  # A row more than was answered for.
    # Neither no records nor no answers are a match for something.
    refused(gate, ledger, gradient(), None, found)
    refused(gate, ledger, gradient(), None, nobody)
    refused(gate, ledger, gradient(), (), nobody)


def test_answers_of_another_policy_are_none(policy_of, ledger):
    """An unsafe gate answers with the true labels; a gate of a looser policy with better ones than this one pays for."""
    gate = Gate(policy_of(**LABELLED), ledger)
    unsafe = answered(Gate(policy_of(epsilon=None), None), [1, 2])
    looser = answered(Gate(policy_of(**(LABELLED | {"labels": (0.3, 4)})), ledger), [1, 2])
    for found in (unsafe, looser):
        refused(gate, ledger, gradient(), found.records, found)


def test_where_gradients_are_noised_answers_change_nothing(policy_of, ledger):
    unsafe = answered(Gate(policy_of(epsilon=None), None), [1, 2])
    gate = Gate(policy_of(**ROUND), ledger)
    released = gate.release(gradient(), at="gradient", records=unsafe.records, responded=unsafe, memoise=False)
    assert not (values(released) == gradient().numpy()).any()
    assert [e.channel for e in ledger.entries()] == ["gradient"] * 2


def test_the_answers_open_no_other_channel(policy_of, ledger):
    gate = Gate(policy_of(**LABELLED), ledger)
    found = answered(gate, [1, 2])
    released = gate.release(gradient(), at="cut", records=found.records, responded=found)
    assert not (values(released) == gradient().numpy()).any()
    with pytest.raises(PolicyDenied):
        gate.release(gradient(), at="decode", records=found.records, responded=found)


def test_a_gradient_of_the_answers_that_overflowed_leaves_as_zero(policy_of, ledger):
    gate, rows = Gate(policy_of(**LABELLED), ledger), gradient()
    rows[1, 0, 0] = float("inf")
    found = answered(gate, [1, 2])
    sent = values(gate.release(rows, at="gradient", records=found.records, responded=found))
    assert np.array_equal(sent[0], gradient().numpy()[0])
    assert not sent[1].any()


def test_a_gradient_from_an_unsound_state_does_not_leave(policy_of, ledger):
    state = ["start"]
    gate = Gate(policy_of(**LABELLED), ledger, state=lambda: state[0])
    found = answered(gate, [1, 2])
    state[0] = "moved"
    with pytest.raises(PolicyDenied) as caught:
        gate.release(gradient(), at="gradient", records=found.records, responded=found)
    assert caught.value.code == "SS-2014"


# ---- forgeries -------------------------------------------------------------------------------------------------------


def test_answers_cannot_be_made_elsewhere(policy_of, ledger):
    known = {field.name for field in dataclasses.fields(Responded)}
    for mint in (object(), None, True):
        with pytest.raises(TypeError, match="Gate"):
            Responded(**dict.fromkeys(known, ()), mint=mint)
    real = answered(Gate(policy_of(**LABELLED), ledger), [1, 2])
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(real, records=("r5", "r6"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        real.records = ("r5", "r6")
    assert not hasattr(real, "mint")
    assert "tensor" not in repr(real), "answers do not belong into a log"


def test_the_mint_is_the_gates_alone():
    """Whoever holds it can send anything. Read from the source, also where a name is fetched or spelled as text."""
    takers = set()
    for path in sorted([*(ROOT / "securesplit").rglob("*.py"), *(ROOT / "attacks").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            spelled = {
                ast.alias: lambda n: n.name,
                ast.Name: lambda n: n.id,
                ast.Attribute: lambda n: n.attr,
                ast.Constant: lambda n: n.value,
            }.get(type(node), lambda _: None)(node)
            if spelled == "_MINT":
                takers.add(path.relative_to(ROOT).as_posix())
    assert takers == {"securesplit/privacy/gate.py", "securesplit/privacy/released.py"}
