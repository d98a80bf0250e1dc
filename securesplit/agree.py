"""Where two policies meet: what a change does in mu, and what binds a session between a client and a server.

A client holds to its own policy at least. It refuses a server that offers a looser one, rule by rule, and takes on what a
stricter one asks; so a server can make a session stricter, down to one that sends nothing useful, and never looser. In the
client's clips and words a server has no say.

What this does not protect against: a server that offers a strict policy and does not keep to it. An offer binds the client,
the one that noises; the server's own part of a policy is its caps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from securesplit.errors import InputError, PolicyDenied
from securesplit.policy.compare import Change, changes, verdict
from securesplit.policy.meaning import Meaning, meaning_of
from securesplit.policy.negotiate import negotiate, with_own_measures
from securesplit.policy.orders import Effect
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.plan import ChannelPlan, Plan, enforced_epsilon, plan_for, rows_moved

__all__ = ["Budget", "ChannelEffect", "Comparison", "agree", "compare", "strictest"]

_PLACES: dict[str, Literal["cut", "gradient", "decode", "update"]] = {
    "activations": "cut", "gradients": "gradient", "generation": "decode", "updates": "update",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChannelEffect:
    """One channel's noise before and after; None where it is closed.

    Attributes:
        channel: the name of its table.
        mu: of all its releases together. mu_each: of one. sigma_over_clip: of one. releases: how many.
    """

    channel: str
    mu: tuple[float | None, float | None]
    mu_each: tuple[float | None, float | None]
    sigma_over_clip: tuple[float | None, float | None]
    releases: tuple[int | None, int | None]


@dataclass(frozen=True, slots=True)
class Budget:
    """What two policies cost one unit over its life.

    Attributes:
        mu: before and after; None where a policy protects nothing.
        epsilon: the same at ``delta``.
        delta: the smaller of the two policies', so that both are compared at one.
        meaning: of each epsilon; where the two differ, they are not one quantity.
        channels: each that either policy opens.
    """

    mu: tuple[float | None, float | None]
    epsilon: tuple[float | None, float | None]
    delta: float | None
    meaning: tuple[Meaning | None, Meaning | None]
    channels: tuple[ChannelEffect, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two policies, weighed.

    Attributes:
        effect: of going from the first to the second.
        changes: every key that differs.
        budget: in numbers.
    """

    effect: Effect
    changes: tuple[Change, ...]
    budget: Budget

    @property
    def loosened(self) -> tuple[Change, ...]:
        """The changes that loosen."""
        return tuple(change for change in self.changes if change.effect == "loosens")


def compare(before: Policy, after: Policy) -> Comparison:
    """Every change and its effect.

    A larger share of a smaller budget may cost less than before, and a smaller one of a larger budget more. Such a share is
    neutral: the budget says the rest.

    Raises:
        InputError: SS-1533 when a policy's budget cannot be divided as it says.
    """
    old, new = _plan(before), _plan(after)
    found = tuple(_weighed(change, old, new) for change in changes(before, after))
    return Comparison(effect=verdict(found), changes=found, budget=_budget(before, after, old, new))


def strictest(own: Policy, other: Policy) -> Policy:
    """A policy that is at least as strict as both.

    One of the two where it is that, with the clips of ``own``; else the strictest value of each key.

    Raises:
        PolicyDenied: SS-2061 with every rule on which no value suits both.
        InputError: SS-1533 as :func:`compare`.
    """
    if _covers(own, other):
        return own
    if _covers(other, own):
        return with_own_measures(own, other)
    return negotiate(own, other)


def agree(own: Policy, offer: Policy, *, peer: str) -> Policy:
    """What a client enforces in a session with a server that offers a policy.

    Args:
        own: the client's.
        offer: the server's.
        peer: the server's certificate name, for the message.

    Returns:
        A policy that loosens neither; ``own`` itself where the offer tightens nothing.

    Raises:
        PolicyDenied: SS-2060 with one rule per key that the offer loosens, SS-2061 with every rule on which no value suits
            both.
    """
    if own.digest == offer.digest:
        return own
    try:
        looser = compare(own, offer).loosened
    except InputError as error:
        raise PolicyDenied(
            "SS-2061",
            f"server '{peer}' offers policy '{offer.name}', whose budget cannot be divided, or yours cannot",
            hint="Check both files with `securesplit policy show`.",
            details=(error.what,),
        ) from None
    if looser:
        raise PolicyDenied(
            "SS-2060",
            f"server '{peer}' offers policy '{offer.name}', looser than '{own.name}' by {len(looser)} rule(s)",
            hint="Ask its operator to serve your policy or a stricter one; `securesplit policy diff` compares two files.",
            details=tuple(change.line() for change in looser),
        )
    return strictest(own, offer)


def _covers(strict: Policy, other: Policy) -> bool:
    """Whether nothing of ``other`` is stricter than ``strict``, each release of each channel included."""
    found = compare(other, strict)
    if found.effect == "loosens":
        return False
    if any(change.path in _NEEDS_EQUAL for change in found.changes):
        return False  # A unit in which nothing is measured alike.
    return not any(_more(c.mu_each) or _more(c.releases) for c in found.budget.channels)


_NEEDS_EQUAL = frozenset({"privacy.unit", "privacy.labels.classes"})


def _more(pair: tuple[float | None, float | None]) -> bool:
    before, after = pair
    return before is not None and after is not None and after > before


def _plan(policy: Policy) -> Plan | None:
    if not isinstance(policy.privacy, Gaussian):
        return None
    return plan_for(policy.privacy, rows=rows_moved(policy.limits.min_front, policy.limits.buckets))


def _weighed(change: Change, old: Plan | None, new: Plan | None) -> Change:
    if not change.path.endswith(".share") or old is None or new is None:
        return change
    name = change.path.split(".")[1]
    before, after = (_units(plan, name) for plan in (old, new))
    if change.effect == "loosens" and after <= before:
        return replace(change, effect="neutral", why=f"{change.why}; of the smaller budget it is no more than before")
    if change.effect == "tightens" and after >= before:
        return replace(change, effect="neutral", why=f"{change.why}; of the larger budget it is no less than before")
    return change


def _units(plan: Plan, name: str) -> int:
    if name == "labels":
        return plan.labels.units if plan.labels else 0
    channel = plan.channel(_PLACES[name])
    return channel.units * channel.releases if channel else 0


def _budget(before: Policy, after: Policy, old: Plan | None, new: Plan | None) -> Budget:
    mu = tuple(plan.mu if plan else None for plan in (old, new))
    deltas = [p.privacy.delta for p in (before, after) if isinstance(p.privacy, Gaussian)]
    delta = min(deltas, default=None)
    epsilon = tuple(None if m is None or delta is None else enforced_epsilon(m, delta) for m in mu)
    found = []
    for name, place in _PLACES.items():
        one, two = (plan.channel(place) if plan else None for plan in (old, new))
        if one is not None or two is not None:
            found.append(_effect(name, one, two))
    return Budget(
        mu=(mu[0], mu[1]), epsilon=(epsilon[0], epsilon[1]), delta=delta,
        meaning=(_meaning(before, delta), _meaning(after, delta)), channels=tuple(found),
    )  # fmt: skip


def _meaning(policy: Policy, delta: float | None) -> Meaning | None:
    if delta is None or not isinstance(policy.privacy, Gaussian):
        return None
    return replace(meaning_of(policy.privacy), delta=delta)


def _effect(name: str, one: ChannelPlan | None, two: ChannelPlan | None) -> ChannelEffect:
    def both(figure: Callable[[ChannelPlan], float]) -> tuple[float | None, float | None]:
        return None if one is None else figure(one), None if two is None else figure(two)

    return ChannelEffect(
        channel=name, mu=both(lambda c: c.mu * c.releases**0.5), mu_each=both(lambda c: c.mu),
        sigma_over_clip=both(lambda c: c.sigma / c.clip),
        releases=(one.releases if one else None, two.releases if two else None),
    )  # fmt: skip
