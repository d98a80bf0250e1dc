"""The end of a message ends the answer, whole, and under a private policy the server does not see where."""

from __future__ import annotations

import pytest

from securesplit.client.chat.toll import Toll
from securesplit.client.chat.turn import Turn, speak
from securesplit.client.sampling import Sampling
from securesplit.protocol.messages import Forward
from tests.e2e.house import FROZEN, LAB, build_house, policy_of

PROMPT, COUNT = (20, 21, 22), 6


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """One for all tests here: they leave nothing behind in it."""
    return build_house(tmp_path_factory.mktemp("turn") / "house")


def site(house, privacy=LAB, ledger=None):
    client, spy, _ = house.joined(house.job(), policy_of(privacy), ledger=ledger)
    client.tokenizer.eos_token = None
    return client, spy


def turn(ends: int | None, stop: tuple[str, ...] = ()) -> Turn:
    return Turn(
        PROMPT,
        ("w20 w21 w22",),
        dropped=0,
        max_new_tokens=COUNT,
        sampling=Sampling(repetition_penalty=9.0, stop=stop),
        price=None,
        ends=ends,
    )


@pytest.fixture(scope="module")
def plain(house) -> tuple[int, ...]:
    """What is said without such a token; the penalty makes all tokens differ."""
    client, _ = site(house)
    made = client.generate(PROMPT, max_new_tokens=COUNT, sampling=Sampling(repetition_penalty=9.0)).tokens
    assert len(set(made)) == COUNT
    return made


@pytest.mark.parametrize("privacy", [LAB, FROZEN], ids=["lab", "frozen"])
def test_an_answer_ends_where_its_message_does(house, privacy, open_ledger):
    client, spy = site(house, privacy, open_ledger() if privacy == FROZEN else None)
    # Noise chooses the tokens there; the prompt's is remembered, so that its first one is the same again.
    first = client.generate(PROMPT, max_new_tokens=1, sampling=turn(None).sampling).tokens[0]
    before = len(spy.messages(Forward))
    pieces = list(speak(client, Toll(), turn(first)))
    assert [(piece.token, piece.finish) for piece in pieces][-1] == (None, "stop")
    assert [piece.token for piece in pieces if piece.token is not None] == []
    # Under a private policy as many tokens cross as were asked for.
    assert len(spy.messages(Forward)) - before == (1 if privacy == LAB else COUNT)


def test_what_could_have_become_a_stop_text_is_said_when_the_message_ends(house, plain):
    client, _ = site(house)
    said = client.tokenizer.decode(list(plain[:2]))
    stop = said[-2:] + " never"  # Its beginning is held back until it is clear that nothing more comes.
    pieces = list(speak(client, Toll(), turn(plain[2], (stop,))))
    assert [piece.token for piece in pieces if piece.token is not None] == list(plain[:2])
    assert "".join(piece.text for piece in pieces) == said
    assert pieces[-1].finish == "stop"


@pytest.mark.parametrize("ends", [None, 2])
def test_without_such_a_token_nothing_is_changed(house, plain, ends):
    assert ends not in plain
    client, _ = site(house)
    pieces = list(speak(client, Toll(), turn(ends)))
    assert [piece.token for piece in pieces] == [*plain, None]
    assert [piece.finish for piece in pieces] == [None] * COUNT + ["length"]
    assert "w20" not in repr(turn(ends))


def test_who_leaves_early_stops_the_generation(house):
    client, spy = site(house)
    pieces = speak(client, Toll(), turn(None))
    next(pieces)
    pieces.close()
    assert len(spy.messages(Forward)) == 1
