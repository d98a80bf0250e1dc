"""How many tokens a sequence really has inside its public bucket: where text rows end and padding rows begin (O7).

Padding repeats one token, so that its rows look alike and unlike text; noise hides that row by row, but all rows of a
sequence vote together. For every possible length n the attack adds up Gaussian log-likelihoods,

    sum over text rows of log N(row; m_text, S_text + s^2 I)  +  sum over padding of log N(row; m_age, S_pad + s^2 I),

with moments from public text and s the policy's noise, and a prior over lengths from public text. Without noise that is
exact; with infinite noise the prior is left. A gradient at B's output says the same more plainly: no label stands on
padding, so that its rows are zero, or noise alone. Sizes and timing say nothing within a bucket: all sizes are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.knowledge import Knowledge
from attacks.simulated import clean_rows, framed, padding_of, public_texts

__all__ = ["Frame", "Moments", "from_gradients", "from_rows", "length_prior", "moments_of"]

# Padding rows differ by how many stand before them; from this age on they are alike.
_AGES = 4
# Variance that is always there, as a part of the text rows' own: codecs round, adapters drift, public text is not private.
_FLOOR = 1e-4
_SCALES = (0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True, slots=True)
class Frame:
    """One public length.

    Attributes:
        bucket: T. low, high: the fewest and the most tokens of a text in it.
        classes: whether padding stands in front of the text, and once behind; else behind it only.
    """

    bucket: int
    low: int
    high: int
    classes: bool

    @property
    def lengths(self) -> range:
        """Every possible number of tokens."""
        return range(self.low, self.high + 1)

    def padding(self, length: int) -> Tensor:
        """(T,) bool: which rows are padding when the text has ``length`` tokens."""
        places = torch.arange(self.bucket)
        if not self.classes:
            return places >= length
        return (places < self.bucket - 1 - length) | (places == self.bucket - 1)

    def ages(self, length: int) -> Tensor:
        """(T,) int: the kind of padding that a row is, by how much padding stands right before it; at most ``_AGES - 1``."""
        places = torch.arange(self.bucket)
        if not self.classes:
            return (places - length).clamp(0, _AGES - 1)
        # In front a row's age is its place; the closing one is the first after a text, a kind of its own.
        return torch.where(places == self.bucket - 1, _AGES - 1, places.clamp_max(_AGES - 2))


@dataclass(frozen=True, slots=True)
class Moments:
    """Gaussian moments of clean rows of one frame.

    Attributes:
        first_mean: (D,), first: (D, D) covariance of text at position 0, whose states are like no others.
        text_mean: (D,), text: (D, D) covariance of text behind it.
        pad_means: (ages, D). pad: (D, D) covariance about those.
    """

    first_mean: Tensor
    first: Tensor
    text_mean: Tensor
    text: Tensor
    pad_means: Tensor
    pad: Tensor


def length_prior(known: Knowledge, frame: Frame) -> Tensor:
    """(lengths,) log-probability of each length: public texts that fall into the frame, smoothed over neighbours.

    A client cuts longer texts, so that they count for the longest length where the frame is the largest one.
    """
    lengths = torch.tensor(list(frame.lengths), dtype=torch.float64)
    weight = torch.full((len(lengths),), 0.2 / len(lengths), dtype=torch.float64)
    seen = torch.tensor([float(min(len(text), frame.high)) for text in known.prior.texts if len(text) >= frame.low])
    if len(seen):
        near = torch.exp(-(lengths[:, None] - seen.double()).abs())
        weight += 0.8 * (near / near.sum(0)).mean(1)
    return (weight / weight.sum()).log()


def moments_of(known: Knowledge, frame: Frame, count: int) -> Moments:
    """Moments from public texts of uniformly drawn lengths."""
    generator = torch.Generator().manual_seed(known.seed)
    ends = torch.randint(frame.low, frame.high + 1, (count,), generator=generator).tolist()
    texts = [
        _stretched(text, end) for text, end in zip(public_texts(known, count, frame.high, generator), ends, strict=True)
    ]
    rows = clean_rows(known, framed(texts, frame.bucket, padding_of(known), classes=frame.classes)).double()
    where = torch.stack([frame.padding(end) for end in ends])
    ages = torch.stack([frame.ages(end) for end in ends])
    inside = ~where
    inside[:, 0] = False
    pads, kinds = rows[where], ages[where]
    # Unframed, every text has a token of its own at position 0.
    first = clean_rows(known, framed(texts, frame.bucket, padding_of(known), classes=False)).double()[:, 0]
    means = torch.zeros(_AGES, rows.shape[-1], dtype=torch.float64)
    for age in set(kinds.tolist()):
        means[age] = pads[kinds == age].mean(0)
    return Moments(
        first_mean=first.mean(0), first=_covariance(first - first.mean(0)),
        text_mean=rows[inside].mean(0), text=_covariance(rows[inside] - rows[inside].mean(0)),
        pad_means=means, pad=_covariance(pads - means[kinds]),
    )  # fmt: skip


def _stretched(text: Sequence[int], length: int) -> tuple[int, ...]:
    """A text of exactly so many tokens: cut, or repeated."""
    return tuple((list(text) * (length // len(text) + 1))[:length])


def _covariance(centred: Tensor) -> Tensor:
    if not len(centred):
        return torch.zeros(centred.shape[1], centred.shape[1], dtype=torch.float64)
    return centred.T @ centred / len(centred)


def from_rows(rows: Tensor, moments: Moments, frame: Frame, sigma: float) -> Tensor:
    """(N, lengths) log-likelihood of each length from released rows, (N, T, D), up to a constant per sequence."""
    rows = rows.double()
    floor = _FLOOR * float(moments.text.diagonal().mean()) + 1e-30
    noise = (sigma**2 + floor) * torch.eye(rows.shape[-1], dtype=torch.float64)
    text = _log_normal(rows - moments.text_mean, moments.text + noise)
    text[:, 0] = _log_normal(rows[:, 0] - moments.first_mean, moments.first + noise)
    pads = torch.stack([_log_normal(rows - mean, moments.pad + noise) for mean in moments.pad_means], dim=-1)
    found = []
    for length in frame.lengths:
        ages = frame.ages(length).expand(rows.shape[:2])
        as_pad = pads.gather(-1, ages[..., None])[..., 0]
        found.append(torch.where(frame.padding(length), as_pad, text).sum(1))
    return torch.stack(found, dim=1)


def _log_normal(centred: Tensor, covariance: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(covariance)
    flat = centred.reshape(-1, centred.shape[-1])
    whitened = torch.linalg.solve_triangular(factor, flat.T, upper=False)
    density: Tensor = whitened.square().sum(0) / 2 + factor.diagonal().log().sum()
    return -density.reshape(centred.shape[:-1])


def from_gradients(gradients: Tensor, frame: Frame, sigma: float) -> Tensor:
    """(N, lengths) log-likelihood of each length from gradients at B's output, (N, T, D), where padding stands behind.

    Attention looks back and labels of padding are left out, so that of n tokens the first n - 1 rows carry gradient and
    the others none. How large it is, the traffic says; rows differ by orders of magnitude, hence a mixture of scales.
    """
    energy, width = gradients.double().square().sum(-1), gradients.shape[-1]
    mean = float(energy.mean()) / width
    # What the noise by itself would make of that mean, two standard errors above, is no signal.
    excess = mean - sigma**2 * (1 + 2 * math.sqrt(2 / energy.numel() / width))
    quiet, signal = sigma**2 + 1e-12 * mean + 1e-30, max(excess, 0.0)

    def spoken(variance: float) -> Tensor:
        return -energy / (2 * variance) - width / 2 * math.log(variance)

    loud = torch.logsumexp(torch.stack([spoken(quiet + scale * signal) for scale in _SCALES]), 0) - math.log(
        len(_SCALES)
    )
    still, places = spoken(quiet), torch.arange(frame.bucket)
    return torch.stack([torch.where(places < n - 1, loud, still).sum(1) for n in frame.lengths], dim=1)
