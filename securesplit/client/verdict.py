"""Would this client join that server, and if not, by which rule? The handshake's decisions without a connection.

In the order of securesplit/client/dial.py, but every refusal is told and not only those of the first step that refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from securesplit.admit import broken_rules, traffic_of
from securesplit.agree import compare, strictest
from securesplit.errors import InputError, PolicyDenied
from securesplit.policy.leakage import Proof, faults_of
from securesplit.policy.rules import Breach
from securesplit.policy.schema import Policy
from securesplit.protocol.job import Job

__all__ = ["Evidence", "Verdict", "judge"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What proves ``[leakage]`` limits.

    Attributes:
        proofs: the site's reports. model: digest of the model's manifest. now: with a time zone.
    """

    proofs: Sequence[Proof]
    model: str
    now: datetime


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a client would do.

    Attributes:
        refusals: every rule that is broken; none when the client would join.
        agreed: the policy that would bind the session; None where there is none.
        open_questions: what could not be decided with what was given.
    """

    refusals: tuple[Breach, ...]
    agreed: Policy | None
    open_questions: tuple[str, ...]

    @property
    def admitted(self) -> bool:
        """Whether the client would join, as far as it can be told."""
        return not self.refusals


def judge(
    policy: Policy, *, job: Job | None = None, offer: Policy | None = None, evidence: Evidence | None = None
) -> Verdict:
    """Decide as a client does.

    Args:
        policy: the client's own.
        job: the server's; None leaves it out.
        offer: the server's policy; None when it offers none.
        evidence: for a policy with ``[leakage]`` limits.
    """
    agreed, refusals = (policy, ()) if offer is None else _meet(policy, offer)
    for rules in [policy] if agreed in (None, policy) else [policy, agreed]:
        assert rules is not None
        if job is not None:
            known = {breach.rule for breach in refusals}
            refusals = (*refusals, *(b for b in broken_rules(rules, job) if b.rule not in known))
    asked: tuple[str, ...] = ()
    binding = agreed or policy
    if binding.leakage is not None and job is not None:
        if evidence is None:
            asked = ("leakage: whether a fresh report proves the limits needs the site's reports and the model",)
        else:
            refusals = (*refusals, *_proof(binding, job, evidence))
    return Verdict(refusals=refusals, agreed=None if refusals else agreed, open_questions=asked)


def _meet(policy: Policy, offer: Policy) -> tuple[Policy | None, tuple[Breach, ...]]:
    try:
        looser = compare(policy, offer).loosened
        if looser:
            return None, tuple(
                Breach(c.path, "{} here, {} in the offer".format(*c.values) + f"; {c.why}", c.before, c.after, "offer")
                for c in looser
            )
        return strictest(policy, offer), ()
    except PolicyDenied as error:
        found = (line.partition(": ") for line in error.details)
        return None, tuple(Breach(rule, what, None, None, "offer") for rule, _, what in found)
    except InputError as error:
        return None, (Breach("privacy.epsilon", error.what, None, None, "offer"),)


def _proof(policy: Policy, job: Job, evidence: Evidence) -> tuple[Breach, ...]:
    assert policy.leakage is not None
    traffic = traffic_of(policy, job, model=evidence.model)
    missing, over = faults_of(policy.leakage, evidence.proofs, traffic, now=evidence.now)
    told = [Breach("leakage.proof", what, None, None) for what in missing]
    told += [Breach("leakage.limit", what, None, None) for what in over]
    return tuple(replace(breach, source="proof") for breach in told)
