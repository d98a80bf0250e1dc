"""Rounds outlive kills: of any client and of the server, before and after every message of a round and of its end."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.protocol.messages import RoundBegin, RoundKept, RoundReady, RoundStatus, Secagg
from tests.e2e.house import CLIENTS, build_house, policy_of
from tests.e2e.lives import Killed, World, quick

POLICY = policy_of()
STAGES = ("advertise", "shares", "masked", "consistent", "unmask")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return build_house(tmp_path_factory.mktemp("house"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quick(monkeypatch)


def job_of(house, *, attempts: int = 20, **sums):
    job = house.job(blind=False)
    values = {"attempts": attempts, "stage_seconds": 5.0, "reconnect_seconds": 5.0, **sums}
    return job.model_copy(update={"sums": job.sums.model_copy(update=values)})


def named(message) -> str:
    match message:
        case RoundReady():
            return "ready"
        case RoundBegin():
            return "begin"
        case RoundKept():
            return "kept"
        case RoundStatus():
            return "closed" if message.closed else "status"
        case Secagg():
            return STAGES[message.stage] if message.stage < 5 else "abort"
    return type(message).__name__


SENT = ("ready", *STAGES, "kept")
READ = ("begin", *STAGES, "closed")
DISK = ("safe?", "written", "safe")
ALWAYS = {*[("sent", what) for what in SENT], ("read", "unmask"), ("read", "closed"), *[(when, "") for when in DISK]}
EVERY = [*[(w, m) for w in ("send", "sent") for m in SENT], *[("read", m) for m in READ], *[(w, "") for w in DISK]]
MOMENTS = [moment if moment in ALWAYS else pytest.param(*moment, marks=pytest.mark.slow) for moment in EVERY]


@pytest.fixture
def world(house, tmp_path):
    def make(**options) -> World:
        return World(house, job_of(house), POLICY, tmp_path, **options)

    return make


def test_a_round_without_faults_and_its_end(world):
    scene = world(rounds=2)
    scene.run(*CLIENTS)
    scene.exact(*CLIENTS)
    assert {disk.lives for disk in scene.disks.values()} == {1}
    assert (scene.core.sums.finished, scene.core.sums.aborted) == (2, 0)


@pytest.mark.parametrize(("when", "what"), MOMENTS)
def test_a_client_that_is_killed_at_any_message_and_lives_again(world, when, what):
    scene = world(rounds=2)
    todo = [True]

    def kill(name, at, message):
        if name == "carol" and at == when and (message is None or named(message) == what) and todo:
            todo.clear()
            raise Killed

    scene.on = kill
    scene.run(*CLIENTS)
    assert todo == []
    scene.exact(*CLIENTS)
    assert scene.disks["carol"].lives == 2


@pytest.mark.parametrize(("when", "what"), MOMENTS)
def test_a_server_that_is_killed_at_any_message_and_starts_anew(world, when, what):
    scene = world(rounds=2)
    todo = [True]

    def kill(name, at, message):
        if name == "carol" and at == when and (message is None or named(message) == what) and todo:
            todo.clear()
            scene.restart()

    scene.on = kill
    scene.run(*CLIENTS)
    assert todo == []
    scene.exact(*CLIENTS)


@pytest.mark.parametrize("examples", [6, pytest.param(150, marks=pytest.mark.slow)])
def test_after_any_schedule_of_kills_each_sum_holds_every_update_once(house, tmp_path_factory, examples):
    """Clients and the server die at random messages, the server also after it did what it was told and before it answers."""

    @settings(deadline=None, max_examples=examples)
    @given(data=st.data())
    def scheduled(data):
        one_schedule(house, tmp_path_factory, data)

    scheduled()


def one_schedule(house, tmp_path_factory, data) -> None:
    scene = World(house, job_of(house, attempts=200), POLICY, tmp_path_factory.mktemp("world"), rounds=2)
    kills = data.draw(
        st.lists(st.tuples(st.integers(0, 60), st.sampled_from(["client", "server", "silent"])), max_size=8)
    )
    due = dict(kills)
    count, lock = iter(range(10_000)), threading.Lock()

    def kill(name, at, message):
        del name, message
        if at not in {"send", "sent", "read"}:
            return
        with lock:
            who = due.pop(next(count), "")
        if who == "client":
            raise Killed
        if who == "server":
            scene.restart()
        elif who == "silent":
            scene.server.mute = True

    scene.on = kill
    scene.run(*CLIENTS)
    scene.exact(*CLIENTS)


def test_one_that_never_comes_is_named_to_all_and_no_sum_is_made(house, tmp_path):
    """quorum = the whole roster, three tries; the clock runs fast, so that the server's patience ends."""
    scene = World(house, job_of(house, attempts=3, quorum=3), POLICY, tmp_path, rate=200.0)
    scene.run("alice", "bob")
    assert {name: error.code for name, error in scene.errors.items()} == {"alice": "SS-6031", "bob": "SS-6031"}
    for error in scene.errors.values():
        assert error.exit_code == 5
        assert "lost 3 times" in error.what
        assert error.what.endswith("missing: carol")
    assert ("carol",) in scene.missing["alice"] | scene.missing["bob"]
    assert scene.core.sums.finished == 0


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return build_house(tmp_path_factory.mktemp("four"), "dave")


FOUR = (*CLIENTS, "dave")


def test_one_that_leaves_for_good_is_done_without_where_the_quorum_allows(four, tmp_path):
    """Dave dies after the first round's sum, before it is safe; the others close without it, and sum on without it."""
    job = job_of(four, roster=FOUR, threshold=3)
    scene = World(four, job, POLICY, tmp_path, rounds=2)
    gone = threading.Event()

    def leave(name, at, message):
        if name == "dave" and at == "safe?":
            scene.disks["dave"].lives = scene.most_lives
            scene.rate = 200.0
            gone.set()
            raise Killed
        if at == "read" and named(message) == "closed":
            scene.rate = 1.0

    scene.on = leave
    scene.run(*FOUR)
    assert gone.is_set()
    assert scene.errors == {}
    assert [scene.disks["alice"].sums[n].survivors for n in (0, 1)] == [FOUR, CLIENTS]
    assert any("dave" in names for names in scene.missing["alice"])


def test_with_the_whole_roster_as_quorum_nobody_goes_on_without_one_that_lacks_the_sum(four, tmp_path):
    job = job_of(four, attempts=3, quorum=4, roster=FOUR, threshold=3)
    scene = World(four, job, POLICY, tmp_path, rounds=2)

    def leave(name, at, message):
        del message
        if name == "dave" and at == "safe?":
            scene.disks["dave"].lives, scene.rate = scene.most_lives, 200.0
            raise Killed

    scene.on = leave
    scene.run(*FOUR)
    assert {error.code for error in scene.errors.values()} == {"SS-6031"}
    assert set(scene.errors) == set(CLIENTS)
    assert all(error.what.endswith("missing: dave") for error in scene.errors.values())
    # What they have stays good: with dave back, all end the round and the job.
    scene.errors.clear()
    scene.on, scene.rate = (lambda *_: None), 1.0
    scene.disks["dave"].lives = 1
    scene.run(*FOUR)
    scene.exact(*FOUR)


def test_without_attempts_a_lost_client_ends_the_round_as_before(house, tmp_path):
    scene = World(house, job_of(house, attempts=None), POLICY, tmp_path)

    def kill(name, at, message):
        if name == "carol" and at == "sent" and named(message) == "shares":
            scene.disks["carol"].lives, scene.rate = scene.most_lives, 100.0
            raise Killed

    scene.on = kill
    scene.run(*CLIENTS)
    assert {error.code for error in scene.errors.values()} == {"SS-6010"}
    assert scene.missing == {}


def test_a_sum_that_comes_out_otherwise_the_second_time_is_refused(world, monkeypatch):
    """The server adds one to a word of the repeated sum; alice has the first one on its disk."""
    scene = world()
    seen = []

    def altered(core):
        outbound = core.sums._outbound

        def changed(number, delivery):
            if delivery.stage == 4 and delivery.to == "alice":
                seen.append(delivery)
                if len(seen) == 2:
                    words = delivery.vector.copy()
                    words[0] += 1
                    delivery = delivery._replace(vector=words)
            return outbound(number, delivery)

        core.sums._outbound = changed

    scene.core_hook = altered
    altered(scene.core)
    killed = [True]

    def kill(name, at, message):
        del message
        if name == "carol" and at == "safe?" and killed:
            killed.clear()
            raise Killed

    scene.on = kill
    scene.run(*CLIENTS)
    assert scene.errors["alice"].code == "SS-6032"
    assert np.array_equal(scene.disks["alice"].sums[0].ring_sum, seen[0].vector)
