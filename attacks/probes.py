"""Classifiers of noised rows, fitted to clean public rows with the noise put in exactly, and a choice among them.

Two kinds. A *discriminant* is linear in pooled rows: classes are Gaussians with one covariance, to which the noise that
pooling leaves is added. A *token classifier* takes every row for a noisy state of one token, whose state is about Gaussian,
and every class for a bag of tokens: ``sum_t log sum_v p(v | class) N(row_t; m_v, S + sigma^2 I)``. Pooling dilutes a
single telling word by the length of the text; the other does not, but knows nothing of context. Both tend to the classes'
frequencies as the noise grows, as a Bayes classifier must.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

__all__ = ["Ensemble", "Form", "Sample", "choose", "discriminant", "pooled", "token_classifier"]

_TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_JITTER = 1e-6
_TOGETHER = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Labelled sequences of one public length.

    Attributes:
        rows: (N, T, D), clean unless a form says otherwise. ids: (N, T) their tokens, padding included.
        labels: (N,) classes. classes: how many there are.
    """

    rows: Tensor
    ids: Tensor
    labels: Tensor
    classes: int

    def part(self, indices: Tensor) -> Sample:
        """Some of them."""
        return Sample(self.rows[indices], self.ids[indices], self.labels[indices], self.classes)

    @property
    def log_prior(self) -> Tensor:
        """(C,) log frequency of the classes, one more of each."""
        counts = torch.bincount(self.labels, minlength=self.classes).double() + 1
        return (counts / counts.sum()).log()


Form = Callable[[Tensor], Tensor]
"""A fitted classifier: (N, T, D) released rows to (N, C) log scores."""

Fit = Callable[[Sample], Form]


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Forms that speak together.

    Attributes:
        forms: classifiers. temperatures: what each one's scores are divided by; a naive one is too sure of itself.
    """

    forms: tuple[Form, ...]
    temperatures: tuple[float, ...]

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, T, D) to (N, C), the sum of the forms' log-posteriors."""
        spoken = [
            torch.log_softmax(form(rows) / heat, -1) for form, heat in zip(self.forms, self.temperatures, strict=True)
        ]
        return torch.stack(spoken).sum(0)


def pooled(rows: Tensor, *, last: bool) -> Tensor:
    """(N, T, D) to (N, D), the mean row without position 0, whose states dwarf the others; with the last row (N, 2 D)."""
    mean = (rows[:, 1:] if rows.shape[1] > 1 else rows).double().mean(1)
    return torch.cat((mean, rows[:, -1].double()), 1) if last else mean


def discriminant(sample: Sample, sigma: float, *, last: bool, shrinkage: float) -> Form:
    """A linear discriminant of pooled rows (Fisher 1936), with sigma^2 of noise on every coordinate of every row."""
    x, (_, length, width) = pooled(sample.rows, last=last), sample.rows.shape
    # A class of which nothing was seen has the common mean, and its prior alone.
    means = x.mean(0).expand(sample.classes, -1).clone()
    for label in sorted(set(sample.labels.tolist())):
        means[label] = x[sample.labels == label].mean(0)
    centred = x - means[sample.labels]
    within = centred.T @ centred / len(x)
    sphere = float(within.diagonal().mean())
    noise = torch.full((x.shape[1],), sigma**2 / max(1, length - 1), dtype=torch.float64)
    noise[width:] = sigma**2
    covariance = (1 - shrinkage) * within + torch.diag(noise + shrinkage * sphere + _JITTER * sphere + 1e-30)
    weights = torch.linalg.solve(covariance, means.T)
    bias = sample.log_prior - (means * weights.T).sum(1) / 2

    def score(rows: Tensor) -> Tensor:
        found: Tensor = pooled(rows, last=last) @ weights + bias
        return found

    return score


def token_classifier(sample: Sample, sigma: float, *, vocabulary: int, smoothing: float) -> Form:
    """A Bayes classifier over noisy tokens.

    Args:
        vocabulary: how many different tokens it knows, commonest first.
        smoothing: pseudo-tokens of the common distribution in each class.
    """
    skip = 1 if sample.rows.shape[1] > 1 else 0
    rows, ids = sample.rows[:, skip:].double(), sample.ids[:, skip:].contiguous()
    tokens, counts = torch.unique(ids, return_counts=True)
    tokens = tokens[counts.argsort(descending=True, stable=True)[:vocabulary]].sort().values
    place = torch.searchsorted(tokens, ids).clamp_max(len(tokens) - 1)
    inside = tokens[place] == ids
    flat, where = rows[inside], place[inside]
    seen = torch.bincount(where, minlength=len(tokens)).double()
    means = torch.zeros(len(tokens), rows.shape[-1], dtype=torch.float64).index_add_(0, where, flat) / seen[:, None]
    centred = flat - means[where]
    spread = centred.T @ centred / len(flat)
    # A token that was seen once has no spread of its own; the common one stands for all.
    floor = 1e-3 * float((flat - flat.mean(0)).square().mean()) + 1e-30
    factor = torch.linalg.cholesky(spread + (sigma**2 + floor) * torch.eye(len(spread), dtype=torch.float64))
    bags = torch.zeros(sample.classes, len(tokens), dtype=torch.float64)
    owners = sample.labels[:, None].expand_as(ids)[inside]
    bags.index_put_((owners, where), torch.ones(len(where), dtype=torch.float64), accumulate=True)
    bags = bags + smoothing * seen / seen.sum()
    bags = bags / bags.sum(1, keepdim=True)
    centres = torch.linalg.solve_triangular(factor, means.T, upper=False).T
    half, prior = centres.square().sum(1) / 2, sample.log_prior

    def score(released: Tensor) -> Tensor:
        later = released[:, skip:].double()
        found = []
        for part in torch.split(later.flatten(0, 1), _TOGETHER):
            near = torch.linalg.solve_triangular(factor, part.T, upper=False).T @ centres.T - half
            top = near.max(1, keepdim=True).values
            found.append(((near - top).exp() @ bags.T).clamp_min(1e-300).log())
        # What is common to all classes, `top` and the rest of the density, is left out.
        summed: Tensor = prior + torch.cat(found).view(*later.shape[:2], -1).sum(1)
        return summed

    return score


def choose(
    fits: Sequence[Fit], train: Sample, judged: Sample, seen: Tensor, everything: Sample | None = None
) -> Ensemble:
    """Fit all forms, give each its temperature, and keep those that do best together on held-out sequences.

    Args:
        fits: how each form is fitted to a sample.
        train: clean sequences to fit to. judged: held-out ones, whose labels judge. seen: (M, T, D) their released rows; M
            may be a multiple of their number, for several draws of the noise, one after the other.
        everything: what the chosen forms are fitted to in the end; the training part when None.

    Returns:
        The forms whose summed log-posteriors lose least, and at equal loss the fewer of them.
    """
    labels = judged.labels.repeat(len(seen) // len(judged.labels))
    spoken, heats = [], []
    for fit in fits:
        scores = fit(train)(seen)
        losses = {heat: _loss(torch.log_softmax(scores / heat, -1), labels) for heat in _TEMPERATURES}
        heats.append(min(losses, key=lambda heat: (losses[heat], heat)))
        spoken.append(torch.log_softmax(scores / heats[-1], -1))
    subsets = [c for size in range(1, len(fits) + 1) for c in combinations(range(len(fits)), size) if size <= 3]
    best = min(subsets, key=lambda chosen: _loss(torch.stack([spoken[i] for i in chosen]).sum(0), labels))
    final = train if everything is None else everything
    return Ensemble(tuple(fits[i](final) for i in best), tuple(heats[i] for i in best))


def _loss(scores: Tensor, labels: Tensor) -> float:
    """Cross-entropy in nats, of scores up to a constant."""
    return float(torch.nn.functional.cross_entropy(scores, labels))
