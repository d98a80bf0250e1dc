"""What the scorer and the attack process say to each other: one JSON object a line, and nothing but these shapes.

The task has no field for the truth. Its keys say where the wanted sequences stood in the traffic; its candidates are
texts whose membership is asked, members and others mixed; its pairs are what a colluding client gave away itself.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from attacks.config import AttackName, ProfileName
from attacks.threat import Threat
from attacks.view import Key

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

Tokens = tuple[int, ...]


class Told(BaseModel):
    """One sequence of a colluding client: where it stood, and its ids without padding."""

    model_config = _STRICT
    key: Key
    tokens: Tokens


class Task(BaseModel):
    """What to attack, with which public knowledge.

    Attributes:
        transcript, model, aux: paths of the recording, of the public model directory, of public text or None.
        adapter: directory of trained adapters, for weights beyond the pre-trained ones and for O6; or None.
        keys: the wanted sequences.
        attacks: which attacks; empty lets the attacker choose all that fit the view.
        threat: what else the adversary may know and do.
        pairs: what a colluding client tells; empty unless the threat model says so.
        candidates: texts whose membership is asked; empty for none.
        seed: of everything random in this run.
    """

    model_config = _STRICT
    transcript: str
    model: str
    aux: str | None
    adapter: str | None = None
    profile: ProfileName
    attacks: tuple[AttackName, ...]
    keys: tuple[Key, ...]
    threat: Threat = Threat()
    pairs: tuple[Told, ...] = ()
    candidates: tuple[str, ...] = ()
    seed: int = 0


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
        frequent: the 5000 most frequent, for guesses of a whole bag.
        positional: the most frequent token at each position of an auxiliary text; empty without text.
        written: what the public language model writes by itself behind the sentinel, greedily; empty without a model.
        informed: whether there was auxiliary text.
        releases: the most fresh releases that were linked to one attacked record.
    """

    model_config = _STRICT
    kind: Literal["known"] = "known"
    common: Tokens
    frequent: Tokens = ()
    positional: Tokens
    written: Tokens = ()
    informed: bool
    releases: Annotated[int, Field(ge=1)] = 1


class Skipped(BaseModel):
    """An attack that was not run, and why: a report says what was *not* tested."""

    model_config = _STRICT
    kind: Literal["skipped"] = "skipped"
    attack: AttackName
    why: str


class Examined(BaseModel):
    """One test of the noise that arrived, of attacks/forensics.py."""

    model_config = _STRICT
    kind: Literal["examined"] = "examined"
    name: str
    statistic: float
    threshold: float
    passed: bool


class Proven(BaseModel):
    """Proofs that nothing else in the vocabulary can explain a row, on a sample of positions spread over the sequences.

    Attributes:
        tried: positions. proven: of these, where the named token explains the row and no other does.
        radius: smallest half distance to the next token's state: errors below it cannot hide a token; None for no position.
    """

    model_config = _STRICT
    tried: Annotated[int, Field(ge=0)]
    proven: Annotated[int, Field(ge=0)]
    radius: Annotated[float, Field(ge=0)] | None


class Recovered(BaseModel):
    """An answer in tokens: one for every row of every sequence, in the order of the task's keys.

    Attributes:
        keys: which sequences; keys that the recording does not hold are missing.
        first: the first position that the attack speaks of; a gradient, for one, says nothing of position 0. Earlier
            places hold -1 and are not scored.
        unresolved: positions where no candidate was as close as the right one should be.
        certified: proofs of a sample of positions; None where the attack cannot prove anything.
    """

    model_config = _STRICT
    kind: Literal["recovered"] = "recovered"
    attack: AttackName
    keys: tuple[Key, ...]
    tokens: tuple[Tokens, ...]
    first: Annotated[int, Field(ge=0)] = 0
    unresolved: int = 0
    certified: Proven | None = None
    seconds: float


class Bagged(BaseModel):
    """An answer on opened sums (O5): which tokens were in them, and whole sequences as far as they could be ordered.

    Attributes:
        rounds: numbers of the sums that were attacked. peers: whom each of them sums over.
        bags: per sum the ids that are claimed to occur in it, each once.
        sequences: per sum the ordered sequences that are claimed.
    """

    model_config = _STRICT
    kind: Literal["bagged"] = "bagged"
    attack: AttackName
    rounds: tuple[int, ...]
    peers: tuple[tuple[str, ...], ...]
    bags: tuple[Tokens, ...]
    sequences: tuple[tuple[Tokens, ...], ...]
    seconds: float


class Rated(BaseModel):
    """An answer in scores, one per candidate text, higher for "was trained on" (O6)."""

    model_config = _STRICT
    kind: Literal["rated"] = "rated"
    attack: AttackName
    scores: tuple[float, ...]
    seconds: float


class Labelled(BaseModel):
    """An answer in classes, one per sequence: its label or attribute, as an index; -1 where the attack has no guess."""

    model_config = _STRICT
    kind: Literal["labelled"] = "labelled"
    attack: AttackName
    keys: tuple[Key, ...]
    labels: tuple[int, ...]
    seconds: float


class Linked(BaseModel):
    """An answer in groups: sequences of one group are claimed to be releases of one record (O7)."""

    model_config = _STRICT
    kind: Literal["linked"] = "linked"
    attack: AttackName
    keys: tuple[Key, ...]
    groups: tuple[int, ...]
    seconds: float


class Measured(BaseModel):
    """An answer in lengths: for every sequence the true number of tokens, as the attack estimates it (O7)."""

    model_config = _STRICT
    kind: Literal["measured"] = "measured"
    attack: AttackName
    keys: tuple[Key, ...]
    lengths: tuple[int, ...]
    seconds: float


class Extracted(BaseModel):
    """An answer in pieces of text that the trained model gave away, most certain first (O6)."""

    model_config = _STRICT
    kind: Literal["extracted"] = "extracted"
    attack: AttackName
    spans: tuple[str, ...]
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


Answer = Recovered | Bagged | Rated | Labelled | Linked | Measured | Extracted
Event = Annotated[Progress | Known | Skipped | Examined | Answer | Failed, Field(discriminator="kind")]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)
