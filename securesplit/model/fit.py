"""Fits the public code at the cut to public text: mean and principal components of A's rows.

The text must be public, and so must every choice made from what comes out: nothing here clips, noises or charges, and
the file goes to the server. A code fitted on private text would carry that text's statistics out.

Two kinds of outliers are kept from deciding the components. Rows of massive norm (attention sinks and delimiters, over
``MASSIVE`` times the median norm) do not enter mean and covariance. Dimensions of massive spread, over ``WILD`` times
the median spread, which transformers have a few of and which say little about the token, are weighed down to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from securesplit.errors import InputError
from securesplit.model.code import Clips, CodeFacts, CutCode
from securesplit.model.parts import Front, Middle

__all__ = ["MASSIVE", "WILD", "fit_code"]

MASSIVE = 4.0
WILD = 4.0
_BATCH = 16
_QUANTILES = (0.5, 0.9, 0.99)
_FLAT = 1e-6  # Components below this share of the largest deviation are noise of the arithmetic.


@dataclass(frozen=True, slots=True)
class _Moments:
    """Of the rows that are not massive: how many, mean (D,) and covariance (D, D), float64."""

    count: int
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True, slots=True)
class _Axes:
    """The linear part of a code, float64: weight (D,), basis (k, D), scale (k,), and the share of variance kept."""

    weight: Tensor
    basis: Tensor
    scale: Tensor
    explained: float


@torch.no_grad()
def fit_code(
    front: Front,
    middle: Middle,
    windows: Tensor,
    *,
    width: int,
    model: str,
    text: str,
    sentinel: int | None = None,
    whiten: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> CutCode:
    """Fit a code.

    Args:
        front, middle: A and B of the public model, without adapters, in evaluation mode.
        windows: (N, T) tokens of public text.
        width: k, 1 to D; with k = D and without ``whiten`` the basis is the identity and the code only centres.
        model: digest of the model's manifest.
        text: SHA-256 of the public text's file, for the record.
        sentinel: a public token to stand in front of every sequence, or None.
        whiten: give every component unit variance, so that weak ones are not lost in the noise; costs strong ones.
        progress: called with windows done and in all.

    Raises:
        InputError: SS-1417 when the width is impossible or the text too short for it.
    """
    if not 1 <= width <= front.width:
        raise InputError(
            "SS-1417",
            f"a width of {width} is not between 1 and {front.width}",
            hint="64 to 128 is usual; see the docs.",
        )
    rows = _rows(front, windows, sentinel, progress)
    moments = _moments(rows)
    if moments.count < 2 * width:
        raise InputError(
            "SS-1417",
            f"{moments.count} usable rows of public text are too few for {width} components",
            hint="Give at least two rows per component; a hundred are better.",
        )
    axes = _identity(moments) if width == front.width and not whiten else _components(moments, width, whiten=whiten)
    row, mixed = _constants(front, middle, sentinel)
    draft = CodeFacts(
        model=model, front=front.span.stop, back=front.layers_total - middle.span.stop, hidden=front.width, width=width,
        sentinel=sentinel, whitened=whiten, text=text, rows=moments.count, explained=axes.explained,
        clips=Clips(rows=windows.shape[1], sequence=(0.0, 0.0, 0.0), row=(0.0, 0.0, 0.0)),
    )  # fmt: skip
    code = CutCode(draft, moments.mean.float(), axes.weight.float(), axes.basis.float(), axes.scale.float(), row, mixed)
    facts = draft.model_copy(update={"clips": _clips(code, rows)})
    return CutCode(facts, code.mean, code.weight, code.basis, code.scale, row, mixed)


def _rows(front: Front, windows: Tensor, sentinel: int | None, progress: Callable[[int, int], None]) -> Tensor:
    """A's output without the sentinel's row, (N, T, D) float32."""
    found = []
    for start in range(0, len(windows), _BATCH):
        ids = windows[start : start + _BATCH]
        if sentinel is None:
            found.append(front(ids).float())
        else:
            found.append(front(torch.cat([torch.full_like(ids[:, :1], sentinel), ids], 1))[:, 1:].float())
        progress(min(start + _BATCH, len(windows)), len(windows))
    return torch.cat(found)


def _moments(rows: Tensor) -> _Moments:
    norms = rows.norm(dim=-1)
    ordinary = norms <= MASSIVE * norms.median()
    count = int(ordinary.sum())
    mean = torch.stack([r[o].double().sum(0) for r, o in zip(rows, ordinary, strict=True)]).sum(0) / count
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for start in range(0, len(rows), _BATCH):  # In pieces, because float64 of all rows would double the memory.
        part = slice(start, start + _BATCH)
        centred = rows[part][ordinary[part]].double() - mean
        covariance += centred.T @ centred
    return _Moments(count, mean, covariance / count)


def _identity(moments: _Moments) -> _Axes:
    size = len(moments.mean)
    ones = torch.ones(size, dtype=torch.float64)
    return _Axes(ones, torch.eye(size, dtype=torch.float64), ones.clone(), 1.0)


def _components(moments: _Moments, width: int, *, whiten: bool) -> _Axes:
    """Principal components of the weighted rows, by eigenvectors of their covariance; signs are fixed."""
    spread = moments.covariance.diagonal().clamp_min(0).sqrt()
    tiny = torch.finfo(torch.float32).tiny
    weight = (WILD * spread.median() / spread.clamp_min(tiny)).clamp(1e-6, 1.0)
    values, vectors = torch.linalg.eigh(moments.covariance * weight[:, None] * weight)
    basis = vectors[:, -width:].flip(1).T
    strongest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    basis = basis * strongest.sign()
    deviation = values[-width:].flip(0).clamp_min(0).sqrt()
    scale = deviation.clamp_min(max(_FLAT * float(deviation[0]), tiny)) if whiten else torch.ones_like(deviation)
    lost = torch.eye(len(weight), dtype=torch.float64) - (basis * weight).T @ (basis / weight)
    left = float((lost.T @ moments.covariance @ lost).trace() / moments.covariance.trace().clamp_min(tiny))
    return _Axes(weight, basis, scale, 1.0 - left)


def _constants(front: Front, middle: Middle, sentinel: int | None) -> tuple[Tensor | None, Tensor | None]:
    """A's output for the sentinel alone, and B's for that, (D,) float32 each."""
    if sentinel is None:
        return None, None
    row = front(torch.tensor([[sentinel]]))
    return row[0, 0].float().clone(), middle(row)[0, 0].float().clone()


def _clips(code: CutCode, rows: Tensor) -> Clips:
    norms = torch.cat([code.encode(rows[i : i + _BATCH]).norm(dim=-1) for i in range(0, len(rows), _BATCH)])

    def quantiles(values: Tensor) -> tuple[float, float, float]:
        a, b, c = (float(torch.quantile(values, q)) for q in _QUANTILES)
        return a, b, c

    return Clips(rows=rows.shape[1], sequence=quantiles(norms.norm(dim=1)), row=quantiles(norms.flatten()[: 1 << 23]))
