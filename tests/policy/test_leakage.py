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
            "profile": profile, "created": (NOW - timedelta(days=days)).isoformat(),
        }  # fmt: skip
        attacks = [{"measure": "tokens", "value": recovery, "pii_exact": pii, "name": "more is said than is read"}]
        if auc is not None:
            attacks.append({"measure": "membership", "value": auc})
        return {"setting": {**facts, **setting}, "attacks": attacks, "worst": recovery, "other": 1}

    return make


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
