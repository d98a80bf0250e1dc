"""Folders of runs, whole, half and damaged; what differs between two; names of data that tell nothing."""

from __future__ import annotations

import hashlib
import json
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.data.corpus import Record
from securesplit.errors import InputError
from securesplit.policy.load import load_policy
from securesplit.policy.meaning import Meaning
from securesplit.policy.schema import Policy
from securesplit.protocol.job import Job, load_job
from securesplit.runs.about import ABOUT, About, DataNote, Option, Seeds, versions, write_about
from securesplit.runs.compare import Figure, compare_runs, job_differences
from securesplit.runs.fingerprint import KEY, fingerprint, run_key
from securesplit.runs.folder import RUN, claim, clear, list_runs, read_run
from securesplit.runs.losses import HELD_OUT, RecordLoss, read_losses, write_losses
from securesplit.runs.metrics import METRICS, Metrics, Reading
from securesplit.runs.spent import NO_BOUND, UNKNOWN, Spent

ROOT = Path(__file__).parents[2]
JOB = load_job(ROOT / "examples" / "job.toml")
POLICY = load_policy(ROOT / "policies" / "balanced.toml")
LAB = load_policy(ROOT / "policies" / "lab.toml")
MEANING = Meaning(1e-5, "sequence", "replace-one")


def about(*, job: Job = JOB, policy: Policy = POLICY, minute: int = 0, **options: object) -> About:
    return About(
        started=datetime(2026, 11, 22, 12, minute, tzinfo=UTC), client="alice", job=job.canonical(), job_digest=job.digest,
        job_name=job.name, policy=policy.canonical().decode(), policy_digest=policy.digest, policy_name=policy.name, model="a" * 64,
        regime="frozen", options=tuple(Option(name=k, value=v) for k, v in options.items()), seeds=Seeds(adapters=7, batches=7),
        versions=versions(), data=DataNote(digest="b" * 64, records=8, held_out=2, batches=2), tls="memory",
    )  # fmt: skip


def record(**values: object) -> str:
    base = {
        "client": "alice", "policy": "balanced", "policy_digest": POLICY.digest, "job": JOB.digest, "regime": "frozen", "steps": 4,
        "loss": 2.0, "initial_loss": 3.0, "curve": [3.0, 2.5, 2.0], "alone": None, "epsilon": 1.5, "delta": 1e-5, "unit": "sequence",
        "channels": [{"channel": "cut", "releases": 4, "mu": 0.5, "epsilon": 1.5}], "bytes_up": 100, "bytes_down": 50, "seconds": 2.0,
    }  # fmt: skip
    return json.dumps({**base, **values})


def begun(folder: Path, steps: int = 0, **options: object) -> Path:
    folder.mkdir(parents=True)
    write_about(folder, about(**options))
    metrics = Metrics(folder, lambda: Reading(5, 6, 0.5), lr=0.1)
    for step in range(1, steps + 1):
        metrics.step(number=0, step=step, loss=4.0 - step)
    metrics.close()
    return folder


def test_a_finished_an_interrupted_and_a_running_run(tmp_path):
    done = begun(tmp_path / "done", 2)
    (done / RUN).write_text(record())
    found = read_run(done)
    assert (found.state, found.steps, found.loss, found.spent, found.faults) == (
        "finished",
        4,
        2.0,
        Spent("stated", 1.5, MEANING),
        (),
    )
    half = begun(tmp_path / "half", 2)
    with (half / METRICS).open("a") as file:
        file.write('{"kind": "ste')
    found = read_run(half)
    assert (found.state, found.steps, found.loss, found.spent, found.faults) == (
        "interrupted",
        2,
        2.0,
        Spent("stated", 0.5, MEANING),
        (),
    )
    metrics = Metrics(half, lambda: Reading(0, 0, None), after=2)
    assert read_run(half).state == "running"
    metrics.close()
    assert read_run(half).state == "interrupted"
    assert stat.S_IMODE((half / ABOUT).stat().st_mode) == 0o600


def test_keys_of_later_versions_are_passed_over_and_known_ones_are_strict(tmp_path):
    folder = begun(tmp_path / "run")
    (folder / RUN).write_text(record(something_new={"a": 1}, loss=None))
    assert read_run(folder).finished.loss is None
    (folder / RUN).write_text(record(steps="many", bytes_up=-1.5))
    found = read_run(folder)
    assert found.state == "damaged"
    assert [fault.split(":")[:2] for fault in found.faults] == [["run.json", " steps"], ["run.json", " bytes_up"]]


@pytest.mark.parametrize("text", ["", '{"steps": 4', "[]"])
def test_half_a_record_is_damage_and_no_interruption(tmp_path, text: str):
    folder = begun(tmp_path / "run")
    (folder / RUN).write_text(text)
    assert read_run(folder).state == list_runs(tmp_path)[0].state == "damaged"


@settings(deadline=None, max_examples=30)
@given(
    one=st.binary(max_size=40) | st.just(b"{}"), two=st.binary(max_size=40), three=st.none() | st.binary(max_size=40)
)
def test_whatever_lies_there_the_list_is_made(tmp_path_factory, one, two, three):
    root = tmp_path_factory.mktemp("any")
    begun(root / "good", 1)
    bad = root / "bad"
    bad.mkdir()
    for name, data in ((ABOUT, one), (RUN, two), (METRICS, three)):
        if data is not None:
            (bad / name).write_bytes(data)
    states = {run.path.name: run.state for run in list_runs(root)}
    assert states == {"good": "interrupted", "bad": "damaged"}


def test_a_run_that_is_deleted_meanwhile_does_not_bring_the_list_down(tmp_path, monkeypatch):
    begun(tmp_path / "mine")
    (tmp_path / "gone").mkdir()
    monkeypatch.setattr("securesplit.runs.folder._looks_like_a_run", lambda folder: folder != tmp_path)
    assert [run.path.name for run in list_runs(tmp_path)] == ["mine"]


def test_a_folder_that_may_not_be_entered_does_not_bring_the_list_down(tmp_path, monkeypatch):
    begun(tmp_path / "mine")
    (tmp_path / "theirs").mkdir()
    plain = Path.is_file

    def is_file(path):  # Also where the tests run as root, whom no mode keeps out.
        if path.parent.name == "theirs":
            raise PermissionError
        return plain(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    assert [run.path.name for run in list_runs(tmp_path)] == ["mine"]
    with pytest.raises(InputError) as caught:
        read_run(tmp_path / "theirs")
    assert caught.value.code == "SS-1281"


def test_runs_are_listed_by_when_they_began_three_levels_deep(tmp_path):
    begun(tmp_path / "b" / "alice", minute=1)
    begun(tmp_path / "a" / "x" / "bob", minute=2)
    begun(tmp_path / "a" / "x" / "y" / "too-deep")
    old = tmp_path / "old"
    old.mkdir()
    (old / RUN).write_text(record())  # Of a version without about.json.
    assert [run.path.name for run in list_runs(tmp_path)] == ["old", "alice", "bob"]
    assert list_runs(tmp_path / "b" / "alice")[0].path.name == "alice"
    with pytest.raises(InputError, match="SS-1281"):
        list_runs(tmp_path / "nowhere")
    with pytest.raises(InputError, match="SS-1281"):
        read_run(tmp_path / "a")


def test_the_best_adapters_of_a_deleted_run_are_not_taken_for_the_new_one_s(tmp_path):
    folder = begun(tmp_path / "run", 1)
    (folder / "best").mkdir()
    for name in ("best/adapter-back.safetensors", "adapter-back.safetensors", "best/mine.txt"):
        (folder / name).touch()
    clear(folder, results=False)
    assert (folder / "best/adapter-back.safetensors").exists()
    clear(folder, results=True)
    assert not list(folder.rglob("*.safetensors"))
    assert (folder / "best/mine.txt").exists()


def test_a_finished_run_is_deleted_only_where_that_was_asked_for(tmp_path):
    folder = begun(tmp_path / "run", 1)
    names = [
        RUN, HELD_OUT, "adapter-front.safetensors", "round-3.npz", "round-0-abcd.record", "mine.txt", "tensorboard/events",
    ]  # fmt: skip
    (folder / "tensorboard").mkdir()
    for name in names:
        (folder / name).write_text(record() if name == RUN else "x")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="SS-1280"):
        claim(folder, overwrite=False)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    claim(folder, overwrite=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, (
        "not before a run begins"
    )
    clear(folder, results=False)
    left = {path.name for path in folder.rglob("*")}
    assert left == {"adapter-front.safetensors", "round-3.npz", "round-0-abcd.record", "mine.txt"}
    clear(folder, results=True)
    assert [path.name for path in folder.rglob("*")] == ["mine.txt"]
    claim(tmp_path / "new" / "deep", overwrite=False)
    assert stat.S_IMODE((tmp_path / "new" / "deep").stat().st_mode) == 0o700


def test_a_folder_in_which_a_run_is_at_work_is_not_taken(tmp_path):
    folder = begun(tmp_path / "run")
    metrics = Metrics(folder, lambda: Reading(0, 0, None))
    with pytest.raises(InputError, match="SS-1282"):
        claim(folder, overwrite=True)
    metrics.close()
    claim(folder, overwrite=False)  # An interrupted one is no result that could be lost.


def test_what_differs_is_told_and_policies_by_effect(tmp_path):
    changed = JOB.model_copy(update={"optimiser": JOB.optimiser.model_copy(update={"client_lr": 0.5})})
    looser = POLICY.model_dump(mode="json")
    looser["privacy"]["epsilon"] *= 2
    policy = Policy.model_validate(looser, strict=False)
    one = begun(tmp_path / "one", held_out=4, task="multirc")
    (one / RUN).write_text(record())
    two = begun(tmp_path / "two", job=changed, policy=policy, held_out=8)
    (two / RUN).write_text(record(loss=1.5, epsilon=3.0))
    found = compare_runs(read_run(one), read_run(two))
    assert {(d.key, d.before, d.after) for d in found.settings if "digest" not in d.key} == {
        ("job.optimiser.client_lr", 2e-3, 0.5), ("options.held_out", 4, 8), ("options.task", "multirc", None),
    }  # fmt: skip
    assert [(c.path, c.effect) for c in found.policy] == [("privacy.epsilon", "loosens")]
    assert [(f.name, f.change) for f in found.figures if f.change] == [("loss", -0.5), ("epsilon", 1.5)]
    same = compare_runs(read_run(one), read_run(one))
    assert (same.settings, same.policy) == ((), ())


def figure_of(one: Path, two: Path) -> Figure:
    return next(f for f in compare_runs(read_run(one), read_run(two)).figures if f.name == "epsilon")


@pytest.mark.parametrize("other", [{"delta": 1e-6}, {"unit": "user"}, {"relation": "add-remove"}])
def test_epsilons_of_different_quantities_are_not_subtracted(tmp_path, other):
    one, two = begun(tmp_path / "one"), begun(tmp_path / "two")
    (one / RUN).write_text(record())
    (two / RUN).write_text(record(epsilon=3.0, **other))
    found = figure_of(one, two)
    assert (found.before, found.after, found.comparable, found.change) == (1.5, 3.0, False, None)
    assert figure_of(two, two).change == 0.0


def test_a_run_without_a_bound_has_no_epsilon_to_compare(tmp_path):
    one, two = begun(tmp_path / "one"), begun(tmp_path / "two", policy=LAB)
    (one / RUN).write_text(record())
    assert read_run(two).spent == NO_BOUND
    (two / RUN).write_text(record(epsilon=None, delta=None))
    assert read_run(two).spent == NO_BOUND
    for pair in ((one, two), (two, two)):
        assert (figure_of(*pair).comparable, figure_of(*pair).change) == (False, None)


def test_the_meaning_is_the_records_else_the_last_rows_else_the_policys(tmp_path):
    folder = begun(tmp_path / "run", 1, policy=LAB)
    by_user = Meaning(1e-6, "user", "replace-one")
    with_meaning = Metrics(folder, lambda: Reading(5, 6, 0.75, by_user), after=1)
    assert read_run(folder).spent == NO_BOUND, "the row says nothing, and the policy that nothing is bounded"
    with_meaning.step(number=0, step=2, loss=1.0)
    with_meaning.close()
    assert read_run(folder).spent == Spent("stated", 0.75, by_user)
    (folder / RUN).write_text(record())
    assert read_run(folder).spent == Spent("stated", 1.5, MEANING)
    (folder / RUN).unlink()
    (folder / METRICS).unlink()
    (folder / ABOUT).write_text("{}")
    assert read_run(folder).spent == UNKNOWN


def test_an_interrupted_run_is_compared_as_far_as_it_got(tmp_path):
    one, two = begun(tmp_path / "one", 1), begun(tmp_path / "two", 3)
    figures = {f.name: (f.before, f.after) for f in compare_runs(read_run(one), read_run(two)).figures}
    assert figures["steps"] == (1, 3)
    assert figures["loss"] == (3.0, 1.0)
    assert "initial_loss" not in figures


def test_runs_that_cannot_be_compared_are_named_all_at_once(tmp_path):
    one, two = tmp_path / "one", begun(tmp_path / "two")
    one.mkdir()
    (one / RUN).write_text(record())
    (two / ABOUT).write_text("{}")
    with pytest.raises(InputError, match="SS-1284") as caught:
        compare_runs(read_run(one), read_run(two))
    assert any("one" in d and "missing" in d for d in caught.value.details)
    assert len(caught.value.details) > 5
    assert {d.split(":")[0].rsplit("/", 1)[1] for d in caught.value.details} == {"one", "two"}


def test_a_policy_of_another_schema_is_said_to_be_unreadable(tmp_path):
    one, two = begun(tmp_path / "one"), begun(tmp_path / "two")
    text = json.loads((two / ABOUT).read_text())
    (two / ABOUT).write_text(json.dumps({**text, "policy": '{"new": 1}', "policy_digest": "c" * 64}))
    assert compare_runs(read_run(one), read_run(two)).policy is None


def test_jobs_differ_by_dotted_keys():
    assert job_differences('{"a":{"b":1,"c":[1,2]}}', '{"a":{"c":[1,2]},"d":null}') == (
        *job_differences('{"a":{"b":1}}', '{"a":{}}'),
    )
    assert [(d.key, d.before, d.after) for d in job_differences('{"a":[1]}', "not json")] == [
        ("job.a", "[1]", None), ("job", None, "not json"),
    ]  # fmt: skip


def test_a_name_of_data_is_keyed_ordered_and_the_same_anywhere(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    key = run_key(tmp_path / "here")
    assert stat.S_IMODE((tmp_path / "here" / KEY).stat().st_mode) == 0o600
    assert run_key(tmp_path / "here") == key
    records = [Record("a"), Record("b", user="u", label="l")]
    (tmp_path / "there" / KEY).write_bytes(key)
    name = fingerprint(records, key)
    assert fingerprint(list(records), run_key(tmp_path / "there")) == name
    others = [
        [Record("b", user="u", label="l"), Record("a")], [Record("a")], [Record("a"), Record("b", user="ul")], [Record("ab"), Record("b")],
        [Record("a"), Record("b", user="l", label="u")],
    ]  # fmt: skip
    assert len({fingerprint(other, key) for other in others} | {name}) == 6
    assert fingerprint(records, b"x" * 32) != name
    guesses = {hashlib.sha256(text).hexdigest() for text in (b"ab", b"a\nb", b"a\n\nb", b'["a","b"]')}
    assert name not in guesses, "who knows the text and not the key cannot tell"
    (tmp_path / "here" / KEY).write_bytes(b"short")
    with pytest.raises(InputError, match="SS-1287"):
        run_key(tmp_path / "here")


def test_losses_of_records_come_back_sorted_and_faults_are_counted(tmp_path):
    losses = [RecordLoss(source=3, nats=1.5, tokens=2), RecordLoss(source=1, nats=0.0, tokens=1)]
    write_losses(tmp_path, losses)
    assert read_losses(tmp_path) == (losses[1], losses[0])
    assert stat.S_IMODE((tmp_path / HELD_OUT).stat().st_mode) == 0o600
    (tmp_path / HELD_OUT).write_text('{"source": 1}\nnonsense secret\n')
    with pytest.raises(InputError, match="SS-1284") as caught:
        read_losses(tmp_path)
    assert [detail.split(":")[0] for detail in caught.value.details] == ["line 1", "line 2"]
    assert "secret" not in str(caught.value.details)
    with pytest.raises(InputError, match="SS-1284"):
        read_losses(tmp_path / "nowhere")


def test_versions_name_what_computed():
    found = versions()
    assert found.python.count(".") == 2
    assert found.torch
    assert found.peft
    assert found.commit is None or len(found.commit.rstrip("+")) == 40
