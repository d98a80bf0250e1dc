"""The end of a message ends the answer, and under a private policy the server does not see where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from securesplit.client.chat.toll import Toll
from securesplit.client.chat.turn import Turn, speak
from securesplit.client.generate import Piece
from securesplit.client.sampling import Sampling
from securesplit.policy.schema import Policy
from tests.e2e.house import FROZEN, LAB, policy_of


@dataclass
class Scripted:
    """A client that says token after token, and knows how many it was asked for."""

    policy: Policy
    ledger: None = None
    crossed: list[int] = field(default_factory=list)

    def stream(self, prompt: object, *, max_new_tokens: int, **_: Any) -> Iterator[Piece]:
        for token in range(10, 10 + max_new_tokens):
            self.crossed.append(token)
            yield Piece(f"w{token} ", token, None)
        yield Piece("", None, "length")


def turn(ends: int | None) -> Turn:
    return Turn((3, 4), ("w3 w4",), dropped=0, max_new_tokens=5, sampling=Sampling(), price=None, ends=ends)


@pytest.mark.parametrize("privacy", [LAB, FROZEN])
def test_an_answer_ends_where_its_message_does(privacy):
    client = Scripted(policy_of(privacy))
    pieces = list(speak(client, Toll(), turn(12)))
    assert [piece.token for piece in pieces] == [10, 11, None]
    assert [piece.finish for piece in pieces] == [None, None, "stop"]
    assert client.crossed == ([10, 11, 12] if privacy == LAB else [10, 11, 12, 13, 14])


@pytest.mark.parametrize("ends", [None, 99])
def test_without_such_a_token_nothing_is_changed(ends):
    client = Scripted(policy_of())
    assert [piece.finish for piece in speak(client, Toll(), turn(ends))] == [None] * 5 + ["length"]
    assert "w3" not in repr(turn(ends))


def test_who_leaves_early_stops_the_generation():
    client = Scripted(policy_of())
    pieces = speak(client, Toll(), turn(None))
    next(pieces)
    pieces.close()
    assert client.crossed == [10]
