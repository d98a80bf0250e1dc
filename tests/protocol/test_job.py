"""A job: what ships is sound, faults are named at once, the peer's is never trusted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from securesplit.errors import InputError, RemoteProtocolError
from securesplit.protocol.job import Job, load_job, parse_job

EXAMPLE = Path(__file__).parents[2] / "examples" / "job.toml"
TEXT = EXAMPLE.read_text(encoding="utf-8")
PRIVATE = ("epsilon", "delta", "sigma", "clip_norm", "noise", "mechanism", "budget")


def test_the_example_travels_as_it_is():
    job = load_job(EXAMPLE)
    assert parse_job(job.canonical()) == job
    assert job.digest == hashlib.sha256(job.canonical().encode()).hexdigest()
    assert json.loads(job.canonical()) == job.model_dump(mode="json", exclude_none=True)
    assert " " not in job.canonical()


def test_no_privacy_parameter_stands_in_a_job():
    assert not [name for name in PRIVATE if f'"{name}"' in load_job(EXAMPLE).canonical()]
    for name in PRIVATE:
        with pytest.raises(RemoteProtocolError) as caught:
            parse_job(load_job(EXAMPLE).canonical().replace('"name"', f'"{name}":1,"name"', 1))
        assert caught.value.code == "SS-4006"


def test_every_fault_of_a_job_file_is_named_at_once(tmp_path):
    path = tmp_path / "job.toml"
    bad = (
        TEXT.replace("front = 2", "front = -1")
        .replace("rank = 8", 'rank = "8"')
        .replace("seed = 7", "epsilon = 8.0\nseed = 7")
    )
    path.write_text(bad.replace("client_lr = 2e-3", "client_lr = nan").replace("blind = true", ""))
    with pytest.raises(InputError) as caught:
        load_job(path)
    assert caught.value.code == "SS-1111"
    starts = ("cut.front:", "adapters.rank:", "adapters.epsilon:", "optimiser.client_lr:", "sums.blind:")
    assert len(caught.value.details) == len(starts)
    for start in starts:
        assert any(line.startswith(start) for line in caught.value.details)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "broken.toml").write_text("[cut")
    for name in ("absent.toml", "binary.toml", "broken.toml"):
        with pytest.raises(InputError) as caught:
            load_job(tmp_path / name)
        assert caught.value.code == "SS-1110"


def test_any_change_changes_the_digest():
    job = load_job(EXAMPLE)
    digests = {job.digest}
    assert job.code is None
    coded = {**job.model_dump(mode="json"), "code": {"digest": "0" * 64, "width": 64}}
    for code in (coded["code"], {"digest": "1" * 64, "width": 64}, {"digest": "0" * 64, "width": 63}):
        digests.add(Job.model_validate({**coded, "code": code}).digest)
    for table in ("cut", "adapters", "optimiser", "schedule", "sums"):
        for key, value in job.model_dump(mode="json", exclude_none=True)[table].items():
            raw = job.model_dump(mode="json")
            raw[table][key] = (
                (not value)
                if isinstance(value, bool)
                else value + 1
                if isinstance(value, int)
                else value / 2
                if isinstance(value, float)
                else [*value, "zoe"]
            )
            digests.add(Job.model_validate(raw).digest)
    assert len(digests) == 1 + 3 + sum(
        len(job.model_dump(exclude_none=True)[t]) for t in ("cut", "adapters", "optimiser", "schedule", "sums")
    )
    base = job.model_dump(mode="json", exclude_none=True)
    further = {
        "reconnect_seconds": 5.0,
        "colluders": 1,
        "ring_bits": 64,
        "backend": "bfv",
        "prg": "chacha20",
        "weights": "uniform",
    }
    others = {Job.model_validate({**base, "sums": {**base["sums"], k: v}}).digest for k, v in further.items()}
    assert len(others | digests) == len(digests) + len(further)


def test_a_code_is_named_or_absent_and_nothing_between():
    raw = load_job(EXAMPLE).model_dump(mode="json")
    assert "code" not in json.loads(load_job(EXAMPLE).canonical()), "a job without one is what it was before codes"
    named = Job.model_validate({**raw, "code": {"digest": "a" * 64, "width": 64}})
    assert parse_job(named.canonical()) == named
    for code in (
        {}, {"digest": "a" * 64}, {"width": 64}, {"digest": "A" * 64, "width": 64}, {"digest": "a" * 63, "width": 64},
        {"digest": "a" * 64, "width": 0}, {"digest": "a" * 64, "width": 1.5}, {"digest": "a" * 64, "width": 64, "clip": 1.0},
    ):  # fmt: skip
        with pytest.raises(RemoteProtocolError, match="SS-4006"):
            parse_job(json.dumps({**raw, "code": code}))


def test_a_task_is_absent_or_names_different_labels():
    raw = load_job(EXAMPLE).model_dump(mode="json")
    assert "task" not in json.loads(load_job(EXAMPLE).canonical()), "a job without one is what it was before tasks"
    job = Job.model_validate({**raw, "task": {"labels": ["yes", "no"]}})
    assert parse_job(job.canonical()) == job
    assert job.task.labels == ("yes", "no")
    turned = Job.model_validate({**raw, "task": {"labels": ["no", "yes"]}})
    assert len({load_job(EXAMPLE).digest, job.digest, turned.digest}) == 3, "the order is part of the job"
    for task in (
        {}, {"labels": []}, {"labels": ["yes"]}, {"labels": ["yes", "yes"]}, {"labels": ["yes", ""]}, {"labels": ["yes", 1]},
        {"labels": ["yes", "n" * 65]}, {"labels": ["yes", "no"], "classes": 2},
        {"labels": [f"{i:064}" for i in range(500)]},
    ):  # fmt: skip
        with pytest.raises(RemoteProtocolError, match="SS-4006"):
            parse_job(json.dumps({**raw, "task": task}))
    # What is longest still fits into a Welcome.
    longest = Job.model_validate({**raw, "task": {"labels": [f"{i:064}" for i in range(480)]}})
    assert len(longest.canonical()) < 1 << 16


def test_the_examples_commented_tables_are_right(tmp_path):
    path = tmp_path / "job.toml"
    table = TEXT.partition("# [task]")[2]
    path.write_text(TEXT + "\n[task]\n" + table.partition("\n# ")[2].partition("#")[0])
    assert load_job(path).task.labels == ("yes", "no")


def test_sharing_is_absent_or_one_of_the_known_and_naive_is_said_twice():
    plain = load_job(EXAMPLE)
    raw = plain.model_dump(mode="json")
    assert not {"sharing", "inexact"} & set(json.loads(plain.canonical())["adapters"]), "as before there were modes"

    def with_adapters(**changes):
        return Job.model_validate({**raw, "adapters": {**raw["adapters"], **changes}})

    assert with_adapters(sharing="alternating", inexact=False).digest == plain.digest
    assert plain.adapters.sharing == "alternating"
    jobs = [with_adapters(sharing=mode) for mode in ("frozen-a", "share-a", "core")]
    jobs.append(with_adapters(sharing="naive", inexact=True))
    assert len({job.digest for job in (plain, *jobs)}) == 5
    for job in jobs:
        assert parse_job(job.canonical()) == job
    for wrong in (
        {"sharing": "naive"}, {"sharing": "naive", "inexact": False}, {"sharing": "core", "inexact": True}, {"inexact": True},
        {"sharing": "flora"}, {"sharing": None}, {"inexact": None}, {"inexact": 1},
    ):  # fmt: skip
        with pytest.raises(RemoteProtocolError, match="SS-4006"):
            parse_job(json.dumps({**raw, "adapters": {**raw["adapters"], **wrong}}))


def test_the_error_says_how_to_get_naive_averaging(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(TEXT.replace("seed = 7", 'sharing = "naive"\nseed = 7'))
    with pytest.raises(InputError, match="SS-1111") as caught:
        load_job(path)
    (detail,) = caught.value.details
    assert detail.startswith("adapters:")
    assert "inexact = true" in detail
    path.write_text(TEXT.replace("seed = 7", 'sharing = "naive"\ninexact = true\nseed = 7'))
    assert load_job(path).adapters.inexact


def with_sums(**sums) -> Job:
    fields = load_job(EXAMPLE).model_dump(exclude_none=True)
    return Job.model_validate({**fields, "sums": {**fields["sums"], **sums}}, strict=False)


def test_what_is_said_of_attempts_and_quorum_is_in_the_digest_and_what_is_not_said_is_not():
    plain = load_job(EXAMPLE)
    assert '"attempts"' not in plain.canonical()
    assert '"quorum"' not in plain.canonical()
    assert (plain.sums.attempts, plain.sums.fewest) == (None, 3)
    said = with_sums(attempts=20, quorum=3)
    assert '"attempts":20' in said.canonical()
    assert said.digest != plain.digest
    assert parse_job(said.canonical()) == said


@pytest.mark.parametrize("sums", [{"quorum": 2}, {"quorum": 4}, {"attempts": 1}, {"attempts": 1001}, {"attempts": 2.5}])
def test_a_quorum_outside_of_its_bounds_is_refused(sums):
    with pytest.raises(ValidationError):
        with_sums(**sums)


def test_a_quorum_is_between_threshold_and_roster():
    roster = tuple("abcdef")
    with pytest.raises(ValidationError, match="between 5"):
        with_sums(roster=roster, threshold=5, quorum=4)
    assert with_sums(roster=roster, threshold=4, quorum=6).sums.fewest == 6
    assert with_sums(roster=roster, threshold=4).sums.fewest == 4
