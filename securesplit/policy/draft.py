"""A complete, commented policy from a few answers: what is done, with what kind of text, by how many.

The numbers are a starting point that ``policy check`` accepts without a warning; an officer reads them before they are signed.
No draft turns the noise off: who wants that copies policies/lab.toml by hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from securesplit.errors import InputError
from securesplit.policy.meaning import Meaning

__all__ = ["EPSILONS", "Answers", "Sensitivity", "Use", "draft"]

Use = Literal["train", "generate", "both", "adapt"]
Sensitivity = Literal["public", "internal", "personal", "special"]

EPSILONS: dict[Sensitivity, float] = {"public": 16.0, "internal": 8.0, "personal": 4.0, "special": 2.0}
"""Budget of one record by what its exposure would do. 16: a yes-or-no question about it is answered right in at most 92 % of
cases, 8: 80 %, 4: 67 %, 2: 60 %."""

_RIGHT = {16.0: 92, 8.0: 80, 4.0: 67, 2.0: 60}
_USES: dict[Use, str] = {
    "train": "training on private records; nothing is generated",
    "generate": "answering prompts; nothing is learnt from them",
    "both": "training, and generation under the same budget",
    "adapt": "training that moves the client's first layers too, by noised sums",
}
_KINDS: dict[Sensitivity, str] = {
    "public": "text that anybody may read",
    "internal": "text of the house whose exposure would embarrass",
    "personal": "records of people",
    "special": "health, legal or financial records, whose exposure would harm somebody",
}


@dataclass(frozen=True, slots=True)
class Answers:
    """What a draft is made from. An impossible set of answers cannot be built.

    Attributes:
        name: of the policy.
        use: what is done. sensitivity: of the text.
        unit: what one budget is for.
        clients: how many sites take part, 3 to 256.
        records: of the largest site; delta is a tenth of one over it, and 1e-5 at most.
        clip: norm of one record's hidden states at the cut, from public text.
        tokens: how many are generated in the life of the records, where anything is.
        rounds: how many sums, where A learns.
        epsilon: in place of the sensitivity's own, 0.1 to 16.

    Raises:
        InputError: SS-1122 with every fault.
    """

    name: str
    use: Use
    sensitivity: Sensitivity
    unit: Literal["sequence", "user"] = "sequence"
    clients: int = 3
    records: int = 1000
    clip: float = 600.0
    tokens: int = 256
    rounds: int = 4
    epsilon: float | None = None

    def __post_init__(self) -> None:
        ranges = (
            ("clients", self.clients, 3, 256),
            ("records", self.records, 1, 10**9),
            ("clip", self.clip, 0.01, 1e5),
            ("tokens", self.tokens, 1, 1_000_000),
            ("rounds", self.rounds, 1, 100_000),
            ("epsilon", EPSILONS["special"] if self.epsilon is None else self.epsilon, 0.1, 16),
        )
        faults = [f"{name}: {value:g} is not between {least:g} and {most:g}" for name, value, least, most in ranges
                  if not least <= value <= most]  # fmt: skip
        if self.use not in get_args(Use):
            faults.append(f"use: one of {', '.join(get_args(Use))}")
        if self.sensitivity not in EPSILONS:
            faults.append(f"data: one of {', '.join(EPSILONS)}")
        if faults:
            raise InputError(
                "SS-1122", f"no policy can be made from these answers: {len(faults)} fault(s)",
                hint="Correct each; `securesplit policy new --help` explains them.", details=tuple(faults),
            )  # fmt: skip

    @property
    def budget(self) -> float:
        """Epsilon."""
        return EPSILONS[self.sensitivity] if self.epsilon is None else self.epsilon

    @property
    def meaning(self) -> Meaning:
        """Of :attr:`budget`."""
        return Meaning(self.delta, self.unit, "replace-one")

    @property
    def delta(self) -> float:
        """A tenth of one over the records, rounded down to one digit, and never above 1e-5, 1e-6 for special data."""
        most = 1e-6 if self.sensitivity == "special" else 1e-5
        wanted = min(most, 0.1 / self.records)
        digit = 10.0 ** math.floor(math.log10(wanted) + 1e-9)
        return float(f"{math.floor(wanted / digit + 1e-9) * digit:.0e}")


def draft(answers: Answers) -> str:
    """The file's text. Each line says why it is as it is."""
    return "\n".join((_head(answers), _privacy(answers), *_channels(answers), _rest(answers)))


def _head(a: Answers) -> str:
    return f'''# Made by `securesplit policy new`, for {_USES[a.use]}, on {_KINDS[a.sensitivity]}.
# A draft: read every line before it is signed. Every key is explained in policies/README.md; nothing is inherited.
name = "{a.name}"
purpose = "For {_USES[a.use]}; on {_KINDS[a.sensitivity]}."
cost = "Noise for epsilon {a.budget:g} {a.meaning}: compare with the client-only baseline before you pay for a server."
'''


def _privacy(a: Answers) -> str:
    unit = {
        "sequence": "one training example or prompt, whole; a person in several of them is protected less",
        "user": 'everything of one person at this site; every record needs a "user"',
    }[a.unit]
    percent = _RIGHT.get(a.budget)
    right = f"a yes-or-no question about one {a.unit} is answered right in at most {percent} % of cases" if percent else (
        f"of one {a.unit}, over its whole life, against a server that keeps everything")  # fmt: skip
    regime, why = ("round", "A and C move once a round, by noised sums") if a.use == "adapt" else (
        "frozen", "A and B never change and no gradient crosses, so a record is released once and remembered")  # fmt: skip
    return f'''[privacy]
mechanism = "gaussian"
unit = "{a.unit}"          # {unit}
relation = "{a.meaning.relation}"   # replaced by any other: sensitivity 2 C
epsilon = {a.budget!r}              # {right}
delta = {a.delta!r}              # at most one over ten times {a.records} records
regime = "{regime}"          # {why}
'''


def _channels(a: Answers) -> tuple[str, ...]:
    cut = "norm of one record's hidden states at the cut; take it from public text, never from private text"
    row = float(f"{max(0.01, a.clip / 6):.3g}")
    shares: dict[Use, tuple[float, ...]] = {"train": (1.0,), "generate": (0.5, 0.5), "both": (0.6, 0.4), "adapt": (0.4, 0.3, 0.3)}  # fmt: skip
    parts = shares[a.use]
    often = a.rounds if a.use == "adapt" else 1
    said = "one in each round, because A moves" if a.use == "adapt" else "remembered and resent, never drawn again"
    found = [_channel("activations", "O1: hidden states", a.clip, cut, parts[0], often, said)]
    if a.use in ("generate", "both"):
        found.append(
            _channel("generation", "O1 again: generated tokens that are fed back", row, "norm of one row", parts[1], a.tokens, "tokens in the life of these records")
        )  # fmt: skip
    if a.use == "adapt":
        found.append(_channel("gradients", "O3: gradients at the output of the server's part", 1.0, "norm of one record's gradient", parts[1], often, "one in each round"))  # fmt: skip
        found.append(_channel("updates", "O5: the LoRA update, inside the secure sum", 1.0, "norm of one record's part of an update", parts[2], often, "one in each round"))  # fmt: skip
    return tuple(found)


def _channel(name: str, what: str, clip: float, why: str, share: float, releases: int, often: str) -> str:
    return f"""[privacy.{name}]      # {what}
clip = {clip!r}               # {why}
share = {share!r}                # part of the squared budget
releases = {releases}               # {often}
"""


def _rest(a: Answers) -> str:
    clients = max(3, math.ceil(0.8 * a.clients))
    threshold = a.clients // 2 + 1
    return f"""[aggregation]
min_clients = {clients}            # of {a.clients}: one in five may drop out; a sum of fewer hides too little
min_threshold = {threshold}          # more than half must agree before a sum is opened
blind = true               # the server does not see the sum either
max_update = 1.0           # largest coordinate of an update
# roster = ["alice", "bob", "carol"]   # name exactly those who may take part, and no server can add one

[limits]
min_front = 2              # layers before the cut: with the embedding alone each row is one token
min_back = 2               # layers behind it: a gradient at the head alone is the label in closed form
max_sequences = 64
buckets = [16, 32, 64, 128, 256, 512]   # the lengths that the server can tell apart; fewer hide more
max_message_bytes = 268435456

[transport]
loopback_only = false

# [leakage]                # hold every job to a fresh report of the attack suite (docs/attacks.md)
# token_recovery = 0.1     # largest share of tokens that any attack may name
# max_age_days = 14
# profile = "standard"
"""
