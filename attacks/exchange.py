"""What the scorer and the attack process say to each other: one JSON object a line, and nothing but these shapes.

The task has no field for the truth. Its keys say where the wanted sequences stood in the traffic.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from attacks.config import AttackName, ProfileName
from attacks.view import Key

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

Tokens = tuple[int, ...]


class Task(BaseModel):
    """What to attack, with which public knowledge.

    Attributes:
        transcript, model, aux: paths of the recording, of the public model directory, of public text or None.
        keys: the wanted sequences.
        attacks: which attacks; empty lets the attacker choose all that fit the policy.
    """

    model_config = _STRICT
    transcript: str
    model: str
    aux: str | None
    profile: ProfileName
    attacks: tuple[AttackName, ...]
    keys: tuple[Key, ...]


class Progress(BaseModel):
    """How far one attack is: positions done, of all."""

    model_config = _STRICT
    kind: Literal["progress"] = "progress"
    attack: str
    done: int
    total: int


class Known(BaseModel):
    """What the attacker guesses without looking at the traffic.

    Attributes:
        common: the 100 most frequent tokens of the auxiliary text, most frequent first; by rank without text.
        positional: the most frequent token at each position of an auxiliary text; empty without text.
        informed: whether there was auxiliary text.
    """

    model_config = _STRICT
    kind: Literal["known"] = "known"
    common: Tokens
    positional: Tokens
    informed: bool


class Recovered(BaseModel):
    """One attack's answer: a token for every row of every sequence, in the order of the task's keys.

    Attributes:
        keys: which sequences; keys that the recording does not hold are missing.
        unresolved: positions where no candidate was as close as the right one should be.
    """

    model_config = _STRICT
    kind: Literal["recovered"] = "recovered"
    attack: AttackName
    keys: tuple[Key, ...]
    tokens: tuple[Tokens, ...]
    unresolved: int
    seconds: float


class Failed(BaseModel):
    """An error of the tree, on its way to the parent."""

    model_config = _STRICT
    kind: Literal["failed"] = "failed"
    error: str
    code: str
    what: str
    hint: str
    details: tuple[str, ...]


Event = Annotated[Progress | Known | Recovered | Failed, Field(discriminator="kind")]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)
