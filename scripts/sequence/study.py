"""One draw of the study: clients, releases, every head that somebody could fit, and who is right on the tested records.

A seed decides which client has which passages. The noise is the product's own, from the operating system, and is not
repeated by a seed.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from securesplit.model.distil import SequenceCode, fit_sequence_code
from securesplit.model.moments import Moments, fit_head, joint_statistic, sum_moments
from securesplit.privacy.clip import clip_sequence
from securesplit.privacy.lattice import discrete_gaussian, quantise, step_for

PRIOR = 3.0  # Precision of a head on codes; chosen, like RANK and the depth, inside the training passages.
RANK = 6
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
JUDGED = 20  # Clients whose heads are tested in each draw; the sums are over all of them.


@dataclass(frozen=True, slots=True)
class Setting:
    """How many clients, records of each, and the budget of one record at delta 1e-5, in mu of the lattice's noise."""

    clients: int
    records: int
    epsilon: float
    mu: float


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A part of the corpus as numbers: (N, .) rows of A, of all of the client's layers, of the whole model; (N, 1) labels."""

    shallow: Tensor
    own: Tensor
    deep: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> Rows:
        """Some of the records."""
        return Rows(self.shallow[index], self.own[index], self.deep[index], self.labels[index])


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """What is fixed before any draw; the codes and moments are of public text alone."""

    private: Rows
    passages: Tensor
    tested: Rows
    public: Rows
    codes: Mapping[str, SequenceCode]


def build_world(private: Rows, passages: Tensor, tested: Rows, public: Rows) -> World:
    """Fit the public codes, and centre and scale all rows by public text."""
    codes = {
        "deep": fit_sequence_code(public.shallow, public.deep, RANK),
        "pca": fit_sequence_code(public.shallow, None, RANK),
        "deep32": fit_sequence_code(public.shallow, public.deep, 32),
    }
    return World(private, passages, tested, public, codes)


def partition(world: World, setting: Setting, seed: int) -> tuple[Tensor, ...]:
    """Whole passages in a random order, cut into clients of equally many records."""
    order = torch.randperm(int(world.passages.max()) + 1, generator=torch.Generator().manual_seed(seed))
    index = torch.cat([torch.nonzero(world.passages == passage)[:, 0] for passage in order])
    if setting.clients * setting.records > len(index):
        raise ValueError("there are not that many records")
    return tuple(index[i * setting.records : (i + 1) * setting.records] for i in range(setting.clients))


def release(statistics: Tensor, mu: float) -> Tensor:
    """(N, 1, r) statistics through clip, lattice and discrete Gaussian, as the gate does it with C = 1."""
    step = step_for(2 / mu)
    clipped = clip_sequence(statistics, 1.0).numpy()
    noise = discrete_gaussian(tuple(statistics.shape))
    return torch.stack(
        [torch.from_numpy((quantise(row, step, 1.0) + drawn) * step) for row, drawn in zip(clipped, noise, strict=True)]
    )


def draw(world: World, setting: Setting, seed: int) -> dict[str, Tensor]:
    """Every method's share of judged clients that are right, (T,) per tested record."""
    clients = partition(world, setting, seed)
    right: dict[str, list[Tensor]] = {}
    for source in (_alone(world, clients), _together(world, clients, setting)):
        for name, scores in source:
            right.setdefault(name, []).append(((scores > 0) == (world.tested.labels > 0))[:, 0].double())
    return {name: torch.stack(each).mean(0) for name, each in right.items()}


def _alone(world: World, clients: tuple[Tensor, ...]) -> Iterator[tuple[str, Tensor]]:
    """Heads of a client that nobody helps: on all of its layers, and on the public codes."""
    spaces = {
        f"client-only, {name}": (code.encode(world.private.shallow), code.encode(world.tested.shallow))
        for name, code in (
            ("public deep code", world.codes["deep"]),
            ("public deep code, 32 axes", world.codes["deep32"]),
            ("public PCA code", world.codes["pca"]),
        )
    }
    for name, kind in (
        ("client-only, rows of A", "shallow"),
        ("client-only, rows of A and C", "own"),
        ("whole model at the client, own records", "deep"),
    ):
        public: Tensor = getattr(world.public, kind)
        both = [_wide(public, getattr(part, kind)) for part in (world.private, world.tested)]
        spaces[name] = (both[0], both[1])
    for name, (private, tested) in spaces.items():
        for mine in clients[:JUDGED]:
            heads = ridge_heads(private[mine], world.private.labels[mine])
            for ridge, head in heads.items():
                yield f"{name}, ridge {ridge}", tested @ head


def _wide(public: Tensor, rows: Tensor) -> Tensor:
    """Rows centred and scaled by public text, of mean square norm about 1, and a constant."""
    scale = public.std(0, correction=0).clamp_min(1e-6)
    return torch.cat(
        [(rows - public.mean(0)) / scale / math.sqrt(rows.shape[1]), rows.new_ones(len(rows), 1)], 1
    ).double()


def ridge_heads(rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Ridge heads at each penalty, and ``loo`` at the one whose leave-one-out error on these very records is least."""
    heads: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    y = labels.double()
    left, values, right = torch.linalg.svd(rows, full_matrices=False)  # Once for all penalties, few rows or many.
    for ridge in RIDGES:
        kept = values.square() / (values.square() + ridge)
        part = left.mT @ y * kept[:, None]
        heads[str(ridge)] = right.mT @ (part / values.clamp_min(1e-12)[:, None])
        leverage = (left.square() @ kept)[:, None]
        errors[str(ridge)] = float(((y - left @ part) / (1 - leverage)).square().mean())
    heads["loo"] = heads[min(errors, key=lambda ridge: errors[ridge])]
    return heads


def _together(world: World, clients: tuple[Tensor, ...], setting: Setting) -> Iterator[tuple[str, Tensor]]:
    """Heads that other clients' records went into."""
    everyone = torch.cat(clients)
    tested = {name: code.encode(world.tested.shallow) for name, code in world.codes.items()}
    for kind, label in (("deep", "split"), ("pca", "split, public PCA code (no depth)")):
        code = world.codes[kind]
        second = code.second_moment(world.public.shallow)
        z, y = code.encode(world.private.shallow[everyone]), world.private.labels[everyone].double()
        clean = joint_statistic(z, y)
        released, sigma = release(clean, setting.mu), 2 / setting.mu
        whole, sums = sum_moments(released, 1, sigma), sum_moments(clean, 1, 0.0)
        noise = release(torch.zeros(1, 1, code.width), setting.mu).reshape(-1, 1)
        once = Moments(sums.total + noise, sums.count, sigma**2)
        response = _responses(z, y, setting.mu)
        for i in range(min(JUDGED, len(clients))):
            own = slice(i * setting.records, (i + 1) * setting.records)
            others = whole.without(sum_moments(released[own], 1, sigma))
            clean_others = sums.without(sum_moments(clean[own], 1, 0.0))
            yield label, tested[kind] @ fit_head(z[own], y[own], PRIOR, others, second)
            if kind == "pca":
                continue
            yield "split, without own records", tested[kind] @ fit_head(z[:0], y[:0], PRIOR, others, second)
            rest = once.without(sum_moments(clean[own], 1, 0.0))
            yield "secure sum, noised once", tested[kind] @ fit_head(z[own], y[own], PRIOR, rest, second)
            yield "secure sum, no noise", tested[kind] @ fit_head(z[own], y[own], PRIOR, clean_others, second)
            separate = response.leave(own)
            yield (
                "split, label by randomised response",
                tested[kind] @ fit_head(z[own], y[own], PRIOR, separate, second),
            )
    deep, deep_tested = (_wide(world.public.deep, part.deep) for part in (world.private, world.tested))
    yield (
        "noiseless split, all records",
        deep_tested @ ridge_heads(deep[everyone], world.private.labels[everyone])["loo"],
    )
    shallow, shallow_tested = (_wide(world.public.shallow, part.shallow) for part in (world.private, world.tested))
    yield (
        "rows of A, all records clean",
        shallow_tested @ ridge_heads(shallow[everyone], world.private.labels[everyone])["loo"],
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Responses:
    """Code and label released apart, half of mu^2 each; (N, r) debiased products."""

    products: Tensor
    extra: float

    def leave(self, own: slice) -> Moments:
        """Moments of everybody else."""
        rest = torch.cat([self.products[: own.start], self.products[own.stop :]])
        return Moments(rest.sum(0)[:, None], len(rest), len(rest) * self.extra)


def _responses(z: Tensor, y: Tensor, mu: float) -> _Responses:
    part = mu / math.sqrt(2)
    keep = 0.5 * math.erfc(
        -part / 2 / math.sqrt(2)
    )  # pure epsilon-DP is worth mu = 2 Phi^-1(keep), so keep = Phi(mu/2).
    coin = secrets.SystemRandom()
    told = torch.tensor([[float(label) if coin.random() < keep else -float(label)] for label in y[:, 0]], dtype=y.dtype)
    noised = release(z[:, None], part)[:, 0]
    power = (2 * keep - 1) ** 2
    return _Responses(noised * told / (2 * keep - 1), ((2 / part) ** 2 + 1 / z.shape[1]) / power - 1 / z.shape[1])
