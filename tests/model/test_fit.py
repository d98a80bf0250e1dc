"""A fitted code against plain linear algebra by NumPy's SVD, and against a model made to have outliers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from securesplit.errors import InputError
from securesplit.model.fit import MASSIVE, WILD, fit_code
from securesplit.model.plan import CutPlan
from securesplit.model.split import split_model

N, T, D = 40, 12, 32


@pytest.fixture(scope="module")
def windows():
    return torch.randint(6, 97, (N, T), generator=torch.Generator().manual_seed(5))


def fit(split, windows, width, **options):
    return fit_code(split.front, split.middle, windows, width=width, model="0" * 64, text="1" * 64, **options)


def rows_of(split, windows, sentinel=None):
    """A's rows as NumPy sees them, without the sentinel's."""
    with torch.no_grad():
        if sentinel is None:
            return split.front(windows).double().numpy().reshape(-1, D)
        first = torch.full_like(windows[:, :1], sentinel)
        return split.front(torch.cat([first, windows], 1))[:, 1:].double().numpy().reshape(-1, D)


def usable(rows):
    """The rows and the weight that the module's own text promises."""
    norms = np.linalg.norm(rows, axis=1)
    kept = rows[norms <= MASSIVE * np.median(norms)]
    spread = kept.std(axis=0)
    return kept, np.minimum(1.0, WILD * np.sort(spread)[(D - 1) // 2] / spread)


@pytest.mark.parametrize("sentinel", [None, 5])
@pytest.mark.parametrize("width", [1, 8, 31])
def test_the_components_are_those_of_the_svd(tiny, windows, width, sentinel):
    split = split_model(tiny("llama"), CutPlan(2, 2))
    code = fit(split, windows, width, sentinel=sentinel)
    kept, weight = usable(rows_of(split, windows, sentinel))
    centred = kept - kept.mean(0)
    right = np.linalg.svd(centred * weight, full_matrices=False)[2][:width]
    np.testing.assert_allclose(code.mean.numpy(), kept.mean(0), atol=1e-5)
    np.testing.assert_allclose(code.weight.numpy(), weight, rtol=1e-4)
    # Subspaces, not vectors: signs and near ties are nobody's business.
    np.testing.assert_allclose(code.basis.numpy().T @ code.basis.numpy(), right.T @ right, atol=1e-3)
    np.testing.assert_allclose(code.basis.numpy() @ code.basis.numpy().T, np.eye(width), atol=1e-5)
    back = ((centred * weight) @ right.T) @ right / weight
    assert code.facts.explained == pytest.approx(1 - ((centred - back) ** 2).sum() / (centred**2).sum(), abs=1e-4)
    assert code.facts.rows == len(kept)
    assert (code.facts.front, code.facts.back, code.facts.hidden, code.facts.width) == (2, 2, D, width)
    assert torch.equal(code.scale, torch.ones(width))
    with torch.no_grad():
        hidden = torch.from_numpy(kept).float()
        got = code.decode(code.encode(hidden).float()).numpy()
    np.testing.assert_allclose(got, back + kept.mean(0), atol=1e-4)


def test_the_clips_are_quantiles_of_the_norms_of_codes(tiny, windows):
    split = split_model(tiny("llama"), CutPlan(2, 2))
    code = fit(split, windows, 8, sentinel=5)
    codes = code.encode(torch.from_numpy(rows_of(split, windows, 5))).numpy().reshape(N, T, 8)
    assert code.facts.clips.rows == T
    for told, norms in (
        (code.facts.clips.sequence, np.sqrt((codes**2).sum((1, 2)))),
        (code.facts.clips.row, np.linalg.norm(codes, axis=2).ravel()),
    ):
        np.testing.assert_allclose(told, np.quantile(norms, [0.5, 0.9, 0.99]), rtol=1e-5)
        assert told[0] <= told[1] <= told[2]


def test_whitened_components_have_unit_variance_and_decode_alike(tiny, windows):
    split = split_model(tiny("llama"), CutPlan(2, 2))
    plain, white = (fit(split, windows, 8, whiten=w) for w in (False, True))
    hidden = torch.from_numpy(rows_of(split, windows))
    np.testing.assert_allclose(white.encode(hidden).std(0, unbiased=False).numpy(), 1.0, rtol=1e-3)
    spread = plain.encode(hidden).std(0, unbiased=False).numpy()
    assert (np.diff(spread) <= 1e-6).all()
    assert spread[0] > 1.2 * spread[-1]
    for code in (plain, white):
        torch.testing.assert_close(
            code.decode(code.encode(hidden).float()), plain.decode(plain.encode(hidden).float()), rtol=1e-4, atol=1e-4
        )
    assert white.facts.whitened
    assert white.digest != plain.digest


def test_as_wide_as_the_model_it_only_centres(tiny, windows):
    split = split_model(tiny("llama"), CutPlan(2, 2))
    code = fit(split, windows, D)
    assert torch.equal(code.basis, torch.eye(D))
    assert torch.equal(code.weight, torch.ones(D))
    assert code.facts.explained == 1.0
    hidden = torch.from_numpy(rows_of(split, windows)).float()
    torch.testing.assert_close(code.encode(hidden).float(), hidden - code.mean)
    white = fit(split, windows, D, whiten=True)
    torch.testing.assert_close(white.decode(white.encode(hidden).float()), hidden, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_the_sentinels_rows_are_the_whole_models(tiny, windows, family):
    """HF's own hidden states of the unsplit model, between its layers."""
    model = tiny(family)
    code = fit(split_model(model, CutPlan(2, 3)), windows, 4, sentinel=5)
    with torch.no_grad():
        states = model(torch.cat([torch.full((N, 1), 5), windows], 1), output_hidden_states=True).hidden_states
    for got, want in ((code.row, states[2][:, 0]), (code.mixed, states[3][:, 0])):
        torch.testing.assert_close(got.expand(N, -1), want, rtol=1e-4, atol=1e-5)
    assert code.facts.sentinel == 5


def test_massive_rows_and_wild_dimensions_do_not_decide(tiny, windows):
    split = split_model(tiny("llama"), CutPlan(0, 2))
    table = split.front.module.embed_tokens.weight
    with torch.no_grad():
        table[7] *= 1e4  # A token whose row is massive, as an attention sink's.
        table[:, 3] *= 50  # A dimension that is wild everywhere.
    texts = windows.clone()
    texts[0, 0] = 7
    code = fit(split, texts, 8)
    held = int((texts == 7).sum())
    assert held >= 1
    assert code.facts.rows == N * T - held
    assert float(code.mean.abs().max()) < 10
    assert code.weight[3] < 0.2
    assert int((code.weight < 1).sum()) == 1
    assert float(code.basis[:, 3].abs().max()) < 1.0
    # Every other dimension still counts: no component is the wild one alone.
    assert float((code.basis[0] ** 2).max()) < 0.99


def test_the_same_text_gives_the_same_code(tiny, windows):
    split = split_model(tiny("llama"), CutPlan(2, 2))
    assert fit(split, windows, 8, sentinel=5).digest == fit(split, windows, 8, sentinel=5).digest


def test_progress_reaches_the_end(tiny, windows):
    seen = []
    fit(split_model(tiny("llama"), CutPlan(2, 2)), windows, 4, progress=lambda *now: seen.append(now))
    assert seen[-1] == (N, N)
    assert seen == sorted(seen)


def test_what_cannot_be_fitted(tiny, windows):
    split = split_model(tiny("llama"), CutPlan(2, 2))
    for width in (0, -1, D + 1):
        with pytest.raises(InputError, match="SS-1417"):
            fit(split, windows, width)
    with pytest.raises(InputError, match="SS-1417"):
        fit(split, windows[:1], 8)
