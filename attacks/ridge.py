"""The ridge inverter: one affine map from a released row to its token's embedding, fitted on public text in closed form.

Its guess is good, and never final: vocabulary.py proves each guess by a forward pass. A second map serves position 0,
whose states have many times the norm of the others. Under noise the textbook fit (noise added to the covariance) can
rank tokens *worse* than the noiseless one, since it shrinks estimates towards short embeddings; so four forms compete
on held-out public rows with the noise on, and the best one is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.view import Front, Noise

_BATCH = 64
_SINGLES = 4096
_RECALL_AT = 64
_TESTED = 512
_JITTER = 1e-7
# Public simulation of the noise; nothing secret depends on this generator.
_SEED = 20261122


@dataclass(frozen=True, slots=True)
class Affine:
    """``(rows - mean) @ matrix``: (N, D) to (N, E), estimates of embeddings about their own mean.

    Attributes:
        mean: (D,). matrix: (D, E).
        bias: (V,) subtracted from a token's score. scale: (V,) multiplied with it. Together the ranking rule.
        offset: (E,) added to make the estimate itself; the mean embedding of the rows that the map was fitted on.
    """

    mean: Tensor
    matrix: Tensor
    bias: Tensor
    scale: Tensor
    offset: Tensor


@dataclass(frozen=True, slots=True)
class Layer:
    """Public statistics of the cut.

    Attributes:
        spread_first, spread_later: median squared distance of a row from the mean row, at position 0 and after it.
        factor: expected clipping factor, min(1, C / norm of a sequence), over public sequences; 1 without a clip.
        factor_std: its standard deviation, at least 5 % of it where the clip bites, because private text differs.
    """

    spread_first: float
    spread_later: float
    factor: float
    factor_std: float


@dataclass(frozen=True, slots=True)
class Inverter:
    """Ranks the vocabulary for a row.

    Attributes:
        first, later: maps for position 0 and for the rest.
        embedding: (V, E) about its mean. mean: (E,).
        recall: part of held-out noised public rows whose token stood among the first 64.
    """

    first: Affine
    later: Affine
    embedding: Tensor
    mean: Tensor
    recall: float

    def propose(self, rows: Tensor, position: int, count: int) -> Tensor:
        """The likeliest tokens, best first.

        Args:
            rows: (N, D), in the model's own units: divide by the clipping factor before.
            position: 0-based position of these rows.
            count: how many; at most V.

        Returns:
            (N, count) token ids.
        """
        chosen = self.first if position == 0 else self.later
        count = min(count, len(self.embedding))
        # Scores of 256 rows at a time: V is large, and more would not fit the processor's caches.
        parts = [_scores(chosen, self.embedding, part).topk(count, dim=1).indices for part in torch.split(rows, 256)]
        return torch.cat(parts)

    def estimate(self, rows: Tensor, position: int) -> Tensor:
        """Estimated embeddings (N, E) of the tokens of rows (N, D), which are as in :meth:`propose`."""
        chosen = self.first if position == 0 else self.later
        return (rows - chosen.mean) @ chosen.matrix + chosen.offset + self.mean


def _scores(affine: Affine, embedding: Tensor, rows: Tensor) -> Tensor:
    return (((rows - affine.mean) @ affine.matrix) @ embedding.T - affine.bias) * affine.scale


def hidden_of(front: Front, sequences: Tensor) -> Tensor:
    """Public states of public sequences: (N, T) ids to (N, T, D) float32."""
    with torch.inference_mode():
        return torch.cat([front(part).float() for part in torch.split(sequences, _BATCH)])


def layer_statistics(hidden: Tensor, singles: Tensor, noise: Noise) -> Layer:
    """Statistics of the cut from public states.

    Args:
        hidden: (N, T, D) states of public sequences. singles: (M, D) states of single tokens at position 0.
        noise: the policy's mechanism.
    """
    later = hidden[:, 1:].flatten(0, 1) if hidden.shape[1] > 1 else singles
    factor, std = 1.0, 0.0
    if noise.clip is not None:
        factors = (noise.clip / hidden.double().flatten(1).norm(dim=1)).clamp_max(1.0)
        factor, std = float(factors.mean()), float(factors.std())
        if factor < 1:
            std = max(std, 0.05 * factor)
    return Layer(
        spread_first=float((singles - singles.mean(0)).square().sum(1).median()),
        spread_later=float((later - later.mean(0)).square().sum(1).median()),
        factor=factor,
        factor_std=max(std, 1e-6 * factor),
    )


def _fit_one(rows: Tensor, tokens: Tensor, embedding: Tensor, sigma: float, held_out: float) -> tuple[Affine, float]:
    """The best of four forms, and its recall at 64 on held-out rows with the noise on."""
    generator = torch.Generator().manual_seed(_SEED)
    order = torch.randperm(len(rows), generator=generator)
    cut = max(1, int(len(rows) * held_out))
    test, train = order[:cut][:_TESTED], order[cut:]
    mean = rows[train].mean(0)
    X, Y = (rows[train] - mean).double(), embedding[tokens[train]].double()
    gram, cross = X.T @ X, X.T @ (Y - Y.mean(0))
    noised = rows[test] + sigma * torch.randn(rows[test].shape, generator=generator)
    identity = torch.eye(len(gram), dtype=torch.float64)
    floor = _JITTER * float(gram.diagonal().mean()) + 1e-12
    best: tuple[float, Affine] | None = None
    norms = embedding.norm(dim=1).clamp_min(1e-6)
    for penalty in dict.fromkeys((floor, floor + len(train) * sigma**2)):
        matrix = torch.linalg.solve(gram + penalty * identity, cross).float()
        for bias, scale in ((norms.square() / 2, torch.ones_like(norms)), (torch.zeros_like(norms), 1 / norms)):
            affine = Affine(mean=mean, matrix=matrix, bias=bias, scale=scale, offset=Y.mean(0).float())
            recall = _recall(affine, embedding, noised, tokens[test])
            if best is None or recall > best[0]:
                best = recall, affine
    assert best is not None
    return best[1], best[0]


def _recall(affine: Affine, embedding: Tensor, rows: Tensor, tokens: Tensor) -> float:
    hits, count = 0.0, min(_RECALL_AT, max(1, len(embedding) // 8))
    for part, truth in zip(torch.split(rows, 256), torch.split(tokens, 256), strict=True):
        top = _scores(affine, embedding, part).topk(count, dim=1).indices == truth[:, None]
        # The first place counts a little more, so that equal recalls are told apart.
        hits += float(top.any(1).sum()) + 0.1 * float(top[:, 0].sum())
    return hits / (1.1 * len(rows))


def fit(
    front: Front, embedding: Tensor, sequences: Tensor, noise: Noise, *, held_out: float = 0.2
) -> tuple[Inverter, Layer]:
    """Fit the inverter and the public statistics of the cut.

    Args:
        front: partition A, public weights.
        embedding: (V, E).
        sequences: (N, T) public token ids; N T should be well above D.
        noise: the policy's mechanism, which is simulated on the held-out rows.
        held_out: part of the rows that chooses among the four forms.
    """
    embedding = embedding.detach().float()
    mean = embedding[sequences.flatten()].mean(0)
    centred = embedding - mean
    hidden = hidden_of(front, sequences)
    # Every known opening, then random tokens, each alone at position 0.
    generator = torch.Generator().manual_seed(_SEED)
    randoms = torch.randint(0, len(embedding), (_SINGLES,), generator=generator)
    openings = torch.cat([torch.unique(sequences)[:_SINGLES], randoms])[: 2 * _SINGLES]
    singles = hidden_of(front, openings[:, None].contiguous()).flatten(0, 1)
    layer = layer_statistics(hidden, singles, noise)
    sigma = noise.sigma / layer.factor
    first, _ = _fit_one(singles, openings, centred, sigma, held_out)
    later, recall = first, 0.0
    if sequences.shape[1] > 1:
        later, recall = _fit_one(hidden[:, 1:].flatten(0, 1), sequences[:, 1:].flatten(), centred, sigma, held_out)
    return Inverter(first=first, later=later, embedding=centred, mean=mean, recall=recall), layer
