"""A client with a valid certificate that tells a restarted server of sums that nobody has: it costs the others nothing.

The hostile one speaks first after the restart, over the wire of the in-memory server. Before the server remembered which round was
open, one such message made it refuse honest clients for good (SS-6033, SS-4051), close the round for those who had no sum yet,
or give up a run that was going on.
"""

from __future__ import annotations

import pytest

from securesplit.errors import SecureSplitError
from securesplit.protocol.codec import encode
from securesplit.protocol.messages import Failure, RoundBegin, RoundKept, RoundReady
from securesplit.server.closed import ClosedRuns
from securesplit.transport.memory import MemoryServer
from tests.e2e.house import CLIENTS, build_house, policy_of
from tests.e2e.lives import Killed, World, quick
from tests.e2e.test_lives import job_of, named

POLICY = policy_of()
FORGED = b"f" * 16


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return build_house(tmp_path_factory.mktemp("house"))


CLAIMS = {
    "of a round far ahead": RoundKept(round=900, run=FORGED, clients=CLIENTS),
    "of the next round": RoundKept(round=1, run=FORGED, clients=CLIENTS),
    "of the open round, without one who lacks it": RoundKept(round=0, run=FORGED, clients=("alice", "carol")),
    "of the open round": RoundKept(round=0, run=FORGED, clients=CLIENTS),
}


@pytest.mark.parametrize("lists", ["kept", "lost"])
@pytest.mark.parametrize("claim", CLAIMS)
def test_what_it_claims_after_a_restart_costs_the_others_nothing(house, tmp_path, monkeypatch, claim, lists):
    """The server dies when alice has the sum and bob has not; carol's claim is the first that the new one hears."""
    quick(monkeypatch)
    starts = []

    def claims(core):
        starts.append(core)
        if len(starts) != 2:
            return
        server = MemoryServer(core)
        pipe = house.link(server, POLICY, "carol")[0]._pipe
        pipe.send(encode(CLAIMS[claim]))
        server.drop(1)  # Else her own honest client would be the second one of that name.

    todo = [True]

    def kill(name, at, message):
        if name == "bob" and at == "read" and message is not None and named(message) == "unmask" and todo:
            todo.clear()
            if lists == "lost":
                (tmp_path / "closed.json").unlink(missing_ok=True)
            scene.restart()
            raise Killed  # What followed was lost with the server.

    scene = World(house, job_of(house), POLICY, tmp_path, rounds=2, on=kill, core_hook=claims)
    scene.run(*CLIENTS)
    assert (todo, len(starts)) == ([], 2)
    scene.exact(*CLIENTS)


def told(link) -> list[object]:
    """Everything that has come for a client."""
    found = []
    while link._pipe.inner._inbox:
        try:
            found.append(link.next())
        except SecureSplitError as error:
            found.append(Failure(code=error.code))
    return found


def test_a_run_that_goes_on_is_not_given_up_for_its_word(house, tmp_path):
    core = house.core(job_of(house), POLICY, closed=ClosedRuns(tmp_path / "closed.json"))
    server = MemoryServer(core)
    links = {name: house.link(server, POLICY, name)[0] for name in CLIENTS}
    for link in links.values():
        link.tell(RoundReady(round=3, dim=4, frozen="0" * 64))
    assert {type(message) for link in links.values() for message in told(link)} == {RoundBegin}
    links["carol"].tell(RoundKept(round=3, run=FORGED, clients=CLIENTS))
    server.tick(1.0)
    assert core.sums.aborted == 0
    assert told(links["alice"]) == told(links["bob"]) == []
