"""One cell of the benchmark: one code at one noise, decoded, judged and attacked.

The noise here is torch's, seeded: this is a measurement on public files, and nothing is released. The product's noise
is securesplit/privacy/noise.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scripts.frontier.client import with_sentinel
from securesplit.model.bayes import Channel, Filtered, Prior, causal_filter, linear_mean, posterior, posterior_mean
from securesplit.model.fusion import Evidence, fit_gate, fit_weight, mismatches, mix
from securesplit.model.hypotheses import Hypotheses, list_decode, vote
from securesplit.privacy.calibrate import mu_for

DELTA = 1e-5
_AT_ONCE = 1024  # Sequences times hypotheses in one forward pass.


@dataclass(frozen=True, slots=True)
class Cell:
    """What defines a figure; equal cells have equal results.

    Attributes:
        epsilon: per released row, replace-one, at :data:`DELTA`.
        code: ``plain`` (embedding clipped at its RMS norm) or ``unit`` (centred PCA, every row scaled to the bound).
        k: dimensions that are released.
        width: K, hypotheses of the list decoder; 1 is a single greedy prefix.
        recombine, share: of the list decoder and of the prior.
        tune, test, length: sequences of public tuning text, private sequences, tokens of each.
        client: digest of everything that defines the client-only models.
        seeds: how many.
    """

    epsilon: float
    code: str
    k: int
    width: int
    recombine: int
    share: float
    tune: int
    test: int
    length: int
    client: str
    seeds: int

    @property
    def digest(self) -> str:
        """Content hash, by which a finished cell is known."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class World:
    """What is public: the model (bfloat16), its embeddings in float32, the unigram, and the sentinel."""

    model: Any
    table: Tensor
    log_unigram: Tensor
    sentinel: int


@dataclass(frozen=True, slots=True)
class Known:
    """Sequences and what needs no noise: log-probabilities of tokens 1.. and the largest at each position, (N, T-1)."""

    tokens: Tensor
    noiseless: Tensor
    client: Tensor
    client_top: Tensor


@dataclass(frozen=True, slots=True)
class Heard:
    """What the server made of noised rows: log-probabilities of the true tokens, evidence for gates, recovery.

    Attributes:
        simple: by name of the server, (N, T-1).
        filter_evidence: (N, T-1, 1, F); listed: (N, T-1, K); list_evidence: (N, T-1, K, F); weight: (N, T-1, K).
        recovery: by name of the attack, (N,) shares of tokens that were named correctly.
    """

    simple: dict[str, Tensor]
    filter_evidence: Tensor
    listed: Tensor
    list_evidence: Tensor
    weight: Tensor
    recovery: dict[str, Tensor]


def unigram(chunks: Tensor, vocabulary: int) -> Tensor:
    """(V,) smoothed log frequencies of public text; a fiftieth of a count for every token."""
    counts = torch.bincount(chunks.flatten(), minlength=vocabulary).double() + 0.02
    return (counts / counts.sum()).log().float()


def channel_for(world: World, cell: Cell) -> Channel:
    """The public code of a cell and its noise: sensitivity 2 C of one row under replace-one, mu = 2 C / sigma."""
    weight = world.log_unigram.exp()[:, None]
    codes = world.table
    if cell.code == "unit":
        codes = codes - (weight * codes).sum(0)
        basis = torch.linalg.eigh(((weight * codes).T @ codes).double()).eigenvectors[:, -cell.k :]
        codes = codes @ basis.float()
    norms = codes.norm(dim=1, keepdim=True)
    bound = float((weight * norms.square()).sum().sqrt())
    factor = bound / norms if cell.code == "unit" else (bound / norms).clamp(max=1)
    return Channel(codes * factor, 2 * bound / mu_for(cell.epsilon, DELTA))


@torch.inference_mode()
def predictions(model: Any, tokens: Tensor, sentinel: int, embeddings: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log-probability of tokens 1.. given what stands before, and the largest one, both (N, T-1).

    Args:
        model: a causal model.
        tokens: (N, T), the truth.
        sentinel: public first token.
        embeddings: (N, T, D) to read in place of the tokens' own.
    """
    found = []
    for part in range(0, len(tokens), 12):
        ids = tokens[part : part + 12]
        if embeddings is None:
            logits = model(with_sentinel(ids, sentinel)).logits
        else:
            table = model.get_input_embeddings().weight
            first = table[sentinel].expand(len(ids), 1, -1)
            logits = model(inputs_embeds=torch.cat([first, embeddings[part : part + 12].to(table.dtype)], 1)).logits
        log_p = functional.log_softmax(logits[:, 1:-1].float(), dim=-1)
        found.append(torch.stack([log_p.gather(-1, ids[:, 1:, None])[..., 0], log_p.amax(-1)]))
    both = torch.cat(found, dim=1).clone()
    return both[0], both[1]


def know(world: World, client: Any, tokens: Tensor) -> Known:
    """The references of some sequences."""
    noiseless, _ = predictions(world.model, tokens, world.sentinel)
    mine, top = predictions(client, tokens, world.sentinel)
    return Known(tokens, noiseless, mine, top)


@torch.inference_mode()
def hear(world: World, cell: Cell, tokens: Tensor, *, noise_seed: int, progress: Callable[[float], None]) -> Heard:
    """Release, decode and attack some sequences (N, T)."""
    channel = channel_for(world, cell)
    generator = torch.Generator().manual_seed(noise_seed)  # A measurement: nothing is released.
    rows = channel.codes[tokens]
    rows = rows + channel.sigma * torch.randn(rows.shape, generator=generator)
    prior, at_once = Prior(world.log_unigram, cell.share), max(1, _AT_ONCE // cell.width)
    parts = []
    for start in range(0, len(tokens), at_once):
        part = slice(start, start + at_once)

        def passed(share: float, start: int = start) -> None:
            progress((start + share * min(at_once, len(tokens) - start)) / len(tokens))

        parts.append(_hear(world, channel, prior, cell, tokens[part], rows[part], passed))
    first = parts[0]
    return Heard(
        {name: torch.cat([p.simple[name] for p in parts]) for name in first.simple},
        *(
            torch.cat([getattr(p, field) for p in parts])
            for field in ("filter_evidence", "listed", "list_evidence", "weight")
        ),
        {name: torch.cat([p.recovery[name] for p in parts]) for name in first.recovery},
    )


def _hear(
    world: World,
    channel: Channel,
    prior: Prior,
    cell: Cell,
    tokens: Tensor,
    rows: Tensor,
    progress: Callable[[float], None],
) -> Heard:
    model, sentinel = world.model, world.sentinel
    mean = torch.cat([_mean_given_unigram(world, channel, part) for part in rows.split(8)])
    linear = linear_mean(channel, rows, world.log_unigram, world.table)
    simple = {
        "linear": predictions(model, tokens, sentinel, linear)[0],
        "unigram": predictions(model, tokens, sentinel, mean)[0],
    }
    filtered, simple["filter"], top = _filter(world, channel, prior, tokens, rows)
    guesses = [mismatches(filtered.tokens[:, None, :t], tokens[:, :t]) for t in range(1, tokens.shape[1])]
    sure = torch.stack([filtered.confidence[:, :-1].log(), top], -1)
    evidence = torch.cat([torch.stack(guesses, 1), sure[:, :, None]], dim=-1)
    answers: list[tuple[Tensor, Tensor, Tensor]] = []

    def visit(hypotheses: Hypotheses, probability: Tensor) -> None:
        position = hypotheses.tokens.shape[-1]
        progress(position / tokens.shape[1])
        if position < tokens.shape[1]:
            target = tokens[:, position, None, None].expand(-1, cell.width, 1)
            weight = hypotheses.log_weight.clamp(min=-20.0)
            wrong = mismatches(hypotheses.tokens, tokens[:, :position])
            more = torch.stack([weight, probability.amax(-1).log()], -1)
            answers.append(
                (probability.gather(-1, target)[..., 0].log(), torch.cat([wrong, more], -1), hypotheses.log_weight)
            )

    final = list_decode(
        model, channel, rows, prior, sentinel=sentinel, width=cell.width, recombine=cell.recombine, visit=visit
    )
    guesses_by = {"filter": filtered.tokens, "path": final.tokens[:, 0], "vote": vote(final)}
    guesses_by["oracle"] = _oracle(world, channel, prior, tokens, rows)
    listed, list_evidence, weight = (torch.stack([a[i] for a in answers], 1) for i in range(3))
    recovery = {name: (guess == tokens).float().mean(1) for name, guess in guesses_by.items()}
    return Heard(simple, evidence, listed, list_evidence, weight, recovery)


def _mean_given_unigram(world: World, channel: Channel, rows: Tensor) -> Tensor:
    return posterior_mean(posterior(channel.log_likelihood(rows), world.log_unigram), world.table)


def _filter(
    world: World, channel: Channel, prior: Prior, tokens: Tensor, rows: Tensor
) -> tuple[Filtered, Tensor, Tensor]:
    """The causal filter, its log-probabilities of the true tokens 1.., and its largest ones, (N, T-1)."""
    true, top = [], []

    def visit(probability: Tensor) -> None:
        true.append(probability.gather(1, tokens[:, len(true), None])[:, 0].log())
        top.append(probability.amax(1).log())

    filtered = causal_filter(world.model, channel, rows, prior, sentinel=world.sentinel, visit=visit)
    return filtered, torch.stack(true[1:], 1), torch.stack(top[1:], 1)


def _oracle(world: World, channel: Channel, prior: Prior, tokens: Tensor, rows: Tensor) -> Tensor:
    """The best guess of each token given its row and the *true* prefix: no left-to-right attack does better."""
    guesses = []
    for ids, part in zip(tokens.split(8), rows.split(8), strict=True):
        logits = world.model(with_sentinel(ids, world.sentinel)).logits[:, :-1]
        expected = prior.given(functional.softmax(logits, dim=-1, dtype=torch.float32))
        guesses.append((expected.log_() + channel.log_likelihood(part)).argmax(-1))
    return torch.cat(guesses)


@dataclass(frozen=True, slots=True)
class Judged:
    """Losses per sequence (nats per token) by method, what the fits were, and recovery per sequence by attack."""

    losses: dict[str, list[float]]
    fits: dict[str, tuple[float, float, float]]
    recovery: dict[str, list[float]]


def judge(tune: tuple[Known, Heard], test: tuple[Known, Heard]) -> Judged:
    """Fit weights and gates on public text, and apply them once to private text."""
    (known, heard), (known_test, heard_test) = tune, test
    log_p = {"noiseless": known_test.noiseless, "client": known_test.client}
    fits: dict[str, tuple[float, float, float]] = {}
    servers = {name: (heard.simple[name], heard_test.simple[name]) for name in heard.simple}
    servers["list"] = (_mixture(heard), _mixture(heard_test))
    for name, (public, private) in servers.items():
        fit = fit_weight(known.client, public)
        fits[f"{name}+skip"] = (fit.weight, fit.gain, fit.margin)
        log_p[name], log_p[f"{name}+skip"] = private, mix(known_test.client, private, fit.weight)
    for name in ("filter", "list"):
        answers, answers_test = (_answers(h, name) for h in (heard, heard_test))
        evidence, evidence_test = _evidence(known, heard, name), _evidence(known_test, heard_test, name)
        gate = fit_gate(evidence, known.client.double(), answers.double())
        fits[f"{name}+gate"] = (float(gate.gate.open), gate.gain, gate.margin)
        log_p[f"{name}+gate"] = gate.gate.mix(evidence_test, known_test.client.double(), answers_test.double())
    return Judged(
        {name: [round(float(v), 5) for v in -value.mean(1)] for name, value in log_p.items()},
        fits,
        {name: [round(float(v), 5) for v in value] for name, value in heard_test.recovery.items()},
    )


def _mixture(heard: Heard) -> Tensor:
    return torch.logsumexp(heard.listed + heard.weight, dim=-1)


def _answers(heard: Heard, name: str) -> Tensor:
    return heard.listed if name == "list" else heard.simple["filter"][..., None]


def _evidence(known: Known, heard: Heard, name: str) -> Evidence:
    server = heard.list_evidence if name == "list" else heard.filter_evidence
    present = heard.weight.isfinite() if name == "list" else torch.ones(server.shape[:3], dtype=torch.bool)
    return Evidence(server.double(), known.client_top[..., None].double(), present)
