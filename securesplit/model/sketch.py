"""By how much averaging A and B apart is wrong, measured within the same secure sum.

Clients that train both factors and average them apart end with ``mean(B) mean(A)``; what they would want is
``mean(B A)``. The difference is a covariance: with A = A0 + a and B = B0 + b from a common start,

    R = mean(B A) - mean(B) mean(A) = mean(b a) - mean(b) mean(a),

because every term with A0 or B0 cancels. The sum of ``b a`` itself would need a number for every weight of the layer. But
``U^T b a V`` is as linear in ``b a``, and with public random signs U (out, k) and V (in, k) its mean square is the
square of the Frobenius norm of ``b a`` (Johnson and Lindenstrauss; for two sides e.g. Woodruff, arXiv:1411.4357). So each
client appends those k * k numbers per layer to its update, and whoever opens the sum knows ``U^T R V``, and from it
``||R|| / ||mean(B A)||``. Measured standard deviation of that figure at k = 32, three clients: 23 % for one layer of rank 1,
5 % over 28 of them, 9 % and 2 % at rank 8.

Every number is sent in two parts, coarse and fine, so that products much smaller than a coordinate's grid count too. What
does not fit is clipped, and a last number tells the share of the clients (by weight) to whom this happened.

What this does not do: it corrects nothing. It shows whoever opens the sum k * k numbers more per layer about the mean
than the means of A and B. A client that lies about its products lies about the residual.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from securesplit.model.lora import Layout

__all__ = ["SIDE", "Residual", "sketch_size", "sketched", "unsketched"]

Floats = NDArray[np.float64]

SIDE = 32
"""k, directions on each side of a layer."""

_FINE = 1 << 12
"""The fine part counts steps of ``bound / 2^24``; the coarse part's steps, ``bound / 2^12``, are in every ring's grid."""


@dataclass(frozen=True, slots=True)
class Residual:
    """What averaging A and B apart got wrong in one round.

    Attributes:
        relative: estimate of ``||mean(B A) - mean(B) mean(A)|| / ||mean(B A)||``, Frobenius norms over all layers together;
            means are weighted as the sum is. 0 is exact.
        clipped: share of the sum's weight whose clients had to clip a coordinate or a product; where it is not 0 the
            residual is not the whole truth, and may be too low.
    """

    relative: float
    clipped: float

    @property
    def told(self) -> str:
        """One line for whoever watches the run."""
        beyond = f"; clipped for {self.clipped:.0%} of the weight, so it may be more" if self.clipped else ""
        return f"A and B averaged apart missed {self.relative:.2%} of the mean product{beyond}"


@dataclass(frozen=True, slots=True)
class _Pair:
    """Where one layer's factors stand in the flat vector, and its public directions.

    Attributes:
        name: of the layer.
        a, b: places of A, (rank, columns), and B, (rows, rank).
    """

    name: str
    a: slice
    b: slice
    rank: int
    rows: int
    columns: int

    def scale(self, bound: float) -> float:
        """Brings products of coordinates up to ``bound``, of independent signs, to about ``bound`` or less."""
        return 1 / (math.sqrt(self.rows * self.columns) * self.rank * bound)

    def signs(self, seed: int, number: int) -> tuple[Floats, Floats]:
        """U, (rows, k), and V, (columns, k), of one round, entries -1 and 1; the same at every client."""
        return _signs(self.name, "U", self.rows, seed, number), _signs(self.name, "V", self.columns, seed, number)

    def factors(self, flat: Floats) -> tuple[Floats, Floats]:
        """A and B out of a flat vector."""
        return flat[self.a].reshape(self.rank, self.columns), flat[self.b].reshape(self.rows, self.rank)


def sketch_size(layout: Layout) -> int:
    """How many numbers are appended to an update of this layout, which holds A and B of each layer."""
    return 2 * SIDE * SIDE * len(_pairs(layout)) + 1


def sketched(moved: Floats, layout: Layout, *, seed: int, number: int, bound: float) -> Floats:
    """An update with the sketch of its products behind it.

    Args:
        moved: (layout.size,) float64, how far A and B are from the round's common start.
        layout: of A and B.
        seed: the job's, public.
        number: the round.
        bound: the sum's clip; a coordinate beyond it counts as clipped in the products as well.

    Returns:
        (layout.size + sketch_size(layout),) float64; the sketch lies within ``bound``.
    """
    pairs, pieces = _pairs(layout), [moved]
    whole = np.clip(moved, -bound, bound)
    clipped = bool((whole != moved).any())
    # What is not finite is left to whoever releases the update: it makes all of it zeros.
    with np.errstate(invalid="ignore"):
        for pair in pairs:
            left, right = pair.signs(seed, number)
            a, b = pair.factors(whole)
            product = ((left.T @ b) @ (a @ right)) * pair.scale(bound)
            inside = np.clip(product, -bound, bound)
            clipped = clipped or bool((inside != product).any())
            coarse = np.rint(inside * (_FINE / bound)) * (bound / _FINE)
            pieces += [coarse.reshape(-1), ((inside - coarse) * _FINE).reshape(-1)]
    return np.concatenate([*pieces, np.array([bound if clipped else 0.0])])


def unsketched(
    start: Floats, mean: Floats, layout: Layout, *, seed: int, number: int, bound: float
) -> tuple[Floats, Residual]:
    """The mean update without its sketch, and what the sketch says.

    Args:
        start: (layout.size,) the round's common start.
        mean: (layout.size + sketch_size(layout),) of what :func:`sketched` gave each client, weighted.
        layout, seed, number, bound: as there.
    """
    moved, sketch = mean[: layout.size], mean[layout.size :]
    missed = wanted = 0.0
    for place, pair in enumerate(_pairs(layout)):
        coarse, fine = sketch[2 * SIDE * SIDE * place :][: 2 * SIDE * SIDE].reshape(2, SIDE, SIDE)
        left, right = pair.signs(seed, number)
        (a, b), (a0, b0) = pair.factors(moved), pair.factors(start)
        residual = (coarse + fine / _FINE) / pair.scale(bound) - (left.T @ b) @ (a @ right)
        missed += float((residual**2).sum())
        wanted += float(((residual + (left.T @ (b0 + b)) @ ((a0 + a) @ right)) ** 2).sum())
    relative = math.sqrt(missed / wanted) if wanted > 0 else float(missed > 0)
    return moved, Residual(relative=relative, clipped=float(sketch[-1] / bound))


def _pairs(layout: Layout) -> tuple[_Pair, ...]:
    places: dict[str, slice] = {}
    start = 0
    for tensor in layout.tensors:
        places[tensor.name] = slice(start, start + math.prod(tensor.shape))
        start += math.prod(tensor.shape)
    shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
    pairs = []
    for tensor in layout.tensors:
        name, ending = tensor.name.removesuffix(".lora_A.weight"), ".lora_B.weight"
        if name != tensor.name:
            rows = shapes[name + ending][0]
            pairs.append(
                _Pair(name, places[tensor.name], places[name + ending], tensor.shape[0], rows, tensor.shape[1])
            )
    return tuple(pairs)


def _signs(name: str, side: str, length: int, seed: int, number: int) -> Floats:
    """Public signs from a counter-based generator that is keyed by what they are for; (length, k)."""
    key = hashlib.sha256(f"securesplit.sketch.v1|{seed}|{number}|{name}|{side}".encode()).digest()
    bits = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little"))).bytes(length * SIDE // 8)
    return np.unpackbits(np.frombuffer(bits, dtype=np.uint8)).reshape(length, SIDE).astype(np.float64) * 2 - 1
