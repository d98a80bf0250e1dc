"""B's output as an attack on O2 or O3 starts from it: as recorded, or computed again; and what it foretells of labels.

C's distribution on B's output is the sharpest guess of the next token while little noise crosses the cut, and a
confident error when much does. How far to trust it is measured, not assumed: public text goes through A, the policy's
noise, B and C, and a temperature and a share for the unigram prior are fitted to what came of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attacks.head import Head
from attacks.knowledge import Knowledge
from attacks.view import Noise, ServerView, Sighting
from securesplit.model.code import CutCode
from securesplit.model.coded import CodedFront
from securesplit.privacy.clip import clip_sequence

__all__ = ["Outlook", "answered", "outlook_for", "public_texts", "recorded_outputs", "simulated"]

_TEMPERATURES = (0.6, 0.8, 1.0, 1.3, 1.7, 2.5)
_SHARE_ROUNDS = 20
_UNTESTED = 0.8
_LEAST = 1e-4
_MOST_POSITIONS = 1024  # Of public text: each takes V logits.


@dataclass(frozen=True, slots=True)
class Outlook:
    """The prior of a label, given B's output: ``share softmax(z / temperature) + (1 - share) unigram``.

    Attributes:
        share: of C's distribution. temperature: of it.
        unigram: (V,) natural logarithm.
    """

    share: float
    temperature: float
    unigram: Tensor

    def log_prior(self, logits: Tensor) -> Tensor:
        """(n, V) logits to (n, V) normalised log probabilities."""
        own = torch.log_softmax(logits.float() / self.temperature, dim=1) + _log(self.share)
        return torch.logaddexp(own, self.unigram + _log(1 - self.share))


def _log(share: float) -> float:
    return float(torch.tensor(max(share, 1e-30)).log())


def recorded_outputs(view: ServerView, known: Knowledge) -> tuple[Tensor | None, ...]:
    """B's output for every sighting, (T, D); None where it was not recorded and B is not at hand."""
    return tuple(
        torch.from_numpy(seen.output.copy()) if seen.output is not None else _again(seen, known)
        for seen in view.sightings
    )


def _again(seen: Sighting, known: Knowledge) -> Tensor | None:
    rows = torch.from_numpy(seen.rows.copy())[None]
    return None if known.model.middle is None else answered(known, rows, seen.gain)[0]


def answered(known: Knowledge, rows: Tensor, gain: float) -> Tensor:
    """What the public B answers to rows (N, T, D or k): (N, T, D) float32."""
    assert known.model.middle is not None
    front = known.model.front
    code: CutCode | None = front.code if isinstance(front, CodedFront) else None
    rows = rows * gain if gain != 1 else rows
    first = None if code is None else code.row
    with torch.no_grad():
        hidden = rows if code is None else code.decode(rows)
        if first is not None:
            hidden = torch.cat([first.to(hidden).expand(len(hidden), 1, -1), hidden], 1)
        out: Tensor = known.model.middle()(hidden.float()).float()
    return out if first is None else out[:, 1:]


def public_texts(known: Knowledge, count: int) -> Tensor:
    """(n, length) ids of public text, n at most ``count``; empty without text, and few of long ones."""
    count = min(count, -(-_MOST_POSITIONS // known.length))
    long = [text[: known.length] for text in known.prior.texts if len(text) >= known.length]
    return torch.tensor(long[:count], dtype=torch.int64).reshape(-1, known.length)


def outlook_for(view: ServerView, known: Knowledge, head: Head, texts: Tensor) -> Outlook:
    """Fit the prior to public text under this run's noise, simulated by a torch generator from the run's seed.

    Args:
        texts: (n, T) public ids; none, or no B at hand, leaves a share that no text has tested.
    """
    unigram = known.prior.log_probability
    start = Outlook(_UNTESTED, 1.0, unigram)
    if known.model.middle is None or not len(texts) or texts.shape[1] < 2:
        return start
    with torch.no_grad():
        hidden = simulated(view, known, texts)
        logits = torch.cat([head.logits(head.states(part))[:, :-1] for part in torch.split(hidden, 8)]).flatten(0, 1)
    labels = texts[:, 1:].flatten()[:, None]
    base = unigram.exp()[labels[:, 0]]
    best: tuple[float, Outlook] | None = None
    for temperature in _TEMPERATURES:
        own = torch.softmax(logits.float() / temperature, dim=1).gather(1, labels)[:, 0]
        share = 0.5
        for _ in range(_SHARE_ROUNDS):
            share = float((share * own / (share * own + (1 - share) * base)).mean())
        share = min(max(share, _LEAST), 1 - _LEAST)
        value = float((share * own + (1 - share) * base).log().mean())
        if best is None or value > best[0]:
            best = value, replace(start, share=share, temperature=temperature)
    assert best is not None
    return best[1]


def simulated(view: ServerView, known: Knowledge, texts: Tensor) -> Tensor:
    """B's output for public text as the policy's noise would have made it: (n, T) ids to (n, T, D)."""
    with torch.no_grad():
        rows = torch.cat([known.model.front(part).float() for part in torch.split(texts, 8)])
    rows = noised(rows, view.noise, known.seed)
    gain = view.sightings[0].gain if view.sightings else 1.0
    return torch.cat([answered(known, part, gain) for part in torch.split(rows, 8)])


def noised(rows: Tensor, noise: Noise, seed: int) -> Tensor:
    """A simulation of the mechanism on public rows; nothing is released."""
    bounded = rows if noise.clip is None else clip_sequence(rows, noise.clip)
    if not noise.sigma:
        return bounded
    generator = torch.Generator().manual_seed(seed)
    return bounded + noise.sigma * torch.randn(bounded.shape, generator=generator)
