"""Room for decoding caches: never over the budget, counted before anything is computed, and nobody is dropped in turns."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import RemoteProtocolError
from securesplit.model.plan import CutPlan
from securesplit.model.split import split_model
from securesplit.model.store import load_middle
from securesplit.server.caches import POLITE
from securesplit.server.engine import Engine
from securesplit.transport.limits import Caches
from tests.e2e.house import WIDTH, build_house

UNIT = 2 * 2 * 16 * 4
"""Bytes of a position of the house's B by hand: layers, keys and values, width of two of four heads of 8, float32."""


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    return load_middle(build_house(tmp_path_factory.mktemp("caches") / "house").model)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def engine_of(middle, clock, positions: int) -> Engine:
    """With room for so many positions of one sequence."""
    asked = Caches(bytes=positions * UNIT, idle_seconds=10.0, patience_seconds=60.0)
    return Engine(middle, learning_rate=0.0, caches=asked, clock=clock)


def held(engine: Engine) -> int:
    """Bytes of the tensors themselves."""
    found = 0
    for cached in engine.caches.kept.values():
        for lane in cached.lanes:
            for layer in lane.past.past.layers:
                found += sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values))
    return found


def refused(engine: Engine, *args: object) -> str:
    before, kept = held(engine), dict(engine.caches.kept)
    with pytest.raises(RemoteProtocolError) as caught:
        engine.decode(*args)
    assert held(engine) == before
    assert engine.caches.kept == kept, "who is refused moved nobody"
    return caught.value.code


def test_what_is_counted_is_what_the_tensors_take(middle, clock):
    engine = engine_of(middle, clock, 100)
    engine.decode(1, 1, (5, 3, 5), rows(13))
    engine.decode(1, 1, (1, 1, 1), rows(3))
    assert engine.caches.nbytes == held(engine) == 16 * UNIT == engine.caches.kept[1, 1].nbytes
    assert engine._position_bytes() == UNIT


FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(n_layer=4, n_head=2, n_embd=WIDTH, vocab_size=32, n_positions=64),
    "window": lambda: transformers.MistralConfig(
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=WIDTH, intermediate_size=48, vocab_size=32,
        sliding_window=4, head_dim=8,
    ),
    "qwen": lambda: transformers.Qwen2Config(
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, hidden_size=WIDTH, intermediate_size=48, vocab_size=32
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_counted_ahead_is_enough_for_every_family(family, clock):
    whole = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    engine = Engine(split_model(whole, CutPlan(front=1, back=1)).middle, learning_rate=0.0, clock=clock)
    rate, rows_of_all = engine._position_bytes(), 0
    for lengths in ((9, 7), (1, 1), (1, 1), (5, 5)):
        engine.decode(1, 1, lengths, rows(sum(lengths)))
        rows_of_all += sum(lengths)
        assert engine.caches.nbytes == held(engine) <= rows_of_all * rate
    assert (held(engine) == rows_of_all * rate) == (family != "window"), "a window keeps less"


def test_ragged_sequences_are_decoded_as_each_alone(middle, clock):
    engine = engine_of(middle, clock, 1000)
    lengths, start = (5, 3, 5, 4), rows(17)
    steps = [rows(4, seed) for seed in (1, 2, 3)]
    together = [engine.decode(1, 1, lengths, start), *(engine.decode(1, 1, (1,) * 4, step) for step in steps)]
    at = 0
    for i, length in enumerate(lengths):
        alone = [engine.decode(2, i + 1, (length,), start[at : at + length])]
        alone += [engine.decode(2, i + 1, (1,), step[i : i + 1]) for step in steps]
        torch.testing.assert_close(together[0][at : at + length], alone[0])
        for whole, one in zip(together[1:], alone[1:], strict=True):
            torch.testing.assert_close(whole[i : i + 1], one)
        at += length


def test_a_cache_that_is_built_again_in_one_message_is_the_same_bit_for_bit(middle, clock):
    engine = engine_of(middle, clock, 1000)
    prompt, steps = rows(9), [rows(2, seed) for seed in range(1, 7)]
    engine.decode(1, 1, (5, 4), prompt)
    once = [engine.decode(1, 1, (1, 1), step) for step in steps]
    engine.decode(1, 2, (5, 4), prompt)
    again = engine.decode(1, 2, (6, 6), torch.cat([torch.stack(steps, 1)[i] for i in (0, 1)]))
    assert torch.equal(again.reshape(2, 6, WIDTH), torch.stack(once, 1))
    for one, two in zip(engine.caches.kept[1, 1].lanes, engine.caches.kept[1, 2].lanes, strict=True):
        for a, b in zip(one.past.past.layers, two.past.past.layers, strict=True):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)


def test_sequences_that_began_alike_go_on_alike(middle, clock):
    engine = engine_of(middle, clock, 1000)
    engine.decode(1, 1, (2, 2, 3), rows(7))
    assert refused(engine, 1, 1, (1, 2, 1), rows(4)) == "SS-4015"
    assert refused(engine, 1, 1, (1, 1), rows(2)) == "SS-4016"


def test_who_is_in_use_keeps_its_room_and_the_next_one_is_told_to_wait(middle, clock):
    engine = engine_of(middle, clock, 24)
    engine.decode(1, 1, (10,), rows(10))
    engine.decode(2, 1, (10,), rows(10))
    assert refused(engine, 3, 1, (4,), rows(4)) == "SS-4040", "an eighth is left to those who have begun"
    engine.drop_cache(2, 1)
    engine.decode(3, 1, (4,), rows(4))
    clock.now += 10.0
    engine.decode(3, 1, (1,), rows(1))
    engine.decode(2, 1, (10,), rows(10))
    assert set(engine.caches.kept) == {(2, 1), (3, 1)}, "who was not used for long makes room"
    assert refused(engine, 1, 1, (1,), rows(1)) == "SS-4017"
    engine.drop_cache(1, 1)
    assert engine.caches.dropped == set()


def test_the_older_goes_on_at_the_cost_of_the_younger_and_never_the_other_way(middle, clock):
    engine = engine_of(middle, clock, 20)
    engine.decode(1, 1, (8,), rows(8))
    engine.decode(2, 1, (8,), rows(8))
    engine.decode(3, 1, (1,), rows(1))
    engine.decode(3, 1, (3,), rows(3))
    assert refused(engine, 3, 1, (1,), rows(1)) == "SS-4040"
    engine.decode(1, 1, (1,), rows(1))
    assert (2, 1) in engine.caches.dropped or (3, 1) in engine.caches.dropped
    assert (1, 1) in engine.caches.kept


def test_nobody_who_holds_most_keeps_others_waiting_for_ever(middle, clock):
    engine = engine_of(middle, clock, 22)
    for owner in (1, 2):
        engine.decode(owner, 1, (9,), rows(9))
    for _ in range(7):
        assert refused(engine, 3, 1, (5,), rows(5)) == "SS-4040"
        clock.now += 9.0
        for owner in (1, 2):  # In use all the time.
            engine.caches.kept[owner, 1].used = clock.now
    engine.decode(3, 1, (5,), rows(5))
    assert held(engine) == 14 * UNIT


def test_more_than_one_session_may_have_is_said_at_once(middle, clock):
    engine = engine_of(middle, clock, 20)
    assert refused(engine, 1, 1, (11,), rows(11)) == "SS-4041"
    engine.decode(1, 1, (6,), rows(6))
    engine.decode(1, 2, (4,), rows(4))
    assert refused(engine, 1, 2, (1,), rows(1)) == "SS-4041"


def test_who_never_asked_has_no_place_and_who_goes_leaves_nothing(middle, clock):
    engine = engine_of(middle, clock, 40)
    for number in range(1, 4):
        engine.decode(number, 1, (4,), rows(4))
    for number in range(1, 4):
        engine.forget(number)
    engine.forget(9)
    assert (engine.caches.kept, engine.caches.dropped, bool(engine.caches._turns)) == ({}, set(), False)
    assert engine.caches._waiting == {}


ASK = st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 9), st.integers(1, 2), st.sampled_from([0, 1, 11]))


@settings(deadline=None, max_examples=40)
@given(st.lists(ASK, max_size=25))
def test_memory_never_exceeds_the_budget_and_each_keeps_to_its_share(middle, asks):
    clock = Clock()
    engine = engine_of(middle, clock, 24)
    for owner, cache, length, count, pause in asks:
        clock.now += pause
        known = engine.caches.kept.get((owner, cache))
        count = known.sequences if known is not None else count  # noqa: PLW2901
        try:
            engine.decode(owner, cache, (length,) * count, rows(length * count))
        except RemoteProtocolError as error:
            assert error.code in POLITE  # noqa: PT017
            if error.code == "SS-4017":
                engine.drop_cache(owner, cache)
        assert engine.caches.nbytes == held(engine) <= 24 * UNIT
        assert all(engine.caches._held(owner) <= 12 * UNIT for owner in range(1, 5))


def test_two_texts_that_do_not_fit_together_end_one_after_the_other(middle, clock):
    """No pair drops each other's caches in turns: each decodes its whole text, and few steps are computed twice."""
    engine = engine_of(middle, clock, 20)
    wanted, done, computed = 10, {1: 0, 2: 0, 3: 0}, 0
    for _ in range(200):
        for owner, reached in done.items():
            if reached >= wanted:
                engine.drop_cache(owner, 1)
                continue
            fresh = (owner, 1) not in engine.caches.kept
            try:
                engine.decode(owner, 1, (max(reached, 1) if fresh else 1,), rows(max(reached, 1) if fresh else 1))
                computed += max(reached, 1) if fresh else 1
                done[owner] += 1
            except RemoteProtocolError as error:
                if error.code == "SS-4017":
                    engine.drop_cache(owner, 1)
    assert set(done.values()) == {wanted}
    assert computed <= 3 * wanted + 2 * wanted


def test_a_step_that_does_not_fit_its_own_cache_puts_nobody_out(middle, clock):
    engine = engine_of(middle, clock, 100)
    engine.decode(1, 1, (5, 5), rows(10))
    engine.decode(2, 1, (45,), rows(45))
    engine.decode(3, 1, (20,), rows(20))
    assert refused(engine, 1, 1, (30,), rows(30)) == "SS-4016"
    assert refused(engine, 1, 1, (20, 15), rows(35)) == "SS-4015"


# ---- one client over several connections -------------------------------------------------------------------------------


def fill(engine, clock, *connections, client="greedy", most=12):
    """One client takes what it can get over its connections, and keeps all of it in use."""
    for connection in connections:
        for length in (most, *[1] * most):
            with contextlib.suppress(RemoteProtocolError):
                engine.decode(connection, 1, (length,), rows(length), client)
    for cached in engine.caches.kept.values():
        cached.used = clock.now


def test_a_client_with_four_connections_does_not_keep_a_modest_one_waiting(middle, clock):
    """It held all memory by two connections of half of it each, and was the oldest in both."""
    engine = engine_of(middle, clock, 24)
    fill(engine, clock, 1, 2, 3, 4)
    assert held(engine) == 24 * UNIT, "alone it may have everything"
    engine.decode(9, 1, (6,), rows(6), "modest")
    for _ in range(3):
        fill(engine, clock, 1, 2, 3, 4)
        engine.decode(9, 1, (1,), rows(1), "modest")
    assert engine.caches.kept[9, 1].length == 9
    assert engine.caches._held(1) == 12 * UNIT, "its first session goes on, too"


def test_two_sessions_of_one_client_wait_for_each_other_as_those_of_two_did(middle, clock):
    engine = engine_of(middle, clock, 20)
    engine.decode(1, 1, (8,), rows(8), "alice")
    engine.decode(2, 1, (8,), rows(8), "alice")
    assert refused(engine, 3, 1, (3,), rows(3), "alice") == "SS-4040"
    engine.decode(2, 1, (2,), rows(2), "alice")
    engine.decode(1, 1, (2,), rows(2), "alice")
    assert refused(engine, 2, 1, (1,), rows(1), "alice") == "SS-4041"
    engine.decode(4, 1, (1,), rows(1), "bob")
    assert (2, 1) in engine.caches.dropped
    assert (1, 1) in engine.caches.kept


def test_sixteen_sessions_of_one_client_alone_fill_the_whole_budget(middle, clock):
    engine = engine_of(middle, clock, 64)
    for connection in range(1, 17):
        engine.decode(connection, 1, (3,), rows(3), "alice")
    for connection in range(1, 17):
        engine.decode(connection, 1, (1,), rows(1), "alice")
    assert held(engine) == 64 * UNIT
    assert engine.caches.dropped == set()


def test_one_that_was_put_out_after_a_long_wait_does_not_take_it_back_at_once(middle, clock):
    engine = engine_of(middle, clock, 22)
    for owner in (1, 2):
        engine.decode(owner, 1, (9,), rows(9), f"client-{owner}")
    for _ in range(7):
        assert refused(engine, 3, 1, (5,), rows(5), "client-3") == "SS-4040"
        clock.now += 9.0
        for owner in (1, 2):
            engine.caches.kept[owner, 1].used = clock.now
    engine.decode(3, 1, (5,), rows(5), "client-3")
    ((lost, _),) = engine.caches.dropped
    assert refused(engine, lost, 2, (9,), rows(9), f"client-{lost}") == "SS-4040", "it had the older place"
    assert (3, 1) in engine.caches.kept


def test_half_of_the_budget_is_had_after_a_long_wait_though_nothing_is_left_to_grow(middle, clock):
    engine = engine_of(middle, clock, 24)
    fill(engine, clock, 1)
    for _ in range(7):
        assert refused(engine, 9, 1, (12,), rows(12), "modest") == "SS-4040"
        clock.now += 9.0
        engine.caches.kept[1, 1].used = clock.now
    engine.decode(9, 1, (12,), rows(12), "modest")
    assert held(engine) == 24 * UNIT


def test_who_gives_up_waiting_has_no_place_any_more(middle, clock):
    engine = engine_of(middle, clock, 20)
    engine.decode(1, 1, (10,), rows(10))
    engine.decode(2, 1, (7,), rows(7))
    assert refused(engine, 3, 1, (5,), rows(5)) == "SS-4040"
    engine.drop_cache(3, 1)
    clock.now += 61.0
    for owner in (1, 2):
        engine.caches.kept[owner, 1].used = clock.now
    assert refused(engine, 3, 2, (5,), rows(5)) == "SS-4040", "it has not waited for this one"


CROWD = st.tuples(st.integers(0, 7), st.integers(1, 9), st.booleans())


@settings(deadline=None, max_examples=40)
@given(st.lists(CROWD, max_size=40))
def test_no_client_by_any_number_of_connections_refuses_or_puts_out_a_first_session(middle, asks):
    """Eight connections of one client ask for and drop what they like; another's one session of 3/8 never notices."""
    clock = Clock()
    engine, mine = engine_of(middle, clock, 24), 0
    fill(engine, clock, 1, 2, 3, 4)
    for connection, length, keeps in asks:
        if connection == 0:
            engine.decode(9, 1, (1,), rows(1), "modest")  # Never refused.
            mine += 1
            if mine == 9:
                engine.drop_cache(9, 1)
                mine = 0
        elif keeps:
            try:
                engine.decode(connection, 1, (length,), rows(length), "greedy")
            except RemoteProtocolError as error:
                assert error.code in POLITE  # noqa: PT017
                if error.code == "SS-4017":
                    engine.drop_cache(connection, 1)
        else:
            engine.drop_cache(connection, 1)
        assert held(engine) <= 24 * UNIT
        assert (engine.caches.kept[9, 1].length if mine else 0) == mine
        assert (9, 1) not in engine.caches.dropped


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(8, 10), st.randoms(use_true_random=False))
def test_every_session_of_every_client_ends_its_text(middle, sessions, wanted, random):
    """However many each has: one that was refused or put out asks again, and the clock stands still."""
    clock = Clock()
    engine = engine_of(middle, clock, 22)
    todo = {
        n * 10 + i: [f"client-{n}", 0, 1] for n, count in enumerate(sessions) for i in range(count)
    }  # client, tokens, number of its cache
    for _ in range(40 * len(todo)):
        for connection in random.sample(sorted(todo), len(todo)):
            client, reached, cache = todo[connection]
            fresh = (connection, cache) not in engine.caches.kept
            count = max(reached, 1) if fresh and (connection, cache) not in engine.caches.dropped else 1
            try:
                engine.decode(connection, cache, (count,), rows(count), client)
                todo[connection][1] += 1
            except RemoteProtocolError as error:
                if error.code == "SS-4017":
                    engine.drop_cache(connection, cache)
                    todo[connection][2] += 1
            if todo[connection][1] == wanted:
                engine.drop_cache(connection, todo[connection][2])
                del todo[connection]
    assert todo == {}


def test_caches_that_wait_for_room_are_counted_like_those_that_have_it(middle, clock):
    """Else one who asks for another cache after each refusal fills the server's list of those who wait."""
    engine = engine_of(middle, clock, 22)
    for owner in (1, 2):
        engine.decode(owner, 1, (9,), rows(9))
    for cache in range(1, 65):
        assert refused(engine, 3, cache, (5,), rows(5)) == "SS-4040"
    assert refused(engine, 3, 64, (5,), rows(5)) == "SS-4040", "the same one may go on asking"
    assert refused(engine, 3, 65, (5,), rows(5)) == "SS-4034"
    engine.forget(3)
    assert engine.caches._waiting == {}
