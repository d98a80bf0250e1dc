"""Learning steps are done once, whatever is said twice, whoever goes away, and whenever the server is started again.

The oracle is a server that never stopped and never heard anything twice.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress

import msgpack
import numpy as np
import pytest
import torch

from securesplit.errors import InputError, SecureSplitError
from securesplit.kept.folder import Kept
from securesplit.kept.frames import Frames
from securesplit.protocol.codec import decode, encode
from securesplit.protocol.messages import Backward, Forward, Gradient, Hidden, Run
from securesplit.server.serve import state_facts
from securesplit.server.steps import Part
from securesplit.transport.memory import MemoryServer
from tests.e2e.house import ANY, policy_of
from tests.server.test_core import backward, closed_with, forward, open_link, waiting, weights

ALICE, BOB = bytes(16), bytes(15) + b"b"


class Site:
    """A server with a state folder that is started again at will."""

    def __init__(self, house, folder, every=2):
        self.house, self.folder, self.every = house, folder, every
        self.kept = None
        self.start()

    def start(self):
        if self.kept is not None:
            self.kept.close()
        job, policy = self.house.job(), policy_of()
        self.kept = Kept.open(self.folder, state_facts(job, policy, self.house.digest))
        self.core = self.house.core(job, policy, state=self.kept, every=self.every)
        self.server = MemoryServer(self.core)

    def link(self, name="alice", run=ALICE):
        made = open_link(self.house, self.server, name)
        made.tell(Run(run=run))
        return made


@pytest.fixture
def site(house, tmp_path):
    made = Site(house, tmp_path / "state")
    yield made
    made.kept.close()


def said(link, message, kind):
    link.tell(message)
    return link.expect(kind)


def learn(link, number):
    return said(link, forward(number, seed=number), Hidden), said(link, backward(number, seed=50 + number), Gradient)


@pytest.mark.parametrize("at", range(6))
def test_a_server_that_is_started_again_anywhere_goes_on_as_if_nothing_had_been(house, site, tmp_path, at):
    never = Site(house, tmp_path / "never")
    plain, link = never.link(), site.link()
    expected, found, halves = [], [], 0
    for number in range(3):
        for message, kind in ((forward(number, seed=number), Hidden), (backward(number, seed=50 + number), Gradient)):
            expected.append(said(plain, message, kind))
            if halves == at:
                site.start()
                link = site.link()
                if kind is Gradient:  # A connection knows no step before its forward.
                    assert said(link, forward(number, seed=number), Hidden) == found[-1]
            found.append(said(link, message, kind))
            halves += 1
    assert found == expected
    assert (weights(site.core) == weights(never.core)).all()
    assert site.core.steps.taken == 3
    never.kept.close()


def test_what_is_said_twice_is_learnt_once(site):
    first = learn(site.link(), 0)
    before = weights(site.core)
    for _ in range(2):
        link = site.link()
        assert learn(link, 0) == first
        link._pipe.close()
        site.start()
    assert (weights(site.core) == before).all()
    assert site.core.steps.taken == 1


@pytest.mark.parametrize(
    ("message", "code"),
    [(forward(1, seed=9), "SS-4022"), (forward(0, seed=0), "SS-4055")],
    ids=["other contents", "a number that fell"],
)
def test_another_request_under_a_number_that_was_used_is_refused(site, message, code):
    link = site.link()
    learn(link, 0)
    learn(link, 1)
    site.start()
    again = site.link()
    again.tell(message)
    assert closed_with(again) == code


def test_another_backward_under_the_same_number_is_refused(site):
    learn(site.link(), 0)
    link = site.link()
    said(link, forward(0, seed=0), Hidden)
    link.tell(backward(0, seed=51))
    assert closed_with(link) == "SS-4022"


def test_a_new_run_counts_from_the_beginning(site):
    learn(site.link(), 5)
    before = weights(site.core)
    learn(site.link(run=BOB), 0)
    assert (weights(site.core) != before).any()
    assert site.core.steps.taken == 2


def test_a_lost_connection_keeps_its_turn_and_its_graph(site):
    site.server.tick(1000.0)
    alice, bob = site.link(), site.link("bob", BOB)
    hidden = said(alice, forward(0), Hidden)
    bob.tell(forward(0, seed=3))
    alice._pipe.inner.close()
    site.server.tick(1001.0)
    assert waiting(bob) == 0, "alice's step is not over"
    alice = site.link()
    assert said(alice, forward(0), Hidden) == hidden
    said(alice, backward(0), Gradient)
    assert waiting(bob) == 1


def test_a_connection_that_nobody_noticed_to_be_dead_gives_way_to_the_new_one(site):
    dead = site.link()
    hidden = said(dead, forward(0), Hidden)
    alive = site.link()
    assert said(alive, forward(0), Hidden) == hidden
    said(alive, backward(0), Gradient)
    bob = site.link("bob", BOB)
    said(bob, forward(0), Hidden)


def test_after_a_start_the_client_whose_gradient_is_due_is_waited_for_and_no_longer_than_that(site):
    hidden = said(site.link(), forward(0), Hidden)
    site.start()
    site.server.tick(1000.0)
    bob = site.link("bob", BOB)
    bob.tell(forward(0, seed=3))
    site.server.tick(1100.0)
    assert waiting(bob) == 0
    site.server.tick(1121.0)
    bob.expect(Hidden)
    said(bob, backward(0, seed=4), Gradient)
    site.start()  # That alice was given up is in the journal, too.
    alice = site.link()
    assert said(alice, forward(0), Hidden) != hidden, "B has learnt from bob meanwhile"
    said(alice, backward(0), Gradient)
    assert site.core.steps.taken == 2


def test_who_says_goodbye_keeps_nothing(site):
    alice, bob = site.link(), site.link("bob", BOB)
    said(alice, forward(0), Hidden)
    bob.tell(forward(0, seed=3))
    alice.close()
    assert waiting(bob) == 1


def test_a_session_beside_the_run_has_numbers_of_its_own(site):
    link = site.link()
    learn(link, 7)
    beside = open_link(site.house, site.server)
    said(beside, forward(0, learn=False), Hidden)
    learn(link, 8)


def test_another_machines_bits_are_noticed(site):
    said(site.link(), forward(0), Hidden)
    site.kept.close()
    path = next(site.folder.glob("journal-*"))
    *what, _ = msgpack.unpackb(Frames(path).found[0])
    path.unlink()
    file = Frames(path)
    file.append(msgpack.packb([*what, hashlib.sha256(b"other").digest()]))
    file.close()
    with pytest.raises(InputError) as caught:
        site.start()
    assert caught.value.code == "SS-1295"


def test_a_failed_request_is_replayed_as_a_failed_request(site):
    link = site.link()
    said(link, forward(0), Hidden)
    link.tell(Backward(step=0, gradient=backward(0).gradient.model_copy(update={})))
    link.expect(Gradient)
    other = site.link("bob", BOB)
    with pytest.raises(SecureSplitError):
        site.core.steps.apply([Part("bob", BOB, backward(0))])
    before = weights(site.core)
    site.start()
    assert (weights(site.core) == before).all()
    del other


def test_a_full_disk_stops_all_learning_and_a_start_goes_on(site, monkeypatch):
    link = site.link()
    learn(link, 0)
    before = weights(site.core)
    with monkeypatch.context() as patch:
        patch.setattr(Frames, "_put", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        link.tell(forward(1))
        assert closed_with(link) == "SS-1589"
    again = site.link()
    again.tell(forward(1))
    assert closed_with(again) == "SS-1589", "what was not kept was computed; nothing may follow from it"
    site.start()
    assert (weights(site.core) == before).all()
    learn(site.link(), 1)


def test_forwards_without_backwards_do_not_fill_the_disk_and_the_last_one_still_waits(site):
    link = site.link()
    for number in range(40):
        said(link, forward(number, seed=number), Hidden)
    assert len(Frames(next(site.folder.glob("journal-*"))).found) < 20
    hidden = said(link, forward(40, seed=2), Hidden)
    site.core.steps.commit()
    site.start()
    again = site.link()
    assert said(again, forward(40, seed=2), Hidden) == hidden
    said(again, backward(40), Gradient)
    assert site.core.steps.taken == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_a_gradient_that_overflows_is_its_senders_alone(site, bad):
    """One B is everybody's: a client whose step diverged, or who means ill, must not end it for all."""
    mallory, alice = site.link("bob", BOB), site.link()
    said(mallory, forward(0, seed=0), Hidden)
    pull = backward(0, seed=50)
    shape = pull.gradient.shape
    rows = torch.full(shape, bad).numpy().astype("<f4").tobytes()
    mallory.tell(pull.model_copy(update={"gradient": pull.gradient.model_copy(update={"data": rows})}))
    with suppress(SecureSplitError):
        mallory.expect(Gradient)
    before = weights(site.core)
    assert np.isfinite(before).all()
    learn(alice, 0)
    after = weights(site.core)
    assert np.isfinite(after).all()
    assert not np.array_equal(before, after)
    site.start()
    assert np.array_equal(weights(site.core), after)


def test_requests_survive_the_wire_as_they_are_compared():
    message = forward(3)
    assert encode(decode(encode(message), ANY)) == encode(message)
    assert isinstance(decode(encode(message), ANY), Forward)
