"""Every key of a policy and its direction: does a change of it loosen, tighten, or neither?

What "looser" means. A looser policy lets more leave the client, or counts on more people, or admits more jobs. The table is the
one source for `policy diff`, for negotiation and for what a client refuses in a server's offer; a test holds it to the schema,
so that no key can be added without a direction. Noise has no key of its own: it follows from budget, share and releases, and
its size in units of the clip is what protects. So the clip, which scales signal and noise alike, is neutral.
"""

from __future__ import annotations

from dataclasses import dataclass

from securesplit.policy.orders import (
    Bound,
    Fixed,
    Keys,
    Opens,
    Order,
    Own,
    Pinned,
    Ranked,
    Seals,
    Stated,
    Subset,
    Within,
)

__all__ = ["CHANNELS", "DIRECTIONS", "UNSTATED", "Direction", "direction_of"]

CHANNELS = ("activations", "gradients", "updates", "generation")
"""Tables of ``[privacy]`` with a clip, a share and releases."""

UNSTATED: dict[str, object] = {
    "aggregation.plausible.output": (1e-3, 2e4),
    "aggregation.plausible.gradient": (1e-3, 2e4),
    "aggregation.plausible.spread": 1e-3,
    "aggregation.plausible.steadiness": 50.0,
}
"""What holds where the table is absent: the floors of securesplit/client/plausible.py, compared by a test."""


@dataclass(frozen=True, slots=True)
class Direction:
    """One key.

    Attributes:
        path: such as ``privacy.activations.clip``; it is also the rule's name in a refusal.
        order: which of two values is tighter.
        why: what the key decides, in one sentence that is true for either direction.
    """

    path: str
    order: Order
    why: str

    @property
    def parent(self) -> str:
        """The table that the key stands in; empty for the file itself."""
        return self.path.rpartition(".")[0]


_SMALL, _LARGE, _OWN = Bound("small"), Bound("large"), Own()

_WORDS = (
    Direction("name", _OWN, "a name protects nothing"),
    Direction("purpose", _OWN, "words for people"),
    Direction("cost", _OWN, "words for people"),
)

_BUDGET = (
    Direction("privacy.mechanism", Ranked((frozenset({"UnsafeNoPrivacy"}), frozenset({"gaussian"}))), "without a mechanism everything leaves as it is"),
    Direction(
        "privacy.unit", Ranked((frozenset({"token"}), frozenset({"sequence"}), frozenset({"user"})), mixes=False),
        "what the budget protects whole: a token is part of a sequence, and that of what a user has",
    ),
    Direction("privacy.relation", Fixed("loosens"), "the sensitivity that noise is sized for hangs on it"),
    Direction("privacy.epsilon", _SMALL, "the budget of one unit over its life; noise shrinks as it grows"),
    Direction("privacy.delta", _SMALL, "the probability for which epsilon need not hold"),
    Direction(
        "privacy.regime", Ranked((frozenset({"round", "step"}), frozenset({"frozen"}))),
        "in frozen no gradient crosses and A never moves; round and step release gradients in ways that do not compare",
    ),
    Direction("privacy.activations", Keys(), "hidden states at the cut, O1; always there"),
    Direction("privacy.gradients", Opens(), "with it gradients leave the client, O3"),
    Direction("privacy.labels", Opens(), "with it class labels leave the client by randomised response"),
    Direction("privacy.updates", Seals(), "with it updates are clipped and noised before they enter a sum, O5"),
    Direction("privacy.generation", Opens(), "with it generated tokens are fed back, which are releases, and generation is allowed"),
    Direction("privacy.labels.share", _SMALL, "the part of the budget that an answer may cost"),
    Direction("privacy.labels.classes", Fixed("neutral"), "a public number, that of the job's labels; the answer's epsilon is the same"),
    Direction("privacy.updates.honest", Bound("small", absent=1), "on how many other clients' noise the claim counts"),
)  # fmt: skip


def _channel(name: str) -> tuple[Direction, ...]:
    return (
        Direction(f"privacy.{name}.clip", _OWN, "scales what leaves and its noise alike: mu stays as it is"),
        Direction(f"privacy.{name}.share", _SMALL, "the part of the budget that this channel may spend"),
        Direction(
            f"privacy.{name}.releases", _OWN,
            "divides the channel's part: more releases carry more noise each, and cost the same together",
        ),
    )  # fmt: skip


_SUMS = (
    Direction("aggregation.min_clients", _LARGE, "the fewest others that an update hides among"),
    Direction("aggregation.min_threshold", _LARGE, "how many must agree before a sum is opened"),
    Direction("aggregation.blind", _LARGE, "whether the sum is hidden from the server too"),
    Direction("aggregation.max_update", _SMALL, "how large one coordinate of an update may be"),
    Direction("aggregation.min_colluders", Bound("large", absent=0), "how many may side with the server before an update is opened"),
    Direction("aggregation.roster", Pinned(), "who may take part; another list is other people"),
    Direction(
        "aggregation.min_update", Stated(),
        "a larger floor refuses more of a hostile server's work; having one tells the server one bit a round that no epsilon counts",
    ),
    Direction("aggregation.plausible", Keys(), "what a server may answer before this client abstains"),
    Direction("aggregation.plausible.output", Within(), "answers outside the range make this client abstain"),
    Direction("aggregation.plausible.gradient", Within(), "gradients outside the range make this client abstain"),
    Direction("aggregation.plausible.spread", _LARGE, "the least part of the directions that must differ"),
    Direction("aggregation.plausible.steadiness", _SMALL, "how far a step's ratio may lie from the round's"),
)  # fmt: skip

_LIMITS = (
    Direction("limits.min_front", _LARGE, "decoder layers that stay on the client before the cut"),
    Direction("limits.min_back", _LARGE, "decoder layers that stay on the client behind the cut"),
    Direction("limits.max_sequences", _SMALL, "sequences in one message"),
    Direction("limits.buckets", Subset(), "the lengths that the server can tell apart"),
    Direction("limits.max_message_bytes", _SMALL, "the largest message that is sent or taken"),
    Direction("transport.loopback_only", _LARGE, "whether traffic may leave this machine"),
    Direction("leakage", Keys(), "what attacks may get, by a fresh report"),
    Direction("leakage.token_recovery", _SMALL, "the share of tokens that any attack may name"),
    Direction("leakage.pii_exact", _SMALL, "the share of personal data that any attack may get whole"),
    Direction("leakage.membership_auc", _SMALL, "how well any attack may tell members from others"),
    Direction("leakage.max_age_days", _SMALL, "how old the report may be"),
    Direction("leakage.profile", Ranked((frozenset({"smoke"}), frozenset({"standard"}), frozenset({"full"}))), "the least effort of the attacks in the report"),
)  # fmt: skip

DIRECTIONS: tuple[Direction, ...] = (
    *_WORDS,
    *_BUDGET,
    *(direction for name in CHANNELS for direction in _channel(name)),
    *_SUMS,
    *_LIMITS,
)
_BY_PATH = {direction.path: direction for direction in DIRECTIONS}


def direction_of(path: str) -> Direction:
    """The direction of a key.

    Raises:
        KeyError: for a path that is no key of a policy.
    """
    return _BY_PATH[path]
