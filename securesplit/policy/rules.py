"""The rules by which a policy refuses, under names that do not change, and how one refusal is told.

A rule that holds a job to a key of the policy has the key's name. A server's offer is held to the same names, by
securesplit/policy/directions.py: what it loosens is the rule that it breaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FITS", "RULES", "Breach", "Source"]

Source = Literal["job", "offer", "proof"]

FITS: dict[str, str] = {
    "aggregation.sums": "the numbers of a secure sum must fit together",
    "privacy.labels.task": "labels are answered for jobs that classify, and for no others",
    "privacy.labels.classes": "answers are noised for one number of classes, which must be the job's",
    "privacy.regime.sharing": "what stays at a site needs local steps, which regime 'round' does not have",
    "privacy.regime.embedding": "an embedding drifts where A learns and gradients are not taken apart by record",
    "privacy.regime.prefix": "a prefix's gradient is not taken apart by record",
    "privacy.regime.dora": "the gradient of DoRA's lengths is not taken apart by record",
    "privacy.regime.precision": "no record decides by an overflow what is summed",
    "privacy.regime.checkpointing": "gradients that are taken apart by record see each pass once",
    "privacy.regime.accumulate": "the optimiser moves once for each noised sum",
    "privacy.regime.evaluate_every": "within a round of regime 'round' nothing moves",
    "privacy.regime.patience": "held-out text does not decide, without noise, when a client stops",
    "privacy.regime.keep_best": "held-out text does not decide, without noise, which adapters are kept",
    "privacy.updates.sharing": "noise on updates would drown the figure that an inexact sum must report",
    "privacy.updates.honest": "a sum must hold as many honest clients as its shared noise is sized for",
    "privacy.updates.ring": "the ring of the sum must have room for the noise",
}
"""What a job must bring so that the policy's own mechanism works; a looser policy may ask for more of it."""

RULES: dict[str, str] = {
    "limits.min_front": "so many decoder layers stay on the client before the cut",
    "limits.min_back": "so many decoder layers stay on the client behind the cut",
    "limits.max_sequences": "no message has more sequences",
    "aggregation.min_clients": "no sum has fewer clients",
    "aggregation.min_threshold": "fewer clients do not open a sum",
    "aggregation.majority": "more than half of the roster must agree before a sum is opened; this holds under every policy",
    "aggregation.max_update": "no coordinate of an update is larger",
    "aggregation.blind": "the server does not see the sum",
    "aggregation.roster": "exactly these clients take part",
    "aggregation.min_colluders": "so many may side with the server without an update being opened",
    **FITS,
    "leakage.proof": "a fresh report of the attack suite speaks of this mechanism, model, cut and codec",
    "leakage.limit": "no attack of that report got more than the policy accepts",
}
"""Every rule that a job can break, and what it asks for."""


@dataclass(frozen=True, slots=True)
class Breach:
    """One rule that is broken.

    Attributes:
        rule: its name, of :data:`RULES`, or a key of the policy for what an offer loosens.
        what: in words.
        policy: the policy's value, as JSON has it; None where the rule has none.
        other: the other side's.
        source: what broke it: the server's job, the policy that it offers, or the site's own reports.
    """

    rule: str
    what: str
    policy: object
    other: object
    source: Source = "job"

    def line(self) -> str:
        """One line, which begins with the rule."""
        return f"{self.rule}: {self.what}"
