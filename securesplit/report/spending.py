"""``privacy report``: what left a site, what it cost, and what an attacker may reach at most. Figures only, no text.

Everything is read from the ledger, whose chain was verified when it was opened; the policy gives the unit and the budget.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from statistics import NormalDist

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict

from securesplit.errors import PolicyDenied
from securesplit.policy.meaning import Meaning
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.ledger import ALL, Ledger
from securesplit.privacy.plan import UNITS, enforced_epsilon, enforced_mu
from securesplit.privacy.purse import BARE
from securesplit.report.html import figure
from securesplit.report.plots import Bar, share_plot

PRIORS = (0.01, 0.05, 0.1, 0.3, 0.5)
"""Chances of a guess without traffic, for which the ceiling is printed; 0.05 is about the commonest token of English."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ChannelReport(_Frozen):
    """One way out of the site.

    Attributes:
        releases: entries in the ledger.
        records: different units of privacy that were charged by name.
        everyone: entries that are charged to every record of the site.
        mu, epsilon: of the unit that spent most on this channel, what everyone was charged included.
        sigma_over_clip: smallest and largest noise per coordinate, in clips; None for labels, which are answered at random.
    """

    channel: str
    releases: int
    records: int
    everyone: int
    mu: float
    epsilon: float
    sigma_over_clip: tuple[float, float] | None


class CeilingReport(_Frozen):
    """No attack that guesses right with chance ``prior`` without traffic does so with more than ``ceiling`` with it."""

    prior: float
    ceiling: float


class SpendingReport(_Frozen):
    """What a site has spent.

    Attributes:
        policies: digests of the policies that charged, with their entries.
        mu, eps_server: of the unit that spent most, against a server that keeps everything.
        eps_peer: against the other clients, from the sums alone; equal to ``eps_server`` where B learns; None where sums
            carry no noise, or where another policy charged, too, because a bare sum under that one leaves no entry.
        honest: how many honest clients each sum must have held for these to be true; 1 where nobody else was counted on.
        left: the part of the squared budget that this unit still has.
        bits: the most that the server has learnt about this unit, mu^2/8 nats.
        adopted: how often the ledger was accepted after a move.
        head: of the chain, to be kept elsewhere.
    """

    policy: str
    policy_digest: str
    policies: tuple[tuple[str, int], ...]
    unit: str
    relation: str
    delta: float
    regime: str
    budget_epsilon: float
    budget_mu: float
    mu: float
    eps_server: float
    eps_peer: float | None
    honest: int = 1
    left: float
    bits: float
    channels: tuple[ChannelReport, ...]
    ceilings: tuple[CeilingReport, ...]
    adopted: int
    entries: int
    head: str

    def text(self) -> str:
        """The same in a few lines."""
        meaning = Meaning(self.delta, self.unit, self.relation)
        peer = (
            "none, no noise is known to be in all sums" if self.eps_peer is None else f"{self.eps_peer:.4f} {meaning}"
        )
        lines = [
            f"policy '{self.policy}': unit {self.unit}, {self.relation}, delta {self.delta:g}, regime {self.regime}",
            f"eps_server {self.eps_server:.4f} of {self.budget_epsilon:g} {meaning}; eps_peer: {peer}; {self.left:.1%} of the squared budget left",
            *([] if self.honest == 1 else [f"these hold as each sum had at least {self.honest} honest clients in it"]),
            f"the server has learnt at most {self.bits:.3g} bits about the unit that spent most (mu {self.mu:.4f})",
        ]
        lines += [
            f"  {c.channel:9} {c.releases} release(s), {c.records} record(s), {c.everyone} for all; worst mu {c.mu:.4f}, epsilon {c.epsilon:.4f} {meaning}"
            for c in self.channels
        ]
        lines += [
            f"  a guess right {c.prior:.0%} of the time without traffic is right at most {c.ceiling:.1%} with it"
            for c in self.ceilings
        ]
        if self.adopted:
            lines.append(f"  adopted (times: {self.adopted}): the claim rests on the word that no copy was left")
        return "\n".join(lines)


@dataclass(slots=True)
class _Channel:
    releases: int = 0
    units: Counter[str] = field(default_factory=Counter)
    noise: list[float] = field(default_factory=list)
    everyone: int = 0


def spending(ledger: Ledger, policy: Policy) -> SpendingReport:
    """Read a site's ledger.

    Args:
        ledger: open, hence verified.
        policy: of the runs; gives unit, delta and budget.

    Raises:
        TypeError: under a policy that keeps no ledger.
        PolicyDenied: SS-2016 when the ledger counts in another unit than the policy's.
    """
    privacy = policy.privacy
    if not isinstance(privacy, Gaussian):
        raise TypeError("an unsafe policy keeps no ledger")
    if ledger.unit not in {None, privacy.unit}:
        raise PolicyDenied(
            "SS-2016",
            f"this ledger counts by {ledger.unit}, and policy '{policy.name}' protects by {privacy.unit}",
            hint="Name the policy of the runs.",
        )
    channels: dict[str, _Channel] = {}
    policies: Counter[str] = Counter()
    adopted = entries = 0
    for entry in ledger.entries():
        entries += 1
        if entry.adopted:
            adopted += 1
            continue
        policies[entry.policy] += 1
        channel = channels.setdefault(entry.channel, _Channel())
        channel.releases += 1
        channel.units[entry.record] += entry.units
        channel.everyone += entry.record == ALL
        channel.noise.append(entry.sigma / entry.clip)
    mu, budget = ledger.mu(), enforced_mu(privacy.epsilon, privacy.delta)
    peer = ledger.mu(channels=("update",)) if privacy.regime == "frozen" else mu
    # A plain update leaves its marker; what other policies let the peers see is not known from this one.
    noiseless = BARE in channels or (privacy.regime == "frozen" and privacy.updates is None)
    noiseless = noiseless or bool(set(policies) - {policy.digest})
    normal = NormalDist()
    return SpendingReport(
        policy=policy.name, policy_digest=policy.digest, policies=tuple(policies.most_common()), unit=privacy.unit,
        relation=privacy.relation, delta=privacy.delta, regime=privacy.regime, budget_epsilon=privacy.epsilon,
        budget_mu=budget, mu=mu, eps_server=enforced_epsilon(mu, privacy.delta),
        eps_peer=None if noiseless else enforced_epsilon(peer, privacy.delta), left=max(0.0, 1 - (mu / budget) ** 2),
        bits=mu * mu / 8 / math.log(2), honest=(privacy.updates and privacy.updates.honest) or 1,
        channels=tuple(_channel(name, found, privacy.delta) for name, found in channels.items() if name != BARE),
        ceilings=tuple(CeilingReport(prior=p, ceiling=normal.cdf(normal.inv_cdf(p) + mu)) for p in PRIORS),
        adopted=adopted, entries=entries, head=ledger.head(),
    )  # fmt: skip


def _channel(name: str, found: _Channel, delta: float) -> ChannelReport:
    everyone = found.units.pop(ALL, 0)
    mu = math.sqrt((everyone + max(found.units.values(), default=0)) / UNITS)
    return ChannelReport(
        channel=name, releases=found.releases, records=len(found.units), everyone=found.everyone, mu=mu,
        epsilon=enforced_epsilon(mu, delta),
        sigma_over_clip=None if name == "labels" else (min(found.noise), max(found.noise)),
    )  # fmt: skip


def render_spending(report: SpendingReport) -> str:
    """The page, as one string of HTML; self-contained, without script, nothing fetched."""
    environment = Environment(
        loader=PackageLoader("securesplit.report", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(figure=figure)
    return environment.get_template("spending.html.j2").render(r=report, plot=_plot(report))


def _plot(report: SpendingReport) -> Markup:
    bars = [Bar(c.channel, c.mu**2 / report.budget_mu**2) for c in report.channels]
    bars.append(Bar(f"worst {report.unit}, all channels", report.mu**2 / report.budget_mu**2))
    return share_plot("spent", "Share of one unit's squared budget by channel", tuple(bars))
