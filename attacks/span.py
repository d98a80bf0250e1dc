"""The span check of DAGER on what secure sums open: which tokens' inputs lie in the row space of a LoRA update.

With W' = W + s B A a layer maps inputs X (tokens x in) to X W'. The gradient of A is ``s B^T G^T X`` and that of B is
``s G^T X A^T``, G being the gradient at the layer's output. So the rows of the first lie in the span of X, and those of the
second in the span of ``X A^T``. In the first layer an input is a function of its token, and the vocabulary can be tried out:
a token of the text has no part outside of the span, any other has. In the second layer an input is a function of its prefix,
and sequences grow token by token. Both need fewer tokens than dimensions of the span, the rank of the adapters at most for
one layer; the projections of one attention read the same inputs, and their spans are joined for A.

AdamW does not prevent it: attacks/adamw.py reads one step of one client backwards. After several steps, or in a mean of
single steps over clients, rows only lean towards the span, and the check finds what stands out or nothing.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from attacks.adamw import backwards, is_one_step, row_weights
from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.exchange import Bagged
from attacks.knowledge import Knowledge
from attacks.round_start import RoundStart, modules_of, next_layer_inputs, round_start, token_readers
from attacks.sums import RecordedSum
from attacks.threat import Threat
from attacks.view import ServerView
from securesplit.model.parts import Front

__all__ = ["ATTACKS", "Rows", "Settings", "Space", "check", "join", "observed", "spaces", "span"]

_FLOAT = 2.0**-23
_RUN = 3
# Fewer free dimensions than that, and some token of a large vocabulary lies close by chance.
_FREE = 3
# What is cut is checked only where so many dimensions are free.
_CUT = 8


class Settings(BaseModel):
    """Numbers of configs/dager.toml, which explains each."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    rounds: Annotated[int, Field(ge=1)]
    outlier: Annotated[float, Field(gt=0)]
    chance: Annotated[float, Field(gt=0, lt=1)]
    margin: Annotated[float, Field(ge=0, lt=1)]
    close: Annotated[float, Field(gt=0, lt=1)]
    exact: Annotated[float, Field(gt=0, lt=1)]
    loose: Annotated[float, Field(ge=1)]
    beams: Annotated[int, Field(ge=1)]
    budget: Annotated[int, Field(ge=1)]
    longest: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class Rows:
    """One update as a set of rows that should lie in a span.

    Attributes:
        values: (m, n) float64.
        edge: the largest singular value that error alone would give.
    """

    values: Tensor
    edge: float


@dataclass(frozen=True, slots=True)
class Space:
    """A span of inputs, as far as an update shows it.

    Attributes:
        basis: (q, n) float64, orthonormal; q < n.
        project: (n, in) what inputs are multiplied by first, factor A; None where they are compared as they are.
    """

    basis: Tensor
    project: Tensor | None

    def beyond(self, inputs: Tensor) -> Tensor:
        """How much of each input lies outside, 0 to 1: (N, in) to (N,) float64."""
        rows = inputs.double() if self.project is None else inputs.double() @ self.project.double().T
        inside = (rows @ self.basis.T).square().sum(1) / rows.square().sum(1).clamp(min=1e-300)
        return (1 - inside).clamp(min=1e-14, max=1.0).sqrt()

    def chance(self, beyond: Tensor) -> Tensor:
        """Logarithm of a bound on the chance that a random direction lies as close: (N,) to (N,).

        The squared part outside of a q-dimensional space has the Beta distribution with (n - q) / 2 and q / 2, whose
        distribution function is at most ``x^a / (a B(a, b))`` for b >= 1.
        """
        q, n = self.basis.shape
        a, b = (n - q) / 2, max(q / 2, 1.0)
        log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        return (2 * a * beyond.log() - math.log(a) - log_beta).clamp(max=0.0)


def observed(tensor: Tensor, found: RecordedSum, start: Tensor | None) -> Rows:
    """An update as rows in a span, with the size of its errors.

    Args:
        tensor: (m, n) the mean update of one factor.
        found: the sum it is from.
        start: the factor's value at the round's start, which float32 rounds beside the update; None for zeros.
    """
    values = tensor.double()
    if found.sent == "gradients" or found.sigma:
        deviation = math.hypot(found.sigma, found.grid / math.sqrt(12))
        edge = max(deviation * (math.sqrt(values.shape[0]) + math.sqrt(values.shape[1])), _float_edge(values))
    elif len(found.peers) == 1 and is_one_step(map(torch.from_numpy, found.tensors), found.job.optimiser.client_lr):
        last_bit = 0.0 if start is None else start.double().abs() * 2.0**-25
        grid = torch.as_tensor(found.grid / math.sqrt(12), dtype=torch.float64)
        read = backwards(
            values, found.job.optimiser.client_lr, rounding=torch.hypot(torch.as_tensor(last_bit).double(), grid)
        )
        values = read.values * row_weights(read)
        edge = math.sqrt(values.shape[0]) + math.sqrt(values.shape[1])
    else:
        edge = _unknown_edge(values)
    return Rows(values, edge)


def _float_edge(values: Tensor) -> float:
    """What float32 arithmetic leaves where the rank should be lower; relative to the largest singular value."""
    return float(torch.linalg.matrix_norm(values, 2)) * _FLOAT * math.sqrt(max(values.shape))


def _unknown_edge(values: Tensor) -> float:
    """The edge for noise of unknown size: the optimal hard threshold of Gavish and Donoho (2014), from the median."""
    sizes = torch.linalg.svdvals(values)
    ratio = min(values.shape) / max(values.shape)
    return float(sizes.median()) * (0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43)


def join(rows: list[Rows], project: Tensor | None, margin: float) -> Space | None:
    """The space that several updates of the same inputs span together; None where nothing stands out of the errors.

    Args:
        rows: updates with n columns each.
        project: see :class:`Space`.
        margin: part of the dimensions that the space must leave free: where it is large it is cut to its strongest directions.
    """
    usable = [part for part in rows if part.edge > 0]
    if not usable:
        return None
    stacked = torch.cat([part.values / part.edge for part in usable])
    free = max(_FREE, math.ceil(margin * stacked.shape[1]))
    columns = math.sqrt(stacked.shape[1])
    # Together more rows of error have a higher edge than each of them alone.
    edge = max((math.sqrt(len(stacked)) + columns) / (math.sqrt(len(part.values)) + columns) for part in usable)
    sizes, right = torch.linalg.svd(stacked, full_matrices=False)[1:]
    rank = int((sizes > edge).sum())
    if rank > stacked.shape[1] - free:  # More tokens than dimensions: it is no span of tokens any more.
        rank = stacked.shape[1] - free if free >= _CUT else 0
    return Space(right[:rank], project) if rank > 0 else None


def spaces(found: RecordedSum, start: RoundStart, modules: tuple[str, ...], margin: float) -> tuple[Space, ...]:
    """The spans that a sum shows of these modules' common inputs: one by all factors A, one by each factor B or core."""
    held = dict(zip(found.names, map(torch.from_numpy, found.tensors), strict=True))
    whole, single = [], []
    for module in modules:
        if (name := f"{module}.lora_A.weight") in held:
            whole.append(observed(held[name], found, start.factors.get(name)))
        down = start.factors.get(f"{module}.lora_A.weight")
        for factor in ("lora_B", "lora_core"):
            name = f"{module}.{factor}.weight"
            if name in held and down is not None:
                single.append(join([observed(held[name], found, start.factors.get(name))], down, margin))
    return tuple(space for space in (join(whole, None, margin), *single) if space is not None)


def check(inputs: Tensor, found: tuple[Space, ...], settings: Settings) -> tuple[Tensor, Tensor]:
    """Which rows of a vocabulary lie in one of the spaces.

    A row must be an outlier by the logarithm of the odds of its part outside, robustly standardised over the vocabulary, and
    closer than chance allows.

    Returns:
        (V,) bool, and (V,) the standardised odds, lower for closer, the least of all spaces.
    """
    accepted = torch.zeros(len(inputs), dtype=torch.bool)
    best = torch.full((len(inputs),), torch.inf, dtype=torch.float64)
    for space in found:
        beyond = space.beyond(inputs)
        odds = (beyond / (1 - beyond).clamp(min=1e-14)).log()
        middle = odds.median()
        deviation = 1.4826 * (odds - middle).abs().median()
        score = (odds - middle) / deviation.clamp(min=1e-9)
        rare = space.chance(beyond) < math.log(settings.chance / len(inputs))
        accepted |= (score < -settings.outlier) & rare
        best = torch.minimum(best, score)
    return accepted, best


def _grow(
    front: Front, bag: list[int], found: tuple[Space, ...], module: str, settings: Settings
) -> tuple[tuple[int, ...], ...]:
    """Sequences whose every prefix lies in one of the second layer's spans, as far as they can be grown; the closest first.

    How close is close follows from the starts. The first position gives queries no gradient, because a softmax over
    one key is constant: so one of the spans is enough.
    """
    modules = {module: modules_of(front)[module]}
    candidates, close, left = torch.tensor(bag), settings.close, settings.budget
    alive: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    done: list[tuple[float, tuple[int, ...]]] = []
    for length in range(settings.longest):
        grown, left = [], left - len(alive)
        for cost, prefix in alive:
            inputs = next_layer_inputs(front, prefix, candidates, modules)
            beyond = torch.stack([space.beyond(inputs) for space in found])
            rare = torch.stack([space.chance(row) for space, row in zip(found, beyond, strict=True)]).amin(0)
            beyond = beyond.amin(0)
            fits = (beyond < close) & (rare < math.log(settings.chance / len(bag)))
            if not length and bool(fits.any()):
                close = min(close, max(settings.exact, settings.loose * float(beyond[fits].median())))
                fits &= beyond < close
            longer = ((cost + float(beyond[i]), (*prefix, bag[i])) for i in fits.nonzero()[:, 0].tolist())
            grown += [grown for grown in longer if not _is_run(grown[1], _RUN)]
            if prefix and not bool(fits.any()):
                done.append((cost / length, prefix))
        alive = sorted(grown)[: settings.beams]
        if not alive or left <= 0:
            break
    done += [(cost / len(prefix), prefix) for cost, prefix in alive if prefix]
    return tuple(prefix for _, prefix in sorted(done) if not _is_run(prefix, 0))


def _is_run(sequence: tuple[int, ...], longest: int) -> bool:
    """Whether it is one token over and over, from the start: attention over equal values shows the same input each time."""
    return len(set(sequence)) == 1 and len(sequence) > longest


def span(
    found: RecordedSum, start: RoundStart, settings: Settings
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The bag of tokens in one sum, closest first, and the sequences that they grow to."""
    front = start.front
    if front is None or not front.span:
        return (), ()
    modules = sorted({name.rsplit(".lora_", 1)[0] for name in found.names if ".lora_" in name})
    readers, inputs = token_readers(front, modules)
    first = spaces(found, start, readers, settings.margin)
    if not first:
        return (), ()
    accepted, score = check(inputs, first, settings)
    bag = [i for i in score.argsort().tolist() if bool(accepted[i])]
    later = tuple(name for name in (_in_layer(reader, front.span.start, 1) for reader in readers) if name in modules)
    second = spaces(found, start, later, settings.margin) if len(front.span) > 1 else ()
    if not second or not bag:
        return tuple(bag), ()
    return tuple(bag), _grow(front, bag, second, later[0], settings)


def _in_layer(module: str, first: int, further: int) -> str:
    """The same module so many layers further."""
    return module.replace(f".{first}.", f".{first + further}.", 1)


def usable(view: ServerView) -> list[RecordedSum]:
    """The sums that hold adapters."""
    return [s for s in view.sums if isinstance(s, RecordedSum) and any(".lora_" in name for name in s.names)]


def _blocked(view: ServerView, _: Threat) -> str | None:
    if not usable(view):
        return "the recording holds no secure sum that the server could open"
    if not any(".layers.0." in name or ".h.0." in name for found in usable(view) for name in found.names):
        return "no layer that reads tokens is summed: A does not learn, or is the embedding alone"
    return None


def _run(view: ServerView, known: Knowledge, tick: Tick) -> Bagged:
    began, settings, opened = time.perf_counter(), settings_of("dager", Settings), usable(view)
    sums, answers = opened[: settings.rounds], []
    for done, found in enumerate(sums):
        start = round_start(known.model.front, None, found, opened)
        answers.append(span(found, start, settings))
        tick(done + 1, len(sums))
    return Bagged(
        attack="span", rounds=tuple(s.round for s in sums), peers=tuple(s.peers for s in sums),
        bags=tuple(bag for bag, _ in answers), sequences=tuple(grown for _, grown in answers),
        seconds=time.perf_counter() - began,
    )  # fmt: skip


ATTACKS = (Attack("span", _blocked, _run),)
