"""What clients claim where a server does not know which round had the last sum, by itself."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.protocol.messages import RoundKept
from securesplit.server.claims import Claim, Claims

NAMES = ("a", "b", "c", "d", "e")
RUN = b"r" * 16


def kept(number=3, clients=NAMES, run=RUN):
    return RoundKept(round=number, run=run, clients=clients)


def claims_of(*said) -> Claims:
    claims = Claims(NAMES, 3)
    for name, message in said:
        claims.add(name, message, 0.0)
    return claims


def test_a_quorum_of_one_mind_is_believed_and_others_are_not():
    claims = claims_of(("a", kept()), ("b", kept()), ("d", kept(4)), ("e", kept(clients=("b", "d", "e"))))
    assert claims.believed({}) is None
    claims.add("c", kept(run=b"o" * 16), 1.0)
    assert claims.believed({}) == Claim(3, NAMES, (("a", RUN), ("b", RUN), ("c", b"o" * 16)))


def test_who_is_ready_for_a_later_round_bears_it_out():
    claims = claims_of(("a", kept()))
    assert claims.believed({"b": 4, "c": 3}) is None
    assert claims.believed({"b": 4, "c": 4}) is not None


def test_one_alone_is_believed_where_it_costs_nothing():
    """Its claim is over the whole roster, and everybody else is here and wants that sum."""
    claims, want = claims_of(("a", kept())), dict.fromkeys("bcde", 3)
    assert claims.believed(want) is not None
    assert claims.believed(want | {"e": 2}) is None
    del want["e"]
    assert claims.believed(want) is None
    assert claims_of(("a", kept(clients=("a", "b", "c", "d")))).believed(want) is None, "it would leave e out"


def test_each_has_one_claim_and_its_time():
    claims = claims_of(("a", kept()), ("b", kept()))
    claims.add("a", kept(9), 5.0)
    assert claims.stale(10.0, 10.0) == ()
    assert claims.stale(10.1, 10.0) == ("a", "b")
    claims.drop("a")
    claims.drop("b")
    assert not claims
    assert claims.stale(99.0, 0.0) == ()


HOSTILE = st.tuples(st.sampled_from("ab"), st.integers(0, 5), st.sets(st.sampled_from(NAMES), min_size=3))


@settings(deadline=None, max_examples=60)
@given(st.lists(HOSTILE, max_size=8), st.dictionaries(st.sampled_from("cde"), st.just(2), max_size=3))
def test_fewer_than_a_quorum_are_believed_in_nothing_that_could_cost_the_others_a_round(said, honest):
    """Two of five claim what they like; the honest want round 2. Only that they all make it together is believed."""
    claims = claims_of(*((name, kept(number, tuple(clients))) for name, number, clients in said))
    claim = claims.believed(honest)
    if claim is None:
        return
    ahead = sum(number > claim.round for name, number in honest.items() if name in claim.clients)
    assert (claim.round, claim.clients) == (2, NAMES) or ahead + len(claim.by) >= 3
    assert claim.round <= 2, "never of a later round than the honest ones are at"
