"""The server's core in memory: turns, repeats, and peers that break the rules and hurt nobody but themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from securesplit.errors import CheckFailed, PolicyDenied, RemoteProtocolError, SecureSplitError
from securesplit.journal.events import Quota
from securesplit.model.lora import adapter_layout, read_adapters
from securesplit.protocol.codec import decode, encode
from securesplit.protocol.job import Job
from securesplit.protocol.messages import (
    Backward,
    Blob,
    Bye,
    DropCache,
    Failure,
    Forward,
    Gradient,
    Hello,
    Hidden,
    RoundBegin,
    RoundReady,
    Secagg,
)
from securesplit.transport.actions import Close, Send, Work
from securesplit.transport.limits import ClientLimits, Limits
from securesplit.transport.memory import MemoryServer
from tests.e2e.house import ANY, CLIENTS, FROZEN, WIDTH, batches_of, policy_of, sentences


def rows(count: int, seed: int = 0) -> Blob:
    values = np.random.default_rng(seed).normal(size=(count, WIDTH)).astype("<f4")
    return Blob(dtype="f32", shape=(count, WIDTH), data=values.tobytes())


def forward(step: int = 0, *, learn: bool = True, seed: int = 0, lengths=(4, 3), cache: int = 0) -> Forward:
    return Forward(step=step, lengths=lengths, cache=cache, learn=learn, hidden=rows(sum(lengths), seed))


def backward(step: int = 0, *, seed: int = 9, count: int = 7) -> Backward:
    return Backward(step=step, gradient=rows(count, seed))


@pytest.fixture
def core(house):
    return house.core(house.job(), policy_of())


@pytest.fixture
def server(core):
    return MemoryServer(core)


def weights(core):
    middle = core._engine.middle
    return read_adapters(middle, adapter_layout(middle))


def open_link(house, server, name="alice"):
    return house.link(server, policy_of(), name)[0]


def waiting(link) -> int:
    return len(link._pipe.inner._inbox)


def closed_with(link) -> str:
    """The code that the server gave before it closed this connection."""
    with pytest.raises(SecureSplitError) as caught:
        link.next()
    assert link._pipe.inner.closed
    return caught.value.code


def test_two_learning_clients_take_turns_and_the_result_is_the_sequential_one(house, server, core):
    alice, bob = (open_link(house, server, name) for name in ("alice", "bob"))
    alice.tell(forward(seed=1))
    assert waiting(alice) == 1
    bob.tell(forward(seed=2))
    assert waiting(bob) == 0, "bob waits for alice's turn to end"
    first = alice.expect(Hidden)
    alice.tell(backward(seed=3))
    second = (alice.expect(Gradient), bob.expect(Hidden))
    bob.tell(backward(seed=4))
    third = bob.expect(Gradient)
    # The same steps without interleaving, on a fresh server.
    other = house.core(house.job(), policy_of())
    alone = MemoryServer(other)
    a, b = (open_link(house, alone, name) for name in ("alice", "bob"))
    a.tell(forward(seed=1))
    assert a.expect(Hidden) == first
    a.tell(backward(seed=3))
    assert a.expect(Gradient) == second[0]
    b.tell(forward(seed=2))
    assert b.expect(Hidden) == second[1]
    b.tell(backward(seed=4))
    assert b.expect(Gradient) == third
    assert np.array_equal(weights(core), weights(other))
    assert not np.array_equal(weights(core), weights(house.core(house.job(), policy_of())))


def test_evaluation_and_decoding_do_not_wait_for_a_turn(house, server):
    alice, bob = (open_link(house, server, name) for name in ("alice", "bob"))
    alice.tell(forward())
    bob.tell(forward(learn=False))
    bob.expect(Hidden)
    bob.tell(forward(1, learn=False, cache=3, lengths=(2,)))
    bob.expect(Hidden)
    bob.tell(DropCache(cache=3))
    assert waiting(bob) == 0


@pytest.mark.parametrize("how", ["bye", "drop", "fault", "silence"])
def test_a_turn_passes_on_when_its_holder_goes(house, server, core, how):
    alice, bob = (open_link(house, server, name) for name in ("alice", "bob"))
    server.tick(1000.0)
    alice.tell(forward())
    bob.tell(forward())
    if how == "bye":
        alice.tell(Bye())
    elif how == "drop":
        alice._pipe.inner.close()
    elif how == "fault":
        alice._pipe.send(b"garbage")
    else:
        server.tick(1119.0)
        assert waiting(bob) == 0
        server.tick(1121.0)
        alice.expect(Hidden)
        assert closed_with(alice) == "SS-4020"
    bob.expect(Hidden)
    bob.tell(backward())
    bob.expect(Gradient)
    assert core.names == ("bob",)
    assert core._engine.fleet.common.waits_for == ()


def test_one_that_waits_and_goes_is_forgotten(house, server, core):
    alice, bob, carol = (open_link(house, server, name) for name in CLIENTS)
    alice.tell(forward())
    bob.tell(forward())
    carol.tell(forward())
    bob._pipe.close()
    alice.expect(Hidden)
    alice.tell(backward())
    carol.expect(Hidden)
    carol.tell(backward())
    carol.expect(Gradient)
    assert core._engine.fleet.common.waits_for == ()


def test_a_repeated_request_gets_the_same_answer_and_learns_once(house, server, core):
    link = open_link(house, server)
    for message, kind in ((forward(), Hidden), (backward(), Gradient)):
        link.tell(message)
        answers = [link.expect(kind)]
        for _ in range(2):
            link._pipe.send(encode(message))
            answers.append(decode(link._pipe.receive(), ANY))
        assert answers[0] == answers[1] == answers[2]
        learnt = weights(core)
    other = house.core(house.job(), policy_of())
    once = open_link(house, MemoryServer(other))
    once.tell(forward())
    once.tell(backward())
    assert np.array_equal(learnt, weights(other))


def test_the_same_step_with_other_bytes_is_refused(house, server):
    link = open_link(house, server)
    link.tell(forward(seed=1))
    link.expect(Hidden)
    link._pipe.send(encode(forward(seed=2)))
    assert closed_with(link) == "SS-4022"


HOSTILE = {
    "random bytes": (lambda: b"\x00\x17" * 40, "SS-4001"),
    "nothing": (lambda: b"", "SS-4001"),
    "a truncated frame": (lambda: encode(forward())[:-5], "SS-4005"),
    "a frame that ends in its header": (lambda: encode(forward())[:20], "SS-4001"),
    "left-over bytes": (lambda: encode(forward()) + b"x", "SS-4005"),
    "an unknown kind": (lambda: b"SS\x01\xee\x00\x00\x00\x00", "SS-4003"),
    "another version": (lambda: b"SS\x09" + encode(forward())[3:], "SS-4003"),
    "integers where floats are due": (
        lambda: encode(forward()).replace(b"\xa3f32", b"\xa3u32"),
        "SS-4005",
    ),
    "an unknown type": (lambda: encode(forward()).replace(b"\xa3f32", b"\xa3f64"), "SS-4005"),
    "another width": (
        lambda: encode(
            Forward(step=0, lengths=(4,), learn=False, hidden=Blob(dtype="f32", shape=(4, 16), data=bytes(4 * 16 * 4)))
        ),
        "SS-4005",
    ),
    "too many sequences": (lambda: encode(forward(lengths=(1,) * 9)), "SS-4021"),
    "a sequence longer than any bucket": (lambda: encode(forward(learn=False, lengths=(17,))), "SS-4029"),
    "one of them among short ones": (lambda: encode(forward(learn=False, lengths=(4, 17, 4))), "SS-4029"),
    "a cache beyond the model's positions": (lambda: encode(forward(learn=False, lengths=(65,), cache=1)), "SS-4034"),
    "a gradient without a forward": (lambda: encode(backward()), "SS-4013"),
    "a second greeting": (lambda: encode(Hello(version=1, nonce=bytes(32), policy="0" * 64)), "SS-4010"),
    "the server's own kind": (lambda: encode(Hidden(step=0, hidden=rows(2))), "SS-4010"),
    "a message of a sum that does not run": (
        lambda: encode(Secagg(round=0, stage=0, body=b"", vector=Blob(dtype="u32", shape=(0,), data=b""))),
        "SS-6006",
    ),
    "a message over the cap": (lambda: bytes(1 + (1 << 20)), "SS-4002"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_message_closes_its_own_connection_alone(house, server, core, case):
    make, code = HOSTILE[case]
    mallory, bob = open_link(house, server, "alice"), open_link(house, server, "bob")
    bob.tell(forward())
    before = weights(core)
    mallory._pipe.send(make())
    assert closed_with(mallory) == code
    assert np.array_equal(weights(core), before)
    bob.expect(Hidden)
    bob.tell(backward())
    bob.expect(Gradient)
    assert core.names == ("bob",)


def test_a_cache_has_no_more_positions_than_the_model_however_it_grows(house, server, core):
    link = open_link(house, server)
    for step in range(4):
        link.tell(forward(step, learn=False, lengths=(16,), cache=1))
        link.expect(Hidden)
    computed = core._engine.caches.kept[1, 1].nbytes
    link._pipe.send(encode(forward(4, learn=False, lengths=(1,), cache=1)))
    assert closed_with(link) == "SS-4034"
    assert computed > 0
    assert core._engine.caches.kept == {}


def test_a_connection_has_so_many_caches_and_no_more(core):
    one = torch.zeros(1, WIDTH)
    for cache in range(1, 65):
        core._engine.decode(1, cache, (1,), one)
    with pytest.raises(RemoteProtocolError, match="more caches"):
        core._engine.decode(1, 65, (1,), one)
    core._engine.drop_cache(1, 7)
    core._engine.decode(1, 65, (1,), one)
    core._engine.decode(2, 1, (1,), one)


def test_a_log_that_takes_no_row_does_not_keep_a_refusal_from_being_one(house):
    """``receive`` never raises for what a peer sent, and the clock must not stop for it either."""

    def note(event):
        if isinstance(event, Quota):
            raise CheckFailed("SS-1585", "the log takes no row")

    core = house.core(house.job(), policy_of(), limits=Limits(clients=ClientLimits(steps=1)), note=note)
    link = open_link(house, MemoryServer(core))
    link.tell(forward(learn=False))
    link.expect(Hidden)
    link._pipe.send(encode(forward(1, learn=False)))
    assert closed_with(link) == "SS-2040"


def test_a_gradient_for_an_evaluation_is_refused(house, server):
    link = open_link(house, server)
    link.tell(forward(learn=False))
    link.expect(Hidden)
    link._pipe.send(encode(backward()))
    assert closed_with(link) == "SS-4013"


def test_a_second_gradient_that_differs_is_refused(house, server, core):
    link = open_link(house, server)
    link.tell(forward())
    link.expect(Hidden)
    link.tell(backward(seed=1))
    link.expect(Gradient)
    learnt = weights(core)
    link._pipe.send(encode(backward(seed=2)))
    assert closed_with(link) == "SS-4022"
    assert np.array_equal(weights(core), learnt)


def test_a_cache_that_changes_its_number_of_sequences_is_refused(house, server):
    link = open_link(house, server)
    link.tell(forward(0, learn=False, cache=1, lengths=(2, 2)))
    link.expect(Hidden)
    link._pipe.send(encode(forward(1, learn=False, cache=1, lengths=(1, 1, 1))))
    assert closed_with(link) == "SS-4016"


def test_before_the_handshake_nothing_else_is_answered(house, server, core):
    _, theirs = house.parties("alice")
    for message in (forward(), backward(), RoundReady(round=0, dim=1, frozen="0" * 64), DropCache(cache=1)):
        pipe = server.connect("alice", theirs)
        pipe.send(encode(message))
        assert decode(pipe.receive(), ANY) == Failure(code="SS-4010")
        assert pipe.closed
    assert core.names == ()


def test_a_handshake_signed_by_another_key_is_refused(house, server):
    _, theirs = house.parties("alice")
    pipe = server.connect("alice", theirs)
    bob, _ = house.parties("bob")
    from securesplit.client.dial import greet
    from securesplit.protocol.session import Party

    thief = Party(house.folder("alice").cert_der, bob.peer, bob.sign, bob.verify)
    link = greet(pipe, thief, policy_of(), name="alice", server="gpu")
    with pytest.raises(RemoteProtocolError, match="SS-4012"):
        link.next()


def test_a_server_whose_own_policy_forbids_its_job_serves_nobody(house):
    server = MemoryServer(house.core(house.job(blind=False), policy_of(FROZEN)))
    with pytest.raises(PolicyDenied, match="SS-2001"):
        house.link(server, policy_of())


def test_a_failing_computation_closes_one_connection(house, server, core, monkeypatch):
    alice, bob = (open_link(house, server, name) for name in ("alice", "bob"))
    original = core._engine.forward

    def fails(batches, **options):
        if batches[0].client == "alice":
            raise RuntimeError("a word of the text")
        return original(batches, **options)

    monkeypatch.setattr(core._engine, "forward", fails)
    alice.tell(forward())
    assert closed_with(alice) == "SS-4190"
    bob.tell(forward())
    bob.expect(Hidden)


class Manual:
    """Carries actions out one at a time, as the real shell may: between any two of them something else can happen."""

    def __init__(self, house, core):
        self.house, self.core = house, core
        self.sent: dict[int, list[bytes]] = {}
        self.closed: dict[int, str] = {}

    def open(self, name):
        from securesplit.protocol.codec import Caps
        from securesplit.protocol.session import Session

        mine, theirs = self.house.parties(name)
        number = self.core.connect(name, theirs)
        session = Session("client", mine, Caps(1 << 20))
        session.hail(nonce=bytes(32), policy="0" * 64)
        self.run(self.core.receive(number, session.data_to_send()[0]))
        session.receive(self.sent[number].pop())
        session.confirm()
        self.run(self.core.receive(number, session.data_to_send()[0]))
        return number

    def half_open(self, name):
        return self.core.connect(name, self.house.parties(name)[1])

    def run(self, actions):
        for action in actions:
            if isinstance(action, Send):
                self.sent.setdefault(action.connection, []).append(action.data)
            elif isinstance(action, Close):
                self.closed[action.connection] = action.code
            else:
                self.run(self.core.complete(action.connection, action.run()))


def test_a_peer_that_breaks_the_rules_while_its_step_is_computed_hurts_nobody(house, core):
    """Alice's gradient hands the turn to bob; bob is refused before his computation is done."""
    shell = Manual(house, core)
    alice, bob = shell.open("alice"), shell.open("bob")
    shell.run(core.receive(alice, encode(forward(seed=1))))
    assert core.receive(bob, encode(forward(seed=2))) == []
    (work,) = core.receive(alice, encode(backward()))
    after = core.complete(alice, work.run())
    (bobs,) = [a for a in after if isinstance(a, Work)]
    shell.run(core.receive(bob, b"garbage"))
    assert shell.closed == {bob: "SS-4001"}
    # The answer has nobody to go to; that is no fault of whoever's task carries it out.
    assert [a for a in core.complete(bob, bobs.run()) if isinstance(a, Send)] == []
    shell.run(core.disconnect(bob))
    assert core._engine.fleet.common.waits_for == ()
    shell.run(core.receive(alice, encode(forward(1, seed=3))))
    assert alice not in shell.closed


def test_a_computation_that_ends_after_its_connection_leaves_nothing_behind(house, core):
    shell = Manual(house, core)
    alice = shell.open("alice")
    (work,) = core.receive(alice, encode(forward()))
    shell.run(core.disconnect(alice))
    shell.run(core.complete(alice, work.run()))
    assert core._engine.fleet.common.waits_for == ()


def ready(number=0, dim=6):
    return encode(RoundReady(round=number, dim=dim, frozen="1" * 64))


def test_a_second_connection_without_a_handshake_does_not_stop_a_sum(house, core):
    """A client that reconnects, or one that means harm, must not take the others' round, or the server, down."""
    shell = Manual(house, core)
    numbers = [shell.open(name) for name in CLIENTS]
    stray = shell.half_open("carol")
    for number in numbers:
        shell.run(core.receive(number, ready()))
    assert shell.closed == {}
    assert [isinstance(decode(shell.sent[n][0], ANY), RoundBegin) for n in numbers] == [True] * 3
    assert stray not in shell.sent
    shell.run(core.tick(1e9))
    assert all(decode(shell.sent[n][-1], ANY).stage == 15 for n in numbers), (
        "the stage ran out, and every client was told"
    )
    shell.run(core.receive(numbers[0], encode(forward())))
    assert shell.closed == {}


def test_a_sums_messages_go_to_the_session_that_takes_part_and_to_no_other_of_its_client(house, core):
    """A user may generate by the same key while a run trains; and the run may come back over a new connection."""
    shell = Manual(house, core)
    numbers = [shell.open(name) for name in CLIENTS]
    other = shell.open("carol")
    for number in numbers:
        shell.run(core.receive(number, ready()))
    assert isinstance(decode(shell.sent[numbers[2]][-1], ANY), RoundBegin)
    assert not shell.sent.get(other)
    shell.run(core.disconnect(other))
    assert all(left is None for _, left in core.sums._presence._moves), (
        "the session that takes part is still there: nobody is missed"
    )
    back = shell.open("carol")
    shell.run(core.disconnect(numbers[2]))
    shell.run(core.receive(back, ready()))
    assert isinstance(decode(shell.sent[back][-1], ANY), RoundBegin)


def test_a_refused_connection_does_not_stop_the_clock(house, core):
    """Between refusal and disconnection a connection still has its name; what is due to it then is dropped."""
    shell = Manual(house, core)
    numbers = [shell.open(name) for name in CLIENTS]
    for number in numbers:
        shell.run(core.receive(number, ready()))
    shell.run(core.receive(numbers[2], b"garbage"))
    assert shell.closed == {numbers[2]: "SS-4001"}
    shell.run(core.tick(1e9))
    assert set(shell.closed) == {numbers[2]}


def test_a_training_step_over_the_memory_twin_is_what_the_core_saw(house, server):
    link, spy = house.link(server, policy_of())
    client = house.client(link, policy_of())
    client.train("B")
    client.step(batches_of(client, sentences(2, seed=0))[0])
    kinds = [type(m).__name__ for m in spy.messages()]
    assert kinds == ["Hello", "Confirm", "Forward", "Backward"]
    assert torch.is_tensor(client.parameters()[0].grad)
    link.close()
    with pytest.raises(SecureSplitError):
        link.tell(Bye())


def test_the_gain_scales_what_b_meets_and_what_comes_back(house, server, core):
    """Both ways, and in decoding; the oracle is B's own layers without the server around them."""
    link = open_link(house, server)
    sent = forward(lengths=(5,)).model_copy(update={"gain": 0.25})
    values = torch.frombuffer(bytearray(sent.hidden.data), dtype=torch.float32).reshape(1, 5, WIDTH)
    middle = house.core(house.job(), policy_of())._engine.middle
    leaf = values.clone().requires_grad_()
    output = middle(leaf * 0.25)
    pulled = backward(count=5)
    output.backward(torch.frombuffer(bytearray(pulled.gradient.data), dtype=torch.float32).reshape(1, 5, WIDTH))
    link.tell(sent)
    assert link.expect(Hidden).hidden.data == output.detach().numpy().tobytes()
    link.tell(pulled)
    assert link.expect(Gradient).gradient.data == leaf.grad.numpy().tobytes()
    fresh = open_link(house, MemoryServer(house.core(house.job(), policy_of())), "bob")
    fresh.tell(sent.model_copy(update={"cache": 1, "learn": False}))
    with torch.no_grad():
        decoded = house.core(house.job(), policy_of())._engine.middle(values * 0.25, cache=middle.new_cache())
    assert fresh.expect(Hidden).hidden.data == decoded.numpy().tobytes()


@pytest.mark.parametrize("gain", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_an_impossible_gain_is_refused(house, server, gain):
    link = open_link(house, server)
    link._pipe.send(encode(forward().model_copy(update={"gain": gain})))
    assert closed_with(link) == "SS-4004"


@pytest.fixture
def modal(house):
    def make(**training):
        raw = house.job().model_dump(mode="json", exclude_none=True) | {"training": training}
        raw["sums"] |= {"roster": [*sorted(raw["sums"]["roster"]), "zoe"], "threshold": 3}
        return house.core(Job.model_validate(raw), policy_of())

    return make


def test_a_gradient_out_of_turn_costs_its_sender_alone(house, server, core):
    """Sent behind a step that still waits for its turn, it took the holder's graph away."""
    alice, bob = (open_link(house, server, name) for name in ("alice", "bob"))
    alice.tell(forward())
    alice.expect(Hidden)
    bob.tell(forward())
    bob.tell(backward())
    assert closed_with(bob) == "SS-4014"
    before = weights(core)
    alice.tell(backward())
    alice.expect(Gradient)
    assert not np.array_equal(weights(core), before)


def test_copies_are_averaged_when_a_sum_begins_without_one(house, modal):
    """In splitfed-v1 a client that never comes kept B's copies apart for ever, and the common one at its start."""
    core = modal(mode="splitfed-v1")
    server, start = MemoryServer(core), weights(core)
    names = sorted(core.job.sums.roster)
    server.tick(1.0)
    links = [open_link(house, server, name) for name in names[:-1]]
    for number, link in enumerate(links):
        link.tell(forward(seed=number))
        link.expect(Hidden)
        link.tell(backward(seed=10 + number))
        link.expect(Gradient)
    for link in links:
        link.tell(RoundReady(round=0, dim=6, frozen="1" * 64))
    assert np.array_equal(weights(core), start), "the last one may come yet"
    server.tick(1e6)
    for link in links:
        link.expect(RoundBegin)
    assert not np.array_equal(weights(core), start)


def test_a_new_session_keeps_its_graph_when_an_answer_of_the_old_one_is_late(house, core):
    shell = Manual(house, core)
    old = shell.open("alice")
    (work,) = core.receive(old, encode(forward()))
    shell.run(core.disconnect(old))
    new = shell.open("alice")
    (again,) = core.receive(new, encode(forward()))
    late = core.complete(old, work.run())
    shell.run(core.complete(new, again.run()))
    shell.run(late)  # The line of computations: what is to be forgotten stands behind the new session's forward.
    assert core._engine.fleet.common.waits_for == ("alice",)
