"""What is guessed without looking at the traffic, scored on the same positions as the attacks.

This runs in the scorer, because the strongest baseline needs the truth: the language model that is told every true token
before the one that it guesses. What it does not know is the later text; a two-sided prior can still be better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attacks.bounds import share_of, unigram_share
from attacks.exchange import Known
from attacks.report import Baselines

_LEAST = 1e-12


@dataclass(frozen=True, slots=True)
class Forced:
    """The public language model's view of true sequences, each position given all true tokens before.

    Attributes:
        probability: per sequence and position, of the true token. right: whether the best guess was the true token.
        surprise: mean over counted positions, in bits per token. share: part of them that it guesses.
    """

    probability: tuple[tuple[float, ...], ...]
    right: tuple[tuple[bool, ...], ...]
    surprise: float
    share: float


def forced(whole: Any, truths: Sequence[Sequence[int]], special: frozenset[int], sentinel: int | None) -> Forced:
    """Ask the language model, sequence by sequence.

    Args:
        whole: the causal model, in evaluation mode.
        truths: true ids, without padding.
        special: ids that do not count.
        sentinel: stands before a sequence that does not begin with it; without one the first token is guessed evenly.
    """
    probability, right, bits, counted, hits = [], [], 0.0, 0, 0
    vocabulary = int(whole.config.vocab_size)
    for truth in truths:
        ids = list(truth)
        lead = [sentinel] if sentinel is not None and ids[0] != sentinel else []
        with torch.inference_mode():
            logits = whole(torch.tensor([lead + ids])).logits[0].float()
        log = logits.log_softmax(-1)
        told = [math.log(1 / vocabulary)] * (1 - len(lead))
        guesses = [-1] * (1 - len(lead))
        for place in range(len(lead) + len(ids) - 1):
            following = (lead + ids)[place + 1]
            told.append(float(log[place, following]))
            guesses.append(int(log[place].argmax()))
        probability.append(tuple(max(_LEAST, math.exp(value)) for value in told))
        right.append(tuple(g == t for g, t in zip(guesses, ids, strict=True)))
        for value, hit, token in zip(told, right[-1], ids, strict=True):
            if token not in special:
                bits, counted, hits = bits - value / math.log(2), counted + 1, hits + hit
    return Forced(tuple(probability), tuple(right), bits / max(1, counted), hits / max(1, counted))


def baselines(
    truths: Sequence[Sequence[int]],
    known: Known,
    special: frozenset[int],
    vocabulary: int,
    texts: Sequence[Sequence[int]],
    told: Forced | None,
) -> Baselines:
    """All baselines on the attacked sequences.

    Args:
        truths: true ids, without padding.
        known: the attacker's own guesses without observation.
        special: ids that do not count.
        vocabulary: V.
        texts: the auxiliary texts' ids.
        told: the language model's view; None without a whole model.
    """
    nearest = [max(texts, key=lambda text: _agreement(truth, text), default=()) for truth in truths]
    return Baselines(
        uniform=1 / vocabulary,
        unigram=unigram_share(truths, special, known.common[0] if known.informed else None),
        positional=share_of(truths, [known.positional] * len(truths), special),
        lm_free=share_of(truths, [known.written] * len(truths), special),
        lm_forced=None if told is None else told.share,
        lm_bits=None if told is None else told.surprise,
        nearest_text=share_of(truths, nearest, special),
    )


def _agreement(truth: Sequence[int], text: Sequence[int]) -> int:
    return sum(a == b for a, b in zip(truth, text, strict=False))


def extra_bits(told: Forced | None, hits: Sequence[Sequence[bool]], counted: Sequence[Sequence[bool]]) -> float | None:
    """Bits per token that an attack's answer adds to the language model's knowledge: a lower bound.

    The answer and the model together predict token t as ``r [its guess] + (1 - r) p(t | all true tokens before)``, where r
    is the attack's hit rate on the *other* sequences, so that nothing is fitted on what is predicted. The gain in mean
    log2-likelihood over the model alone is a V-information (Xu et al. 2020, arXiv 2002.10689), never negative in
    expectation for an r that fits; a negative figure on a sample is given as 0.

    Args:
        told: the language model's view.
        hits, counted: per sequence and position, whether the answer was right, and whether the position counts.
    """
    if told is None:
        return None
    total = sum(sum(row) for row in counted)
    right = sum(h and c for row, mask in zip(hits, counted, strict=True) for h, c in zip(row, mask, strict=True))
    gain = 0.0
    for row, mask, probability in zip(hits, counted, told.probability, strict=True):
        others = total - sum(mask)
        share = (right - sum(h and c for h, c in zip(row, mask, strict=True))) / others if others else 0.0
        share = min(max(share, 1 / (total + 2)), 1 - 1 / (total + 2))
        for hit, counts, p in zip(row, mask, probability, strict=True):
            if counts:
                gain += math.log2((share + (1 - share) * p) / p if hit else 1 - share)
    return max(0.0, gain / total) if total else None
