"""An epsilon as JSON: never without what it speaks of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from securesplit.policy.schema import Policy
    from securesplit.runs.spent import Spent

__all__ = ["claim", "claimed"]


def claim(spent: Spent) -> dict[str, Any]:
    """Keys for an object: ``epsilon`` with its ``delta``, ``unit`` and ``relation``; ``bound`` says why where there is none."""
    said = spent.meaning
    return {
        "epsilon": spent.epsilon, "delta": said and said.delta, "unit": said and said.unit,
        "relation": said and said.relation, "bound": spent.bound,
    }  # fmt: skip


def claimed(policy: Policy) -> dict[str, Any]:
    """What an epsilon under this policy means, as the same keys but ``epsilon``; without a bound it means nothing."""
    from securesplit.policy.schema import Gaussian

    if not isinstance(privacy := policy.privacy, Gaussian):
        return {"delta": None, "unit": None, "relation": None, "bound": "none"}
    return {"delta": privacy.delta, "unit": privacy.unit, "relation": privacy.relation, "bound": "stated"}
