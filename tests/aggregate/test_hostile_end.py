"""A hostile server in stages 2 to 4: false survivors, two stories, second requests. No trick gets both shares of a client."""

import numpy as np
import pytest

from securesplit.aggregate import wire
from securesplit.aggregate.client import State
from securesplit.aggregate.keys import bind, statement
from securesplit.errors import AggregationAborted

ALL = ("amir", "bea", "chloe", "dan", "eve")

# Stage 2: survivors.


@pytest.mark.parametrize(
    ("survivors", "dropped", "code"),
    [
        (ALL, ("bea",), "SS-6009"),  # wants b and s of bea
        (("amir", "chloe", "dan"), ("bea", "dan", "eve"), "SS-6009"),
        (("bea", "chloe", "dan"), ("amir", "eve"), "SS-6008"),  # without self
        (("amir", "bea", "chloe"), ("dan",), "SS-6008"),
        (("amir", "bea", "chloe", "mallory"), ("dan", "eve"), "SS-6008"),
        (("amir", "bea"), ("chloe", "dan", "eve"), "SS-6010"),  # a sum of two
        (("amir",), ("bea", "chloe", "dan", "eve"), "SS-6010"),  # a sum of one
        (("bea", "amir", "chloe"), ("dan", "eve"), "SS-6008"),
        (("amir", "amir", "bea"), ("chloe", "dan", "eve"), "SS-6008"),
    ],
)
def test_wrong_survivors_are_refused(cohort_of, survivors, dropped, code):
    c = cohort_of().run(until=2)
    body = c.told("amir", 2).model_copy(update={"survivors": survivors, "dropped": dropped})
    assert c.refusal("amir", 2, body) == code


# Stages 3 and 4: the set that was signed is the set that is opened.


def test_two_stories_about_the_survivors_open_nothing(cohort_of):
    """The classic attack: some clients hear that bea dropped, some that she did not; both kinds of shares would follow."""

    def split_view(delivery):
        if delivery.stage == wire.MASKED and delivery.to in {"amir", "eve"}:
            told = wire.decode(wire.Survivors, delivery.body)
            lie = told.model_copy(update={"survivors": ("amir", "chloe", "dan", "eve"), "dropped": ("bea",)})
            return delivery._replace(body=wire.encode(lie))
        if delivery.stage == wire.CONSISTENT and delivery.to in {"amir", "eve"}:
            # Of the five signatures, hand on those that could pass: not that of a client outside their set.
            bundle = wire.decode(wire.Bundle, delivery.body)
            rest = tuple((n, s) for n, s in bundle.signatures if n != "bea")
            return delivery._replace(body=wire.encode(bundle.model_copy(update={"signatures": rest})))
        return delivery

    c = cohort_of()
    # A hostile server does not refuse the two odd signatures; what is tested is the clients' own defence.
    c.server._verify = None
    c.run(tamper=split_view)
    answered = {name for name, stage, _, _ in c.up if stage == wire.UNMASK}
    assert answered == {"bea", "chloe", "dan"}
    assert c.failed["amir"].code == c.failed["eve"].code == "SS-6010"
    kinds = [
        ("b", n)
        for name, stage, body, _ in c.up
        if stage == wire.UNMASK
        for n, _ in wire.decode(wire.Unmask, body).self_shares
    ]
    assert all(not wire.decode(wire.Unmask, body).seed_shares for _, stage, body, _ in c.up if stage == wire.UNMASK)
    assert kinds.count(("b", "bea")) == 3


def test_never_shares_of_b_and_s_of_one_client_from_anybody(cohort_of):
    c = cohort_of().run(vanish={"eve": wire.MASKED})
    asked = {"b": set(), "s": set()}
    for _, stage, body, _ in c.up:
        if stage == wire.UNMASK:
            answer = wire.decode(wire.Unmask, body)
            asked["b"] |= {n for n, _ in answer.self_shares}
            asked["s"] |= {n for n, _ in answer.seed_shares}
    assert asked == {"b": {"amir", "bea", "chloe", "dan"}, "s": {"eve"}}


def test_a_second_unmask_request_is_refused_and_says_nothing(cohort_of):
    c = cohort_of().run(until=4)
    assert all(member.state is State.UNMASKED for member in c.clients.values())
    assert c.refusal("amir", 3, c.told("amir", 3)) == "SS-6005"
    assert c.refusal("bea", 2, c.told("bea", 2)) == "SS-6005"


def test_survivors_cannot_be_told_twice(cohort_of):
    c = cohort_of().run(until=3)
    told = c.told("amir", 2).model_copy(update={"survivors": ("amir", "bea", "chloe"), "dropped": ("dan", "eve")})
    assert c.refusal("amir", 2, told) == "SS-6005"


def test_a_restarted_client_does_not_answer_the_same_round_again(cohort_of):
    first = cohort_of().run()
    second = cohort_of(answered=first.answered)

    def refuse(record):
        raise AggregationAborted("SS-6015", "answered before")

    second.clients["amir"]._persist = refuse
    second.run()
    assert second.failed["amir"].code == "SS-6015"
    assert "amir" not in {name for name, stage, _, _ in second.up if stage == wire.UNMASK}
    known = first.answered["bea"][0]
    assert (known.session_id, known.round, known.t3) == (first.config.session_id, 1, first.clients["bea"]._t3)
    assert known.survivors == first.config.roster


def test_the_record_is_made_before_any_share_leaves(cohort_of):
    c = cohort_of().run(until=3)
    assert all(records == [] for records in c.answered.values())

    def full_disk(record):
        raise OSError

    member = c.clients["amir"]
    member._persist = full_disk
    with pytest.raises(OSError, match=r"^$"):
        member.receive(3, wire.encode(c.told("amir", 3)))
    assert member.state is State.ABORTED
    assert member._held == {}


def signatures_over(c, names, t3):
    draft = wire.Consistent(session=c.config.session_id, round=1, cfg=c.config.digest, signature=bytes(64))
    said = statement("consistent", t3, wire.unsigned(draft))
    return tuple((n, c.identities[n].sign(said)) for n in names)


@pytest.mark.parametrize(
    ("signers", "code"),
    [
        (("amir", "bea"), "SS-6010"),
        ((), "SS-6010"),
        (("amir", "amir", "amir"), "SS-6008"),
        (("bea", "amir", "chloe"), "SS-6008"),
    ],
)
def test_fewer_than_t_distinct_signatures_open_nothing(cohort_of, signers, code):
    c = cohort_of().run(until=3)
    body = c.told("amir", 3).model_copy(update={"signatures": signatures_over(c, signers, c.clients["amir"]._t3)})
    assert c.refusal("amir", 3, body) == code


def test_signatures_over_another_set_do_not_count(cohort_of):
    c = cohort_of().run(until=3)
    other = bind("ssa-1/u3", c.clients["amir"]._t2, [b"amir", b"chloe", b"dan"])
    good = signatures_over(c, ("amir", "bea"), c.clients["amir"]._t3)
    body = c.told("amir", 3).model_copy(
        update={"signatures": (*good, *signatures_over(c, ("chloe", "dan", "eve"), other))}
    )
    assert c.refusal("amir", 3, body) == "SS-6010"


def test_a_bad_signature_costs_only_itself(cohort_of):
    c = cohort_of().run(until=3)
    good = c.told("amir", 3)
    body = good.model_copy(
        update={"signatures": tuple((n, bytes(64) if n in {"bea", "eve"} else s) for n, s in good.signatures)}
    )
    (out,) = c.clients["amir"].receive(3, wire.encode(body))
    assert out.stage == wire.UNMASK


def test_a_signer_outside_the_survivors_does_not_count(cohort_of):
    c = cohort_of().run(vanish={"eve": wire.MASKED}, until=3)
    body = c.told("amir", 3)
    extra = signatures_over(c, ("eve",), c.clients["amir"]._t3)
    assert c.refusal("amir", 3, body.model_copy(update={"signatures": body.signatures + extra})) == "SS-6008"


# The result, and everything malformed.


def test_a_server_that_adds_to_a_blind_sum_cannot_tell_what_it_hit(cohort_of):
    # With a refusal it could: whoever refuses shows where the hidden word stood, bit by bit.
    c = cohort_of(blind=True, dim=200).run(until=4)
    ring = c.server.result.ring_sum
    for name, delta in (("amir", 1 << 31), ("bea", 1 << 20), ("chloe", 12345)):
        moved = ring.copy()
        moved[[0, -1]] += np.uint32(delta)
        assert c.clients[name].receive(4, wire.encode(c.told(name, 4)), moved) == []
        opened = c.clients[name].result
        assert np.abs(opened.mean).max() <= c.config.clip
        assert len(opened.survivors) <= opened.total_weight <= len(opened.survivors) * c.config.w_max


def test_a_result_that_cannot_be_is_refused(cohort_of):
    c = cohort_of(dim=200).run(until=4)
    ring = c.server.result.ring_sum
    result = c.told("amir", 4)
    noise = np.random.default_rng(1).integers(0, 1 << 32, ring.size, dtype=np.uint32)
    assert c.refusal("amir", 4, result, noise) == "SS-6011"
    heavy = ring.copy()
    heavy[-1] += np.uint32(1 << 20)
    assert c.refusal("bea", 4, result, heavy) == "SS-6011"
    assert c.refusal("chloe", 4, result, ring[:-1]) == "SS-6014"
    assert c.refusal("dan", 4, result, None) == "SS-6014"
    assert c.refusal("eve", 4, result.model_copy(update={"survivors": ALL[:-1]}), ring) == "SS-6008"
    assert all(member.result is None for member in c.clients.values())


@pytest.mark.parametrize("stage", range(5))
def test_garbage_ends_the_round_of_that_client_alone(cohort_of, stage):
    c = cohort_of().run(until=stage)
    assert c.refusal("amir", stage, b"\xff\x00garbage") == "SS-6014"
    assert c.clients["bea"].state is not State.ABORTED


@pytest.mark.parametrize("stage", range(4))
def test_a_vector_where_none_belongs_is_refused(cohort_of, stage):
    c = cohort_of().run(until=stage)
    assert c.refusal("amir", stage, c.told("amir", stage), np.zeros(8, dtype=np.uint32)) == "SS-6014"


@pytest.mark.parametrize("stage", [1, 2, 3, 4, 5, 14])
def test_messages_out_of_order_are_terminal(cohort_of, stage):
    c = cohort_of().run(until=0)
    assert c.refusal("amir", stage, b"") == "SS-6005"


def test_the_servers_abort_is_passed_on_with_its_code(cohort_of):
    c = cohort_of().run(until=2)
    config = c.config
    body = wire.Abort(session=config.session_id, round=1, cfg=config.digest, code="SS-6013")
    assert c.refusal("amir", 15, body) == "SS-6013"


def test_a_client_outside_the_roster_cannot_begin(cohort_of, config_of):
    c = cohort_of()
    with pytest.raises(AggregationAborted) as error:
        c.client("eve", config=config_of(roster=("amir", "bea", "chloe"), threshold=2))
    assert error.value.code == "SS-6003"
