from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import count

import pytest

from securesplit.policy.schema import Aggregation, Channel, Gaussian, Limits, Policy, Transport, UnsafeNoPrivacy


@pytest.fixture
def policy_of() -> Callable[..., Policy]:
    """``policy_of(epsilon=..., regime=..., activations=(clip, share, releases), ...)``; ``epsilon=None`` is unsafe."""

    def make(epsilon: float | None = 8.0, regime: str = "frozen", delta: float = 1e-5, **channels) -> Policy:
        channels.setdefault("activations", (1.0, 0.4, 1))
        stated = {name: Channel(clip=c, share=s, releases=n) for name, (c, s, n) in channels.items()}
        privacy = (
            UnsafeNoPrivacy(mechanism="UnsafeNoPrivacy")
            if epsilon is None
            else Gaussian(
                mechanism="gaussian", unit="sequence", relation="replace-one",
                epsilon=epsilon, delta=delta, regime=regime, **stated,
            )
        )  # fmt: skip
        return Policy(
            name="tiny",
            purpose="For the tests of the privacy package alone.",
            cost="Nobody's quality, because nothing is trained.",
            privacy=privacy,
            aggregation=Aggregation(min_clients=3, min_threshold=2, blind=True, max_update=1.0),
            limits=Limits(min_front=0, min_back=0, max_sequences=64, buckets=(4,), max_message_bytes=1 << 20),
            transport=Transport(loopback_only=True),
        )

    return make


@pytest.fixture
def fixed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise keys from a counter, so that a statistical test answers the same in every run. No production path has this."""
    numbers = count()
    monkeypatch.setattr(
        "securesplit.privacy.noise._fresh_key",
        lambda: hashlib.sha256(b"a test's noise" + next(numbers).to_bytes(8, "little")).digest(),
    )
