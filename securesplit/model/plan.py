"""Where a model is cut: how many decoder layers stay with the client on each end. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from securesplit.errors import InputError

__all__ = ["ROLES", "CutPlan", "Role", "Spans"]

Role = Literal["front", "middle", "back"]
ROLES: tuple[Role, ...] = ("front", "middle", "back")


@dataclass(frozen=True, slots=True)
class Spans:
    """The global numbers of the decoder layers of each part; together they are ``range(layers)``."""

    front: range
    middle: range
    back: range

    def of(self, role: Role) -> range:
        """The layers of one part."""
        return {"front": self.front, "middle": self.middle, "back": self.back}[role]

    def role_of(self, layer: int) -> Role:
        """The part that holds the decoder layer with this global number."""
        return "front" if layer in self.front else "middle" if layer in self.middle else "back"


@dataclass(frozen=True, slots=True)
class CutPlan:
    """A cut, in decoder layers.

    Attributes:
        front: layers of the input part A, after the embedding; 0 is the embedding alone.
        back: layers of the output part C, before norm and head; 0 is norm and head alone.

    Raises:
        InputError: SS-1400 when a number is negative or not an integer.
    """

    front: int = 2
    back: int = 2

    def __post_init__(self) -> None:
        for name, value in (("front", self.front), ("back", self.back)):
            if type(value) is not int or value < 0:
                raise InputError(
                    "SS-1400",
                    f"{name} must be a whole number of layers, 0 or more",
                    hint="Use for example front 2, back 2.",
                )

    def spans(self, layers: int) -> Spans:
        """The layers of each part of a model that has ``layers`` decoder layers.

        Raises:
            InputError: SS-1400 when no layer would be left for the middle.
        """
        if self.front + self.back >= layers:
            raise InputError(
                "SS-1400",
                f"a cut of {self.front} front and {self.back} back layers leaves no middle in a model of {layers} layers",
                hint=f"front + back must be at most {layers - 1}.",
            )
        stop = layers - self.back
        return Spans(range(self.front), range(self.front, stop), range(stop, layers))
