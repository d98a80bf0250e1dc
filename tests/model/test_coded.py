"""A code around A, B and C against the unsplit model on [sentinel] + text, and against a formula written out here."""

from __future__ import annotations

import pytest
import torch

from securesplit.model.code import Clips, CodeFacts, CutCode
from securesplit.model.coded import CodedBack, CodedFront, code_back, code_front
from securesplit.model.plan import CutPlan
from securesplit.model.split import split_model
from securesplit.server.engine import Batch, Engine
from securesplit.server.learner import Rows

FAMILIES = ("llama", "gpt2", "qwen2")
SENTINEL, T = 5, 9
CUTS = (CutPlan(2, 2), CutPlan(0, 0), CutPlan(1, 3))


def facts(width, *, sentinel, hidden=32):
    return CodeFacts(
        model="0" * 64, front=2, back=2, hidden=hidden, width=width, sentinel=sentinel, whitened=False, text="1" * 64,
        rows=10, explained=1.0, clips=Clips(rows=48, sequence=(1.0, 2.0, 3.0), row=(0.1, 0.2, 0.3)),
    )  # fmt: skip


def centring(split, *, sentinel=SENTINEL):
    """k = D: the identity around a mean that is far from zero."""
    ones = torch.ones(32)
    row = mixed = None
    if sentinel is not None:
        with torch.no_grad():
            row = split.front(torch.tensor([[sentinel]]))[0, 0]
            mixed = split.middle(row[None, None])[0, 0]
    return CutCode(facts(32, sentinel=sentinel), torch.linspace(-2, 2, 32), ones, torch.eye(32), ones, row, mixed)


def narrow(k=12, *, sentinel=None, seed=1):
    """k < D with every part of the map far from trivial."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=g)).Q[:k].contiguous()
    first = (torch.randn(32, generator=g), torch.randn(32, generator=g)) if sentinel is not None else (None, None)
    return CutCode(
        facts(k, sentinel=sentinel), torch.randn(32, generator=g), torch.rand(32, generator=g) + 0.2, basis,
        torch.rand(k, generator=g) + 0.5, *first,
    )  # fmt: skip


def loud(tiny, family):
    """The usual start is so small that a sentinel would hardly be heard."""
    model = tiny(family)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data * 6
    return model


def ids_of(batch=3, length=T):
    return torch.randint(6, 97, (batch, length), generator=torch.Generator().manual_seed(2))


def served(engine, codes, **options):
    batch, length, _ = codes.shape
    (out,) = engine.forward([Batch("a", 0, (length,) * batch, codes.float().flatten(0, 1), **options)], learn=False)
    return out.reshape(batch, length, -1)


@pytest.mark.parametrize("plan", CUTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_loss_are_the_unsplit_models_behind_the_sentinel(tiny, family, plan):
    model = loud(tiny, family)
    split, ids = split_model(model, plan), ids_of()
    code = centring(split)
    front, back = CodedFront(split.front, code), CodedBack(split.back, code)
    engine = Engine(split.middle, learning_rate=0.1, code=code)
    labels = ids.clone()
    labels[1, 4:] = -100
    with torch.no_grad():
        codes = front(ids)
        assert codes.shape == (3, T, 32), "the sentinel's row is not sent"
        mixed = served(engine, codes)
        assert mixed.shape == (3, T, 32), "nor sent back"
        whole = model(torch.cat([torch.full((3, 1), SENTINEL), ids], 1)).logits[:, 1:]
        torch.testing.assert_close(back(mixed), whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(back(mixed, logits_to_keep=2), whole[:, -2:], rtol=1e-4, atol=1e-4)
        # Written out: the mean over the labels that a model without a sentinel would predict, too.
        chosen = torch.log_softmax(whole[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
        want = -chosen[labels[:, 1:] != -100].mean()
        torch.testing.assert_close(back(mixed, labels), want, rtol=1e-4, atol=1e-4)
        # The test can tell: without the sentinel the same text has other logits.
        assert (model(ids).logits - whole).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_caches_is_the_unsplit_models_behind_the_sentinel(tiny, family):
    model = loud(tiny, family)
    split, ids = split_model(model, CutPlan(2, 2)), ids_of(2)
    code = centring(split)
    front, back = CodedFront(split.front, code), CodedBack(split.back, code)
    engine = Engine(split.middle, learning_rate=0.1, code=code)
    a, c = front.new_cache(), back.new_cache()
    got = []
    with torch.no_grad():
        for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:8], ids[:, 8:]):
            length = part.shape[1]
            codes = front(part, cache=a)
            assert codes.shape == (2, length, 32)
            rows = engine.decode(1, 7, (length, length), codes.float().flatten(0, 1))
            got.append(back(rows.reshape(2, length, -1), cache=c))
        whole = model(torch.cat([torch.full((2, 1), SENTINEL), ids], 1)).logits[:, 1:]
    assert a.length == c.length == T + 1
    torch.testing.assert_close(torch.cat(got, 1), whole, rtol=1e-4, atol=1e-4)
    assert [g.shape[1] for g in got] == [4, 1, 3, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_sentinel_centring_changes_nothing(tiny, family):
    model = loud(tiny, family)
    split, ids = split_model(model, CutPlan(2, 2)), ids_of()
    code = centring(split, sentinel=None)
    front, back = code_front(split.front, code), code_back(split.back, code)
    assert isinstance(front, CodedFront)
    assert back is split.back
    with torch.no_grad():
        got = back(served(Engine(split.middle, learning_rate=0.1, code=code), front(ids)))
        torch.testing.assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_without_a_code_the_parts_are_the_parts(tiny):
    split = split_model(tiny("llama"), CutPlan(2, 2))
    assert code_front(split.front, None) is split.front
    assert code_back(split.back, None) is split.back


def test_the_parts_share_weights_and_mode(tiny):
    split = split_model(tiny("llama"), CutPlan(2, 2))
    coded = CodedFront(split.front, narrow())
    assert coded.module is split.front.module
    assert coded.width == 32


@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_a_narrow_code_is_the_formula(tiny, gain):
    """One entry at a time, in Python's own arithmetic, then B by the whole model's layers."""
    split, ids, code = split_model(tiny("llama"), CutPlan(2, 2)), ids_of(2, 3), narrow()
    with torch.no_grad():
        hidden = split.front(ids)
        codes = CodedFront(split.front, code)(ids)
        m, w, e, s = (t.tolist() for t in (code.mean, code.weight, code.basis, code.scale))
        want_codes, want_rows = [], []
        for row in hidden.flatten(0, 1).tolist():
            z = [sum((row[d] - m[d]) * w[d] * e[k][d] for d in range(32)) / s[k] for k in range(12)]
            want_codes.append(z)
            want_rows.append([sum(gain * z[k] * s[k] * e[k][d] for k in range(12)) / w[d] + m[d] for d in range(32)])
        torch.testing.assert_close(codes.flatten(0, 1), torch.tensor(want_codes, dtype=torch.float64))
        rows = torch.tensor(want_rows).reshape(2, 3, 32)
        engine = Engine(split.middle, learning_rate=0.1, code=code)
        torch.testing.assert_close(served(engine, codes, gain=gain), split.middle(rows), rtol=1e-4, atol=1e-4)


def test_ragged_batches_each_get_their_sentinel(tiny):
    split = split_model(tiny("llama"), CutPlan(2, 2))
    code = narrow(sentinel=SENTINEL)
    engine = Engine(split.middle, learning_rate=0.1, code=code)
    codes = torch.randn(9, 12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        (got,) = engine.forward([Batch("a", 0, (4, 2, 3), codes)], learn=False)
        for start, stop in ((0, 4), (4, 6), (6, 9)):
            rows = torch.cat([code.row[None], code.decode(codes[start:stop])])[None]
            torch.testing.assert_close(got[start:stop], split.middle(rows)[0, 1:], rtol=1e-4, atol=1e-4)


def test_the_gradient_comes_back_as_wide_as_the_codes_and_is_the_right_one(tiny):
    split = split_model(tiny("llama"), CutPlan(2, 2))
    code = narrow(sentinel=SENTINEL)
    engine = Engine(split.middle, learning_rate=0.1, code=code)
    engine.fleet.common._descent = None
    codes = torch.randn(6, 12, generator=torch.Generator().manual_seed(3))
    pull = torch.randn(6, 32, generator=torch.Generator().manual_seed(4))
    engine.forward([Batch("a", 0, (3, 3), codes, 0.5)], learn=True)
    (got,) = engine.backward([Rows("a", 0, pull)])
    assert got.shape == codes.shape

    def scalar(z):
        rows = torch.cat([code.row.expand(2, 1, -1), code.decode(z * 0.5).reshape(2, 3, -1)], 1)
        return float((split.middle(rows)[:, 1:].reshape(6, -1) * pull).sum())

    with torch.no_grad():
        for i, j in ((0, 0), (2, 5), (5, 11)):
            bump = torch.zeros_like(codes)
            bump[i, j] = 5e-2
            slope = (scalar(codes + bump) - scalar(codes - bump)) / 1e-1
            assert got[i, j].item() == pytest.approx(slope, rel=0.05, abs=2e-2)
