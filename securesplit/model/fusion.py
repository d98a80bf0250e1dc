"""The client's skip: its own prediction beside the server's, mixed so that the server can only help.

Late fusion mixes *probabilities*, ``p = (1 - w) p_client + w p_server``, at the client, which then never says what it
did. The weights are functions of a few numbers, fitted on public text that went through the same noise. A margin
guards them: unless the gain on public sequences that the fit did not see is positive with confidence, every weight is 0
and the client-only model stands. So the expected loss is at most that of the client alone, up to the level of the test
and the distance from public to private text.

Two forms. One weight for all positions (:func:`fit_weight`, :func:`mix`); and a :class:`Gate` that chooses among
several answers position by position (:func:`fit_gate`), from what the client knows: its clean prefix, against which it
compares each prefix that the server guessed (:func:`mismatches`).

What this does not do: nothing here is private towards anybody who sees the choice. Neither weights nor the choice may
leave the client. The guarantee is on average over positions, not for a single text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "LAGS",
    "Evidence",
    "Fit",
    "Gate",
    "GateFit",
    "fit_gate",
    "fit_weight",
    "lower_bound",
    "mismatches",
    "mix",
]

# Bins of the distance between a guessed token and the position that is predicted; the last one is open.
LAGS: tuple[tuple[int, int | None], ...] = ((0, 1), (1, 2), (2, 3), (3, 4), (4, 8), (8, 16), (16, None))
_ONE_SIDED = 1.645  # 95 % of a normal distribution lie below


def mix(log_client: Tensor, log_server: Tensor, weight: Tensor | float) -> Tensor:
    """log of ``(1 - weight) exp(log_client) + weight exp(log_server)``, elementwise; exact at weights 0 and 1."""
    share = torch.as_tensor(weight, dtype=log_client.dtype)
    return torch.logaddexp(log_client + torch.log1p(-share), log_server + torch.log(share))


def lower_bound(gains: Tensor, sigmas: float = _ONE_SIDED) -> float:
    """One-sided lower confidence bound of the mean of independent gains (S,), in their unit; -inf for fewer than 2."""
    if len(gains) < 2:
        return -math.inf
    return float(gains.mean() - sigmas * gains.std() / math.sqrt(len(gains)))


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted weight.

    Attributes:
        weight: in [0, 1]; 0 when the margin is not positive.
        gain: mean gain in nats per token over the client alone, on public sequences that the fit did not see.
        margin: its one-sided 95 % lower bound.
    """

    weight: float
    gain: float
    margin: float


def fit_weight(log_client: Tensor, log_server: Tensor, *, folds: int = 4) -> Fit:
    """Choose one mixture weight on public text.

    Args:
        log_client, log_server: (S, T) log-probabilities of the true tokens, S public sequences. The client model must
            not have been trained on them, or the server looks worse than it is.
        folds: sequences are held out in so many parts, to measure the gain on sequences that the fit did not see.
    """
    held = torch.empty(len(log_client), dtype=log_client.dtype)
    for part in range(folds):
        out = torch.arange(len(log_client)) % folds == part
        weight = _maximise(log_client[~out], log_server[~out])
        held[out] = (mix(log_client[out], log_server[out], weight) - log_client[out]).mean(1)
    margin = lower_bound(held)
    return Fit(_maximise(log_client, log_server) if margin > 0 else 0.0, float(held.mean()), margin)


def _maximise(log_client: Tensor, log_server: Tensor) -> float:
    """The weight of the largest mean log-likelihood: concave in the weight, so golden sections find it."""
    ratio = (math.sqrt(5) - 1) / 2
    low, high = 0.0, 1.0
    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if mix(log_client, log_server, left).mean() < mix(log_client, log_server, right).mean():
            low = left
        else:
            high = right
    best = (low + high) / 2
    return best if mix(log_client, log_server, best).mean() > log_client.mean() else 0.0


def mismatches(guessed: Tensor, truth: Tensor) -> Tensor:
    """How wrong each guessed prefix is, by distance from its end.

    Args:
        guessed: (N, K, t), the server's prefixes.
        truth: (N, t), the client's own.

    Returns:
        (N, K, len(LAGS)): the share of wrong tokens in each bin of :data:`LAGS`; 0 where a prefix does not reach.
    """
    wrong = (guessed != truth[:, None]).float().flip(-1)
    bins = [wrong[..., start:stop] for start, stop in LAGS]
    return torch.stack([b.mean(-1) if b.shape[-1] else wrong.new_zeros(wrong.shape[:-1]) for b in bins], dim=-1)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the client knows at each position before it sees the next token.

    Attributes:
        server: (S, T, K, F) features of each of the server's K answers.
        client: (S, T, G) features of the client's own prediction.
        present: (S, T, K) bool, which answers there are.
    """

    server: Tensor
    client: Tensor
    present: Tensor

    def at(self, chosen: Tensor) -> Evidence:
        """The evidence of some of the sequences."""
        return Evidence(self.server[chosen], self.client[chosen], self.present[chosen])


@dataclass(frozen=True, slots=True)
class Gate:
    """Weights over the client's prediction and K answers, as the softmax of scores that are linear in the evidence.

    Attributes:
        server: (F,), client: (G,), bias: (), the score of an answer less that of the client.
        open: whether the server is used at all.
    """

    server: Tensor
    client: Tensor
    bias: Tensor
    open: bool = True

    def log_weights(self, evidence: Evidence) -> Tensor:
        """(S, T, 1 + K) log weights that sum to one; the client's stands first."""
        score = (evidence.server * self.server).sum(-1) + self.bias
        score = score.masked_fill(~evidence.present, -math.inf)
        if not self.open:
            score = torch.full_like(score, -math.inf)
        mine = (evidence.client * self.client).sum(-1, keepdim=True)
        return functional.log_softmax(torch.cat([mine, score], dim=-1), dim=-1)

    def mix(self, evidence: Evidence, log_client: Tensor, log_server: Tensor) -> Tensor:
        """log-probability (S, T) of a token from the client's (S, T) and the answers' (S, T, K)."""
        answers = torch.cat([log_client[..., None], log_server.masked_fill(~evidence.present, 0.0)], dim=-1)
        return torch.logsumexp(self.log_weights(evidence) + answers, dim=-1)


@dataclass(frozen=True, slots=True)
class GateFit:
    """A fitted gate, and its gain on public sequences that the fit did not see; as in :class:`Fit`."""

    gate: Gate
    gain: float
    margin: float


def fit_gate(
    evidence: Evidence, log_client: Tensor, log_server: Tensor, *, folds: int = 4, decay: float = 1e-4
) -> GateFit:
    """Fit a gate on public text; closed unless it gains with confidence on sequences it was not fitted on.

    Args:
        evidence: of S public sequences, of which the client model has seen none in training.
        log_client: (S, T); log_server: (S, T, K); log-probabilities of the true tokens.
        folds: as in :func:`fit_weight`.
        decay: penalty on the squared coefficients, against fitting chance.
    """
    held = torch.empty(len(log_client), dtype=log_client.dtype)
    for part in range(folds):
        out = torch.arange(len(log_client)) % folds == part
        gate = _descend(evidence.at(~out), log_client[~out], log_server[~out], decay)
        held[out] = (gate.mix(evidence.at(out), log_client[out], log_server[out]) - log_client[out]).mean(1)
    margin = lower_bound(held)
    gate = _descend(evidence, log_client, log_server, decay)
    return GateFit(Gate(gate.server, gate.client, gate.bias, open=margin > 0), float(held.mean()), margin)


def _descend(evidence: Evidence, log_client: Tensor, log_server: Tensor, decay: float) -> Gate:
    """Minimise the mixture's loss from a gate that is nearly closed."""
    kind = log_client.dtype
    server = torch.zeros(evidence.server.shape[-1], dtype=kind, requires_grad=True)
    client = torch.zeros(evidence.client.shape[-1], dtype=kind, requires_grad=True)
    bias = torch.tensor(-2.0, dtype=kind, requires_grad=True)
    gate = Gate(server, client, bias)
    optimizer = torch.optim.LBFGS([server, client, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty: Tensor = decay * (server.square().sum() + client.square().sum())
        loss = penalty - gate.mix(evidence, log_client, log_server).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Gate(server.detach(), client.detach(), bias.detach())
