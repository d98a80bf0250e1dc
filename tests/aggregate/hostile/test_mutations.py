"""Every message in both directions, every field of it, every change of mutations.py; and pairs of changes, drawn.

Downwards the server is hostile: it alters what it tells one client, or all of them alike. Upwards a client is: the server
is honest, and the client signs what it alters where a signature is due. For each, every honest client ends with a code of
SS-60xx or with exactly the sum, and the attacker of judge.py learns nothing. In blind rounds a sum may be spoiled in
silence, by whoever masks otherwise than the rest (securesplit/aggregate/fixedpoint.py says why nobody may complain).

Where one client alone is told something and refuses, the rest of the round is not played: it is the round in which one
client leaves at that stage, which is judged once for every stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.aggregate import wire
from securesplit.aggregate.fixedpoint import vector_digest
from securesplit.aggregate.wire import Delivery, Outgoing
from securesplit.errors import RemoteProtocolError
from tests.aggregate.hostile.judge import check_secrecy, outcome
from tests.aggregate.hostile.kit import COMPLETE, DOWN, EVERY, OTHERS, UP, Play, at, elsewhere, named
from tests.aggregate.hostile.mutations import Mutant, flips, mutants

DOWNWARDS = ("Roster", "Routed", "Survivors", "Bundle", "Result")
UPWARDS = ("Advertise", "Shares", "Masked", "Consistent", "Unmask")


def verdict(play: Play, tally: Counter[str], *, colluders: Iterable[str] = (), differs: bool = False) -> None:
    """Secrecy, and a code or the sum for everybody honest; another sum where that is what was put in."""
    differs = differs or play.config.blind
    check_secrecy(play, colluders)
    for name in play.config.roster:
        if name not in colluders:
            end = outcome(play, name)
            assert end == "exact" or end[:5] == "SS-60" or (end == "other sum" and differs), f"{name}: {end}"
            tally[end] += 1


def told(play: Play, name: str) -> bytes:
    return next(d.body for d in play.queue if d.to == name)


@cache
def down_mutants(mode: str, stage: int, name: str) -> dict[str, Mutant]:
    """Changes of what a client is told at a stage, by name."""
    play = at(mode, stage)
    roster = play.config.roster
    others = [("another client's", told(play, roster[(roster.index(name) + 1) % len(roster)]))]
    for which in OTHERS:
        body = next(d.body for d in elsewhere(mode, which).shown if (d.to, d.stage) == (name, stage))
        others.append((which, body))
    names = (roster[0], name, roster[-1], "zoe")
    return {m.name: m for m in mutants(told(play, name), others, names)}


def lie(play: Play, name: str, data: bytes) -> None:
    play.queue = [d._replace(body=data) if d.to == name else d for d in play.queue]


def tell_one(mode: str, stage: int, data: bytes, tally: Counter[str]) -> None:
    """To the second client alone."""
    play = at(mode, stage).gullible()
    name = play.config.roster[1]
    vector = next(d.vector for d in play.queue if d.to == name)
    probe = play.clone()
    probe.tell(name, stage, data, vector)
    if name in probe.ended:
        assert [item.stage for item in probe.said if item.name == name][-1] == wire.ABORT
        tally[probe.ended[name]] += 1
        return
    lie(play, name, data)
    verdict(play.finish(), tally)


def tell_all(mode: str, stage: int, mutant: str, tally: Counter[str]) -> None:
    play = at(mode, stage).gullible()
    for name in play.config.roster:
        found = down_mutants(mode, stage, name).get(mutant)
        if found is not None:
            lie(play, name, found.data)
    verdict(play.finish(), tally)


def line(record: Callable[[str, object], None], what: str, mode: str, rounds: int, tally: Counter[str]) -> None:
    record("hostile", [what, mode, rounds, sorted(tally)])


@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("mode", [*COMPLETE, "sparse"])
def test_a_client_that_leaves_at_any_stage_costs_the_others_nothing(mode, stage, record_property):
    tally: Counter[str] = Counter()
    play = at(mode, stage)
    gone = play.config.roster[1]
    play.finish(down=lambda d: () if d.to == gone else (d,))
    check_secrecy(play)
    tally.update(outcome(play, name) for name in play.config.roster if name != gone)
    assert tally == {"exact": len(play.config.roster) - 1}
    line(record_property, f"a client leaves while stage {stage} is due", mode, 1, tally)


@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("mode", ["plain", "blind", pytest.param("64-bit", marks=pytest.mark.slow)])
def test_every_change_of_what_one_client_is_told(mode, stage, record_property):
    found, tally = down_mutants(mode, stage, at(mode, stage).config.roster[1]), Counter()
    for mutant in found.values():
        tell_one(mode, stage, mutant.data, tally)
    line(record_property, f"{DOWNWARDS[stage]} altered for one client", mode, len(found), tally)


@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("mode", ["plain", "blind", pytest.param("64-bit", marks=pytest.mark.slow)])
def test_every_change_of_what_all_clients_are_told(mode, stage, record_property):
    found, tally = down_mutants(mode, stage, at(mode, stage).config.roster[1]), Counter()
    for mutant in found:
        tell_all(mode, stage, mutant, tally)
    line(record_property, f"{DOWNWARDS[stage]} altered for all", mode, len(found), tally)


@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("mode", ["plain", pytest.param("blind", marks=pytest.mark.slow)])
def test_one_bit_of_every_byte_that_a_client_is_told(mode, stage, record_property):
    name, tally = at(mode, stage).config.roster[1], Counter()
    found = list(flips(told(at(mode, stage), name)))
    for mutant in found:
        tell_one(mode, stage, mutant.data, tally)
    line(record_property, f"{DOWNWARDS[stage]} with a flipped bit", mode, len(found), tally)


# The sparse graph is the same code with other sets: what one client is told, and of that every seventh change. What only it
# has, the proofs of stage 2, is altered in every way.


def sparse_stage(mode: str, stage: int, stride: int, record: Callable[[str, object], None]) -> None:
    found, tally = down_mutants(mode, stage, at(mode, stage).config.roster[1]), Counter()
    chosen = [m for place, m in enumerate(found.values()) if place % stride == 0 or m.name.startswith("masked:")]
    for mutant in chosen:
        tell_one(mode, stage, mutant.data, tally)
    line(record, f"{DOWNWARDS[stage]} altered for one client", mode, len(chosen), tally)


@pytest.mark.parametrize("stage", range(5))
def test_changes_of_what_one_client_of_the_sparse_graph_is_told(stage, record_property):
    sparse_stage("sparse", stage, 7, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("mode", ["sparse", "sparse blind"])
def test_every_change_of_what_one_client_of_the_sparse_graph_is_told(mode, stage, record_property):
    sparse_stage(mode, stage, 1, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("mode", ["sparse", "sparse blind"])
def test_changes_of_what_all_clients_of_the_sparse_graph_are_told(mode, stage, record_property):
    found, tally = list(down_mutants(mode, stage, at(mode, stage).config.roster[1]))[::5], Counter()
    for mutant in found:
        tell_all(mode, stage, mutant, tally)
    line(record_property, f"{DOWNWARDS[stage]} altered for all", mode, len(found), tally)


# Upwards: a hostile client among honest ones, and an honest server.


@cache
def up_mutants(mode: str, stage: int) -> dict[str, Mutant]:
    """Changes of what the second client says at a stage."""
    whole, roster = at(mode, 5), at(mode, 0).config.roster
    others = [("another client's", whole.last(roster[2], stage).body)]
    others += [(which, elsewhere(mode, which).last(roster[1], stage).body) for which in OTHERS]
    body = first_to_speak(mode, stage).last(roster[1], stage).body
    return {m.name: m for m in mutants(body, others, (*roster[:3], "zoe"))}


def say(
    mode: str,
    stage: int,
    changed: Callable[[Play, Outgoing], Outgoing],
    tally: Counter[str],
    *,
    differs: bool = False,
) -> None:
    """The second client says something else at a stage, and goes on as an honest one, as far as it is let."""
    play = first_to_speak(mode, stage).clone()
    liar = play.config.roster[1]
    true = play.last(liar, stage)
    out = changed(play, Outgoing(true.stage, true.body, true.vector))
    play.hear(liar, out)
    if stage == 0:
        play.clients[liar]._advert = out.body  # It stands by what it said.
        for name in play.config.roster:
            if name != liar:
                play.hear(name, Outgoing(0, play.last(name, 0).body, None))
    verdict(play.finish(), tally, colluders=(liar,), differs=differs)


def resigned(play: Play, stage: int, data: bytes) -> bytes:
    """The same with the liar's good signature, where it is a body at all."""
    liar = play.config.roster[1]
    try:
        body = wire.decode(UP[stage], data)
    except RemoteProtocolError:
        return data
    client = play.clients[liar]
    transcript = (play.config.digest, client._peers.t1, client._t2, client._t3, client._t3)[stage]
    secret = client._said if stage == wire.CONSISTENT else b""
    return wire.encode(play.signed(liar, stage, body, transcript, secret))


@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("mode", ["plain", "blind"])
def test_every_change_of_what_a_client_says(mode, stage, record_property):
    """What the server refuses is the round without that client; the rest is played, and all that can be is signed anew."""
    tally: Counter[str] = Counter()
    liar, found, signable = at(mode, 0).config.roster[1], up_mutants(mode, stage), 0
    waiting = first_to_speak(mode, stage)
    for mutant in found.values():
        probe = waiting.clone()
        try:
            probe.server.receive(liar, stage, mutant.data, waiting.last(liar, stage).vector)
        except RemoteProtocolError as error:
            tally[named(error.code)] += 1
        else:
            probe.server.finished = True
            say(mode, stage, lambda _play, out, data=mutant.data: out._replace(body=data), tally)
        stands = (probe.server.stage, liar in probe.server.waiting_for) == (stage, True)
        assert stands or probe.server.finished, "what is refused leaves the round as it was"
        if readable(UP[stage], mutant.data):
            signable += 1
            say(mode, stage, lambda p, out, data=mutant.data: out._replace(body=resigned(p, stage, data)), tally)
    line(record_property, f"{UPWARDS[stage]} altered by a hostile client", mode, len(found), tally)
    line(record_property, f"{UPWARDS[stage]} altered and signed by it", mode, signable, tally)


@cache
def first_to_speak(mode: str, stage: int) -> Play:
    """The second client has answered at this stage, and the server has heard nobody yet."""
    play = Play(mode) if stage == 0 else at(mode, stage - 1)
    liar = play.config.roster[1]
    if stage == 0:
        for name in play.config.roster:
            play.advertise(name)
    else:
        play.tell(*next(d for d in play.queue if d.to == liar))
        play.queue = [d for d in play.queue if d.to != liar]
    return play


def readable(kind: type[wire.Body], data: bytes) -> bool:
    try:
        wire.decode(kind, data)
    except RemoteProtocolError:
        return False
    return True


VECTORS: dict[str, Callable[[Play, object], object]] = {
    "left out": lambda _p, _v: None,
    "empty": lambda _p, v: v[:0],
    "a word less": lambda _p, v: v[:-1],
    "a word more": lambda _p, v: v.repeat(2)[: v.size + 1],
    "in other words": lambda _p, v: v.astype("<i8"),
    "in bytes": lambda _p, v: v.view("u1"),
    "as floats": lambda _p, v: v.astype("<f8"),
    "as a matrix": lambda _p, v: v.reshape(1, -1),
    "zeros": lambda _p, v: v * v.dtype.type(0),
    "a flipped bit": lambda _p, v: v ^ v.dtype.type(1),
    "another client's": lambda p, _v: at(p.mode, 5).last(p.config.roster[2], wire.MASKED).vector,
    "another round's": lambda p, _v: elsewhere(p.mode, "another round").last(p.config.roster[1], wire.MASKED).vector,
}


@pytest.mark.parametrize("signs", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("mode", ["plain", "blind", "64-bit"])
def test_every_change_of_a_masked_vector(mode, signs, record_property):
    """Signed, a change is an update of the client's own choice, in range or not: sums are not proof against that."""
    tally: Counter[str] = Counter()
    for change in VECTORS.values():

        def changed(play: Play, out: Outgoing, change: Callable = change) -> Outgoing:
            vector = change(play, out.vector)
            if not signs or vector is None or vector.dtype != out.vector.dtype:
                return out._replace(vector=vector)
            body = wire.decode(wire.Masked, out.body).model_copy(update={"vector_digest": vector_digest(vector)})
            return out._replace(body=resigned(play, wire.MASKED, wire.encode(body)), vector=vector)

        say(mode, wire.MASKED, changed, tally, differs=signs)
    how = "altered and signed by a hostile client" if signs else "altered by a hostile client"
    line(record_property, f"masked vector {how}", mode, len(VECTORS), tally)


# Two changes at once.


CHOICES = st.tuples(
    st.sampled_from(["one", "all", "client"]), st.integers(0, 4), st.integers(0, 6), st.integers(0, 1 << 20)
)


def carry_out(mode: str, drawn: list[tuple[str, int, int, int]], tally: Counter[str]) -> None:
    play = Play(mode).gullible()
    liar = play.config.roster[1]
    lies = {(way, stage): (place, pick) for way, stage, place, pick in drawn}

    def down(delivery: Delivery) -> tuple[Delivery, ...]:
        for way in ("one", "all"):
            place, pick = lies.get((way, delivery.stage), (0, 0))
            if (way, delivery.stage) in lies and (way == "all" or play.config.roster[place] == delivery.to):
                delivery = delivery._replace(body=altered_live(play, DOWN[delivery.stage], delivery.body, pick))
        return (delivery,)

    def up(name: str, out: Outgoing) -> tuple[Outgoing, ...]:
        if name == liar and ("client", out.stage) in lies:
            body = altered_live(play, UP[out.stage], out.body, lies["client", out.stage][1])
            out = out._replace(body=resigned(play, out.stage, body))
        return (out,)

    for name in play.config.roster:
        for out in up(name, play.advertise(name)):
            play.clients[name]._advert = out.body
            play.hear(name, out)
    verdict(play.finish(down, up), tally, colluders=(liar,))


def altered_live(play: Play, kind: type[wire.Body], body: bytes, pick: int) -> bytes:
    """A change of a body of this very round that leaves it well-formed; malformed ones stop at the first look."""
    found = live_mutants(body, (*play.config.roster[:3], "zoe"))
    for step in range(len(found)):
        data = found[(pick + step) % len(found)].data
        if readable(kind, data):
            return data
    return body


@lru_cache(maxsize=32)
def live_mutants(body: bytes, names: tuple[str, ...]) -> list[Mutant]:
    return [m for m in mutants(body, (), names) if m.data[:1] == body[:1]]


def search(mode: str, examples: int) -> Counter[str]:
    tally: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(st.lists(CHOICES, min_size=2, max_size=2, unique_by=lambda c: (c[0], c[1])))
    def pairs(drawn: list[tuple[str, int, int, int]]) -> None:
        carry_out(mode, drawn, tally)

    pairs()
    return tally


@pytest.mark.parametrize("mode", ["plain", "blind"])
def test_two_changes_at_once(mode, record_property):
    line(record_property, "two changes at once, drawn", mode, 40, search(mode, 40))


@pytest.mark.slow
@pytest.mark.parametrize("mode", EVERY)
def test_two_changes_at_once_at_length(mode, record_property):
    examples = 400 if mode in COMPLETE else 40
    line(record_property, "two changes at once, drawn", mode, examples, search(mode, examples))
