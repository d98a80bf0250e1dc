"""The policy that is audited when none is given: every channel is open, and each release is large enough to be measured."""

from __future__ import annotations

from securesplit.policy.schema import Aggregation, Channel, Gaussian, Limits, Policy, Transport, Updates


def builtin_policy() -> Policy:
    """Regime ``round`` with generation. Epsilon is large, because an audit's precision is in mu and its time in 1/mu^2."""
    return Policy(
        name="audit",
        purpose="Audited when no policy is named; it opens every channel and is meant for no data.",
        cost="Nobody's quality, because nothing is trained under it.",
        privacy=Gaussian(
            mechanism="gaussian", unit="sequence", relation="replace-one", epsilon=32.0, delta=1e-5, regime="round",
            activations=Channel(clip=8.0, share=0.3, releases=3), gradients=Channel(clip=1.0, share=0.25, releases=2),
            updates=Updates(clip=0.05, share=0.2, releases=2), generation=Channel(clip=2.0, share=0.25, releases=12),
        ),
        aggregation=Aggregation(min_clients=3, min_threshold=2, blind=True, max_update=1.0),
        limits=Limits(
            min_front=0, min_back=0, max_sequences=4096, buckets=(8, 16), max_message_bytes=1 << 28
        ),
        transport=Transport(loopback_only=True),
    )  # fmt: skip
