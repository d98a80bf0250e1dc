"""A conversation as a value: who said what, in order. It lives in memory; nothing here writes it anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Conversation", "Message", "Role"]

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True, repr=False)
class Message:
    """What one side said. Its ``repr`` hides the text, so that no log and no traceback shows it."""

    role: Role
    content: str

    def __repr__(self) -> str:
        return f"Message({self.role}, {len(self.content)} characters)"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, oldest first."""

    messages: tuple[Message, ...] = ()

    @classmethod
    def begun(cls, system: str | None = None) -> Conversation:
        """A conversation in which nobody has spoken yet, with or without instructions."""
        return cls(() if system is None else (Message("system", system),))

    def said(self, role: Role, content: str) -> Conversation:
        """The conversation with one more message."""
        return Conversation((*self.messages, Message(role, content)))

    @property
    def mine(self) -> tuple[str, ...]:
        """What the user said."""
        return tuple(message.content for message in self.messages if message.role == "user")

    def without_oldest(self, count: int) -> Conversation:
        """The conversation without its oldest turns: a message of the user and all answers up to the next one, each.

        System messages stay, wherever they stand. ``count`` is from 0 to :attr:`droppable`.
        """
        if count == 0:
            return self
        start = self._later[count - 1]
        kept = (m for i, m in enumerate(self.messages) if m.role == "system" or i >= start)
        return Conversation(tuple(kept))

    @property
    def droppable(self) -> int:
        """How many of the oldest turns can go: all but the last."""
        return len(self._later)

    @property
    def _later(self) -> list[int]:
        """Where the user speaks again."""
        spoken = [i for i, message in enumerate(self.messages) if message.role != "system"]
        asked = [i for i in spoken if self.messages[i].role == "user"]
        return [i for i in asked if i > spoken[0]]
