"""Connections that break, stall and come back inside a secure sum, over TLS through a proxy that the test hurts.

Four clients in threads; carol goes through the proxy. Plain integer sums of what each client put in are the oracle.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest

from securesplit.aggregate.answered import AnswerLog
from securesplit.aggregate.client import ClientRound
from securesplit.aggregate.fixedpoint import Aggregate
from securesplit.client import rounds
from securesplit.client.dial import dial
from securesplit.client.link import Link
from securesplit.errors import AggregationAborted, ConnectionFailed, RemoteProtocolError
from securesplit.privacy.gate import Gate
from securesplit.protocol.messages import Message, RoundReady, Secagg
from securesplit.protocol.states import State
from securesplit.server.serve import listen_for
from securesplit.transport import client as pipes
from securesplit.transport import peer as peer_module
from securesplit.transport import server as shell_module
from securesplit.transport import silence
from securesplit.transport.actions import Close, Send
from securesplit.transport.limits import ClientLimits
from tests.e2e.house import CLIENTS, Loopback, build_house, policy_of
from tests.e2e.proxy import Limit, Proxy

FOUR = (*CLIENTS, "dave")
OTHERS = tuple(name for name in FOUR if name != "carol")
STAGES = ("advertise", "shares", "masked", "consistent", "unmask")
POLICY = policy_of(max_message_bytes=1 << 23)
SECONDS = 30.0


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return build_house(tmp_path_factory.mktemp("four"), "dave")


def job_of(house, *, stage: float = 20.0, reconnect: float = 10.0, name: str = "tiny"):
    job = house.job(blind=False, name=name)
    sums = {"roster": FOUR, "threshold": 3, "min_clients": 3, "stage_seconds": stage, "reconnect_seconds": reconnect}
    return job.model_copy(update={"sums": job.sums.model_copy(update=sums)})


def named(message: Message) -> str:
    if isinstance(message, RoundReady):
        return "ready"
    return STAGES[message.stage] if isinstance(message, Secagg) and message.stage < len(STAGES) else ""


@dataclass
class Scene:
    """One round with four clients, and what is to be done to it when."""

    proxy: Proxy
    dim: int = 50
    given: dict[str, np.ndarray] = field(default_factory=dict)
    sums: dict[str, Aggregate] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    said: dict[tuple[str, str], threading.Event] = field(default_factory=lambda: defaultdict(threading.Event))
    processed: dict[tuple[str, str], threading.Event] = field(default_factory=lambda: defaultdict(threading.Event))
    back: threading.Event = field(default_factory=threading.Event)
    hooks: dict[tuple[str, str, str], list[Callable[[], object]]] = field(default_factory=lambda: defaultdict(list))
    links: dict[str, Link] = field(default_factory=dict)

    def on(self, name: str, when: str, what: str, *todo: Callable[[], object]) -> None:
        """Do one thing after the other, one each time that ``name`` is about to say, has said, or is back for ``what``."""
        self.hooks[name, when, what] += todo

    def at(self, name: str, when: str, what: str) -> None:
        if todo := self.hooks[name, when, what]:
            todo.pop(0)()

    def passed(self, name: str, what: str) -> None:
        """Wait until the server has taken in what ``name`` said."""
        assert self.processed[name, what].wait(SECONDS), (name, what)

    def exact(self, among: tuple[str, ...] = FOUR, to: tuple[str, ...] = FOUR) -> None:
        """Everybody in ``to`` has the sum over ``among``, and the rest have none."""
        total = sum(self.given[name].astype(np.uint64) for name in among) % (1 << 32)
        assert {name: error for name, error in self.errors.items() if name in to} == {}
        assert set(self.sums) == set(to)
        for name in to:
            assert self.sums[name].survivors == among
            assert np.array_equal(self.sums[name].ring_sum, total)


@contextmanager
def watched(scene: Scene, core, monkeypatch) -> Iterator[None]:
    tell, reconnect, contribute = Link.tell, Link.reconnect, ClientRound.contribute
    receive, ready = core.sums.receive, core.sums.ready

    def told(link, message):
        scene.at(link.name, "saying", named(message))
        tell(link, message)
        scene.said[link.name, named(message)].set()
        scene.at(link.name, "said", named(message))

    def reconnected(link, lost, *, within):
        reconnect(link, lost, within=within)
        scene.at(link.name, "back", "")
        scene.back.set()

    def contributed(party, update, weight):
        clipped = contribute(party, update, weight)
        scene.given[party.name] = party.contribution.copy()
        return clipped

    def received(name, message, now):
        try:
            return receive(name, message, now)
        finally:
            scene.processed[name, named(message)].set()

    def readied(name, message, now):
        try:
            return ready(name, message, now)
        finally:
            scene.processed[name, "ready"].set()

    with monkeypatch.context() as patch:
        patch.setattr(Link, "tell", told)
        patch.setattr(Link, "reconnect", reconnected)
        patch.setattr(ClientRound, "contribute", contributed)
        patch.setattr(core.sums, "receive", received)
        patch.setattr(core.sums, "ready", readied)
        yield


def play(house, scene: Scene, loop: Loopback, monkeypatch, *, names=FOUR, log: str = "0") -> None:
    """Let all clients take part in round 0, each in its thread; nobody takes longer than SECONDS."""
    folder = house.root / f"logs-{time.monotonic_ns()}-{log}"
    folder.mkdir()

    def one(name: str) -> None:
        vector = np.random.default_rng(len(name) + ord(name[0])).normal(scale=0.2, size=scene.dim)
        update = Gate(POLICY, None).release_update(vector)
        begin = time.monotonic()
        try:
            url = scene.proxy.url if name == "carol" else loop.url
            link = scene.links[name] = dial(url, keys=house.keys / name, policy=POLICY, patience=SECONDS)
            with closing(AnswerLog(folder / name)) as answers:
                opened = rounds.secure_sum(
                    link, link.folder, POLICY, update, weight=2, number=0, frozen="0" * 64, origin=b"", answers=answers
                )
            scene.sums[name] = opened.aggregate
        except BaseException as error:  # noqa: BLE001 (handed to the test's thread)
            scene.errors[name] = error
        scene.seconds[name] = time.monotonic() - begin

    threads = [threading.Thread(target=one, args=(name,), daemon=True) for name in names]
    with watched(scene, loop.core, monkeypatch):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert not any(thread.is_alive() for thread in threads), "somebody hangs"
    for wire in scene.proxy.wires:
        wire.cut()
    for link in scene.links.values():
        link.close()


@contextmanager
def staged(house, *, dim: int = 50, **job) -> Iterator[tuple[Scene, Loopback]]:
    core = house.core(job_of(house, **job), POLICY)
    with Loopback(core, house.keys, max_message=1 << 23) as loop, Proxy(loop.port) as proxy:
        yield Scene(proxy, dim), loop
        assert loop.alive


EVERY = ("ready", *STAGES)
SOME = {"ready", "masked", "unmask"}


def every(*stages: str) -> pytest.MarkDecorator:
    """A test for each of these messages; some in the fast tier, where the ends and the vector stand for all."""
    return pytest.mark.parametrize(
        "what", [what if what in SOME else pytest.param(what, marks=pytest.mark.slow) for what in stages]
    )


@every(*EVERY)
def test_a_message_that_never_reached_the_server_is_said_again(four, monkeypatch, what):
    with staged(four) as (scene, loop):
        scene.on("carol", "saying", what, lambda: scene.proxy.wire.hold("up"))
        scene.on("carol", "said", what, lambda: scene.proxy.wire.cut())  # noqa: PLW0108 (the wire of that moment)
        play(four, scene, loop, monkeypatch)
        assert len(scene.proxy.wires) == 2
        scene.exact()
        assert (loop.core.sums.finished, loop.core.sums.aborted) == (1, 0)


@every(*EVERY)
@pytest.mark.parametrize("last", [True, False])
def test_an_answer_that_never_reached_the_client_comes_again(four, monkeypatch, what, last):
    """Carol speaks last, so that the answer follows at once and is lost; or first, and is back before the others speak."""
    with staged(four) as (scene, loop):

        def lose() -> None:
            scene.passed("carol", what)
            scene.proxy.wire.cut(reset=True)

        def wait() -> None:
            for other in OTHERS:
                scene.passed(other, what)

        for other in OTHERS:
            scene.on(other, "saying", what, lambda: last or scene.back.wait(SECONDS))
        scene.on("carol", "saying", what, lambda: (last and wait(), scene.proxy.wire.hold("down")))
        scene.on("carol", "said", what, lose)
        play(four, scene, loop, monkeypatch)
        assert len(scene.proxy.wires) == 2
        scene.exact()


@every(*EVERY)
def test_what_comes_twice_to_one_that_was_back_in_time_is_taken_once(four, monkeypatch, what):
    """Carol is connected again, then the others speak, and only then carol repeats itself: the answer is sent twice."""
    with staged(four) as (scene, loop):
        free = threading.Event()

        def lose() -> None:
            scene.passed("carol", what)
            scene.proxy.wire.cut_near()  # The server goes on believing in it, so that carol stays ready.

        def others_first() -> None:
            known = [c.session for c in loop.core._connections.values() if c.name == "carol"]
            while known[-1].state is not State.OPEN:
                time.sleep(0.01)
            free.set()
            for other in OTHERS:
                scene.passed(other, what)
            time.sleep(0.1)

        for other in OTHERS:
            scene.on(other, "saying", what, lambda: free.wait(SECONDS))
        scene.on("carol", "saying", what, lambda: scene.proxy.wire.hold("down"))
        scene.on("carol", "said", what, lose)
        scene.on("carol", "back", "", others_first)
        play(four, scene, loop, monkeypatch)
        scene.exact()


@pytest.mark.parametrize("count", [1, 100_000, 1_500_000, 3_900_000])
def test_a_connection_that_breaks_in_the_middle_of_a_large_vector(four, monkeypatch, count):
    with staged(four, dim=1_000_000) as (scene, loop):
        scene.on("carol", "saying", "masked", lambda: scene.proxy.wire.after("up", count))
        play(four, scene, loop, monkeypatch)
        assert len(scene.proxy.wires) == 2
        scene.exact()


def test_a_result_that_breaks_off_in_the_middle(four, monkeypatch):
    with staged(four, dim=1_000_000) as (scene, loop):
        scene.on("carol", "said", "consistent", lambda: scene.proxy.wire.after("down", 2_000_000))
        play(four, scene, loop, monkeypatch)
        assert len(scene.proxy.wires) == 2
        scene.exact()


def test_cut_at_every_message_and_twice_at_some(four, monkeypatch):
    with staged(four) as (scene, loop):
        for what in EVERY:
            times = 2 if what in {"shares", "masked"} else 1
            scene.on("carol", "said", what, *[lambda: scene.proxy.wire.cut()] * times)  # noqa: PLW0108
        play(four, scene, loop, monkeypatch)
        # What the server had taken in before the cut is not said again, and then the second cut of its kind does not come.
        unused = sum(map(len, scene.hooks.values()))
        assert unused <= 2
        assert len(scene.proxy.wires) == 1 + len(EVERY) + 2 - unused
        scene.exact()


@pytest.mark.parametrize("way", ["up", "down"])
def test_one_direction_ends(four, monkeypatch, way):
    with staged(four) as (scene, loop):
        scene.on("carol", "said", "shares", lambda: scene.proxy.wire.half_close(way))
        play(four, scene, loop, monkeypatch)
        scene.exact()


def test_the_way_back_is_cut_inside_tls_and_inside_the_websocket_handshake(four, monkeypatch):
    """Each attempt gets a little further: no byte, a part of TLS, all of TLS, a part of the upgrade, all of it, a greeting."""
    with staged(four) as (scene, loop):
        probe = scene.proxy
        dial(probe.url, keys=four.keys / "carol", policy=POLICY).close()
        time.sleep(0.2)
        whole = dict(probe.wire.passed)
        limits = [Limit(down=0), Limit(up=100)]
        limits += [Limit(down=whole["down"] * part // 10) for part in (3, 6, 8, 9)]
        limits += [Limit(up=whole["up"] * part // 10) for part in (6, 9)]
        scene.on("carol", "said", "masked", lambda: (probe.limits.extend(limits), probe.wire.cut()))
        known = len(probe.wires)
        play(four, scene, loop, monkeypatch)
        assert len(probe.wires) >= known + 1 + len(limits)
        scene.exact()


def test_a_connection_that_is_cut_the_moment_it_is_open_is_an_error_of_ours(four, monkeypatch):
    """The library's own thread closes the socket while the certificate is about to be read."""
    admitted = pipes._admitted

    def cut(socket, closing, folder):
        socket.socket.close()
        return admitted(socket, closing, folder)

    with staged(four) as (scene, loop):
        del scene
        with monkeypatch.context() as patch:
            patch.setattr(pipes, "_admitted", cut)
            with pytest.raises(ConnectionFailed, match="SS-3020"):
                dial(loop.url, keys=four.keys / "carol", policy=POLICY)


@every(*EVERY)
def test_the_server_believes_in_the_old_connection_while_the_new_one_is_there(four, monkeypatch, what):
    with staged(four) as (scene, loop):
        believed: list[int] = []
        scene.on("carol", "said", what, lambda: scene.proxy.wire.cut_near())  # noqa: PLW0108 (the wire of that moment)
        scene.on("carol", "back", "", lambda: believed.append(loop.core.names.count("carol")))
        play(four, scene, loop, monkeypatch)
        assert believed == [2]
        scene.exact()


def test_one_that_stalls_longer_than_a_stage_is_left_behind_and_told(four, monkeypatch):
    """Nothing of carol's vector comes through; the others have their sum without it, and carol hears why."""
    with staged(four, stage=1.5) as (scene, loop):
        scene.on("carol", "saying", "masked", lambda: scene.proxy.wire.hold("up"))
        play(four, scene, loop, monkeypatch)
        scene.exact(OTHERS, OTHERS)
        assert isinstance(scene.errors["carol"], AggregationAborted)
        assert (scene.errors["carol"].code, scene.errors["carol"].exit_code) == ("SS-6013", 5)
        assert max(scene.seconds.values()) < 8


@every(*STAGES[:4])
def test_one_that_does_not_read_costs_nobody_else_more_than_a_stage(four, monkeypatch, what):
    with staged(four, stage=1.5) as (scene, loop):
        scene.on("carol", "saying", what, lambda: scene.proxy.wire.hold("down"))

        deadline = time.monotonic() + SECONDS

        def free() -> None:
            while not loop.core.sums.finished and time.monotonic() < deadline:
                time.sleep(0.05)
            scene.proxy.wire.release()

        thread = threading.Thread(target=free, daemon=True)
        thread.start()
        play(four, scene, loop, monkeypatch)
        thread.join(SECONDS)
        scene.exact(FOUR if what in {"masked", "consistent"} else OTHERS, OTHERS)
        assert scene.errors["carol"].code in {"SS-6013", "SS-6005"}
        assert max(scene.seconds[name] for name in OTHERS) < 6


def test_one_that_never_comes_back_costs_the_reconnect_time_and_no_stage(four, monkeypatch):
    with staged(four, reconnect=0.5) as (scene, loop):

        def die() -> None:
            scene.passed("carol", "masked")
            scene.proxy.upstream = 1  # Nobody listens there.
            scene.proxy.wire.cut()

        scene.on("carol", "said", "masked", die)
        play(four, scene, loop, monkeypatch)
        scene.exact(FOUR, OTHERS)
        assert isinstance(scene.errors["carol"], ConnectionFailed)
        assert (scene.errors["carol"].code, scene.errors["carol"].exit_code) == ("SS-3020", 4)
        assert max(scene.seconds[name] for name in OTHERS) < 5


def test_a_result_is_kept_for_one_that_comes_back_late(four, monkeypatch):
    with staged(four, reconnect=0.4) as (scene, loop):
        monkeypatch.setattr(Link, "reconnect", _after(Link.reconnect, 1.5))
        scene.on("carol", "saying", "unmask", lambda: scene.proxy.wire.hold("down"))
        scene.on("carol", "said", "unmask", lambda: (scene.passed("carol", "unmask"), scene.proxy.wire.cut()))
        for other in OTHERS:
            scene.on(other, "saying", "unmask", lambda: scene.passed("carol", "unmask"))
        play(four, scene, loop, monkeypatch)
        scene.exact()


@every(*STAGES[:4])
def test_one_that_comes_back_too_late_is_told_so_and_does_not_wait_for_ever(four, monkeypatch, what):
    """What it repeats the server has already, and nothing follows any more."""
    with staged(four, reconnect=0.4) as (scene, loop):
        monkeypatch.setattr(Link, "reconnect", _after(Link.reconnect, 1.5))
        scene.on("carol", "saying", what, lambda: scene.proxy.wire.hold("down"))

        gone = threading.Event()

        def lose() -> None:
            scene.passed("carol", what)
            scene.proxy.wire.cut()
            threading.Timer(1.0, gone.set).start()

        for (
            other
        ) in OTHERS:  # Carol is given up before they speak, so that no answer of this stage is ever made for it.
            scene.on(other, "saying", what, lambda: (scene.passed("carol", what), gone.wait(SECONDS)))
        scene.on("carol", "said", what, lose)
        play(four, scene, loop, monkeypatch)
        scene.exact(FOUR if what in STAGES[2:] else OTHERS, OTHERS)
        assert isinstance(scene.errors["carol"], AggregationAborted)
        assert scene.errors["carol"].code == "SS-6013"


def _after(reconnect, seconds):
    def late(link, lost, *, within):
        time.sleep(seconds)
        reconnect(link, lost, within=within)

    return late


def test_a_server_that_lets_in_and_drops_at_once_is_given_up(four, monkeypatch):
    with staged(four) as (scene, loop):
        answer = loop.core._answer

        def dropped(connection, peer, message):
            if peer.name == "carol" and isinstance(message, Secagg | RoundReady):
                return [Close(connection)]
            return answer(connection, peer, message)

        monkeypatch.setattr(loop.core, "_answer", dropped)
        play(four, scene, loop, monkeypatch, names=("carol",))
        assert isinstance(scene.errors["carol"], ConnectionFailed)
        assert scene.errors["carol"].exit_code == 4
        assert len(scene.proxy.wires) == 1 + rounds.RECONNECTS
        assert scene.seconds["carol"] < 15


def test_a_server_that_comes_back_with_another_job_is_not_answered(four, monkeypatch):
    with staged(four) as (scene, loop), staged(four, name="other") as (_, stranger):

        def exchanged() -> None:
            scene.proxy.upstream = stranger.port
            scene.proxy.wire.cut()

        scene.on("carol", "said", "shares", exchanged)
        with monkeypatch.context() as patch:
            patch.setattr(loop.core.sums, "_patience", type(loop.core.sums._patience)(20.0, 200.0, 0.5))
            play(four, scene, loop, monkeypatch)
        assert isinstance(scene.errors["carol"], RemoteProtocolError)
        assert (scene.errors["carol"].code, scene.errors["carol"].exit_code) == ("SS-4023", 5)
        scene.exact(OTHERS, OTHERS)
        assert stranger.core.sums._round is None


@every(*STAGES)
def test_one_that_comes_back_cannot_change_what_it_said(four, monkeypatch, what):
    """Another message of the same stage is refused, the first one stands, and the others have the sum with it."""
    with staged(four, reconnect=0.5) as (scene, loop):
        said: list[Secagg] = []
        refused, tell = threading.Event(), Link.tell

        def kept(link, message):
            if link.name == "carol" and named(message) == what:
                said.append(message)
                if len(said) == 2:
                    message = _changed(message)
                    scene.processed[link.name, what] = refused
            tell(link, message)

        monkeypatch.setattr(Link, "tell", kept)

        def lose() -> None:
            scene.passed("carol", what)
            scene.proxy.wire.cut()

        for other in OTHERS:
            scene.on(other, "saying", what, lambda: refused.wait(SECONDS))
        scene.on("carol", "said", what, lose)
        play(four, scene, loop, monkeypatch)
        assert isinstance(scene.errors["carol"], AggregationAborted)
        assert scene.errors["carol"].code == "SS-6005"
        scene.exact(FOUR if what in STAGES[2:] else OTHERS, OTHERS)


def _changed(message: Secagg) -> Secagg:
    """The last byte of a body is one of its signature's."""
    body = message.body[:-1] + bytes([message.body[-1] ^ 1])
    return message.model_copy(update={"body": body})


def test_a_server_that_takes_nothing_is_given_up_by_the_client(four, monkeypatch):
    """The vector fits into no buffer and nobody reads: without a limit the client would hang in the middle of sending."""
    monkeypatch.setattr(silence, "UNTAKEN_SECONDS", 1.0)
    with staged(four, dim=1_900_000, stage=60) as (scene, loop):
        scene.on("carol", "saying", "masked", lambda: scene.proxy.wire.hold("up"))
        play(four, scene, loop, monkeypatch)
        assert len(scene.proxy.wires) == 2
        scene.exact()
        assert scene.seconds["carol"] < 20


def test_one_that_takes_nothing_is_put_out_by_the_server(four, monkeypatch):
    """A large result that nobody reads; the connection does not stay for ever."""
    monkeypatch.setattr(silence, "UNTAKEN_SECONDS", 1.0)
    with staged(four, dim=1_900_000) as (scene, loop):
        scene.on("carol", "said", "unmask", lambda: scene.proxy.wire.hold("down"))
        known: list[bool] = []

        def look() -> None:
            deadline = time.monotonic() + 10
            while "carol" not in loop.core.names and time.monotonic() < deadline:
                time.sleep(0.05)
            while "carol" in loop.core.names and time.monotonic() < deadline:
                time.sleep(0.05)
            known.append("carol" not in loop.core.names)
            scene.proxy.wire.cut()

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        play(four, scene, loop, monkeypatch)
        thread.join(SECONDS)
        assert known == [True]
        scene.exact()


def test_one_that_does_not_read_cannot_hold_off_its_own_end(four, monkeypatch):
    """As after a revocation: the farewell is stuck behind what nobody reads, and the connection ends all the same."""
    monkeypatch.setattr(peer_module, "FAREWELL", 0.5)
    with staged(four) as (scene, loop):
        link = dial(scene.proxy.url, keys=four.keys / "carol", policy=POLICY)
        scene.proxy.wire.hold("down")
        (number, peer), *_ = loop.shell._peers.items()

        def end() -> None:
            loop.shell._queue(peer, Send(number, bytes(24 << 20)))
            loop.shell._queue(peer, Close(number, "SS-3205"))

        loop._loop.call_soon_threadsafe(end)
        deadline = time.monotonic() + 5
        while loop.core.names and time.monotonic() < deadline:
            time.sleep(0.05)
        assert loop.core.names == ()
        scene.proxy.wire.cut()
        link.close()


def test_while_the_clock_ends_a_stage_the_server_answers_others(four, monkeypatch):
    """Carol is lost, and with that the sum can be opened: long work that must not hold the event loop up."""
    with staged(four, reconnect=0.3) as (scene, loop):
        tick, working = loop.core.sums.tick, threading.Event()

        def slow(now):
            working.set()
            time.sleep(2.0)
            return tick(now)

        def die() -> None:
            scene.passed("carol", "consistent")
            scene.proxy.upstream = 1
            scene.proxy.wire.cut()
            monkeypatch.setattr(loop.core.sums, "tick", slow)

        waited: list[float] = []

        def look() -> None:
            assert working.wait(SECONDS)
            begin = time.monotonic()
            assert scene.links["alice"]._pipe._socket.ping().wait(1.0)
            dial(loop.url, keys=four.keys / "bob", policy=POLICY).close()
            waited.append(time.monotonic() - begin)

        scene.on("carol", "said", "consistent", die)
        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        play(four, scene, loop, monkeypatch)
        thread.join(SECONDS)
        assert len(waited) == 1
        assert waited[0] < 1.5
        scene.exact(FOUR, OTHERS)


def test_a_whole_roster_of_a_large_job_may_be_connected_at_once(four):
    """More than the shell's own limit: what `serve` asks for is enough for all, and once more for those who come back."""
    job = job_of(four)
    large = job.model_copy(update={"sums": job.sums.model_copy(update={"roster": tuple(f"c{i}" for i in range(256))})})
    listen = listen_for(large, POLICY, "127.0.0.1", 0, None)
    assert listen.max_connections >= 512
    assert listen_for(job, POLICY, "127.0.0.1", 0, None).max_connections == shell_module.CONNECTIONS
    core = four.core(job, POLICY)
    # One certificate stands for all here.
    limits = listen.limits.model_copy(update={"clients": ClientLimits()})
    with Loopback(core, four.keys, max_connections=listen.max_connections, limits=limits) as loop:
        count = shell_module.CONNECTIONS + 20
        with ThreadPoolExecutor(20) as pool:
            dialled = partial(dial, keys=four.keys / "carol", policy=POLICY)
            links = list(pool.map(lambda _: dialled(loop.url), range(count)))
            assert len(core.names) == count
            list(pool.map(Link.close, links))


def test_a_client_that_computes_for_long_keeps_its_connection(four, monkeypatch):
    """Pings both ways are answered while the caller's thread holds the interpreter for several times their limit."""
    for module in (shell_module, pipes):
        monkeypatch.setattr(module, "PING_SECONDS", 0.3)
    monkeypatch.setattr(pipes, "PONG_SECONDS", 0.6)

    def compute() -> None:
        end, total = time.monotonic() + 3.0, 0
        while time.monotonic() < end:
            total += sum(range(1000))

    with staged(four) as (scene, loop):
        scene.on("carol", "saying", "masked", compute)
        play(four, scene, loop, monkeypatch)
        assert len(scene.proxy.wires) == 1
        scene.exact()


def test_a_connection_that_is_gone_before_it_is_served_leaves_no_traceback(four, monkeypatch, caplog):
    def gone(wire):
        del wire
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(shell_module, "limit", gone)
    with staged(four) as (scene, loop):
        dial(scene.proxy.url, keys=four.keys / "carol", policy=POLICY).close()
        assert loop.alive
    assert [record for record in caplog.records if record.exc_info] == []
