"""Sessions that compute with a former B beside those that teach the present one; in memory, bit for bit.

The oracle of an evaluation is what the same server answered when B was so; of learning, a server of which nobody marked anything.
"""

from __future__ import annotations

import pytest
import torch

from securesplit.errors import RemoteProtocolError
from securesplit.protocol.job import Job
from securesplit.protocol.messages import Backward, Gradient, Hidden, Mark, Run
from securesplit.server.former import FormerStates, name_of
from securesplit.transport.memory import MemoryServer
from tests.e2e.house import policy_of
from tests.server.test_core import backward, closed_with, forward, open_link


def job_of(house, mode: str = "splitfed-v2", most: int | None = 2) -> Job:
    raw = house.job(blind=False).model_dump(mode="json", exclude_none=True)
    raw["schedule"] |= {} if most is None else {"checkpoints": most}
    raw["training"] = {"mode": mode, **({"every": 9} if mode == "splitfed-v3" else {})}
    return Job.model_validate(raw)


@pytest.fixture
def served(house):
    def make(mode: str = "splitfed-v2", **options):
        core = house.core(job_of(house, mode, **options), policy_of())
        return core, MemoryServer(core)

    return make


def learn(link, step: int, *, seed: int) -> bytes:
    link.tell(forward(step, seed=seed))
    link.expect(Hidden)
    link.tell(backward(step, seed=seed + 50))
    return link.expect(Gradient).gradient.data


def ask(link, step: int, *, seed: int = 3, cache: int = 0) -> bytes:
    link.tell(forward(step, learn=False, seed=seed, cache=cache))
    return link.expect(Hidden).hidden.data


def mark(link, **fields) -> Mark:
    link.tell(Mark(**fields))
    return link.expect(Mark)


@pytest.mark.parametrize("mode", ["splitfed-v2", "splitfed-v1", "splitfed-v3"])
@pytest.mark.parametrize("cache", [0, 1])
def test_a_session_computes_with_b_as_it_was(house, served, mode, cache):
    core, server = served(mode)
    alice, bob = (open_link(house, server, name) for name in ("alice", "bob"))
    learn(alice, 0, seed=1)
    learn(bob, 0, seed=2)
    kept = mark(alice, what="now", slot=1)
    assert kept.name == name_of(tuple(p.detach() for p in core._engine.fleet.of("alice").parameters)), "her own copy"
    other = mark(bob, what="now", slot=1)
    assert (other.name == kept.name) == (mode == "splitfed-v2")
    wanted = ask(alice, 1, cache=cache)
    learn(alice, 2, seed=4)
    second = open_link(house, server)
    assert ask(second, 0, cache=cache) != wanted
    assert mark(second, what="use", name=kept.name) == Mark(what="use", name=kept.name)
    assert ask(second, 1, cache=cache) == wanted, "a text that began in another B begins anew"
    if cache:
        assert core._engine.caches.kept, "it decodes on"
    assert ask(alice, 3, cache=2 * cache) != wanted, "the first session goes on with what has learnt"


def test_learning_beside_it_is_what_it_would_be_alone(house, served):
    """A former state is put in and taken out between another client's forward and its backward."""
    plain = served()[1]
    link = open_link(house, plain, "bob")
    wanted = [learn(link, step, seed=step + 1) for step in range(3)]

    core, server = served()
    alice, bob = (open_link(house, server, name) for name in ("alice", "bob"))
    name = mark(alice, what="now").name
    assert mark(alice, what="use", name=name).code == ""
    first, found = ask(alice, 0), []
    for step in range(3):
        bob.tell(forward(step, seed=step + 1))
        bob.expect(Hidden)
        assert ask(alice, step + 1) == first
        bob.tell(backward(step, seed=step + 51))
        found.append(bob.expect(Gradient).gradient.data)
    assert found == wanted
    held = core._engine.fleet.common.parameters
    assert all(p.requires_grad for p in held)
    inside = {id(p) for p in core._engine.middle.parameters()}
    assert {id(p) for p in held} <= inside


def test_what_the_job_does_not_keep_is_refused(house, served):
    wrong = [
        {"what": "now", "slot": 3},
        {"what": "now", "slot": 1, "name": bytes(32)},
        {"what": "ended", "slot": 0, "code": "SS-4095"},
    ]
    for fields in wrong:
        link = open_link(house, served()[1])
        link.tell(Mark(**fields))
        assert closed_with(link) == "SS-4096"
    link = open_link(house, served(most=None)[1])
    link.tell(Mark(what="now"))
    assert closed_with(link) == "SS-4096"


def test_an_unknown_state_is_declined_and_the_session_goes_on(house, served):
    link = open_link(house, served()[1])
    for fields in ({"what": "use", "name": b"\7" * 32}, {"what": "ended", "slot": 1}):
        assert mark(link, **fields) == Mark(**fields, code="SS-4095")
    learn(link, 0, seed=1)
    with pytest.raises(RemoteProtocolError, match="SS-4095") as caught:
        link.use(b"\7" * 32)
    assert "--state" in caught.value.hint
    name = link.mark(slot=0, ended=False)
    link.use(name)
    link.tell(forward(1))
    assert closed_with(link) == "SS-4096", "it may not learn"


def test_a_state_whose_place_was_taken_ends_the_sessions_that_use_it(house, served):
    server = served()[1]
    alice, second = open_link(house, server), open_link(house, server)
    second.use(alice.mark(slot=1, ended=False))
    ask(second, 0)
    learn(alice, 0, seed=1)
    alice.mark(slot=1, ended=False)
    second.tell(forward(1, learn=False))
    assert closed_with(second) == "SS-4095"
    learn(alice, 1, seed=2)


def test_a_disk_that_is_full_is_told_and_learning_goes_on(house, served, monkeypatch):
    def full(*_):
        raise OSError("SS-1804")

    core, server = served()
    alice = open_link(house, server)
    monkeypatch.setattr(FormerStates, "keep", full)
    monkeypatch.setattr(FormerStates, "ended", full)
    core._marks.ended()
    assert mark(alice, what="now", slot=2) == Mark(what="now", slot=2, code="SS-4097")
    assert alice.mark(slot=2, ended=False) == b""
    learn(alice, 0, seed=1)


def test_a_state_of_other_shapes_is_not_put_into_b(house, served):
    core, server = served()
    name = core.former.keep("alice", 0, (torch.zeros(3),))
    assert mark(open_link(house, server), what="use", name=name).code == "SS-4095"


def test_a_guest_evaluates_and_keeps_nothing(house, served):
    core, server = served()
    name = open_link(house, server).mark(slot=0, ended=False)
    link = open_link(house, server, "bob")
    core._connections[2].standing = "guest"
    link.use(name)
    ask(link, 0)
    link.tell(Mark(what="now"))
    assert closed_with(link) == "SS-2041"


def test_a_run_may_mark_between_its_steps(house, served):
    link = open_link(house, served()[1])
    link.tell(Run(run=bytes(16)))
    learn(link, 0, seed=1)
    assert link.mark(slot=1, ended=False)
    link.tell(Backward(step=0, gradient=backward(0, seed=51).gradient))
    assert link.expect(Gradient), "the last step again, after a mark"
