"""White-box audit: what a distinguisher proves about the bytes that leave, beside what the plan claims.

Two worlds differ in every record: one sends +100C e, the other -100C e. The statistic <decoded, e> is the best there is
against Gaussian noise, so its error rates bound mu from below; at joint confidence 99.9 % (Clopper-Pearson) that bound
is under the claim when the code is right and over it when noise, clip or sensitivity are wrong. The whole path is run:
gate, message, bytes, decoding, float32. An audit proves faults, never their absence.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from securesplit.privacy import gate as gates
from securesplit.privacy.gate import ClippedSum, Gate
from securesplit.privacy.ledger import Ledger
from securesplit.privacy.plan import plan_for
from securesplit.protocol.codec import Caps, decode, encode
from securesplit.protocol.messages import Backward, Blob, Forward
from securesplit.protocol.transcript import array_of

SHAPE = (2, 3)  # T, D
N = 4000
ERROR = 1e-3 / 2  # each of the two rates is bounded at half of the joint error
CHANNELS = {"regime": "round", "gradients": (2.0, 0.3, 1), "updates": (3.0, 0.2, 1), "generation": (0.5, 0.2, 1)}
DIRECTIONS = {
    "coordinate": np.eye(6)[4].reshape(SHAPE),
    "dense": np.array([[1.0, -2.0, 3.0], [-1.0, 2.0, 4.0]]) / np.sqrt(35.0),
}


def received(gate, at, rows, records):
    """(B,T,D) as the server decodes it from the bytes that the client sends."""
    released = gate.release(rows, at=at, records=records, memoise=False)
    batch, length, width = released.shape
    blob = Blob(dtype=released.codec, shape=(batch * length, width), data=released.payload)
    if at == "gradient":
        message = Backward(step=0, gradient=blob)
    else:
        message = Forward(step=0, lengths=(length,) * batch, learn=False, hidden=blob)
    decoded = decode(encode(message), Caps(message_bytes=1 << 24, width=width))
    return array_of(decoded.gradient if at == "gradient" else decoded.hidden).reshape(released.shape)


def mu_lower(plus, minus):
    """Lower bound of mu from the statistic in both worlds, threshold 0, fixed in advance."""
    n = len(plus)
    hits, alarms = int((plus > 0).sum()), int((minus > 0).sum())
    hits_low = stats.beta.ppf(ERROR, hits, n - hits + 1) if hits else 0.0
    alarms_high = stats.beta.ppf(1 - ERROR, alarms + 1, n - alarms) if alarms < n else 1.0
    return stats.norm.ppf(hits_low) - stats.norm.ppf(alarms_high)


def audit(policy, directory, at, direction, codec="f32", n=N):
    """(lower bound, claimed mu) of one channel."""
    ledger, plan = Ledger(directory), plan_for(policy.privacy).channel(at)
    gate, e = Gate(policy, ledger, codec=codec), DIRECTIONS[direction]
    rows = torch.from_numpy(100 * plan.clip * e).float().expand(n, *SHAPE)
    worlds = []
    for sign in (1, -1):
        seen = received(gate, at, rows * sign, [f"{sign}{i}" for i in range(n)])
        worlds.append((seen.astype(np.float64) * e).sum((1, 2)))
    ledger.close()
    return mu_lower(*worlds), plan.mu


def verdict(lower, claimed):
    """Why the audit fails, or None."""
    if lower > claimed:
        return "the claim is false"
    return "the noise is larger than its price, or the audit is blind" if lower < 0.6 * claimed else None


@pytest.mark.parametrize(("direction", "codec"), [("coordinate", "f32"), ("dense", "f32"), ("dense", "bf16")])
@pytest.mark.parametrize("at", ["cut", "gradient", "decode"])
def test_the_claim_stands_and_is_not_loose(policy_of, tmp_path, fixed_noise, at, direction, codec):
    policy = policy_of(epsilon=16.0, activations=(1.0, 0.3, 1), **CHANNELS)
    lower, claimed = audit(policy, tmp_path, at, direction, codec)
    assert verdict(lower, claimed) is None, (lower, claimed)


@pytest.mark.parametrize("epsilon", [4.0, 8.0])
def test_the_claim_of_a_whole_budget_in_one_release(policy_of, tmp_path, fixed_noise, epsilon):
    lower, claimed = audit(policy_of(epsilon=epsilon, activations=(600.0, 1.0, 1)), tmp_path, "cut", "dense")
    assert verdict(lower, claimed) is None, (lower, claimed)


def test_the_claim_of_the_update_channel(policy_of, tmp_path, fixed_noise):
    policy = policy_of(epsilon=32.0, activations=(1.0, 0.3, 1), **CHANNELS)
    ledger, plan, n = Ledger(tmp_path), plan_for(policy.privacy).update, 400
    gate, e = Gate(policy, ledger), DIRECTIONS["dense"].ravel()
    worlds = []
    for sign in (1, -1):
        statistic = np.zeros(n)
        for i in range(n):
            total = ClippedSum(6, plan.clip)
            total.add(torch.from_numpy(sign * 100 * plan.clip * e), f"{sign}{i}")
            statistic[i] = gate.release_update(total).vector @ e
        worlds.append(statistic)
    ledger.close()
    lower = mu_lower(*worlds)
    assert verdict(lower, plan.mu) is None, (lower, plan.mu)


REAL = gates.gaussian
MUTANTS = {
    "no noise": ("gaussian", lambda shape, sigma: np.zeros(shape)),
    "sensitivity C for 2C": ("gaussian", lambda shape, sigma: REAL(shape, sigma / 2)),
    "variance for deviation": ("gaussian", lambda shape, sigma: REAL(shape, sigma / 2**0.5)),
    "four draws averaged": ("gaussian", lambda shape, sigma: sum(REAL(shape, sigma) for _ in range(4)) / 4),
    "noise on one row only": ("gaussian", lambda shape, sigma: REAL(shape, sigma) * np.array([[1.0], [0.0]])),
    "no clip": ("clip_sequence", lambda hidden, bound: hidden.float()),
    "clip at 2C": ("clip_sequence", lambda hidden, bound: hidden.float() * 2 * bound / (100 * bound)),
    "too much noise": ("gaussian", lambda shape, sigma: REAL(shape, 2 * sigma)),
}


@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_a_broken_release_is_caught(policy_of, tmp_path, fixed_noise, monkeypatch, mutant):
    name, replacement = MUTANTS[mutant]
    monkeypatch.setattr(gates, name, replacement)
    direction = "dense" if mutant != "noise on one row only" else "coordinate"
    found = verdict(*audit(policy_of(epsilon=4.0, activations=(1.0, 1.0, 1)), tmp_path, "cut", direction))
    assert found is not None
    assert ("larger" in found) == (mutant == "too much noise")
