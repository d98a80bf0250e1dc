"""The cohort that both sides sum, from one seed; nothing but numpy, so that it runs in either environment."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["CLIP", "W_MAX", "Case", "read_case"]

CLIP = 0.5
W_MAX = 255


@dataclass(frozen=True, slots=True)
class Case:
    """One size of a round.

    Attributes:
        clients, dim, threshold, seed: as on the command line.
        sparse: whether the clients share keys in the sparse graph instead of the complete one; ours only.
    """

    clients: int
    dim: int
    threshold: int
    seed: int
    sparse: bool

    def vectors(self) -> list[npt.NDArray[np.float32]]:
        """One update per client, (d,) float32, inside the clip, so that no side loses a value to it."""
        drawn = (np.random.default_rng((self.seed, i)).normal(0.0, CLIP / 4, self.dim) for i in range(self.clients))
        return [np.clip(v, -CLIP, CLIP).astype(np.float32) for v in drawn]

    def weights(self) -> list[int]:
        """One number of examples per client, 1..W_MAX."""
        return np.random.default_rng((self.seed, 1 << 32)).integers(1, W_MAX, self.clients, endpoint=True).tolist()

    def error_of(self, mean: npt.NDArray[np.float64]) -> float:
        """The largest absolute difference to the plain weighted mean in float64."""
        total = np.zeros(self.dim)
        for vector, weight in zip(self.vectors(), self.weights(), strict=True):
            total += vector.astype(np.float64) * weight
        return float(np.abs(mean - total / sum(self.weights())).max())


def read_case() -> Case:
    """The case from this process's arguments: clients, dim, threshold, seed, and 1 for the sparse graph."""
    parser = argparse.ArgumentParser()
    for name in ("clients", "dim", "threshold", "seed", "sparse"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    return Case(given.clients, given.dim, given.threshold, given.seed, bool(given.sparse))
