"""The clients, rehearsed on public text: what partition A makes of it, and what the mechanism would let through.

Learned attacks train on this and choose among their forms on texts that were held out, with the noise on. Only text is
rehearsed, since random tokens would teach a learner the wrong frequencies. The noise here is torch's, from a seed: it
simulates a release and is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.prior import Prior
from attacks.ridge import hidden_of
from attacks.view import Front, Noise
from securesplit.privacy.clip import clip_sequence

__all__ = ["Rehearsal", "rehearse", "released", "windows"]

_HELD_OUT = 0.2
_MOST_HELD_OUT = 24


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Public sequences and their rows before the noise.

    Attributes:
        tokens: (N, T).
        rows: (N, T, D) float32, clipped by the policy's bound.
        factor: mean clipping factor of these sequences; 1 without a clip.
    """

    tokens: Tensor
    rows: Tensor
    factor: float

    def part(self, start: int, stop: int) -> Rehearsal:
        """Some of the sequences; the factor stays that of all."""
        return Rehearsal(self.tokens[start:stop], self.rows[start:stop], self.factor)


def windows(prior: Prior, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """(N, length) tokens of public text, each place at most once, about ``rows`` tokens in all and at least 2 sequences.

    Every text contributes its start, as a client sends it, before any text contributes its continuation. Texts that are
    too short are joined. Without text, tokens are drawn from the prior.
    """
    wanted = max(2, -(-rows // length))
    if not prior.informed:
        drawn = torch.multinomial(prior.log_probability.exp(), wanted * length, replacement=True, generator=generator)
        return drawn.view(wanted, length)
    order = torch.randperm(len(prior.texts), generator=generator).tolist()
    long = [prior.texts[i] for i in order if len(prior.texts[i]) >= length]
    short = [token for i in order if len(prior.texts[i]) < length for token in prior.texts[i]]
    found: list[tuple[int, ...]] = []
    depth = max((len(text) // length for text in long), default=0)
    for place in range(depth):
        found += [text[place * length : (place + 1) * length] for text in long if len(text) >= (place + 1) * length]
    found += [tuple(short[i : i + length]) for i in range(0, len(short) - length + 1, length)]
    if len(found) < 2:
        stream = [token for text in prior.texts for token in text]
        stream *= -(-2 * length // len(stream))
        found = [tuple(stream[:length]), tuple(stream[-length:])]
    return torch.tensor(found[:wanted])


def rehearse(front: Front, tokens: Tensor, noise: Noise) -> tuple[Rehearsal, Rehearsal]:
    """Run A on public sequences and clip: those to learn from, and a fifth (at most 24) to choose by.

    The held-out ones are the last, which come from other places of the text.
    """
    hidden = hidden_of(front, tokens)
    factor = 1.0
    if noise.clip is not None:
        norms = torch.cat([part.double().flatten(1).norm(dim=1) for part in torch.split(hidden, 64)])
        factor = float((noise.clip / norms.clamp_min(1e-12)).clamp_max(1.0).mean())
        # In parts, because the clip computes in float64.
        hidden = torch.cat([clip_sequence(part, noise.clip) for part in torch.split(hidden, 64)])
    # A clone, because rows made under inference mode cannot be trained on.
    hidden = hidden.clone()
    cut = len(tokens) - min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * len(tokens))))
    whole = Rehearsal(tokens, hidden, factor)
    return whole.part(0, cut), whole.part(cut, len(tokens))


def released(rows: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """A simulated release of clipped rows: fresh Gaussian noise on every coordinate of (N, T, D)."""
    if not sigma:
        return rows
    return rows + sigma * torch.randn(rows.shape, generator=generator)
