"""Updates that cannot be used, rounds without anybody, and clients that are too slow: a clear code, and the rest goes on."""

from __future__ import annotations

import numpy as np
import pytest

from securesplit.aggregate import wire
from securesplit.aggregate.client import State
from securesplit.aggregate.server import ServerRound
from securesplit.aggregate.simulate import simulate
from securesplit.errors import InputError, LocalProtocolError
from securesplit.protocol.messages import Failure, RoundBegin, RoundReady, Secagg
from securesplit.protocol.words import vector_of, words_blob
from securesplit.server.sums import Patience, Sums
from tests.aggregate.hostile.judge import check_secrecy, judge, outcome
from tests.aggregate.hostile.kit import COMPLETE, EVERY, Play, at, config_of

BAD: dict[str, object] = {
    "NaN": lambda d: np.where(np.arange(d) == d - 1, np.nan, 0.1),
    "NaN first, float32": lambda d: np.where(np.arange(d) == 0, np.nan, 0.1).astype(np.float32),
    "infinite": lambda d: np.where(np.arange(d) == d // 2, np.inf, 0.1),
    "minus infinite": lambda d: np.full(d, -np.inf),
    "a coordinate less": lambda d: np.zeros(d - 1),
    "a coordinate more": lambda d: np.zeros(d + 1),
    "a column": lambda d: np.zeros((d, 1)),
    "empty": lambda _d: np.zeros(0),
    "a number": lambda _d: np.array(0.1),
}


@pytest.mark.parametrize("mode", COMPLETE)
@pytest.mark.parametrize("what", BAD)
def test_an_update_that_cannot_be_used_is_refused_where_it_is_and_the_others_go_on(what, mode, record_property):
    """The client abstains by an Abort with the code of its error; with nobody hostile, everybody else has the exact sum."""
    play = Play(mode)
    name = play.config.roster[3]
    with pytest.raises(LocalProtocolError) as error:
        play.clients[name].contribute(BAD[what](play.config.dim), 1)
    assert error.value.code == "SS-6011"
    assert play.clients[name].contribution is None
    play.begin(n for n in play.config.roster if n != name)
    play.hear(name, play.clients[name].abort(error.value.code))
    play.finish()
    assert {outcome(play, n) for n in play.config.roster if n != name} == {"exact"}
    assert play.server.result.survivors == tuple(n for n in play.config.roster if n != name)
    check_secrecy(play)
    record_property("hostile", ["an update that cannot be used, at its own client", mode, 1, ["SS-6011"]])


@pytest.mark.parametrize("place", [0, 32_767, 32_768, 40_000 - 1])
def test_a_nan_is_seen_in_every_piece_of_a_long_update(place):
    play = Play("plain", dim=40_000)
    update = np.zeros(40_000, dtype=np.float32)
    update[place] = np.nan
    with pytest.raises(LocalProtocolError) as error:
        play.clients["amir"].contribute(update, 1)
    assert error.value.code == "SS-6011"


@pytest.mark.parametrize("weight", [0, -1, 11, 1 << 40])
def test_a_weight_out_of_range_is_refused(weight):
    play = Play("plain")
    with pytest.raises(LocalProtocolError) as error:
        play.clients["amir"].contribute(play.updates["amir"], weight)
    assert error.value.code == "SS-6011"


def test_after_a_refused_update_a_good_one_may_be_given():
    play = Play("plain")
    with pytest.raises(LocalProtocolError):
        play.clients["amir"].contribute(np.full(7, np.nan), 1)
    assert judge(play.begin().finish()) == ["exact"]


@pytest.mark.parametrize("mode", ["plain", "blind"])
def test_too_many_that_abstain_end_the_round_by_rule(mode, record_property):
    play = Play(mode)
    play.begin(play.config.roster[: play.config.quorum - 1])
    for name in play.config.roster[play.config.quorum - 1 :]:
        play.hear(name, play.clients[name].abort("SS-6011"))
    play.finish()
    assert judge(play, play.config.roster[: play.config.quorum - 1], ["SS-6010"], others=("waits",)) == [
        "SS-6010",
        "waits",
    ]
    record_property("hostile", ["too many abstain", mode, 1, ["SS-6010"]])


def test_a_client_without_an_update_gives_up_before_it_masks():
    play = Play("plain").gullible()
    client = play.clients["amir"]
    body = client.advertise()
    play.begin(play.config.roster[1:])
    play.queue += play.server.receive("amir", 0, body)
    for delivery in play.queue:
        if delivery.to == "amir":
            client.receive(*delivery[1:])
    assert client.state is State.SHARED
    with pytest.raises(LocalProtocolError) as error:
        client.receive(wire.SHARES, b"")
    assert error.value.code == "SS-6005"
    assert client.state is State.ABORTED


# Nobody.


@pytest.mark.parametrize("roster", [(), ("amir",), ("amir", "bea")])
def test_a_roster_that_hides_nobody_makes_no_round(roster, record_property):
    with pytest.raises(InputError) as error:
        config_of("plain", roster=roster, threshold=max(1, len(roster)), min_clients=3, colluders=0)
    assert error.value.code == "SS-1601"
    record_property("hostile", ["empty cohort", "plain", 1, ["SS-1601"]])


@pytest.mark.parametrize("clients", [0, 1, 2])
def test_a_simulated_round_of_nobody_is_refused(clients):
    with pytest.raises(InputError) as error:
        simulate(clients=clients, threshold=1, dim=3)
    assert error.value.code == "SS-1601"


@pytest.mark.parametrize("mode", EVERY)
def test_a_round_to_which_nobody_comes_is_aborted(mode):
    server = ServerRound(config_of(mode))
    told = server.timeout()
    assert (server.aborted, server.result, server.finished) == ("SS-6010", None, True)
    assert {(d.stage, wire.decode(wire.Abort, d.body).code) for d in told} <= {(15, "SS-6013"), (15, "SS-6010")}


# Too slow, by the clock of the server that runs the rounds.


class Clock:
    """Sums over real clients, with a clock that is turned by hand."""

    def __init__(self, mode: str) -> None:
        self.play = Play(mode)
        config = self.play.config
        self.sums = Sums(
            roster=config.roster, quorum=config.quorum, patience=Patience(stage=3.0, gather=30.0, reconnect=1.0),
            config_of=lambda _run, _ready: config, randomness=bytes,
        )  # fmt: skip
        self.now, self.late = 0.0, list[Secagg]()
        self.codes: dict[str, str] = {}

    def run(self, slow: str, stage: int) -> None:
        """The slow client keeps back its message of a stage until the others have gone on."""
        out = []
        for name in self.play.config.roster:
            out += self.sums.ready(name, RoundReady(round=1, dim=7, frozen=self.play.config.frozen), self.now)
        while out or self.sums.finished + self.sums.aborted == 0:
            if not out:
                self.now += 3.1
                out = self.sums.tick(self.now)
            to, message = out[0].to, out.pop(0).message
            for said in self._answers(to, message):
                if (to, said.stage) == (slow, stage):
                    self.late.append(said)
                else:
                    out += self.sums.receive(to, said, self.now)

    def _answers(self, to: str, message: object) -> list[Secagg]:
        if isinstance(message, Failure):
            self.codes[to] = message.code
            return []
        if isinstance(message, RoundBegin):
            due = [self.play.advertise(to)]
        else:
            assert isinstance(message, Secagg)
            due = self.play.tell(to, message.stage, message.body, vector_of(message.vector))
        return [Secagg(round=1, stage=o.stage, body=o.body, vector=words_blob(o.vector)) for o in due]


@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("mode", COMPLETE)
def test_a_client_that_is_too_slow_is_told_and_the_others_go_on(mode, stage, record_property):
    clock = Clock(mode)
    slow = clock.play.config.roster[2]
    clock.run(slow, stage)
    play = clock.play
    assert (clock.sums.finished, clock.sums.aborted) == (1, 0)
    assert {outcome(play, n) for n in play.config.roster if n != slow} == {"exact"}
    assert outcome(play, slow) == "SS-6013"
    in_sum = {n for n in play.config.roster if n != slow or stage > wire.MASKED}
    assert set(clock.sums.last.survivors) == in_sum
    # What it says when it wakes up at last changes nothing: it is told once more that the round went on.
    for said in clock.late:
        told = clock.sums.receive(slow, said, clock.now)
        assert [(o.to, wire.decode(wire.Abort, o.message.body).code) for o in told] == [(slow, "SS-6013")]
    assert clock.sums.finished == 1
    check_secrecy(play)
    record_property("hostile", [f"a client too slow for stage {stage}", mode, 1, ["SS-6013", "exact"]])


@pytest.mark.parametrize("stage", range(5))
def test_too_many_slow_clients_end_the_round_by_rule(stage, record_property):
    play = at("plain", stage) if stage else Play("plain")
    slow = play.config.roster[:3]
    if not stage:
        play.begin(play.config.roster[3:])
    else:
        play = at("plain", stage - 1)
        play.step(up=lambda name, out: () if name in slow else (out,))
    play.finish(up=lambda name, out: () if name in slow else (out,))
    ends = judge(play, play.config.roster[3:], ["SS-6010"], others=("SS-6013", "waits"))
    assert play.server.result is None
    record_property("hostile", [f"three of seven too slow for stage {stage}", "plain", 1, ends])
