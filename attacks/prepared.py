"""One sequence's released gradient, made ready for a test of every word of the vocabulary at every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from attacks.evidence import Evidence, Fit, joined
from attacks.head import Head, Here

__all__ = ["Prepared", "Reference", "Settings", "reference_for"]

_REFERENCE_ERROR = 0.4  # Of a size that is the reference's; most are off by less than a tenth.
_SAMPLE = 16  # Words whose sizes tell a row's factor.


class Settings(BaseModel):
    """labels.toml explains each value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    shortlist: Annotated[int, Field(ge=1)]
    widenings: Annotated[int, Field(ge=1)]
    reference: Annotated[int, Field(ge=1)]
    texts: Annotated[int, Field(ge=0)]
    passes: Annotated[int, Field(ge=1)]
    sweeps: Annotated[int, Field(ge=0)]
    unexplained: Annotated[float, Field(gt=0, lt=1)]
    beam: Annotated[int, Field(ge=1)]


class Prepared:
    """One sequence, ready for V-way tests at each row but the last, which has no label.

    With c the sum of all logits' weights under C's own distribution, label y of row t gives ``J' (c - w_y)`` to the row
    itself. Its product with a row is exact for every word; its size is exact for the words that :meth:`sharpen` looked at,
    and for all others that of the reference's Jacobian times one factor, which is within some per cent.

    Args:
        head: C. hidden, gradient: (T, D), B's output and the released gradient at it.
        reference: the Jacobian at some row of some sequence.
        settings: of the family.

    Attributes:
        logits: (T, V), C's own. probabilities: (T, V). chances: (T, D), c.
        heres: C about each row.
    """

    def __init__(self, head: Head, hidden: Tensor, gradient: Tensor, reference: Reference, settings: Settings) -> None:
        self.head, self.hidden, self.gradient, self.settings = head, hidden, gradient, settings
        with torch.no_grad():
            self.logits = head.logits(head.states(hidden[None])[0]).float()
        self._slope = head.slope(self.logits)
        self.probabilities = torch.softmax(self.logits, dim=1)
        self.chances = self.cotangent(self.probabilities, slice(None))
        past = head.cache(hidden) if head.layers else None
        self.heres = [Here(head, hidden, past, position) for position in range(len(hidden) - 1)]
        rows = slice(0, len(self.heres))
        pushed = torch.cat([here.push(row[None]) for here, row in zip(self.heres, gradient, strict=False)])
        self._along = self.beyond_chance(pushed, rows)
        self._size = self._sizes_by(reference)
        self._exact = torch.zeros_like(self._size, dtype=torch.bool)

    def cotangent(self, weights: Tensor, rows: slice) -> Tensor:
        """(n, V) weights of these rows' logits to (n, D) at the head's input."""
        weights = weights if self._slope is None else weights * self._slope[rows]
        return weights @ self.head.weight

    def beyond_chance(self, states: Tensor, rows: slice) -> Tensor:
        """(n, V): <x, c - w_y> of vectors x at the head's input, (n, D), and each word."""
        products = states @ self.head.weight.T
        products = products if self._slope is None else products * self._slope[rows]
        return (states * self.chances[rows]).sum(1, keepdim=True) - products

    def words(self, position: int, labels: Tensor) -> Tensor:
        """(k, D): c - w_y at the head's input."""
        weight = self.head.weight[labels]
        return self.chances[position] - (
            weight if self._slope is None else weight * self._slope[position, labels, None]
        )

    def _sizes_by(self, reference: Reference) -> Tensor:
        rows = slice(0, len(self.heres))
        energy = reference.energy if self._slope is None else reference.energy * self._slope[rows].square()
        smoothed = self.chances[rows] @ reference.gram
        size = energy - (smoothed * self.chances[rows]).sum(1, keepdim=True) + 2 * self.beyond_chance(smoothed, rows)
        count = len(self.head.weight)
        sample = torch.linspace(0, count - 1, min(_SAMPLE, count)).long()
        for position, here in enumerate(self.heres):
            exact = here.pull(self.words(position, sample)).square().sum(1)
            size[position] *= float((exact / size[position, sample].clamp_min(1e-38)).median())
        return size.clamp_min_(0)

    def sharpen(self, evidence: Evidence, position: int, log_prior: Tensor, found: Fit | None, later: Tensor) -> None:
        """Compute the size exactly for every label that could be the row's best, and write it into the evidence.

        A label is looked at while the reference's error could still bring it before the best of those that were.

        Args:
            evidence: of this one row. log_prior: (V,). found: None ranks by the angle, which no error changes much.
            later: (D,), what later labels give to the row.
        """
        count, here = min(self.settings.shortlist, len(log_prior)), self.heres[position]
        for turn in range(self.settings.widenings if found is not None else 1):
            scores = self._optimistic(evidence, log_prior, position, found)
            best = scores.topk(count).indices
            if turn == 0:
                best = torch.unique(torch.cat([best, log_prior.topk(count).indices]))
            elif self._exact[position, scores.argmax()]:
                return
            best = best[~self._exact[position, best]]
            if not len(best):
                continue
            own = here.pull(self.words(position, best))
            evidence.size[0, best] = (own + later).square().sum(1)
            self._size[position, best] = own.square().sum(1)
            self._exact[position, best] = True

    def _optimistic(self, evidence: Evidence, log_prior: Tensor, position: int, found: Fit | None) -> Tensor:
        """(V,): how good a label may be, given how far the reference may be off for it."""
        if found is None:
            return evidence.angle()[0]
        error = _REFERENCE_ERROR * found.scale**2 * evidence.size[0].masked_fill(self._exact[position], 0.0)
        return log_prior - (evidence.residual(found.scale)[0] - error) / (2 * found.variance)

    def evidence(self, position: int, later: Tensor | None = None) -> Evidence:
        """What one row says, given what later labels give to it, (D,)."""
        row = slice(position, position + 1)
        gradient, along, size = self.gradient[row], self._along[row].clone(), self._size[row].clone()
        if later is not None:
            crossed = self.beyond_chance(self.heres[position].push(later[None]), row)
            along, size = along + gradient[0] @ later, (size + 2 * crossed + later @ later).clamp_min_(0)
        return Evidence(along, size, gradient.square().sum(1), gradient.shape[1])

    def alone(self, log_prior: Tensor, found: Fit | None) -> Evidence:
        """All rows as if later labels gave them nothing, sizes sharpened."""
        rows, none = [], torch.zeros_like(self.hidden[0])
        for position in range(len(self.heres)):
            rows.append(self.evidence(position))
            self.sharpen(rows[-1], position, log_prior[position], found, none)
        return joined(rows)

    def expected_norm(self) -> float:
        """Frobenius norm of the gradient of the sum over labels, as C's own distribution lets one expect it."""
        return float((self.probabilities[:-1] * self._size).sum().sqrt())


@dataclass(frozen=True, slots=True)
class Reference:
    """One row's Jacobian, which others' are like but for a factor.

    Attributes:
        gram: (D, D), J J'. energy: (V,), |J' w_y|^2.
    """

    gram: Tensor
    energy: Tensor


def reference_for(head: Head, hidden: Tensor, settings: Settings) -> Reference:
    """The middle row of a sequence, (T, D)."""
    past = head.cache(hidden) if head.layers else None
    jacobian = Here(head, hidden, past, len(hidden) // 2).pull(torch.eye(hidden.shape[1]))
    parts = torch.split(head.weight, settings.reference)
    return Reference(jacobian @ jacobian.T, torch.cat([(part @ jacobian).square().sum(1) for part in parts]))
