"""The settings of the attack family, read once from configs/vocabulary.toml."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

AttackName = Literal["ridge", "vocabulary-nn", "vocabulary-map", "averaged-map"]
ProfileName = Literal["smoke", "standard", "full"]

Part = Annotated[float, Field(gt=0, lt=1)]


class Published(BaseModel):
    """The paper an attack is taken from."""

    model_config = _STRICT
    title: str
    authors: str
    venue: str
    arxiv: str


class Search(BaseModel):
    """When a candidate is accepted, and how far the search widens; the file explains each value."""

    model_config = _STRICT
    ladder: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, strict=False)]
    exact: Part
    drifted: Part
    ratio: Part
    held_out: Part


class Profile(BaseModel):
    """How much work a run may do."""

    model_config = _STRICT
    sequences: Annotated[int, Field(ge=0)]
    candidates: Annotated[int, Field(ge=1)]
    budget: Annotated[int, Field(ge=0)]
    rows: Annotated[int, Field(ge=1)]


class AttackNote(BaseModel):
    """What `attack list` says of one attack."""

    model_config = _STRICT
    threat: str
    summary: str


class Config(BaseModel):
    """The whole file."""

    model_config = _STRICT
    published: Published
    deviations: dict[str, str]
    search: Search
    profiles: dict[ProfileName, Profile]
    attacks: dict[AttackName, AttackNote]


@cache
def config() -> Config:
    """The shipped settings. They are part of the package, so a fault in them is a bug and raises as it is."""
    text = (Path(__file__).parent / "configs" / "vocabulary.toml").read_text(encoding="utf-8")
    return Config.model_validate(tomllib.loads(text))
