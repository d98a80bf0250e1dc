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

    def without_oldest(self) -> Conversation | None:
        """The conversation without its oldest turn: a message of the user and all answers up to the next one.

        System messages stay, wherever they stand. None when only the last turn is left.
        """
        spoken = [i for i, message in enumerate(self.messages) if message.role != "system"]
        asked = [i for i in spoken if self.messages[i].role == "user"]
        later = [i for i in asked if i > spoken[0]] if spoken else []
        if not later:
            return None
        kept = (m for i, m in enumerate(self.messages) if m.role == "system" or i >= later[0])
        return Conversation(tuple(kept))
