"""The attacker who has read the defence: it fits on defended public text, and compares with defended candidates.

Three kinds of knowledge, in rising order: a ridge inverter that knows the public model alone (*unaware*: fitted on rows
without noise, or on undefended rows); the same fitted on the defence's own output (*ridge*), and a linear-Gaussian model of
the row given the token, with the public unigram (*codebook*); and the exact likelihood of a row given a whole prefix, by
forward passes through A and the defence, with a language-model prior and a beam (*beam*, the form of BeamClean, arXiv
2505.13758) or, where there are no coins but a permutation, the exact match (*match*, matching.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from attacks import ridge
from attacks.view import Noise, fork
from scripts.defences.defence import Defence
from scripts.defences.world import Opened, World, half, states, with_sentinel
from securesplit.model.parts import Front, PartCache

_FORWARDS = 512  # Candidates in one forward pass.
_JITTER = 1e-5
_RIDGE = 400  # Public sequences that an inverter is fitted on: more change it little.


class Defended:
    """A front whose states went through a defence, as the attacker's simulation shows them.

    Args:
        front: partition A behind the sentinel.
        shown: (N, T, D) states to (N, T, k) rows.
    """

    def __init__(self, front: Opened, shown: Callable[[Tensor], Tensor]) -> None:
        self.front, self.shown = front, shown

    def __call__(self, input_ids: Tensor, *, cache: PartCache | None = None) -> Tensor:
        """(B, T) ids to (B, T, k) rows."""
        return self.shown(self.front(input_ids, cache=cache).float())

    def new_cache(self) -> PartCache:
        """The front's."""
        return self.front.new_cache()


def fit_ridge(front: Front, shown: Callable[[Tensor], Tensor], table: Tensor, public: Tensor) -> ridge.Inverter:
    """The best of attacks/ridge.py's forms, fitted on public rows as they are shown.

    Args:
        front: A. shown: what the attacker thinks that becomes of states; draws fresh coins at every call.
        table: (V, E). public: (S, T) tokens.
    """
    return ridge.fit(Defended(Opened(front), shown), table, public[:_RIDGE], Noise(sigma=0.0, clip=None))[0]


def ridge_guess(fitted: ridge.Inverter, rows: Tensor) -> Tensor:
    """(N, T) tokens for rows (N, T, k)."""
    return fitted.propose(rows.flatten(0, 1), 1, 1).view(rows.shape[:2])


def states_alone(front: Front, table: Tensor) -> Tensor:
    """(V, D): every token's state right after the sentinel, by which a codebook knows tokens apart."""
    return torch.cat([states(front, part[:, None])[:, 0] for part in torch.split(torch.arange(len(table)), 4096)])


@dataclass(frozen=True, slots=True)
class Codebook:
    """``log p(row | token)`` as a Gaussian with one covariance for all tokens, whatever the context.

    Attributes:
        mean: (k,). codes: (V, k), the tokens' mean rows about ``mean``. gain: (V, k), codes by the precision.
        quadratic: (V,).
    """

    mean: Tensor
    codes: Tensor
    gain: Tensor
    quadratic: Tensor

    def scores(self, rows: Tensor) -> Tensor:
        """(..., k) canonical rows to (..., V)."""
        return (rows - self.mean) @ self.gain.T - self.quadratic


def fit_codebook(defence: Defence, table: Tensor, alone: Tensor, public: Tensor, seen: Tensor) -> Codebook:
    """Regress defended public rows on what a token shows alone: its embedding, and its row right after the sentinel.

    The residual's covariance holds the context's influence and the noise: the model is aware of both.

    Args:
        defence: the defence. table: (V, E). alone: from :func:`states_alone`. public: (S, T) tokens.
        seen: (S, T, k), their canonical rows.
    """
    shown = defence.expected(alone)
    features = torch.cat([table / table.std(), shown / shown.std()], dim=1)
    tokens, rows = public.flatten(), seen.flatten(0, 1)
    middle, mean = features[tokens].mean(0), rows.mean(0)
    X, Y = features[tokens] - middle, rows - mean
    gram = (X.T @ X).double()
    floor = 1e-3 * float(gram.diagonal().mean())
    weight = torch.linalg.solve(gram + floor * torch.eye(len(gram), dtype=torch.float64), (X.T @ Y).double())
    rest = Y - X @ weight.float()
    covariance = (rest.T @ rest).double() / len(rest)
    jitter = _JITTER * float(covariance.diagonal().mean()) + 1e-12
    precision = torch.linalg.inv(covariance + jitter * torch.eye(len(covariance), dtype=torch.float64))
    codes = ((features - middle) @ weight.float()).float()
    gain = codes @ precision.float()
    return Codebook(mean.float(), codes, gain, (gain * codes).sum(1) / 2)


@dataclass(frozen=True, slots=True)
class Beam:
    """How wide the search is.

    Attributes:
        width: prefixes that are kept. candidates: tokens tried for each. share: the unigram's part of the prior.
    """

    width: int = 4
    candidates: int = 32
    share: float = 0.5


@torch.inference_mode()
def beam_search(
    world: World,
    front: Front,
    defence: Defence,
    rows: Tensor,
    codebook: Codebook,
    beam: Beam,
    progress: Callable[[float], None],
) -> Tensor:
    """The most probable text: exact likelihood of every row given the prefix, language model and unigram as prior.

    Candidates are those that the codebook and the prior together like best; each is then run through A and the defence.

    Args:
        world: the public model. front: A as the clients have it. defence: the defence.
        rows: (N, T, k) canonical. codebook: proposes.
        beam: how wide. progress: told the share that is done.

    Returns:
        (N, T) tokens.
    """
    count, length, _ = rows.shape
    width, tried = beam.width, min(beam.candidates, len(codebook.quadratic))
    fast = Opened(half(front), count * width)
    cache, memory = fast.new_cache(), _Memory(world.whole, count * width)
    total = torch.full((count, width), -torch.inf)
    total[:, 0] = 0.0
    texts = torch.empty((count, width, 0), dtype=torch.long)
    first = torch.arange(count)[:, None] * width
    unigram = world.log_unigram.exp() * beam.share
    for position in range(length):
        prior = (memory.probability() * (1 - beam.share) + unigram).log().view(count, width, -1)
        ids = (prior + codebook.scores(rows[:, position])[:, None]).topk(tried, dim=-1).indices
        likelihood = _likelihood(fast, cache, defence, rows[:, position], ids.view(count * width, -1), width)
        found = total[:, :, None] + prior.gather(-1, ids) + likelihood.view(ids.shape)
        total, chosen = found.flatten(1).topk(width, dim=1)
        parent, token = chosen // tried, ids.flatten(1).gather(1, chosen)
        texts = torch.cat([texts.gather(1, parent[..., None].expand(-1, -1, position)), token[..., None]], dim=-1)
        keep = (first + parent).flatten()
        cache = fork(cache, keep)
        fast(token.view(-1, 1), cache=cache)
        memory.go_on(keep, token.view(-1, 1))
        progress((position + 1) / length)
    return texts[:, 0]


def _likelihood(front: Opened, cache: PartCache, defence: Defence, rows: Tensor, ids: Tensor, width: int) -> Tensor:
    """(N W, K) log-likelihoods of candidates (N W, K) after the cache's prefixes, rows (N, k)."""
    step = max(1, _FORWARDS // ids.shape[1])
    out = []
    for who, part in zip(torch.split(torch.arange(len(ids)), step), torch.split(ids, step), strict=True):
        forked = fork(cache, who.repeat_interleave(part.shape[1]))
        hidden = front(part.reshape(-1, 1), cache=forked)[:, -1].float().view(*part.shape, -1)
        out.append(defence.log_likelihood(rows[who // width, None], hidden))
    return torch.cat(out)


class _Memory:
    """A language model that goes on from many prefixes, each behind the sentinel."""

    def __init__(self, model: Any, count: int) -> None:
        self.model = model
        out = model(with_sentinel(torch.empty((count, 0), dtype=torch.long)), use_cache=True)
        self.past, self.logits = out.past_key_values, out.logits[:, -1]

    def probability(self) -> Tensor:
        """(N, V) float32."""
        return functional.softmax(self.logits.float(), dim=-1)

    def go_on(self, keep: Tensor, tokens: Tensor) -> None:
        """Keep these prefixes and add one token (N, 1) to each."""
        self.past.batch_select_indices(keep)
        out = self.model(tokens, past_key_values=self.past, use_cache=True)
        self.past, self.logits = out.past_key_values, out.logits[:, -1]


@torch.inference_mode()
def expectations(world: World, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What one can name without any observation, (N, T) each: by the language model after the *true* prefix, and alone.

    Args:
        world: the public model. tokens: (N, T), the truth.
    """
    told = [world.whole(with_sentinel(part)).logits[:, :-1].argmax(-1) for part in torch.split(tokens, 16)]
    memory, alone = _Memory(world.whole, 1), []
    for _ in range(tokens.shape[1]):
        alone.append(memory.logits.argmax(-1, keepdim=True))
        memory.go_on(torch.tensor([0]), alone[-1])
    return torch.cat(told), torch.cat(alone, dim=1).expand(len(tokens), -1)
