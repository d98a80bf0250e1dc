"""Test 5: many canaries in one run. Steinke, Nasr and Jagielski 2023 (arXiv:2305.08846), paired for replace-one.

A fair coin from the operating system places each canary in one of the two extreme records. The auditor sees what the
server decodes, scores each canary, guesses on the tenth that it is surest of, and abstains on the rest. So many right
guesses refute every epsilon below the bound. It is loose for Gaussian noise, and reported beside the two-point test.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch

from securesplit.audit.bench import BATCH, Bench, claims_of
from securesplit.audit.bounds import one_run_epsilon, one_run_p_value
from securesplit.audit.twopoint import directions
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.plan import enforced_epsilon

_GUESSED = 10  # One canary in so many.


@dataclass(frozen=True, slots=True)
class OneRunVerdict:
    """What one run refutes.

    Attributes:
        channel: always ``cut``.
        canaries, guesses, correct: how many were placed, guessed on, and right.
        claimed_epsilon: of one release, at ``delta``, by ``unit`` and ``relation``.
        epsilon_lower: the largest epsilon that the guesses refute at 95 %, as the literature reports it.
        p_value: of the claim; what so many right guesses are worth against it.
        ok: the claim is not refuted at the audit's own, much smaller error.
    """

    channel: str
    canaries: int
    guesses: int
    correct: int
    claimed_epsilon: float
    epsilon_lower: float
    delta: float
    unit: str
    relation: str
    p_value: float
    ok: bool


def audit_one_run(policy: Policy, bench: Bench, *, canaries: int, error: float) -> OneRunVerdict:
    """Place canaries on the channel ``cut`` and guess.

    Args:
        policy: audited; its delta is the claim's.
        bench: of this policy.
        canaries: how many.
        error: probability that a right claim is refuted.
    """
    privacy = policy.privacy
    assert isinstance(privacy, Gaussian)
    claim = next(c for c in claims_of(policy) if c.at == "cut")
    direction = directions(claim)[1]
    coins = 2.0 * (np.frombuffer(os.urandom(canaries), dtype=np.uint8) & 1) - 1
    record = torch.from_numpy(100 * claim.clip * np.sqrt(claim.rows) * direction).float()
    scores = np.concatenate(
        [
            bench.send(torch.from_numpy(part)[:, None, None].float() * record, at="cut").reshape(len(part), -1)
            @ direction.ravel()
            for part in np.array_split(coins, -(-canaries // BATCH))
        ]
    )
    surest = np.argsort(-np.abs(scores))[: canaries // _GUESSED]
    correct = int((np.sign(scores[surest]) == coins[surest]).sum())
    bound = one_run_epsilon(canaries, len(surest), correct, privacy.delta, 0.05)
    claimed = enforced_epsilon(claim.mu, privacy.delta)
    p_value = one_run_p_value(canaries, len(surest), correct, claimed, privacy.delta)
    return OneRunVerdict(
        channel="cut", canaries=canaries, guesses=len(surest), correct=correct, claimed_epsilon=claimed, epsilon_lower=bound,
        delta=privacy.delta, unit=privacy.unit, relation=privacy.relation, p_value=p_value, ok=p_value >= error,
    )  # fmt: skip
