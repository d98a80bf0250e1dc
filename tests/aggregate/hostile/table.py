"""The form of a named attack, how it is carried out, and its line in the table at the end of a test run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tests.aggregate.hostile.judge import HONEST, judge, spoiled
from tests.aggregate.hostile.kit import EVERY, Play, at

Script = Callable[[Play], Iterable[str]]
"""Does the attack from its stage on to the round's end; returns the clients at which it must end by one of the codes."""

SERVERS_KEY = X25519PrivateKey.from_private_bytes(bytes(range(32)))


@dataclass(frozen=True)
class Attack:
    """One row.

    Attributes:
        stage: the script begins when the server is about to send the messages of this stage.
        codes: with which it must end at those that the script returns.
        spoils: whether the sum may be spoiled for the others.
        others: how it may end for the others, beside exact or left alone.
        colluders: how many clients of the beginning of the roster side with the server; none is judged as honest.
    """

    name: str
    stage: int
    codes: tuple[str, ...]
    script: Script
    modes: tuple[str, ...]
    spoils: bool
    others: tuple[str, ...]
    colluders: int


class Table:
    """The attacks of one file."""

    def __init__(self) -> None:
        self.rows: list[Attack] = []

    def attack(
        self,
        name: str,
        stage: int,
        *codes: str,
        modes: tuple[str, ...] = EVERY,
        spoils: bool = False,
        others: tuple[str, ...] = (),
        colluders: int = 0,
    ) -> Callable[[Script], Script]:
        def note(script: Script) -> Script:
            self.rows.append(Attack(name, stage, codes, script, modes, spoils, others, colluders))
            return script

        return note

    @property
    def cases(self) -> list[object]:
        """For parametrize. Sparse rounds are dear: what is done in every mode is done among the slow tests in sparse blind
        rounds, and in open ones where one client alone is lied to as all are elsewhere.
        """
        return [
            pytest.param(
                a, mode, id=f"{mode}: {a.name}",
                marks=[pytest.mark.slow] if a.modes == EVERY and _dear(a, mode) else [],
            )
            for a in self.rows
            for mode in a.modes
        ]  # fmt: skip


def _dear(attack: Attack, mode: str) -> bool:
    return mode == "sparse blind" or (mode == "sparse" and attack.name.endswith(", to one client"))


def act(attack: Attack, mode: str, record: Callable[[str, object], None]) -> Play:
    """Carry an attack out and judge it."""
    play = at(mode, attack.stage).gullible()
    victims = tuple(attack.script(play))
    others = (spoiled(mode) if attack.spoils else HONEST) | set(attack.others)
    friends = play.config.roster[: attack.colluders]
    ends = judge(play, victims, attack.codes, others=others, colluders=friends, keys=(SERVERS_KEY,))
    record("hostile", [attack.name.partition(", to ")[0], mode, 1, ends])
    return play


def but(play: Play, *places: int) -> tuple[str, ...]:
    """The roster without those at some places."""
    return tuple(name for place, name in enumerate(play.config.roster) if place not in places)
