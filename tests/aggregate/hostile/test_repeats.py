"""What is said twice: by clients whose connection broke, to the server; and by a network that delivers both times."""

from __future__ import annotations

from collections import Counter, deque
from types import SimpleNamespace

import pytest

from securesplit.aggregate.client import ClientRound
from securesplit.client import rounds as rounds_module
from securesplit.errors import ConnectionFailed, RemoteProtocolError
from securesplit.protocol.messages import RoundBegin, RoundReady, Secagg
from securesplit.protocol.words import vector_of, words_blob
from securesplit.server.sums import Patience, Sums
from tests.aggregate.hostile.judge import judge
from tests.aggregate.hostile.kit import COMPLETE, LABELS, Play, at, named


@pytest.mark.parametrize("mode", [*COMPLETE, "sparse"])
@pytest.mark.parametrize("stage", range(5))
def test_all_that_was_said_may_be_said_again_at_every_stage(mode, stage, record_property):
    """Byte for byte: it gets once more what followed it, or nothing; the round stands as it was and ends exact."""
    play = at(mode, stage)
    for item in play.said:
        before = play.server.stage, play.server.waiting_for
        again = play.server.receive(item.name, item.stage, item.body, item.vector)
        assert again in ([], [d for d in play.queue if (d.to, d.stage) == (item.name, item.stage)])
        assert (play.server.stage, play.server.waiting_for) == before
    assert judge(play.finish()) == ["exact"]
    record_property("hostile", ["clients repeat all that they said", mode, len(play.said), ["exact"]])


@pytest.mark.parametrize("stage", range(4))
def test_what_another_has_said_is_nobody_elses_repetition(stage, record_property):
    """A client sends another one's messages of this very round as its own."""
    play, tally = at("plain", stage), Counter[str]()
    for item in play.said:
        for thief in play.config.roster:
            if thief != item.name:
                with pytest.raises(RemoteProtocolError) as error:
                    play.server.receive(thief, item.stage, item.body, item.vector)
                tally[named(error.value.code)] += 1
    assert judge(play.finish()) == ["exact"]
    record_property("hostile", ["a client repeats what others said", "plain", sum(tally.values()), sorted(tally)])


class Crossing:
    """A link that breaks once, right after its client said its message of a stage, and is made anew.

    Before the client says that again, the others finish the stage: the answer crosses the repetition, which is answered
    too. The other clients, the server and the client's line are real.
    """

    job = SimpleNamespace(sums=SimpleNamespace(patience=1.0))

    def __init__(self, stage: int) -> None:
        self.play, self.stage, self.broken = Play("plain"), stage, False
        config = self.play.config
        self.name = config.roster[2]
        self.server = Sums(
            roster=config.roster, quorum=config.quorum, patience=Patience(stage=3.0, gather=30.0, reconnect=1.0),
            config_of=lambda _run, _ready: config, randomness=bytes,
        )  # fmt: skip
        self.mine, self.theirs = deque[Secagg](), deque[tuple[str, object]]()
        self.sums = self  # The part of a link that a secure sum speaks over.
        for name in config.roster:
            self._sort(self.server.ready(name, RoundReady(round=1, dim=7, frozen=config.frozen), 0.0))

    def _sort(self, outbound: list[object]) -> None:
        for item in outbound:
            if item.to != self.name:
                self.theirs.append((item.to, item.message))
            elif isinstance(item.message, Secagg):
                self.mine.append(item.message)

    def _others(self) -> None:
        """The others go on as far as they can without us."""
        while self.theirs:
            to, message = self.theirs.popleft()
            if isinstance(message, RoundBegin):
                due = [self.play.advertise(to)]
            else:
                due = self.play.tell(to, message.stage, message.body, vector_of(message.vector))
            for out in due:
                said = Secagg(round=1, stage=out.stage, body=out.body, vector=words_blob(out.vector))
                self._sort(self.server.receive(to, said, 0.0))

    def tell(self, message: Secagg) -> None:
        self.last = message.stage
        self._sort(self.server.receive(self.name, message, 0.0))

    def secagg(self) -> Secagg:
        if self.last == self.stage and not self.broken:
            self.broken = True
            raise ConnectionFailed("SS-3001", "the line is dead")
        self._others()
        return self.mine.popleft()

    def reconnect(self, _lost: ConnectionFailed, *, within: float) -> None:
        assert within == 1.0
        self.server.leave(self.name, 0.0)
        self.server.join(self.name)
        self._others()


@pytest.mark.parametrize("stage", range(5))
def test_an_answer_that_crosses_the_repetition_is_taken_once(stage, record_property):
    link = Crossing(stage)
    play = link.play
    client: ClientRound = play.clients[link.name]
    client.contribute(play.updates[link.name], play.weights[link.name])
    rounds_module._run(rounds_module._Line(link), play.config, client)
    link._others()
    assert link.broken
    assert {play.server.stage, *play.ended} == {0}, "the sums have a server of their own, and nobody gave up"
    assert client.result is not None
    assert client.result.ring_sum.view("i4").tolist() == play.plain_sum(play.config.roster)
    record_property("hostile", [f"the answer crosses a repeated {LABELS[stage]}", "plain", 1, ["exact"]])
