"""A conversation line by line: commands, what the model sees, what happens when a turn is refused."""

from __future__ import annotations

import pytest

from securesplit.client.chat.loop import Talk
from securesplit.client.chat.toll import Toll
from securesplit.client.sampling import Sampling
from securesplit.errors import BudgetExhausted, InputError
from tests.e2e.desk import TEMPLATE
from tests.e2e.house import FROZEN, policy_of


class Screen:
    def __init__(self, *, forgiving: bool = True) -> None:
        self.shown: list[str] = []
        self.notes: list[str] = []
        self.refusals: list[str] = []
        self.forgiving = forgiving

    def piece(self, text):
        self.shown.append(text)

    def end(self):
        self.shown.append("\n")

    def note(self, text):
        self.notes.append(text)

    def refused(self, error):
        if not self.forgiving:
            raise error
        self.refusals.append(error.code)


def talk(client, screen, *, system=None, count=3) -> Talk:
    client.tokenizer.chat_template = TEMPLATE
    return Talk(client, Toll(), screen, system, count, Sampling())


def test_turns_build_on_each_other_until_reset(house):
    client, _, _ = house.joined(house.job(blind=False), policy_of())
    screen = Screen()
    lines = ["w3 w4\n", "\n", "w5\n", "/budget\n", "/what\n", "/reset\n", "w3 w4\n", "/quit\n", "w9\n"]
    turns = list(talk(client, screen, system="w7").through(iter(lines)))
    assert [turn.asked for turn in turns] == ["w3 w4", "w5", "w3 w4"]

    def direct(prompt):
        return client.generate(prompt, max_new_tokens=3).text

    first = direct("w60 w7 w61 w3 w4 w62")
    assert [turn.answered for turn in turns] == [first, direct(f"w60 w7 w61 w3 w4 w62 {first} w61 w5 w62"), first]
    assert "".join(screen.shown).split("\n")[:-1] == [turn.answered for turn in turns]
    assert screen.notes[0].startswith("the policy protects nothing")
    assert "/reset" in screen.notes[1]
    assert [turn.epsilon for turn in turns] == [None] * 3


def test_dropped_turns_are_said(house):
    client, _, _ = house.joined(house.job(blind=False), policy_of())
    screen = Screen()
    words = [f"w{i} w{i + 1} w{i + 2}" for i in range(10, 40, 3)]
    turns = list(talk(client, screen).through(iter(words)))
    assert [turn.dropped for turn in turns][:2] == [0, 0]
    assert turns[-1].dropped > 0
    assert sum("oldest" in note for note in screen.notes) == sum(turn.dropped > 0 for turn in turns)


def test_a_refused_turn_is_forgotten_and_the_next_one_answered(house):
    client, _, _ = house.joined(house.job(blind=False), policy_of())
    screen = Screen()
    long = " ".join(["w3"] * 30)
    turns = list(talk(client, screen).through(iter(["w3", long, "<eos>", "w5"])))
    assert [turn.asked for turn in turns] == ["w3", "w5"]
    assert screen.refusals == ["SS-1275", "SS-1276"]
    with pytest.raises(InputError, match="SS-1275"):
        list(talk(client, Screen(forgiving=False)).through(iter([long])))


def test_a_private_policy_tells_prices_and_ends_a_conversation(house, open_ledger):
    client, _, _ = house.joined(house.job(), policy_of(FROZEN), ledger=open_ledger())
    screen = Screen()
    turns = list(talk(client, screen).through(iter(["/budget", "w3", "w4", "/reset", "w5", "/budget"])))
    assert [turn.asked for turn in turns] == ["w3", "w5"]
    assert screen.refusals == ["SS-5001"]
    assert screen.notes[0] == "8 generated tokens left to this site"
    assert screen.notes[-1] == "4 generated tokens left to this site"
    assert turns[0].epsilon is not None
    assert any("epsilon 0.00 -> " in note for note in screen.notes)
    with pytest.raises(BudgetExhausted):
        list(talk(client, Screen(forgiving=False), count=9).through(iter(["w3"])))
