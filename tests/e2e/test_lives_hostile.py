"""A server that loses rounds on purpose, to have one update in sums over different clients, and to subtract.

The clients are real and do what the job asks of them: they try again. The oracle is what the server can compute: it takes
every sum that it opens, and looks for two that differ by one client.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from securesplit.aggregate import wire
from securesplit.client import rounds
from securesplit.client.rounds import Brought
from securesplit.privacy.gate import Gate
from securesplit.privacy.released import _MINT, ReleasedUpdate
from tests.e2e.house import CLIENTS, build_house
from tests.e2e.lives import DIM, LAB, Killed, World, quick
from tests.e2e.test_lives import job_of

FIVE = (*CLIENTS, "dave", "erin")


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    return build_house(tmp_path_factory.mktemp("five"), "dave", "erin")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quick(monkeypatch)


def noised(honest: int):
    """What a gate under a policy with noise on updates lets out: full noise, or a part of the sum's."""

    def release(name: str, vector: np.ndarray) -> ReleasedUpdate:
        drawn = np.random.default_rng([7, *name.encode()]).integers(-50, 50, size=vector.size)
        step = 2.0**-10 if honest > 1 else 0.0
        vector = (np.rint(vector * 2**10) + drawn) * 2.0**-10
        return ReleasedUpdate(vector=vector, noised=True, honest=honest, step=step, mint=_MINT)

    return release


class Thief:
    """Opens what it can, tells everybody that the round was lost, and leaves out another client in every attempt.

    Attributes:
        stolen: survivors and ring sum of each run that it opened.
        victims: whom it leaves out, attempt by attempt; the empty name for nobody.
    """

    def __init__(self, victims: tuple[str, ...]) -> None:
        self.stolen: list[tuple[tuple[str, ...], np.ndarray]] = []
        self.victims = list(victims)

    def __call__(self, core: object) -> None:
        sums = core.sums
        begin, carry = sums._begin, sums._carry

        def begun(ready, present, now):
            victim = self.victims.pop(0) if self.victims else ""
            told = begin(ready, tuple(name for name in present if name != victim), now)
            return [*told, *sums._give_up((victim,), "SS-6010")] if victim in present else told

        def carried(deliveries, now):
            running = sums._round
            if running.result is None:
                return carry(deliveries, now)
            self.stolen.append((running.result.survivors, running.result.ring_sum.copy()))
            running.result, running.aborted = None, "SS-6010"
            return carry([running._abort_for(d.to, "SS-6010") for d in deliveries], now)

        sums._begin, sums._carry = begun, carried

    def differences(self) -> list[tuple[str, np.ndarray]]:
        """Every client whose update is the difference of two sums."""
        found = []
        for (a, x), (b, y) in combinations(self.stolen, 2):
            alone = set(a) ^ set(b)
            if len(alone) == 1:
                found.append((alone.pop(), (x - y if len(a) > len(b) else y - x).astype(np.uint32)))
        return found


def attacked(five, tmp_path, release, victims=("", "dave", "erin", "carol", "")) -> tuple[World, Thief]:
    job = job_of(five, attempts=8, roster=FIVE, threshold=3, colluders=0)
    thief = Thief(victims)
    scene = World(five, job, LAB, tmp_path, release=release, core_hook=thief)
    scene.run(*FIVE)
    return scene, thief


KINDS = {
    "plain": lambda name, vector: Gate(LAB, None).release_update(vector),
    "noised": noised(1),
    "shared noise": noised(2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_losing_rounds_on_purpose_gives_sums_over_one_set_of_clients(five, tmp_path, kind):
    scene, thief = attacked(five, tmp_path, KINDS[kind])
    assert thief.stolen, "the first sum is the server's by right, whatever it tells the clients"
    assert {survivors for survivors, _ in thief.stolen} == {FIVE}
    assert thief.differences() == []
    assert {error.code for error in scene.errors.values()} == {"SS-6031"}, "nobody is left waiting"


@pytest.mark.parametrize("kind", KINDS)
def test_the_attack_would_work_on_clients_without_the_rule(five, tmp_path, kind, monkeypatch):
    """So the test above tests something: without it each client's own update falls out, to the last bit."""
    monkeypatch.setattr(rounds, "_answering", lambda _answers, _only: lambda _answer: None)
    given: dict[str, np.ndarray] = {}
    contribute = rounds.ClientRound.contribute

    def kept(party, update, weight):
        clipped = contribute(party, update, weight)
        given[party.name] = party.contribution.copy()
        return clipped

    monkeypatch.setattr(rounds.ClientRound, "contribute", kept)
    _, thief = attacked(five, tmp_path, KINDS[kind])
    found = dict(thief.differences())
    assert set(found) >= {"dave", "erin"}
    for name, words in found.items():
        assert np.array_equal(words, given[name])


def test_answers_of_two_attempts_do_not_add_up(five, tmp_path):
    """The server lets just as many answer as it needs, and asks the rest for a sum over others: too few of them are left."""
    job = job_of(five, attempts=6, roster=FIVE, threshold=3, colluders=0)
    opened: list[tuple[str, ...]] = []
    bundles: list[int] = []

    def hostile(core):
        sums = core.sums
        begin, carry = sums._begin, sums._carry

        def begun(ready, present, now):
            bundles.append(0)
            left_out = ("erin",) if len(bundles) > 1 and "erin" in present else ()
            told = begin(ready, tuple(name for name in present if name not in left_out), now)
            return [*told, *sums._give_up(left_out, "SS-6010")]

        def carried(deliveries, now):
            running = sums._round
            if running.result is not None:
                opened.append(running.result.survivors)
                running.result, running.aborted = None, "SS-6010"
                return carry([running._abort_for(d.to, "SS-6010") for d in deliveries], now)
            if deliveries and deliveries[0].stage == wire.CONSISTENT and len(bundles) == 1:
                for delivery in deliveries[3:]:
                    running._gone.add(delivery.to)
                rest = [running._abort_for(d.to, "SS-6013") for d in deliveries[3:]]
                return carry([*deliveries[:3], *rest], now)
            return carry(deliveries, now)

        sums._begin, sums._carry = begun, carried

    scene = World(five, job, LAB, tmp_path, core_hook=hostile)
    scene.run(*FIVE)
    assert opened == [FIVE]
    assert {error.code for error in scene.errors.values()} == {"SS-6031"}


def test_helping_is_no_way_to_a_sum_over_others(five, tmp_path):
    """After the result one client lacks it; the server begins the repetition without another one: refused, whatever the noise."""
    job = job_of(five, attempts=4, roster=FIVE, threshold=3)
    begun: list[tuple[str, ...]] = []
    opened: list[tuple[str, ...]] = []

    def hostile(core):
        sums = core.sums
        begin = sums._begin

        def other(ready, present, now):
            begun.append(present)
            if len(begun) == 1:
                return begin(ready, present, now)
            return [*begin(ready, tuple(n for n in present if n != "erin"), now), *sums._give_up(("erin",), "SS-6010")]

        sums._begin, sums._keep = other, lambda ended: opened.append(ended.result.survivors if ended.result else ())

    scene = World(five, job, LAB, tmp_path, release=noised(1), core_hook=hostile)
    first = [True]

    def kill(name, at, message):
        del message
        if name == "carol" and at == "safe?" and first:
            first.clear()
            raise Killed

    scene.on = kill
    scene.run(*FIVE)
    assert len(begun) > 1
    assert {survivors for survivors in opened if survivors} == {FIVE}
    assert set(scene.errors) >= {"carol"}


def test_what_names_an_update_is_its_own_bytes_where_noise_is_shared(five, tmp_path):
    """Also in jobs that try once; full noise stays exempt there, as it was."""
    vector, folder = np.linspace(-0.1, 0.1, DIM), five.folder("alice")

    def pinned(update, *, tried_again):
        return Brought(folder, LAB, update, 1, 0, "0" * 64, None, b"origin").pinned(tried_again=tried_again)

    plain = Gate(LAB, None).release_update(vector)
    assert pinned(plain, tried_again=False) == pinned(plain, tried_again=True) == b"origin"
    full, shared = noised(1)("alice", vector), noised(2)("alice", vector)
    assert pinned(full, tried_again=False) == b""
    assert len(pinned(full, tried_again=True)) == 32
    assert pinned(shared, tried_again=False) == pinned(shared, tried_again=True) != b""
    assert pinned(noised(2)("bob", vector), tried_again=True) != pinned(shared, tried_again=True)
