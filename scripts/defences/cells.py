"""One cell of the benchmark: one defence at one level, served, attacked and counted."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from attacks.ridge import Inverter
from scripts.defences import train as training
from scripts.defences.attacker import Beam, beam_search, fit_codebook, fit_ridge, ridge_guess, states_alone
from scripts.defences.defence import Defence, Linear, Permuted, Quantised, TopK
from scripts.defences.denoise import fit_denoiser, listen, losses, standard
from scripts.defences.matching import Search, match
from scripts.defences.moments import distance_correlation, principal, quantile_norm, standardised
from scripts.defences.train import Trained
from scripts.defences.utility import Public, Served, fit_server, opening, sequence_losses
from scripts.defences.world import Texts, World, states

_TOGETHER = 24  # Sequences in one beam search.
CLIP_SHARE = 0.5  # The clip is the median public norm: best of 0.5, 0.9 and 0.99 on the tuning text.
TRAINED = ("nopeek", "vib", "shaped")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Cell:
    """What defines a figure; equal cells have equal results.

    Attributes:
        kind: of the defence. level: mu, bits, k, alpha or beta; a permutation's is 1 for rows, 2 for columns, 3 for both.
        path: the levels that training went through before this one; empty for what is not trained.
        k: dimensions of a code.
        steps: of the server's decoder. training: steps of a trained defence at each level.
        public, test, length, seeds: public sequences for fits, private ones of a seed, tokens of each, seeds.
        width, candidates: of the beam.
    """

    kind: str
    level: float
    path: tuple[float, ...]
    k: int
    steps: int
    training: int
    public: int
    test: int
    length: int
    seeds: int
    width: int
    candidates: int

    @property
    def digest(self) -> str:
        """Content hash, by which a finished cell is known."""
        return _digest(asdict(self))

    @property
    def lesson(self) -> str:
        """Content hash of what was trained, which does not depend on how it is measured."""
        keys = ("kind", "level", "path", "k", "training", "length")
        return _digest({key: getattr(self, key) for key in keys})

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.kind}:{self.level:g}"


def _digest(value: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Result:
    """What was counted; lists run over sequences, seed after seed.

    Attributes:
        losses: nats per token. denoised: the same behind the client's denoiser; empty where none was fitted.
        hits: tokens named correctly, by attack. of: tokens of a sequence.
        mu: for one row; None without a guarantee.
        unresolved: positions without an exact match; None for noise.
        facts: losses on the tuning text by server, and what training and the defence measured of themselves.
        seconds: how long it took.
    """

    losses: list[float]
    denoised: list[float]
    hits: dict[str, list[int]]
    of: int
    mu: float | None
    unresolved: int | None
    facts: dict[str, float]
    seconds: float


@dataclass(slots=True)
class Bench:
    """All that does not change between cells, and what several of them need.

    Attributes:
        world, texts: who has what. work: folder of trained defences. say: progress.
        hidden: states of the pre-trained A, by the role of the text. unaware: inverters that know no defence.
    """

    world: World
    texts: Texts
    work: Path
    say: Say
    hidden: dict[str, Tensor] = field(default_factory=dict)
    unaware: dict[str, Inverter] = field(default_factory=dict)

    def states(self, role: str, count: int) -> Tensor:
        """States of the pre-trained A for the first ``count`` sequences of ``train``, ``tune`` or ``test``, or tokens ``alone``."""
        key = f"{role}{count}"
        if key not in self.hidden and role == "alone":
            self.hidden[key] = states_alone(self.world.front, self.world.table)
        if key not in self.hidden:
            tokens = {"train": self.texts.train, "tune": self.texts.tune, "test": self.texts.test.flatten(0, 1)}[role]
            self.hidden[key] = states(self.world.front, tokens[:count])
        return self.hidden[key]


def build(bench: Bench, cell: Cell) -> Trained:
    """The defence of a cell, trained now or read from the work folder."""
    front, hidden, level = bench.world.front, bench.states("train", cell.public), cell.level
    if cell.kind in TRAINED:
        return _learn(bench, cell)
    if cell.kind in {"none", "gaussian"}:
        clip = math.inf if cell.kind == "none" else quantile_norm(hidden, CLIP_SHARE)
        sigma = 0.0 if cell.kind == "none" else 2 * clip / level
        return Trained(front, Linear(None, None, clip, sigma, exact=not sigma), None, {})
    if cell.kind in {"centred", "bottleneck", "whitened"}:
        k = hidden.shape[-1] if cell.kind == "centred" else cell.k
        mean, basis = principal(hidden, k, whiten=cell.kind == "whitened")
        clip = quantile_norm((hidden - mean) @ basis, CLIP_SHARE)
        return Trained(front, Linear(mean, basis, clip, 2 * clip / level), None, {})
    if cell.kind == "permuted":
        return Trained(front, Permuted(bool(int(level) & 1), bool(int(level) & 2)), None, {})
    mean, scale = standardised(hidden)
    kinds: dict[str, type[Quantised | TopK]] = {"quantised": Quantised, "topk": TopK}
    return Trained(front, kinds[cell.kind](mean, scale, int(level)), None, {})


def _learn(bench: Bench, cell: Cell) -> Trained:
    """Train level after level; every level is kept, so that a run that was killed loses one at most."""
    world, train = bench.world, bench.texts.train
    model = training.fresh(world, bench.states("train", cell.public), cell.kind, cell.k)
    done: tuple[float, ...] = ()
    facts: dict[str, float] = {}
    for level in (*cell.path, cell.level):
        earlier = Cell(**{**asdict(cell), "level": level, "path": done})
        file = bench.work / f"{cell.kind}-{earlier.lesson}.safetensors"
        notes = file.with_suffix(".json")
        if file.exists() and notes.exists():
            training.load(model, file)
            facts = json.loads(notes.read_text())
        else:

            def progress(step: int, loss: float, extra: float, at: float = level) -> None:
                if step % 20 == 19:
                    bench.say(f"{cell.kind}:{at:g} training step {step + 1}, loss {loss:.2f}, regulariser {extra:.3g}")

            facts = training.train(
                model, world, train, weight=level, steps=cell.training, seed=len(done), progress=progress
            )
            training.save(model, file)
            notes.write_text(json.dumps(facts))
        done = (*done, level)
    return model.finish(cell.level, facts)


def measure(bench: Bench, cell: Cell) -> Result:
    """Build, serve, attack, count."""
    start, world = time.time(), bench.world
    built = build(bench, cell)
    own = built.front is not world.front
    tokens = bench.texts.test.flatten(0, 1)
    train = bench.texts.train[: cell.public]
    public = Public(
        train,
        bench.texts.tune,
        bench.states("train", cell.public),
        states(built.front, train) if own else bench.states("train", cell.public),
        states(built.front, bench.texts.tune) if own else bench.states("tune", len(bench.texts.tune)),
    )
    hidden = states(built.front, tokens) if own else bench.states("test", len(tokens))
    observed = _release(built.defence, hidden, cell)
    first = opening(world.front)
    bench.say(f"{cell.name} serving")
    served = fit_server(world, first, built.defence, public, own=built.decoder, steps=cell.steps, seed=7)
    lost = sequence_losses(world, first, served(built.defence.served(hidden, observed)), tokens)
    denoised = _denoised(bench, cell, built, served, public, (observed, hidden)) if cell.kind == "gaussian" else []
    hits, unresolved = _attack(bench, cell, built, public, observed)
    return Result(
        [round(float(v), 5) for v in lost], denoised, hits, cell.length, built.defence.mu, unresolved,
        {**_facts(bench, cell, built, hidden), **{f"tuning loss, {k}": v for k, v in served.tuned.items()}},
        round(time.time() - start, 1),
    )  # fmt: skip


def _release(defence: Defence, hidden: Tensor, cell: Cell) -> Tensor:
    """Every seed's sequences with that seed's coins."""
    out = []
    for seed, part in enumerate(torch.split(hidden, cell.test)):
        coins = int(_digest({"kind": cell.kind, "level": cell.level, "seed": seed}), 16) % (1 << 62)
        out.append(defence.release(part, torch.Generator().manual_seed(coins)))
    return torch.cat(out)


def _denoised(
    bench: Bench, cell: Cell, built: Trained, served: Served, public: Public, seen: tuple[Tensor, Tensor]
) -> list[float]:
    bench.say(f"{cell.name} denoising at the client")
    first, tokens = opening(bench.world.front), bench.texts.test.flatten(0, 1)
    rows, steps = min(cell.public, 384), 4 * cell.steps
    denoiser = fit_denoiser(bench.world, first, built.defence, served, public, rows=rows, steps=steps, seed=11)
    heard = listen(bench.world, first, built.defence, served, seen, tokens)
    found = losses(bench.world, denoiser, standard(heard, denoiser.mean, denoiser.size))
    return [round(float(v), 5) for v in found]


def _attack(
    bench: Bench, cell: Cell, built: Trained, public: Public, observed: Tensor
) -> tuple[dict[str, list[int]], int | None]:
    """Every attack on the canonical rows; (N,) hits of each."""
    world, defence, front = bench.world, built.defence, built.front
    rows = defence.canonical(observed)
    coins = torch.Generator().manual_seed(13)
    # The unaware attacker knows neither a trained A nor a permutation nor the noise: it reads the rows as they come.
    naive, raw = ((lambda hidden: hidden), observed) if defence.exact else (defence.expected, rows)
    key = "exact" if defence.exact else cell.name if cell.kind in TRAINED else cell.kind
    guesses = {}
    bench.say(f"{cell.name} inverters")
    if key not in bench.unaware:
        bench.unaware[key] = fit_ridge(world.front, naive, world.table, public.train)
    guesses["ridge, unaware"] = ridge_guess(bench.unaware[key], raw)
    aware = fit_ridge(
        front, lambda hidden: defence.canonical(defence.release(hidden, coins)), world.table, public.train
    )
    guesses["ridge"] = ridge_guess(aware, rows)
    bench.say(f"{cell.name} codebook")
    alone = bench.states("alone", len(world.table)) if front is world.front else states_alone(front, world.table)
    seen = defence.canonical(defence.release(public.hidden, coins))
    codebook = fit_codebook(defence, world.table, alone, public.train, seen)
    guesses["codebook"] = torch.stack([(codebook.scores(part) + world.log_unigram).argmax(-1) for part in rows])
    unresolved = None
    name = "match" if defence.exact else "beam"

    def progress(share: float) -> None:
        if round(share * cell.length) % 8 == 0:
            bench.say(f"{cell.name} {name} {share:.0%}")

    if defence.exact:
        matched = match(world, front, defence, rows, codebook, Search(), progress)
        guesses[name], unresolved = matched.tokens, matched.unresolved
    else:
        beam = Beam(cell.width, cell.candidates)
        # A group at a time: the scores of all would fill the memory.
        groups = torch.split(rows, _TOGETHER)
        guesses[name] = torch.cat(
            [beam_search(world, front, defence, part, codebook, beam, progress) for part in groups]
        )
    truth = bench.texts.test.flatten(0, 1)
    return {name: (guess == truth).sum(1).tolist() for name, guess in guesses.items()}, unresolved


def _facts(bench: Bench, cell: Cell, built: Trained, hidden: Tensor) -> dict[str, float]:
    facts = {f"training {name}": round(value, 4) for name, value in built.facts.items()}
    if isinstance(built.defence, Linear) and built.defence.sigma:
        facts["sigma over the clip"] = round(built.defence.sigma / built.defence.clip, 5)
    if cell.kind in {"nopeek", "none"}:
        x = bench.world.table[bench.texts.test.flatten()]
        facts["distance correlation, private text"] = round(float(distance_correlation(x, hidden.flatten(0, 1))), 4)
    return facts
