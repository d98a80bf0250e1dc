"""The settings of the suite: configs/profiles.toml, and one configs/FAMILY.toml per published attack.

A family's file cites its source, says in what ours differs, and holds the attack's own numbers in ``[settings]``, which
the attack's module reads through :func:`settings_of` with a schema of its own.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from attacks.threat import Conduct, Weights

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
_CONFIGS = Path(__file__).parent / "configs"
_PROFILES = "profiles"

AttackName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{1,40}$")]
ProfileName = Literal["smoke", "standard", "full"]
Observed = Literal["O1", "O2", "O3", "O5", "O6", "O7"]
Measure = Literal["tokens", "bag", "membership", "labels", "links", "lengths", "pieces"]

Part = Annotated[float, Field(gt=0, lt=1)]


class Published(BaseModel):
    """The paper an attack is taken from."""

    model_config = _STRICT
    title: str
    authors: str
    venue: str
    arxiv: str


class Search(BaseModel):
    """When a candidate is accepted, and how far the search widens; vocabulary.toml explains each value."""

    model_config = _STRICT
    ladder: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, strict=False)]
    exact: Part
    drifted: Part
    ratio: Part
    held_out: Part


class Profile(BaseModel):
    """How much work a run may do.

    Attributes:
        sequences: how many are attacked; 0 for all.
        candidates: proposals per position, and as many of the prior's favourites, where there is noise.
        budget: candidate evaluations beyond a sequence's first 64 at a position, summed over one attack.
        rows: public rows to fit inverters on.
        seeds: how often an attack that draws at random, or a learned one, is repeated.
        steps: a factor on the training and optimisation steps that an attack's settings state.
        slow: whether attacks that take more than half a minute take part.
    """

    model_config = _STRICT
    sequences: Annotated[int, Field(ge=0)]
    candidates: Annotated[int, Field(ge=1)]
    budget: Annotated[int, Field(ge=0)]
    rows: Annotated[int, Field(ge=1)]
    seeds: Annotated[int, Field(ge=1)]
    steps: Annotated[float, Field(gt=0)]
    slow: bool


class AttackNote(BaseModel):
    """What is known of one attack without running it.

    Attributes:
        threat: its adversary in words. summary: what it does, in one sentence.
        channel: what of the server's view it reads.
        measure: what its answer is scored by.
        weights: the least that it needs. conduct: passive unless it must be active.
        slow: takes more than half a minute on two cores under the smoke profile, and so is left out there.
        random: draws at random, and so is repeated with as many seeds as the profile has.
        at_least: attacks that know less. Where one of them gets more, the cell is flagged; the maximum counts anyway.
    """

    model_config = _STRICT
    threat: str
    summary: str
    channel: Observed = "O1"
    measure: Measure = "tokens"
    weights: Weights = "pre-trained"
    conduct: Conduct = "passive"
    slow: bool = False
    random: bool = False
    at_least: Annotated[tuple[AttackName, ...], Field(strict=False)] = ()


class Family(BaseModel):
    """One file of configs/."""

    model_config = _STRICT
    published: Published
    deviations: dict[str, str]
    attacks: Annotated[dict[AttackName, AttackNote], Field(min_length=1)]
    settings: dict[str, Any] = {}


class Config(BaseModel):
    """All files.

    Attributes:
        families: by the name of their file.
        profiles: by name.
    """

    model_config = _STRICT
    families: dict[str, Family]
    profiles: dict[ProfileName, Profile]

    @property
    def attacks(self) -> dict[str, AttackNote]:
        """Every attack's note, by name, in the order of the files."""
        return {name: note for family in self.families.values() for name, note in family.attacks.items()}

    def family_of(self, attack: str) -> Family:
        """The family that has an attack."""
        return next(family for family in self.families.values() if attack in family.attacks)


@cache
def config() -> Config:
    """The shipped settings. They are part of the package, so a fault in them is a bug and raises as it is."""
    read = {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(_CONFIGS.glob("*.toml"))}
    profiles = read.pop(_PROFILES)
    return Config.model_validate({"families": read, "profiles": profiles})


Settings = TypeVar("Settings", bound=BaseModel)


def settings_of(family: str, schema: type[Settings]) -> Settings:
    """A family's own numbers, checked by its own schema (frozen, extra forbidden, strict)."""
    return schema.model_validate(config().families[family].settings)
