"""Per-record losses and gradients against autograd on each record alone; and nothing left behind on the model."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.model.lora import (
    adapter_layout,
    adapter_parameters,
    add_adapters,
    set_trainable_factor,
    write_adapters,
)
from securesplit.model.persample import per_sample, record_losses
from securesplit.model.plan import CutPlan
from securesplit.model.split import split_model

FAMILIES = ["gpt2", "llama", "qwen2"]
IDS = torch.randint(1, 97, (4, 9), generator=torch.Generator().manual_seed(2))
LENGTHS = (9, 3, 6, 2)


def labels_of(ids, lengths=LENGTHS):
    labels = ids.clone()
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    return labels


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def split(tiny, family):
    """A, B and C with adapters far from their start, where factor B is zero and hides A's gradient."""
    split = split_model(tiny(family), CutPlan(2, 2))
    for seed, part in enumerate((split.front, split.middle, split.back)):
        layout = add_adapters(part, 3, 6.0, seed=5)
        flat = np.random.default_rng(seed).normal(scale=0.2, size=layout.size).astype(np.float32)
        write_adapters(part, layout, flat)
    set_trainable_factor(split.middle, None)
    return split


def alone(parts, backward):
    """What plain autograd gives for one record: the oracle. The adapters' gradients as one row, in layout order."""
    parameters = [p for part in parts for p in adapter_parameters(part)]
    for parameter in parameters:
        parameter.grad = None
    backward()
    row = torch.cat([p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return row


def assert_rows(got, want):
    assert got.shape == (len(want), len(want[0]))
    for mine, expected in zip(got, want, strict=True):
        assert expected.norm() > 0
        assert (mine - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("factor", ["A", "B", "both"])
def test_each_row_is_the_gradient_of_that_record_alone(split, factor):
    parts = (split.front, split.back)
    for part in parts:
        set_trainable_factor(part, factor)
    labels = labels_of(IDS)
    with per_sample(parts) as kept:
        losses = record_losses(split.back(split.middle(split.front(IDS))), labels)
        (losses.sum() / IDS.shape[1]).backward()
        got = kept.gradients()
    want = []
    for i, length in enumerate(LENGTHS):
        one = slice(i, i + 1)

        def mean_times_count(one=one, length=length):
            # By transformers' own loss, a mean over the record's tokens: another route to the same sum.
            loss = split.back(split.middle(split.front(IDS[one])), labels[one])
            (loss * (length - 1) / IDS.shape[1]).backward()

        want.append(alone(parts, mean_times_count))
    size = sum(adapter_layout(part, None if factor == "both" else factor).size for part in parts)
    assert got.shape == (4, size)
    assert_rows(got, want)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_gradient_that_comes_from_outside_is_split_as_well(split, factor):
    """A's output gets its gradient from the server, through an autograd function, and from no loss."""
    set_trainable_factor(split.front, factor)
    sent = torch.randn(4, 9, 32, generator=torch.Generator().manual_seed(1))

    class Wire(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            return torch.zeros_like(hidden)

        @staticmethod
        def backward(ctx, _):
            return sent

    with per_sample([split.front]) as kept:
        Wire.apply(split.front(IDS)).sum().backward()
        got = kept.gradients()
    want = [
        alone([split.front], lambda i=i: split.front(IDS[i : i + 1]).backward(sent[i : i + 1])) for i in range(len(IDS))
    ]
    assert_rows(got, want)


def test_what_stands_in_other_rows_changes_nothing_bit_for_bit(split):
    """Another text of another length in row 2: losses and gradients of the other rows are the same floats."""
    parts = (split.front, split.back)
    seen = []
    for ids, lengths in ((IDS, LENGTHS), (torch.cat([IDS[:2], IDS[:1].flip(1), IDS[3:]]), (9, 3, 2, 2))):
        with per_sample(parts) as kept:
            losses = record_losses(split.back(split.middle(split.front(ids))), labels_of(ids, lengths))
            losses.sum().backward()
            seen.append((losses.detach(), kept.gradients()))
    others = [0, 1, 3]
    assert torch.equal(seen[0][0][others], seen[1][0][others])
    assert torch.equal(seen[0][1][others], seen[1][1][others])
    assert not torch.equal(seen[0][1][2], seen[1][1][2])


def test_the_means_of_transformers_do_couple_records(split):
    """Why the losses stay apart: under the mean over tokens the other rows' gradients move by half."""
    sizes = []
    for lengths in (LENGTHS, (9, 3, 2, 2)):
        with per_sample([split.back]) as kept:
            split.back(split.middle(split.front(IDS)), labels_of(IDS, lengths)).backward()
            sizes.append(kept.gradients()[0].norm())
    assert sizes[1] / sizes[0] == pytest.approx(16 / 12, rel=1e-4)


def test_nothing_is_left_behind_also_after_an_error(split):
    parts = (split.front, split.back)

    def traces():
        found = []
        for part in parts:
            for name, module in part.named_modules():
                hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
                extra = {"activations", "max_batch_len", "autograd_grad_sample_hooks"} & set(vars(module))
                found += [name for _ in extra] + [name for kind in hooks for _ in kind] + [name] * module.training
            for name, parameter in part.named_parameters():
                left = {"grad_sample", "_forward_counter", "_current_grad_sample"} & set(vars(parameter))
                found += [name for _ in left] + ([name] if parameter.grad is not None else [])
        return found

    for part in parts:
        part.eval()
    assert traces() == []
    with per_sample(parts) as kept:
        losses = record_losses(split.back(split.middle(split.front(IDS))), labels_of(IDS))
        losses.sum().backward()
        assert traces() != []
        rows = kept.gradients()
    assert traces() == []

    def fail_between():
        with per_sample(parts):
            split.front(IDS)  # Its inputs are kept by now, and no backward pass takes them.
            raise KeyError

    with pytest.raises(KeyError):
        fail_between()
    assert traces() == []
    with per_sample(parts) as kept:
        losses = record_losses(split.back(split.middle(split.front(IDS))), labels_of(IDS))
        losses.sum().backward()
        assert torch.equal(kept.gradients(), rows), "a second time as the first"


def test_too_few_or_too_many_passes_give_no_rows(split):
    def backward():
        record_losses(split.back(split.middle(split.front(IDS))), labels_of(IDS)).sum().backward()

    with per_sample([split.front, split.back]) as kept:
        with pytest.raises(ValueError, match="one forward and one backward"):
            kept.gradients()
        backward()
        backward()
        with pytest.raises(ValueError, match="one forward and one backward"):
            kept.gradients()
    with per_sample([split.front, split.back]) as kept:  # C alone was reached.
        record_losses(split.back(split.middle(split.front(IDS)).detach()), labels_of(IDS)).sum().backward()
        with pytest.raises(ValueError, match="one forward and one backward"):
            kept.gradients()


def test_whatever_else_may_learn_is_refused(split):
    norm = next(p for n, p in split.back.named_parameters() if "norm" in n or "ln_" in n)
    norm.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen"), per_sample([split.back]):
        pass
    norm.requires_grad_(False)
    with per_sample([split.back]):
        pass


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 2**16), scale=st.floats(0.01, 50)
)
@settings(max_examples=40, deadline=None)
def test_losses_are_sums_of_minus_log_probabilities(lengths, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(lengths), 7, 11, generator=generator) * scale
    labels = labels_of(torch.randint(0, 11, (len(lengths), 7), generator=generator), lengths)
    got = record_losses(logits, labels)
    wide = logits.double().numpy()
    for row, length in enumerate(lengths):
        want = 0.0
        for t in range(length - 1):
            peak = wide[row, t].max()
            want += peak + np.log(np.exp(wide[row, t] - peak).sum()) - wide[row, t, labels[row, t + 1]]
        assert got[row].item() == pytest.approx(want, rel=1e-4, abs=1e-4)


def test_opacus_is_imported_when_it_is_needed_and_without_a_warning():
    code = (
        "import sys, warnings\n"
        "import securesplit.model.persample\n"
        "assert 'opacus' not in sys.modules\n"
        "warnings.simplefilter('error')\n"
        "from opacus.grad_sample.grad_sample_module import GradSampleHooks\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
