"""Settings that are legal and still deserve a word."""

from __future__ import annotations

from securesplit.policy.schema import Gaussian, Policy

MOST_PROVEN = 100
"""Largest epsilon at which the sampler's own error is far below any delta that a policy may state (privacy/lattice.py)."""


def lint(policy: Policy) -> tuple[str, ...]:
    """One sentence per setting that an expert would ask about; empty when there is none."""
    privacy = policy.privacy
    if isinstance(privacy, Gaussian):
        found = _private(policy, privacy)
    else:
        found = ["UnsafeNoPrivacy: the server can read every token; for public text only"]
    if policy.limits.min_front == 0:
        found.append(
            "limits.min_front = 0: with the embedding alone in front, each row is one token, whatever the others are"
        )
    if policy.limits.min_back == 0 and not (isinstance(privacy, Gaussian) and privacy.regime == "frozen"):
        found.append("limits.min_back = 0: a gradient at the head is a closed form of the label")
    if len(policy.limits.buckets) > 12:
        found.append(f"limits.buckets has {len(policy.limits.buckets)} lengths; the fewer, the less a length tells")
    return tuple(found)


def _private(policy: Policy, privacy: Gaussian) -> list[str]:
    found = []
    if privacy.epsilon > 16:
        found.append(
            f"privacy.epsilon = {privacy.epsilon:g} per {privacy.unit}: a server may decide a yes-or-no question about one with over 92 % accuracy (replace-one, delta 1e-5)"
        )
    if privacy.epsilon > MOST_PROVEN:
        found.append(
            f"privacy.epsilon = {privacy.epsilon:g}: beyond {MOST_PROVEN} the rounding of the noise's table is no longer proven negligible beside delta, and nothing is protected anyway"
        )
    if privacy.delta > 1e-5:
        found.append(f"privacy.delta = {privacy.delta:g} is above 1e-5")
    if privacy.unit == "token" and policy.limits.min_front > 0:
        found.append(
            "privacy.unit = token, but A has attention: one token moves all later rows, so the noise is that of a whole sequence of the longest bucket, and the claim is only about one token"
        )
    if privacy.regime != "frozen" and not policy.aggregation.blind:
        found.append(
            "aggregation.blind is false: the server sees the noised sum of updates, which is charged, and needs no more"
        )
    if policy.aggregation.min_update is not None:
        found.append(
            "aggregation.min_update looks at the update itself, so that abstaining tells the server one bit a round about the text, which no epsilon counts"
        )
    return found
