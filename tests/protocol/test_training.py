"""The table [training] of a job: what contradicts its mode is named at once, and old jobs keep their digests."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from securesplit.protocol.job import Job, Training

ROSTER = ("carol", "alice", "bob", "dave")


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"mode": "splitfed-v3"}, "needs every"),
        ({"mode": "hierarchical"}, "needs every"),
        ({"mode": "splitfed-v2", "every": 3}, "every belongs to"),
        ({"mode": "splitfed-v1", "groups": [["a"]]}, "groups belong to"),
        ({"mode": "hierarchical", "every": 1, "groups": [["a", "b"], ["b"]]}, "two groups"),
        ({"mode": "splitfed-v3", "every": 1, "personal": ["back"]}, "personal already"),
        ({"personal": ["back", "back"]}, "twice"),
        ({"personal": ["back", "front"]}, "nothing is left to sum"),
        ({"mode": "sequential", "personal": ["back"]}, "hands both parts over"),
    ],
)
def test_what_contradicts_the_mode_is_told(raw, told):
    with pytest.raises(ValidationError, match=told):
        Training.model_validate(raw)


def test_all_contradictions_at_once():
    with pytest.raises(ValidationError) as caught:
        Training.model_validate({"mode": "sequential", "every": 2, "groups": [["a"]], "personal": ["back"]})
    assert str(caught.value).count(";") >= 2


def test_who_shares_a_copy():
    assert Training().lanes(ROSTER) == (("alice", "bob", "carol", "dave"),)
    assert Training(mode="splitfed-v1").lanes(ROSTER) == (("alice",), ("bob",), ("carol",), ("dave",))
    grouped = Training(mode="hierarchical", every=2, groups=(("dave", "bob"),))
    assert grouped.lanes(ROSTER) == (("bob", "dave"), ("alice",), ("carol",))


def raw_job(**tables):
    base = {
        "name": "j", "model": "m", "cut": {"front": 1, "back": 1}, "adapters": {"rank": 2, "alpha": 4.0, "seed": 1},
        "optimiser": {"client_lr": 1e-3, "server_lr": 1e-3}, "schedule": {"rounds": 1, "epochs": 1, "batch": 2},
        "sums": {"roster": ["alice", "bob", "carol"], "threshold": 2, "clip": 1.0, "blind": True},
    }  # fmt: skip
    return {**base, **tables}


def test_a_job_that_says_nothing_of_training_is_what_it_was():
    job = Job.model_validate(raw_job())
    assert "training" not in job.canonical()
    assert job.mode == Training()


def test_without_sums_one_client_is_enough_and_nothing_need_be_said_of_them():
    job = Job.model_validate(raw_job(training={"mode": "splitfed-v3", "every": 4}, sums={"roster": ["alice"]}))
    assert job.sums.roster == ("alice",)
    again = Job.model_validate_json(job.canonical(), strict=False)
    assert again.digest == job.digest


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"sums": {"roster": ["alice", "bob"], "threshold": 2, "clip": 1.0, "blind": True}}, "need three clients"),
        ({"sums": {"roster": ["alice", "bob", "carol"]}}, "Field required"),
        ({"training": {"mode": "hierarchical", "every": 1, "groups": [["eve"]]}}, "not on the roster"),
        ({"training": {"mode": "sequential"}, "adapters": {"rank": 1, "alpha": 1.0, "seed": 1, "sharing": "share-a"}}, "hands one over"),
        ({"training": {"mode": "splitfed-v3", "every": 1}, "adapters": {"rank": 1, "alpha": 1.0, "seed": 1, "sharing": "core"}}, "has none"),
    ],
)  # fmt: skip
def test_what_other_tables_must_say_for_a_mode(tables, told):
    with pytest.raises(ValidationError, match=told):
        Job.model_validate(raw_job(**tables))
