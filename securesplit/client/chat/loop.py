"""A conversation, line after line: what is typed, what is answered, what it costs. Without a terminal; that is passed in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from securesplit.client.chat.conversation import Conversation
from securesplit.client.chat.toll import Toll, tokens_left
from securesplit.client.chat.turn import Turn, prepare, speak
from securesplit.client.sampling import Sampling
from securesplit.errors import BudgetExhausted, InputError

if TYPE_CHECKING:
    from securesplit.client.client import Client

__all__ = ["Exchanged", "Screen", "Talk"]

HELP = "/reset begins a new conversation, /budget says what is left, /quit ends."


class Screen(Protocol):
    """Where a conversation is shown."""

    def piece(self, text: str) -> None:
        """More of the answer."""

    def end(self) -> None:
        """The answer is whole."""

    def note(self, text: str) -> None:
        """Something about the conversation, not of it."""

    def refused(self, error: InputError | BudgetExhausted) -> None:
        """A turn was refused before anything was sent. Raise the error where nobody can type another."""


@dataclass(frozen=True, slots=True, repr=False)
class Exchanged:
    """One turn that was answered.

    Attributes:
        asked, answered: what both sides said.
        tokens: generated ones.
        finish: why the answer ended.
        dropped: how many of the oldest turns the model did not see.
        epsilon: of what has been said in this conversation, after it; None under UnsafeNoPrivacy.
    """

    asked: str
    answered: str
    tokens: int
    finish: Literal["stop", "length"]
    dropped: int
    epsilon: float | None


@dataclass(slots=True)
class Talk:
    """A conversation in progress; it lives in memory alone.

    Args:
        client: an open site.
        toll: counts what it costs.
        screen: shows it.
        system: instructions, which every conversation begins with.
        max_new_tokens: of one answer.
        sampling: how tokens are chosen.
    """

    client: Client
    toll: Toll
    screen: Screen
    system: str | None
    max_new_tokens: int
    sampling: Sampling

    def through(self, lines: Iterator[str]) -> Iterator[Exchanged]:
        """Answer line after line until they end, or ``/quit``.

        Raises:
            PolicyDenied: SS-2010 when the policy allows no generation. ConnectionFailed and others of the session with the
                server; and what :meth:`Screen.refused` raises again.
        """
        conversation = Conversation.begun(self.system)
        for line in lines:
            match line.strip():
                case "":
                    continue
                case "/quit":
                    return
                case "/reset":
                    conversation = Conversation.begun(self.system)
                    self.screen.note("a new conversation")
                case "/budget":
                    self.screen.note(self.budget())
                case command if command.startswith("/") and " " not in command:
                    self.screen.note(HELP)
                case asked:
                    try:
                        done = self._turn(conversation.said("user", asked), asked)
                    except (InputError, BudgetExhausted) as error:
                        self.screen.refused(error)
                        continue
                    conversation = conversation.said("user", asked).said("assistant", done.answered)
                    yield done

    def budget(self) -> str:
        """What is left, for people."""
        if self.client.gate.plan is None:
            return "the policy protects nothing, so nothing is counted"
        return f"{tokens_left(self.client)} generated tokens left to this site"

    def _turn(self, conversation: Conversation, asked: str) -> Exchanged:
        turn = prepare(self.client, self.toll, conversation, max_new_tokens=self.max_new_tokens, sampling=self.sampling)
        self._announce(turn)
        texts: list[str] = []
        tokens = 0
        finish: Literal["stop", "length"] = "length"
        for piece in speak(self.client, self.toll, turn):
            texts.append(piece.text)
            tokens += piece.token is not None
            finish = piece.finish or finish
            self.screen.piece(piece.text)
        self.screen.end()
        epsilon = None if turn.price is None else turn.price.after
        return Exchanged(asked, "".join(texts), tokens, finish, turn.dropped, epsilon)

    def _announce(self, turn: Turn) -> None:
        if turn.dropped:
            turns = "turn does" if turn.dropped == 1 else f"{turn.dropped} turns do"
            self.screen.note(f"the oldest {turns} not fit any more, and the model does not see them")
        if turn.price is not None:
            self.screen.note(str(turn.price))
