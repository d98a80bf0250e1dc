"""What no attack can exceed, and the guess it starts from.

For a mu-GDP release of a whole sequence under replace-one, any guess of a token made from the release is right with
probability at most ``Phi(Phi^-1(kappa) + mu)`` (reconstruction robustness: Hayes, Mahloujifar, Balle 2023, arXiv
2302.07225; Gaussian trade-off: Dong, Roth, Su 2022), where kappa is the chance of the best guess made without it. Unit:
sequence; relation: replace-one; mu: everything the server ever receives of the record. It bounds expectations: a finite
sample may lie a little above, so that a run compares the lower end of its interval.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist

from securesplit.policy.schema import Policy


def ceiling(kappa: float, mu: float) -> float:
    """``Phi(Phi^-1(kappa) + mu)``.

    Args:
        kappa: chance of the best guess without observation, 0 to 1.
        mu: at least 0.

    Raises:
        ValueError: for arguments out of range.
    """
    if not (0 <= kappa <= 1 and mu >= 0):
        raise ValueError("kappa lies between 0 and 1, and mu is not negative")
    if kappa in {0.0, 1.0}:
        return kappa
    normal = NormalDist()
    return min(1.0, normal.cdf(normal.inv_cdf(kappa) + mu))


def mu_of(policy: Policy) -> float | None:
    """mu of one record's life in the server's view, unit sequence; None when the policy bounds nothing."""
    from securesplit.policy.schema import Gaussian
    from securesplit.privacy.calibrate import mu_for

    privacy = policy.privacy
    return mu_for(privacy.epsilon, privacy.delta) if isinstance(privacy, Gaussian) else None


def share_of(truths: Sequence[Sequence[int]], guesses: Sequence[Sequence[int]], special: frozenset[int]) -> float:
    """Positional recovery of fixed guesses, one per sequence; a guess that ends early misses the rest."""
    hits = total = 0
    for truth, guess in zip(truths, guesses, strict=True):
        for position, token in enumerate(truth):
            if token not in special:
                total += 1
                hits += position < len(guess) and guess[position] == token
    return hits / total if total else 0.0


def unigram_share(truths: Sequence[Sequence[int]], special: frozenset[int], token: int | None = None) -> float:
    """Recovery by always naming one token; by the truth's own commonest, the best such guess there is, when None."""
    counts = Counter(token for truth in truths for token in truth if token not in special)
    if not counts:
        return 0.0
    return (max(counts.values()) if token is None else counts[token]) / sum(counts.values())


def best_guess(truths: Sequence[Sequence[int]], positional: Sequence[int], special: frozenset[int]) -> float:
    """kappa: the best recovery that we know how to reach without any observation.

    The largest of three: the truth's commonest token everywhere; the auxiliary text's commonest token by position; the
    commonest token by position among the *other* sequences, which covers texts written after one template. The first and
    the last look at the truth and so err upwards, as a bound's prior may; a cleverer prior can still exceed them all.
    """
    by_position: dict[int, Counter[int]] = {}
    for truth in truths:
        for position, token in enumerate(truth):
            by_position.setdefault(position, Counter())[token] += 1
    others = []
    for truth in truths:
        guess = []
        for position, token in enumerate(truth):
            counts = by_position[position].copy()
            counts[token] -= 1
            guess.append(max(counts, key=lambda t: (counts[t], -t)) if sum(counts.values()) else -1)
        others.append(guess)
    return max(
        unigram_share(truths, special),
        share_of(truths, [positional] * len(truths), special),
        share_of(truths, others, special),
    )


def membership_ceiling(mu: float) -> float:
    """The largest AUC of telling a record's presence under a mu-GDP release: ``Phi(mu / sqrt 2)``.

    The Gaussian trade-off curve ``beta = Phi(Phi^-1(1 - alpha) - mu)`` bounds the ROC curve of every test (Dong, Roth, Su
    2022), and its area is that of two normal laws mu apart.
    """
    return NormalDist().cdf(mu / math.sqrt(2))


def capacity_bits(width: int, rms: float, sigma: float) -> float:
    """Bits that one noised row can carry at most on average: ``D/2 log2(1 + rms^2 / sigma^2)`` (Shannon 1948).

    Args:
        width: D. rms: of one coordinate of a row before the noise. sigma: of the noise, above 0.
    """
    if not (width > 0 and rms >= 0 and sigma > 0):
        raise ValueError("a row has a width, a size that is not negative, and noise")
    return width / 2 * math.log2(1 + (rms / sigma) ** 2)
