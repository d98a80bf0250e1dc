"""A job meets a policy: every breach alone and all together, and a looser wish that never passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from securesplit.admit import WEIGHT_CAP, admit, breaches, label_breaches, round_config, sharing_breaches
from securesplit.errors import InputError, PolicyDenied
from securesplit.policy.load import load_policy
from securesplit.policy.schema import Policy
from securesplit.protocol.job import Job, load_job

ROOT = Path(__file__).resolve().parent.parent
JOB = load_job(ROOT / "examples/job.toml")
SHIPPED = {name: load_policy(ROOT / f"policies/{name}.toml") for name in ("strict", "balanced", "lab")}


def with_changes(table: str, **changes: object) -> Job:
    raw = JOB.model_dump()
    raw[table] = {**raw[table], **changes}
    return Job.model_validate(raw)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_job_passes_the_shipped_policies(name):
    assert breaches(SHIPPED[name], JOB) == ()
    admit(SHIPPED[name], JOB, peer="gpu")


BREACHES = {
    "limits.min_front": ("cut", {"front": 1}),
    "limits.min_back": ("cut", {"back": 0}),
    "limits.max_sequences": ("schedule", {"batch": 65}),
    "aggregation.max_update": ("sums", {"clip": 1.5}),
    "aggregation.blind": ("sums", {"blind": False}),
    "more than half": ("sums", {"roster": ("a", "b", "c", "d")}),
}


@pytest.mark.parametrize("rule", BREACHES)
def test_each_breach_is_named(rule):
    table, changes = BREACHES[rule]
    found = breaches(SHIPPED["balanced"], with_changes(table, **changes))
    assert len(found) == 1
    assert rule in found[0]


def test_who_may_take_part_is_pinned_by_the_client_and_not_by_the_server():
    raw = SHIPPED["balanced"].model_dump()
    plain = Policy.model_validate(raw)
    raw["aggregation"].update(roster=["carol", "alice", "bob"], min_colluders=0)
    pinned = Policy.model_validate(raw)
    assert breaches(pinned, JOB) == ()
    assert pinned.digest != plain.digest
    for roster in (("alice", "bob", "mallory"), ("alice", "bob", "carol", "mallory")):
        job = with_changes("sums", roster=roster, threshold=3)
        (sentence,) = breaches(pinned, job)
        assert "aggregation.roster" in sentence
        assert breaches(plain, job) == ()


def test_sums_that_cannot_be_made_and_those_that_withstand_too_few_are_refused():
    raw = SHIPPED["balanced"].model_dump()
    raw["aggregation"]["min_colluders"] = 2
    wants_two = Policy.model_validate(raw)
    (sentence,) = breaches(wants_two, JOB)
    assert "min_colluders" in sentence
    seven = {"roster": tuple("abcdefg"), "threshold": 6, "min_clients": 6, "colluders": 2}
    assert breaches(wants_two, with_changes("sums", **seven)) == ()
    (sentence,) = breaches(SHIPPED["balanced"], with_changes("sums", **{**seven, "threshold": 5, "colluders": 4}))
    assert "colluders" in sentence


def test_all_breaches_are_named_at_once():
    raw = SHIPPED["balanced"].model_dump()
    raw["aggregation"].update(min_clients=5, min_threshold=4)
    raw["limits"].update(min_front=9)
    with pytest.raises(PolicyDenied, match="SS-2001") as caught:
        admit(Policy.model_validate(raw), with_changes("sums", blind=False), peer="gpu")
    assert caught.value.exit_code == 3
    assert len(caught.value.details) == 4


def test_a_round_takes_nothing_from_the_server_but_its_name():
    config = round_config(JOB, model="0" * 64, run=bytes(16), number=3, dim=7, frozen="1" * 64)
    assert config.roster == tuple(sorted(JOB.sums.roster))
    assert (config.threshold, config.min_clients, config.clip, config.blind) == (2, 3, 1.0, True)
    assert (config.w_max, config.dim, config.round) == (WEIGHT_CAP, 7, 3)
    # The largest possible sum fits the ring with its sign: clients x weight x scale x clip < 2^31.
    assert len(config.roster) * WEIGHT_CAP * config.scale * config.clip < 2**31
    with pytest.raises(InputError, match="SS-1601"):
        round_config(with_changes("sums", threshold=7), model="0" * 64, run=bytes(16), number=0, dim=7, frozen="1" * 64)


def labelled(classes: int) -> Policy:
    raw = SHIPPED["balanced"].model_dump(exclude_none=True)
    del raw["privacy"]["generation"]
    channel = {"clip": 1.0, "share": 0.2, "releases": 2}
    raw["privacy"].update(regime="round", labels={"share": 0.1, "classes": classes}, updates=channel)
    return Policy.model_validate(raw)


@pytest.mark.parametrize(
    ("labels", "said"),
    [(None, r"no [task]"), (("a", "b", "c"), "3 labels; privacy.labels.classes is 2"), (("a", "b"), None)],
)
def test_a_policy_of_labels_wants_a_task_of_as_many(labels, said):
    job = JOB if labels is None else Job.model_validate({**JOB.model_dump(), "task": {"labels": labels}})
    found = breaches(labelled(2), job)
    assert label_breaches(labelled(2), job) == found
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
    for policy in SHIPPED.values():
        assert breaches(policy, job) == (), "a policy that noises what it releases takes any task"


@pytest.mark.parametrize("regime", ["open", "frozen", "frozen with noise", "round", "step"])
def test_what_is_shared_of_adapters_fits_the_regime(regime):
    raw = SHIPPED["balanced"].model_dump(exclude_none=True)
    del raw["privacy"]["generation"]
    channel = {"clip": 1.0, "share": 0.2, "releases": 2}
    raw["privacy"].update({} if regime == "frozen" else {"updates": channel})
    raw["privacy"].update({"regime": regime, "gradients": channel} if regime in ("round", "step") else {})
    policy = SHIPPED["lab"] if regime == "open" else Policy.model_validate(raw)
    refused = {
        "open": set(), "frozen": set(), "frozen with noise": {"naive"}, "round": {"share-a", "naive"}, "step": {"naive"},
    }[regime]  # fmt: skip
    for sharing in ("alternating", "frozen-a", "share-a", "core", "naive"):
        job = with_changes("adapters", sharing=sharing, inexact=sharing == "naive")
        found = sharing_breaches(policy, job)
        assert len(found) == (sharing in refused)
        assert all(f"sharing '{sharing}'" in sentence and sentence in breaches(policy, job) for sentence in found)
