"""Policies in one line, a ledger of its own for each test, and noise that comes again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from securesplit.policy.schema import (
    Aggregation,
    Channel,
    Gaussian,
    Labels,
    Limits,
    Policy,
    Transport,
    UnsafeNoPrivacy,
)
from securesplit.privacy.ledger import Ledger


@pytest.fixture
def policy_of() -> Callable[..., Policy]:
    """``policy_of(epsilon=..., regime=..., activations=(clip, share, releases), ...)``; ``epsilon=None`` is unsafe.

    ``labels=(share, classes)``; ``unit``, ``delta``, ``blind`` and ``buckets`` by name.
    """

    def make(
        epsilon: float | None = 8.0,
        regime: str = "frozen",
        delta: float = 1e-5,
        unit: str = "sequence",
        labels: tuple[float, int] | None = None,
        *,
        blind: bool = True,
        buckets: tuple[int, ...] = (4,),
        **channels,
    ) -> Policy:
        channels.setdefault("activations", (1.0, 0.4, 1))
        stated = {name: Channel(clip=c, share=s, releases=n) for name, (c, s, n) in channels.items()}
        privacy = (
            UnsafeNoPrivacy(mechanism="UnsafeNoPrivacy")
            if epsilon is None
            else Gaussian(
                mechanism="gaussian", unit=unit, relation="replace-one", epsilon=epsilon, delta=delta, regime=regime,
                labels=None if labels is None else Labels(share=labels[0], classes=labels[1]), **stated,
            )
        )  # fmt: skip
        return Policy(
            name="tiny",
            purpose="For the tests of the privacy package alone.",
            cost="Nobody's quality, because nothing is trained.",
            privacy=privacy,
            aggregation=Aggregation(min_clients=3, min_threshold=2, blind=blind, max_update=1.0),
            limits=Limits(min_front=0, min_back=0, max_sequences=64, buckets=buckets, max_message_bytes=1 << 20),
            transport=Transport(loopback_only=True),
        )

    return make


@pytest.fixture
def open_ledger(tmp_path: Path) -> Iterator[Callable[[], Ledger]]:
    """Opens the site's ledger, as often as a test likes; each is another process's view of the same file."""
    opened: list[Ledger] = []

    def open_it() -> Ledger:
        opened.append(Ledger(tmp_path / "ledger", anchors=tmp_path / "anchors"))
        return opened[-1]

    yield open_it
    for ledger in opened:
        ledger.close()


@pytest.fixture
def ledger(open_ledger: Callable[[], Ledger]) -> Ledger:
    """The site's ledger, empty."""
    return open_ledger()


@pytest.fixture
def fixed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise keys from a counter, so that a statistical test answers the same in every run. No production path has this."""
    numbers = count()

    def key() -> bytes:
        return hashlib.sha256(b"a test's noise" + next(numbers).to_bytes(8, "little")).digest()

    monkeypatch.setattr("securesplit.privacy.lattice.fresh_key", key)
