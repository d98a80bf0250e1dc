"""From what people choose for a secure sum to all of its numbers: the same at both ends, because both compute them.

People choose who, how many must agree, how many must be in a sum, and how large an update may be. The scale is then the
largest that cannot wrap, and above 32 clients the graph is the sparsest whose bounds hold (graph.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from securesplit.aggregate.config import MAX_CLIENTS, Backend, RoundConfig, largest_scale
from securesplit.aggregate.graph import COMPLETE_UP_TO, graph_for
from securesplit.aggregate.masks import Prg

__all__ = ["Wishes", "default_colluders", "fit_round"]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is chosen; the fields are those of :class:`RoundConfig`. The sparse graph lets one client in five vanish."""

    roster: tuple[str, ...]
    threshold: int
    min_clients: int
    clip: float
    w_max: int
    blind: bool
    colluders: int | None = None
    ring_bits: Literal[32, 64] = 32
    backend: Backend = "masks"
    prg: Prg = "aes256ctr"


def default_colluders(clients: int, threshold: int, min_clients: int) -> int:
    """One client in five, or as many as threshold and ``min_clients`` allow if that is fewer."""
    return max(0, min(clients // 5, 2 * threshold - clients - 1, min_clients - 2))


def fit_round(wishes: Wishes, *, session_id: bytes, number: int, dim: int, model: str, frozen: str) -> RoundConfig:
    """The round's configuration.

    Args:
        wishes: what is chosen.
        session_id, number, dim, model, frozen: as in :class:`RoundConfig`.

    Raises:
        InputError: SS-1601 with every fault.
    """
    w, n = wishes, len(wishes.roster)
    colluders = default_colluders(n, w.threshold, w.min_clients) if w.colluders is None else w.colluders
    degree = shares = 0
    smallest = w.min_clients - colluders
    if (
        COMPLETE_UP_TO < n <= MAX_CLIENTS and smallest >= 2 and n < 2 * w.threshold <= 2 * n
    ):  # Else RoundConfig tells what is wrong.
        graph = graph_for(
            n, quorum=max(w.threshold, w.min_clients), colluders=colluders, smallest=smallest,
            dropouts=n // 5,
        )  # fmt: skip
        if graph.degree < n - 1:
            degree, shares = graph.degree, graph.threshold
    return RoundConfig(
        session_id=session_id, round=number, roster=w.roster, threshold=w.threshold, min_clients=w.min_clients, dim=dim,
        scale=largest_scale(n, w.w_max, w.ring_bits), clip=w.clip, w_max=w.w_max, model=model, frozen=frozen, blind=w.blind,
        colluders=colluders, ring_bits=w.ring_bits, degree=degree, share_threshold=shares, backend=w.backend,
        prg=w.prg,
    )  # fmt: skip
