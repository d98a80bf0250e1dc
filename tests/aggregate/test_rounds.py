"""Whole rounds against plain Python integers, with clients leaving at every stage."""

import numpy as np
import pytest

from securesplit.aggregate import client, encryption, wire
from securesplit.errors import AggregationAborted

ALL = ("amir", "bea", "chloe", "dan", "eve")


@pytest.mark.parametrize("blind", [False, True])
def test_every_client_opens_exactly_the_plain_integer_sum(cohort_of, signed_of, blind):
    c = cohort_of(blind=blind, dim=70_001, scale=40_000_000).run()
    assert not c.failed
    want = c.plain_sum(ALL)
    for member in c.clients.values():
        assert signed_of(member.result.ring_sum) == want
        assert member.result.total_weight == 1 + 2 + 3 + 4 + 5
        assert member.result.survivors == ALL
        mean = sum(np.clip(c.updates[n], -0.5, 0.5) * c.weights[n] for n in ALL) / 15
        np.testing.assert_allclose(member.result.mean, mean, rtol=0, atol=0.5 / 40_000_000)
    assert c.server.result.survivors == ALL
    assert (c.server.result.aggregate is None) is blind


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("gone", [("eve",), ("amir", "chloe")])
def test_a_round_survives_drops_at_every_stage(cohort_of, signed_of, blind, stage, gone):
    c = cohort_of(blind=blind).run(vanish=dict.fromkeys(gone, stage))
    in_sum = ALL if stage > wire.MASKED else tuple(n for n in ALL if n not in gone)
    assert c.server.result.survivors == in_sum
    for name, member in c.clients.items():
        if name not in gone:
            assert signed_of(member.result.ring_sum) == c.plain_sum(in_sum)


def test_drops_at_several_stages_of_one_round(cohort_of, signed_of):
    roster = tuple(f"c{i:02d}" for i in range(12))
    vanish = {"c00": 0, "c03": 1, "c11": 2, "c07": 3, "c05": 4}
    c = cohort_of(roster=roster, threshold=7, min_clients=7, blind=True).run(vanish=vanish)
    in_sum = tuple(n for n in roster if n not in {"c00", "c03", "c11"})
    assert c.server.result.survivors == in_sum
    assert signed_of(c.clients["c01"].result.ring_sum) == c.plain_sum(in_sum)


@pytest.mark.parametrize("stage", [wire.CONSISTENT, wire.UNMASK])
@pytest.mark.parametrize("blind", [False, True])
def test_three_clients_with_threshold_two_keep_one_that_left_after_masking(cohort_of, signed_of, stage, blind):
    roster = ("amir", "bea", "chloe")
    c = cohort_of(roster=roster, threshold=2, blind=blind).run(vanish={"bea": stage})
    assert c.server.result.survivors == roster
    for name in ("amir", "chloe"):
        assert signed_of(c.clients[name].result.ring_sum) == c.plain_sum(roster)


@pytest.mark.parametrize("stage", range(5))
def test_too_few_clients_abort_at_every_stage_and_leave_no_sum(cohort_of, stage):
    c = cohort_of().run(vanish=dict.fromkeys(("amir", "bea", "eve"), stage))
    assert c.server.aborted == "SS-6010"
    assert c.server.result is None
    assert c.server._tally._words is None
    assert all(member.result is None for member in c.clients.values())
    told = [error for name, error in c.failed.items() if name in {"chloe", "dan"}]
    assert {error.code for error in told} == {"SS-6010"}
    assert all(isinstance(error, AggregationAborted) and error.exit_code == 5 for error in told)


def test_fewer_masked_vectors_than_min_clients_abort_though_the_threshold_would_allow(cohort_of):
    c = cohort_of(threshold=3, min_clients=5).run(vanish={"bea": wire.MASKED})
    assert (c.server.aborted, c.server.result) == ("SS-6010", None)
    # The server itself stops here; it does not leave that to its clients.
    assert not [stage for _, stage, _, _ in c.down if stage in {wire.MASKED, wire.CONSISTENT}]


def test_a_masked_vector_hides_the_contribution_and_differs_by_round(cohort_of):
    vectors = []
    for number in (1, 2):
        c = cohort_of(round=number, dim=20_000).run()
        for name, stage, _, vector in c.up:
            if stage == wire.MASKED:
                hidden = vector - c.clients[name].contribution
                assert np.count_nonzero(hidden) > 19_900
                # The top byte of the mask is uniform: chi-square over 255 degrees of freedom, 1e-9 bound about 400.
                counts = np.bincount(hidden >> 24, minlength=256)
                assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 400
                vectors.append(vector.tobytes())
    assert len(set(vectors)) == 10


def test_no_stream_key_is_used_twice_but_by_the_two_ends_of_a_pair(cohort_of, monkeypatch):
    used: list[bytes] = []
    original = client.add_streams

    def spy(vector, plus=(), minus=(), **prg):
        used.extend((*plus, *minus))
        original(vector, plus, minus, **prg)

    monkeypatch.setattr(client, "add_streams", spy)
    monkeypatch.setattr(encryption, "add_streams", spy)
    per_round = []
    for number in (1, 2, 3):
        used.clear()
        # The same deterministic identities, the same data, the same everything but the number of the round.
        cohort_of(round=number, blind=True).run(vanish=dict.fromkeys(ALL, wire.CONSISTENT))
        counts = {key: used.count(key) for key in used}
        assert sorted(counts.values()) == [1] * 10 + [2] * 10  # 5 own masks and 5 blinds, 10 pairs
        per_round.append(set(counts))
    assert not per_round[0] & per_round[1]
    assert not (per_round[0] | per_round[1]) & per_round[2]


def test_equal_randomness_in_another_round_still_gives_other_masks(cohort_of):
    first, second = (cohort_of(seed="stuck", round=n).run() for n in (1, 2))
    a, b = ([v.tobytes() for _, stage, _, v in c.up if stage == wire.MASKED] for c in (first, second))
    assert not set(a) & set(b)


def test_in_blind_rounds_the_server_holds_noise(cohort_of, signed_of):
    c = cohort_of(blind=True, dim=20_000).run()
    seen = c.server.result.ring_sum
    want = np.array(c.plain_sum(ALL), dtype=np.int64).astype(np.uint32)
    difference = seen - want
    assert np.count_nonzero(difference) > 19_900
    counts = np.bincount(difference >> 24, minlength=256)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 400
    assert signed_of(c.clients["dan"].result.ring_sum) == signed_of(want)


def test_the_weights_are_in_no_message(cohort_of):
    c = cohort_of(w_max=200_0, dim=3, scale=100)
    c.weights["bea"] = 1777
    c.run()
    assert c.clients["amir"].result.total_weight == 1 + 1777 + 3 + 4 + 5
    for _, stage, body, vector in c.up:
        assert (1777).to_bytes(2, "big") not in body or stage != wire.MASKED
        assert vector is None or 1777 not in vector.tolist()
