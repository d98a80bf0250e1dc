"""What partition A makes of every token: its mean row over contexts, measured with the public weights, not learnt from text.

The weights are public, so the server can run A on any token it likes. Public text is not needed to learn what a rare
token's row looks like; it is needed for how rows vary around that mean, and for how often tokens occur. This is what
separates these attacks from inverters that see each token as often as the text holds it.

Tokens are run behind short public contexts, hundreds behind the same one, whose common effect is then taken out. A row
has a mean ``linear(embedding) + offset``; the offsets are shrunk by empirical Bayes, with the covariance between tokens
and the covariance of one token's rows between contexts, which tokens that were run twice give.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.view import Front, fork

__all__ = ["Codebook", "codebook_of"]

_GROUP = 512  # Tokens behind one context.
_CONTEXT = 8  # Positions of a context; long enough for later rows to have settled.
_TWICE = 4096  # Tokens that are run twice, at most, when the budget allows one run of each.
_RIDGE = 1e-4


@dataclass(frozen=True, slots=True)
class Codebook:
    """Mean rows, before the clip, up to a common shift that is fitted on text.

    Attributes:
        linear: (V, D), the part that is linear in the embedding.
        offset: (V, D), the rest, shrunk; 0 for tokens that were not run.
        first: (V, D), the row at position 0, exact for tokens that were run and linear for others.
    """

    linear: Tensor
    offset: Tensor
    first: Tensor


@torch.inference_mode()
def codebook_of(
    front: Front, embedding: Tensor, contexts: Tensor, likely: Tensor, budget: int, generator: torch.Generator
) -> Codebook:
    """Run A on the vocabulary.

    Args:
        front: A. embedding: (V, E), the input embedding.
        contexts: (N, T) public sequences, whose beginnings are the contexts.
        likely: (V,) token ids, the likeliest first; where the budget is short, they are run first.
        budget: how many tokens may be run, in all; about a third goes to position 0.
        generator: of the order in which tokens meet contexts.

    Returns:
        The codebook. It costs ``budget`` token forwards, of one position each.
    """
    embedding = embedding.detach().float()
    runs = _order(likely, max(2, budget * 2 // 3), generator)
    rows, groups = _behind_contexts(front, runs, contexts[:, :_CONTEXT])
    linear, residual = _linear(embedding, runs, rows, groups)
    offset = _shrunk(residual, runs, len(embedding))
    known = likely[: max(2, budget // 3)]
    exact = torch.cat([front(part[:, None])[:, 0].float() for part in torch.split(known, _GROUP)])
    return Codebook(linear=linear, offset=offset, first=_filled(embedding, known, exact))


def _order(likely: Tensor, budget: int, generator: torch.Generator) -> Tensor:
    """Which tokens to run, in which order: as many rounds over the vocabulary as fit, then some of it once more."""
    vocabulary = len(likely)
    twice = min(_TWICE, vocabulary, max(1, budget // 8))
    whole, rest = divmod(max(budget - twice, 1), vocabulary)
    whole, rest = min(whole, 4), 0 if whole >= 4 else rest
    # What is left over goes to likely tokens and to random ones in equal parts: rare tokens must not be strangers.
    other = likely[rest // 2 :][torch.randperm(vocabulary - rest // 2, generator=generator)[: rest - rest // 2]]
    rounds = [torch.randperm(vocabulary, generator=generator) for _ in range(whole)]
    part = torch.cat([likely[: rest // 2], other])
    part = part[torch.randperm(len(part), generator=generator)]
    run = torch.cat([*rounds, part])
    return torch.cat([run, run[torch.randperm(len(run), generator=generator)[:twice]]])


def _behind_contexts(front: Front, runs: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of tokens behind contexts, and which context each had: (R, D), (R,)."""
    rows, groups = [], []
    for number, part in enumerate(torch.split(runs, _GROUP)):
        cache = front.new_cache()
        front(contexts[number % len(contexts)][None], cache=cache)
        behind = fork(cache, torch.zeros(len(part), dtype=torch.long))
        rows.append(front(part[:, None], cache=behind)[:, 0].float())
        groups.append(torch.full((len(part),), number))
    return torch.cat(rows), torch.cat(groups)


def _centred(values: Tensor, groups: Tensor) -> Tensor:
    """Values about the mean of their group."""
    count = int(groups.max()) + 1
    sums = torch.zeros(count, values.shape[1]).index_add_(0, groups, values)
    return values - (sums / torch.bincount(groups, minlength=count)[:, None].clamp_min(1))[groups]


def _ridge(inputs: Tensor, outputs: Tensor) -> Tensor:
    gram = (inputs.T @ inputs).double()
    penalty = _RIDGE * float(gram.diagonal().mean()) + 1e-12
    solved = torch.linalg.solve(
        gram + penalty * torch.eye(len(gram), dtype=torch.float64), (inputs.T @ outputs).double()
    )
    matrix: Tensor = solved.float()
    return matrix


def _linear(embedding: Tensor, runs: Tensor, rows: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The linear part for the whole vocabulary, (V, D), and what it leaves of every run, (R, D)."""
    centred = embedding - embedding.mean(0)
    inputs = _centred(centred[runs], groups)
    matrix = _ridge(inputs, _centred(rows, groups))
    return centred @ matrix, _centred(rows - centred[runs] @ matrix, groups)


def _shrunk(residual: Tensor, runs: Tensor, vocabulary: int) -> Tensor:
    """Each token's mean residual, times between (between + within / n)^-1."""
    width = residual.shape[1]
    counts = torch.bincount(runs, minlength=vocabulary)
    mean = torch.zeros(vocabulary, width).index_add_(0, runs, residual) / counts[:, None].clamp_min(1)
    often = counts[runs] > 1
    spread = (residual - mean[runs])[often]
    freedom = max(1, int(often.sum()) - int((counts > 1).sum()))
    within = (spread.T @ spread / freedom).double()
    total = (residual.T @ residual / len(residual)).double()
    values, vectors = torch.linalg.eigh(total - within)
    between = (vectors * values.clamp_min(1e-9 * float(total.diagonal().mean()) + 1e-18)) @ vectors.T
    offset = torch.zeros(vocabulary, width)
    for count in range(1, int(counts.max()) + 1):
        mine = counts == count
        if bool(mine.any()):
            jitter = 1e-12 * float(total.diagonal().mean()) + 1e-18
            weight = torch.linalg.solve(
                between + within / count + jitter * torch.eye(width, dtype=torch.float64), between
            )
            offset[mine] = mean[mine] @ weight.float()
    return offset


def _filled(embedding: Tensor, known: Tensor, exact: Tensor) -> Tensor:
    """Rows at position 0 for the whole vocabulary: exact where run, linear in the embedding elsewhere."""
    if len(known) == len(embedding):
        return torch.empty_like(exact).index_copy_(0, known, exact)
    mean_in, mean_out = embedding[known].mean(0), exact.mean(0)
    matrix = _ridge(embedding[known] - mean_in, exact - mean_out)
    return ((embedding - mean_in) @ matrix + mean_out).index_copy_(0, known, exact)
