"""A limit on leakage is kept only by a fresh report on the very same mechanism, model, cut and codec."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from securesplit.admit import require_proof
from securesplit.errors import InputError, LeakageExceeded, PolicyDenied
from securesplit.policy.leakage import Leakage, read_proofs
from securesplit.policy.load import load_policy
from securesplit.protocol.job import load_job

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
MODEL = "ab" * 32
KNOWS = {"weights": "pre-trained", "text": "same-domain", "releases": 1_000_000, "conduct": "passive"}


@pytest.fixture
def policy(pytestconfig):
    plain = load_policy(pytestconfig.rootpath / "policies" / "balanced.toml")
    limits = Leakage(token_recovery=0.2, pii_exact=0.05, max_age_days=30, profile="standard")
    return plain.model_copy(update={"leakage": limits})


@pytest.fixture
def job(pytestconfig):
    return load_job(pytestconfig.rootpath / "examples" / "job.toml")


@pytest.fixture
def report(policy, job):
    def make(*, days=1.0, recovery=0.1, pii=0.0, auc=None, profile="standard", **setting):
        facts = {
            "mechanism": policy.mechanism_digest, "model": MODEL, "cut": [job.cut.front, job.cut.back], "codec": job.codec,
            "profile": profile, "created": (NOW - timedelta(days=days)).isoformat(), "releases": 2, "channels": ["O1", "O2"],
            "threat": dict(KNOWS),
        }  # fmt: skip
        attacks = [result("tokens", recovery, pii_exact=pii, more="is said than is read")]
        if auc is not None:
            attacks.append(result("membership", auc))
        checks = [{"name": "O1 energy", "passed": True}]
        return {"setting": {**facts, **setting}, "attacks": attacks, "worst": recovery, "checks": checks, "other": 1}

    return make


def result(measure, value, **more):
    return {"name": f"by {measure}", "measure": measure, "value": value, "value_ci95": [0.9 * value, value], **more}


def check(policy, job, folder, *reports):
    for number, report in enumerate(reports):
        place = folder / f"run-{number}"
        place.mkdir()
        (place / "report.json").write_text(json.dumps(report))
    require_proof(policy, job, model=MODEL, proofs=read_proofs(folder), now=NOW)


def test_a_fresh_report_within_the_limits_lets_the_job_pass(policy, job, report, tmp_path):
    check(policy, job, tmp_path, report(recovery=0.2))


def test_a_policy_without_the_table_needs_nothing(policy, job):
    require_proof(policy.model_copy(update={"leakage": None}), job, model=MODEL, proofs=())


@pytest.mark.parametrize(
    "change",
    [
        {"mechanism": "0" * 64},
        {"model": "cd" * 32},
        {"cut": [1, 1]},
        {"cut": None},
        {"codec": "bf16"},
        {"asked": ["ridge"]},
    ],
)
def test_a_report_on_anything_else_proves_nothing(policy, job, report, tmp_path, change):
    with pytest.raises(PolicyDenied) as caught:
        check(policy, job, tmp_path, report(**change))
    assert caught.value.code == "SS-2027"


@pytest.mark.parametrize(("days", "word"), [(31, "days old"), (-2, "from the future")])
def test_a_report_of_another_time_proves_nothing(policy, job, report, tmp_path, days, word):
    with pytest.raises(PolicyDenied) as caught:
        check(policy, job, tmp_path, report(days=days))
    assert word in caught.value.details[0]


def test_less_effort_than_the_policy_asks_for_proves_nothing(policy, job, report, tmp_path):
    with pytest.raises(PolicyDenied):
        check(policy, job, tmp_path, report(profile="smoke"))


def test_the_last_report_decides_even_if_an_older_one_was_better(policy, job, report, tmp_path):
    with pytest.raises(LeakageExceeded) as caught:
        check(policy, job, tmp_path, report(days=3, recovery=0.1), report(days=1, recovery=0.21), report(days=2))
    assert (caught.value.code, caught.value.exit_code) == ("SS-7002", 7)
    assert caught.value.details == ("the attacks got token_recovery 0.210; leakage.token_recovery is 0.2",)


def test_every_exceeded_limit_is_named(policy, job, report, tmp_path):
    with pytest.raises(LeakageExceeded) as caught:
        check(policy, job, tmp_path, report(recovery=0.5, pii=0.5))
    assert len(caught.value.details) == 2


def test_what_was_not_measured_is_not_proven(policy, job, report, tmp_path):
    with pytest.raises(PolicyDenied) as caught:
        check(policy, job, tmp_path, report(pii=None))
    assert caught.value.details == ("the last report did not measure pii_exact",)
    strict = policy.model_copy(update={"leakage": Leakage(membership_auc=0.6, max_age_days=9)})
    with pytest.raises(PolicyDenied):
        require_proof(strict, job, model=MODEL, proofs=read_proofs(tmp_path), now=NOW)
    (tmp_path / "auc.json").write_text(json.dumps(report(days=0.5, auc=0.55)))
    require_proof(strict, job, model=MODEL, proofs=read_proofs(tmp_path), now=NOW)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"threat": {**KNOWS, "weights": "none"}}, "weights"),
        ({"threat": {**KNOWS, "text": "none"}}, "no text"),
        ({"channels": []}, "O1"),
        ({"asked": ["ridge"]}, "by name"),
        ({"profile": "smoke"}, "profile"),
    ],
)
def test_a_report_by_a_blind_adversary_proves_nothing(policy, job, report, tmp_path, change, word):
    with pytest.raises(PolicyDenied) as caught:
        check(policy, job, tmp_path, report(**change))
    assert caught.value.code == "SS-2027"
    assert word in caught.value.details[0]


@pytest.mark.parametrize(
    "change", [{"weights": "round-start"}, {"weights": "exact", "text": "colluder"}, {"text": "fifty"}]
)
def test_an_adversary_who_knows_more_proves_as_much(policy, job, report, tmp_path, change):
    check(policy, job, tmp_path, report(threat={**KNOWS, **change}))


def learning(policy, regime):
    """The policy's budget, with gradients and updates, in another regime."""
    stated = policy.privacy.model_dump(mode="json")
    stated |= {
        "regime": regime, "activations": {"clip": 10.0, "share": 0.4, "releases": 8},
        "gradients": {"clip": 1.0, "share": 0.3, "releases": 8}, "updates": {"clip": 1.0, "share": 0.3, "releases": 8},
        "generation": None,
    }  # fmt: skip
    return policy.model_copy(update={"privacy": type(policy.privacy).model_validate_json(json.dumps(stated))})


@pytest.mark.parametrize(("regime", "fresh"), [("round", 2), ("step", 2 * 3)])
def test_a_recording_with_fewer_releases_or_without_gradients_proves_no_training(
    policy, job, report, tmp_path, regime, fresh
):
    rules = learning(policy, regime)
    schedule = job.schedule.model_copy(update={"rounds": 2, "epochs": 3})
    job = job.model_copy(update={"schedule": schedule})
    right = {"mechanism": rules.mechanism_digest, "releases": fresh, "channels": ["O1", "O2", "O3"]}
    for number, change in enumerate(
        ({"releases": fresh - 1}, {"channels": ["O1", "O2"]}, {"threat": {**KNOWS, "releases": fresh - 1}})
    ):
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.raises(PolicyDenied) as caught:
            check(rules, job, place, report(**{**right, **change}))
        assert len(caught.value.details) == 1
    check(rules, job, tmp_path, report(**right))


def test_a_recording_of_blind_sums_proves_no_job_whose_sums_are_opened(policy, job, report, tmp_path):
    opened = job.model_copy(update={"sums": job.sums.model_copy(update={"blind": False})})
    with pytest.raises(PolicyDenied, match="no fresh report"):
        check(policy, opened, tmp_path, report())
    (tmp_path / "sums.json").write_text(json.dumps(report(channels=["O1", "O5"])))
    require_proof(policy, opened, model=MODEL, proofs=read_proofs(tmp_path), now=NOW)


@pytest.mark.parametrize("change", [{"code": "ef" * 32}, {"classes": 3}])
def test_a_recording_under_another_code_or_task_proves_nothing(policy, job, report, tmp_path, change):
    with pytest.raises(PolicyDenied):
        check(policy, job, tmp_path, report(**change))


def broken(report, **changes):
    return {**report, **changes}


def test_a_report_that_accuses_its_own_recording_proves_nothing_and_no_older_one_stands_in(
    policy, job, report, tmp_path
):
    good = report(days=2)
    for number, (bad, word) in enumerate(
        (
            (broken(report(), checks=[{"name": "O1 energy", "passed": False}]), "O1 energy"),
            (broken(report(), attacks=[result("tokens", 0.1, pii_exact=0.0, ceiling=0.05)]), "bound"),
            (broken(report(), worst=0.99), "worst"),
            (broken(report(), worst=0.0), "worst"),
        )
    ):
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.raises(PolicyDenied) as caught:
            check(policy, job, place, good, bad)
        assert word in caught.value.details[0]
    (tmp_path / "below").mkdir()
    check(
        policy, job, tmp_path / "below", broken(report(), attacks=[result("tokens", 0.1, pii_exact=0.0, ceiling=0.095)])
    )


def test_the_named_share_of_a_sum_counts_as_recovery(policy, job, report, tmp_path):
    mixed = report()
    mixed["attacks"].append(result("bag", 1.0))
    with pytest.raises(LeakageExceeded) as caught:
        check(policy, job, tmp_path, mixed)
    assert "1.000" in caught.value.details[0]


def test_the_worst_of_each_profiles_last_report_counts_in_any_order(policy, job, report, tmp_path):
    same = (report(recovery=0.9), report())
    full = (report(days=5, recovery=0.9, profile="full"), report())
    stale = (report(days=200, recovery=0.9, profile="full"), report())
    for number, pair in enumerate((same, same[::-1], full, full[::-1], stale)):
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.raises(LeakageExceeded):
            check(policy, job, place, *pair)
    (tmp_path / "more").mkdir()
    check(policy, job, tmp_path / "more", report(days=200, profile="full"), report(), report(days=0.1, profile="smoke"))


@pytest.mark.parametrize("key", ["checks", "worst"])
def test_a_report_without_its_own_checks_is_unreadable(report, tmp_path, key):
    trimmed = report()
    del trimmed[key]
    (tmp_path / "report.json").write_text(json.dumps(trimmed))
    with pytest.raises(InputError):
        read_proofs(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"setting": {}, "attacks": []}', "\x00"])
def test_a_report_that_nobody_can_read_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(InputError) as caught:
        read_proofs(tmp_path)
    assert caught.value.code == "SS-1115"
    with pytest.raises(InputError):
        read_proofs(tmp_path / "absent")


def test_a_table_without_a_limit_is_refused():
    with pytest.raises(ValidationError, match="state at least one"):
        Leakage(max_age_days=3)


def test_words_and_limits_do_not_change_the_mechanism(policy):
    assert policy.mechanism_digest == policy.model_copy(update={"name": "other", "leakage": None}).mechanism_digest
    assert policy.digest != policy.model_copy(update={"leakage": None}).digest
    changed = policy.privacy.model_copy(update={"epsilon": 7.0})
    assert policy.mechanism_digest != policy.model_copy(update={"privacy": changed}).mechanism_digest
