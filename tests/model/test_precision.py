"""Half precision, its scale, and layers that are computed twice: against the same part in float32 or kept whole."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path

import pytest
import torch

from securesplit.errors import InputError
from securesplit.learning import prepare
from securesplit.model.descent import NamedTensor, Recipe
from securesplit.model.dropout import dropping, step_key
from securesplit.model.lora import adapter_layout, adapter_parameters
from securesplit.model.plan import CutPlan
from securesplit.model.precision import PATIENCE, LossScale, cast_base
from securesplit.model.split import split_model
from securesplit.protocol.job import Job, Memory, Precision
from securesplit.server.learner import Learner, Rows
from tests.e2e.house import job_text
from tests.model.test_tuning import shake

IDS = torch.randint(1, 97, (3, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def job():
    return Job.model_validate(tomllib.loads(job_text(Path("no-model"))))


def with_tables(job, **tables):
    adapters = {"targets": ("q_proj", "v_proj"), "dropout": tables.pop("dropout", 0.0)}
    return job.model_copy(update={"adapters": job.adapters.model_copy(update=adapters), **tables})


def split_of(tiny, job, family="llama"):
    split = split_model(tiny(family), CutPlan(2, 1))
    for part in (split.front, split.middle, split.back):
        prepare(part, job)
    shake(split)
    return split


def learnt(split, key=b"k"):
    """Loss and every adapter's gradient of one step."""
    parts = (split.front, split.middle, split.back)
    with dropping(parts, key):
        loss = split.back(split.middle(split.front(IDS)), IDS)
        loss.backward()
    found = [p.grad.clone() for part in parts for p in adapter_parameters(part)]
    for part in parts:
        for p in adapter_parameters(part):
            p.grad = None
    return loss.item(), found


def parameters_of(split):
    return [p for part in (split.front, split.middle, split.back) for p in part.parameters()]


@pytest.mark.parametrize(("kind", "near"), [("f32", 0.0), ("bf16", 0.15), ("f16", 0.02)])
def test_a_base_in_half_precision_learns_nearly_the_same(tiny, job, kind, near):
    plain = learnt(split_of(tiny, with_tables(job)))
    split = split_of(tiny, with_tables(job, precision=Precision(front=kind, middle=kind, back=kind)))
    types = {p.dtype for p in parameters_of(split) if not p.requires_grad}
    assert types == {{"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[kind]}
    assert {p.dtype for p in parameters_of(split) if p.requires_grad} == {torch.float32}, "adapters are masters"
    assert all(part.scale is not None for part in (split.front, split.middle, split.back)) == (kind == "f16")
    loss, found = learnt(split)
    assert loss == pytest.approx(plain[0], rel=near / 5)
    for mine, theirs in zip(found, plain[1], strict=True):
        assert (mine - theirs).norm() <= near * theirs.norm()
    tables = [b for n, b in split.middle.module.named_buffers() if "inv_freq" in n]
    assert tables
    assert all(b.dtype == torch.float32 for b in tables), "positions keep their precision"


def test_small_gradients_survive_float16_by_the_scale_alone(tiny, job):
    """A gradient of 2e-8 comes into B: below float16's smallest number, it would be lost without a scale."""
    f16 = with_tables(job, precision=Precision(middle="f16"))
    half, plain = split_of(tiny, f16).middle, split_of(tiny, with_tables(job)).middle
    pull = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3)).sign() * 2e-8
    found = []
    for part in (half, plain):
        leaf = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = part(leaf)
        assert out.dtype == torch.float32
        out.backward(pull)
        found.append([leaf.grad, *(p.grad for p in adapter_parameters(part))])
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() <= 0.05 * theirs.norm()
        assert theirs.norm() > 0
    named = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    half(hidden=named).backward(pull)
    assert torch.equal(named.grad, found[0][0]), "by name it is the same"
    half.scale = None
    leaf = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    half(leaf).backward(pull.half())
    assert leaf.grad.norm() == 0, "what the scale is for"


def test_an_overflow_halves_the_scale_and_a_hopeless_step_is_skipped(tiny, job):
    part = split_of(tiny, with_tables(job, precision=Precision(middle="f16"))).middle
    first = part.scale.scale
    rows = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))

    def pull(size):
        leaf = rows.clone().requires_grad_()
        part(leaf).backward(torch.full((2, 5, 32), size))
        found = [p.grad for p in adapter_parameters(part)]
        for p in adapter_parameters(part):
            p.grad = None
        return leaf.grad, found

    gradient, found = pull(100.0)
    assert part.scale.scale < first
    assert torch.isfinite(gradient).all()
    assert all(f is not None and torch.isfinite(f).all() for f in found)
    assert part.scale.skipped == 0, "it was done again, not skipped"
    for size in (1e9, float("inf")):
        gradient, found = pull(size)
        assert gradient.abs().sum() == 0, "zeros go out"
        assert all(f is None or not f.any() for f in found)
    assert part.scale.skipped == 2


def test_the_scale_grows_again_and_is_kept():
    scale, weight = LossScale(), torch.ones(3, requires_grad=True)
    for _ in range(PATIENCE):
        scale.gradients((weight * 2).sum(), [weight], torch.tensor(1.0))
    assert scale.scale == 2.0**17
    other = LossScale()
    other.restore(scale.state())
    assert [p.value for p in other.state()] == [p.value for p in scale.state()]
    for wrong in ((), scale.state()[1:], [*scale.state(), NamedTensor("x", torch.zeros(1))]):
        with pytest.raises(InputError) as caught:
            other.restore(wrong)
        assert caught.value.code == "SS-1250"


def test_a_learner_in_float16_goes_on_bit_for_bit(tiny, job):
    middle = split_of(tiny, with_tables(job, precision=Precision(middle="f16"), dropout=0.3)).middle
    recipe = Recipe(1e-2, accumulate=2, seed=7)

    def learn(learner, seed):
        rows = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed))
        learner.forward([Rows("a", seed, rows.clone())], lambda leaves: tuple(middle(leaf) for leaf in leaves))
        return learner.backward([Rows("a", seed, rows * 30)])[0]

    straight, first = Learner(middle, recipe, own=True), Learner(middle, recipe, own=True)
    fresh = middle.scale.state()
    wanted = [learn(straight, seed) for seed in range(5)]
    middle.scale.restore(fresh)
    got = [learn(first, seed) for seed in range(3)]
    kept = first.state()
    middle.scale.restore(fresh)
    second = Learner(middle, recipe, own=True)
    second.restore(kept)
    got += [learn(second, seed) for seed in range(3, 5)]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters, second.parameters, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_layers_that_are_computed_twice_learn_the_same(tiny, job, family, monkeypatch):
    targets = {"targets": ("attn.c_attn",)} if family == "gpt2" else {}
    plain = with_tables(job, dropout=0.3)
    plain = plain.model_copy(update={"adapters": plain.adapters.model_copy(update=targets)})
    twice = plain.model_copy(update={"memory": Memory(checkpointing=("front", "middle", "back"))})
    one, two = split_of(tiny, plain, family), split_of(tiny, twice, family)
    calls = []
    layer = getattr(two.middle.base, two.middle.architecture.layers)[0]
    original = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, *a, **k: (calls.append(self), original(self, *a, **k))[1])
    mine, theirs = learnt(two, step_key(1, "a", 1)), learnt(one, step_key(1, "a", 1))
    assert mine[0] == theirs[0]
    assert all(torch.equal(a, b) for a, b in zip(mine[1], theirs[1], strict=True))
    cache = two.middle.new_cache()
    with torch.no_grad():
        rows = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
        steps = torch.cat([two.middle(rows[:, i : i + 1], cache=cache) for i in range(6)], 1)
        torch.testing.assert_close(steps, one.middle(rows), rtol=1e-4, atol=1e-5)


def test_a_learner_computes_twice_with_its_own_adapters(tiny, job):
    """Replicas share one checkpointed B: what is computed again must be computed with the replica's own values."""
    middle = split_of(tiny, with_tables(job, memory=Memory(checkpointing=("middle",)))).middle
    plain = split_of(tiny, with_tables(job)).middle
    rows = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for part in (middle, plain):
        one, two = Learner(part, Recipe(1e-2), own=True), Learner(part, Recipe(1e-2), own=True)
        with torch.no_grad():
            two.parameters[0].add_(0.5)
        one.forward([Rows("a", 1, rows.clone())], lambda leaves, part=part: tuple(part(leaf) for leaf in leaves))
        two.forward([Rows("b", 1, rows.clone())], lambda leaves, part=part: tuple(part(leaf) for leaf in leaves))
        pulled = *two.backward([Rows("b", 1, rows)]), *one.backward([Rows("a", 1, rows)])
        found.append([*pulled, *one.parameters, *two.parameters])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_less_is_kept_when_layers_are_computed_twice(tiny, job):
    """The bytes that autograd keeps for the backward pass."""
    kept = []
    for memory in (None, Memory(checkpointing=("middle",))):
        part = split_of(tiny, with_tables(job, memory=memory)).middle
        held = {}

        def pack(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {p.untyped_storage().data_ptr() for p in part.parameters()}
        rows = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            part(rows)
        kept.append(sum(size for pointer, size in held.items() if pointer not in own))
    assert kept[1] < 0.4 * kept[0]


def test_a_shared_base_is_left_as_it_is(tiny):
    model = tiny("llama")
    split = split_model(model, CutPlan(2, 1))
    cast_base(split.middle.module, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert split.middle.dtype == torch.bfloat16
    assert copy.deepcopy(split.middle).dtype == torch.bfloat16
    assert adapter_layout(split.middle).size == 0
