"""`runs` and `baseline` on runs that really happened: three clients over TLS, under two policies."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from securesplit.cli.runs import sparkline
from securesplit.cli.train import _text
from securesplit.client.run import RunRecord
from securesplit.runs.folder import RUN
from securesplit.runs.losses import HELD_OUT
from securesplit.runs.metrics import METRICS, read_metrics
from tests.e2e.house import CLIENTS, FROZEN, LAB, Program, build_house, job_text, policy_of, policy_text, train_argv
from tests.e2e.test_rounds import train_all


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A house whose clients trained twice: without protection in ``lab/``, with it in ``frozen/``."""
    house = build_house(tmp_path_factory.mktemp("runs") / "house")
    (house.root / "job.toml").write_text(job_text(house.model, blind=True))
    for name, privacy in (("lab", LAB), ("frozen", FROZEN)):
        (house.root / f"{name}.toml").write_text(policy_text(privacy, blind=True))
        policy = policy_of(privacy, blind=True)
        outcome = train_all(house, house.core(house.job(), policy), policy)
        assert outcome.errors == {}
        (house.root / name).mkdir()
        for client in CLIENTS:
            shutil.move(house.root / client, house.root / name / client)
            (house.root / f"{client}.truth").unlink()
    return house


def said(command, *argv: object) -> dict:
    code, out, complaint = command(*argv, "--output", "json")
    assert code == 0, complaint
    return json.loads(out)


def test_a_run_wrote_every_step_and_every_evaluation(trained):
    for kind in ("lab", "frozen"):
        folder = trained.root / kind / "alice"
        record = RunRecord.model_validate_json((folder / RUN).read_text())
        rows = read_metrics(folder)
        assert (rows.torn, rows.faults) == (False, ())
        assert rows.curve == pytest.approx(record.curve)
        assert [row.step for row in rows.rows if row.kind == "step"] == list(range(1, record.steps + 1))
        assert [row.round for row in rows.rows if row.kind == "held-out"] == [0, 1, 2]
        for first, second in zip(rows.rows, rows.rows[1:], strict=False):
            assert first.seconds <= second.seconds
            assert first.bytes_up <= second.bytes_up
        assert rows.rows[-1].bytes_up <= record.bytes_up
        assert {row.lr for row in rows.rows if row.kind == "step"} == {1e-2}
        # The ledger says the same as the record does; under frozen nothing is charged after the first pass.
        assert (rows.rows[-1].epsilon is None) == (kind == "lab")
        if kind == "frozen":
            assert 0 < rows.rows[-1].epsilon <= record.epsilon
        sent = {line.channel: (line.releases, line.bytes) for line in record.released}
        # 6 records: under frozen each leaves once; without protection in every state that a step or a sum has made.
        assert sent["cut"][0] == (6 if kind == "frozen" else 2 * 2 * 4 + 3 * 2)
        assert sent["cut"][1] % (4 * 32) == 0, "rows of 32 floats"
        assert 0 < sum(line.bytes for line in record.released if line.channel in {"cut", "gradient"}) < record.bytes_up
        assert ("gradient" in sent) == (kind == "lab")
        lines = [json.loads(line) for line in (folder / HELD_OUT).read_text().splitlines()]
        assert [line["source"] for line in lines] == [4, 5]
        total = sum(line["nats"] for line in lines) / sum(line["tokens"] for line in lines)
        assert total == pytest.approx(record.loss, abs=1e-4)


def test_nothing_of_a_run_holds_text_and_nobody_else_may_read_it(trained):
    folder, words = trained.root / "frozen" / "alice", (trained.root / "alice.jsonl").read_text().split()
    text = " ".join(words[1:4])
    for name in ("about.json", METRICS, HELD_OUT, RUN):
        assert text not in (folder / name).read_text()
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    about = json.loads((folder / "about.json").read_text())
    assert (
        about["data"]["digest"]
        == json.loads((trained.root / "lab" / "alice" / "about.json").read_text())["data"]["digest"]
    )
    assert (
        about["data"]["digest"]
        != json.loads((trained.root / "frozen" / "bob" / "about.json").read_text())["data"]["digest"]
    )
    assert (about["data"]["records"], about["data"]["held_out"]) == (4, 2)
    assert "passphrase" not in {option["name"] for option in about["options"]}


def test_ls_lists_whole_half_and_damaged_runs(trained, command, tmp_path):
    shutil.copytree(trained.root / "lab", tmp_path / "lab")
    (tmp_path / "lab" / "bob" / RUN).unlink()
    with (tmp_path / "lab" / "bob" / METRICS).open("a") as file:
        file.write('{"kind"')
    (tmp_path / "lab" / "carol" / RUN).write_text("{")
    (tmp_path / "lab" / "carol" / "about.json").write_text("\xff")
    runs = {run["name"]: run for run in said(command, "runs", "ls", tmp_path)["runs"]}
    assert {name: run["state"] for name, run in runs.items()} == {
        "alice": "finished", "bob": "interrupted", "carol": "damaged",
    }  # fmt: skip
    assert runs["alice"]["regime"] == "open"
    assert runs["alice"]["policy"] == "tiny"
    assert {(run["epsilon"], run["unit"], run["bound"]) for name, run in runs.items() if name != "carol"} == {
        (None, None, "none")
    }
    assert runs["carol"]["bound"] == "unknown"
    assert runs["bob"]["steps"] == runs["alice"]["steps"] > 0
    assert runs["bob"]["loss"] is not None
    code, out, _ = command("runs", "ls", tmp_path)
    assert code == 0
    first, second, *rest = [line.split()[-1] for line in out.splitlines()]
    assert (first, second, sorted(rest)) == ("state", "damaged", ["finished", "interrupted"])
    assert command("runs", "ls", tmp_path / "lab" / "alice" / "none")[0] == 2
    (tmp_path / "empty").mkdir()
    assert command("runs", "ls", tmp_path / "empty")[1] == "no runs\n"


def test_ls_shows_what_each_epsilon_means_finished_or_not(trained, command, tmp_path):
    shutil.copytree(trained.root / "frozen", tmp_path / "frozen")
    (tmp_path / "frozen" / "bob" / RUN).unlink()
    runs = {run["name"]: run for run in said(command, "runs", "ls", tmp_path)["runs"]}
    for name in CLIENTS:
        assert runs[name]["epsilon"] > 0
        assert [runs[name][key] for key in ("delta", "unit", "relation", "bound")] == [
            1e-5,
            "sequence",
            "replace-one",
            "stated",
        ]
    _, out, _ = command("runs", "ls", tmp_path)
    head, *lines = out.splitlines()
    assert head.split()[-5:] == ["epsilon", "delta", "unit", "relation", "state"]
    assert all(line.split()[-4:-1] == ["1e-05", "sequence", "replace-one"] for line in lines)
    _, out, _ = command("runs", "ls", trained.root / "lab")
    assert all("none: UNSAFE" in line for line in out.splitlines()[1:])


def test_show_tells_one_run_with_a_curve(trained, command):
    value = said(command, "runs", "show", trained.root / "frozen" / "alice")
    assert value["state"] == "finished"
    assert len(value["curve"]) == 3
    assert len(value["losses"]) == value["steps"]
    assert value["about"]["seeds"] == {"adapters": 7, "batches": 7}
    assert value["record"]["channels"][0]["channel"]
    _, out, _ = command("runs", "show", trained.root / "frozen" / "alice")
    claim = "at delta 1e-05, unit sequence, replace-one"
    spent = f"epsilon {value['epsilon']:.6g} {claim}"
    assert spent in out.splitlines()[0]
    assert out.count("epsilon") == out.count(claim), "no epsilon stands alone"
    assert [value[key] for key in ("delta", "unit", "relation", "bound")] == [1e-5, "sequence", "replace-one", "stated"]
    _, out, _ = command("runs", "show", trained.root / "lab" / "alice")
    assert out.splitlines()[0].endswith("epsilon none: UNSAFE")
    _, out, _ = command("runs", "show", trained.root / "frozen" / "alice")
    assert any(block in out for block in "▁█")
    assert "sent in this run" in out
    assert command("runs", "show", trained.root)[0] == 2


def test_show_tells_of_rounds_that_went_on_without_the_client(trained, command, tmp_path):
    shutil.copytree(trained.root / "lab" / "alice", tmp_path / "late")
    raw = json.loads((tmp_path / "late" / RUN).read_text())
    (tmp_path / "late" / RUN).write_text(json.dumps(raw | {"missed": [0, 1, 2]}))
    assert said(command, "runs", "show", tmp_path / "late")["record"]["missed"] == [0, 1, 2]
    assert "3 rounds, which went on without" in command("runs", "show", tmp_path / "late")[1]
    assert "missed" not in command("runs", "show", trained.root / "lab" / "alice")[1]


def test_diff_tells_settings_policy_by_effect_and_figures(trained, command):
    lab, frozen = trained.root / "lab" / "alice", trained.root / "frozen" / "alice"
    value = said(command, "runs", "diff", lab, frozen)
    assert value["policy"]["effect"] == "tightens"
    assert any(change["path"] == "privacy.mechanism" for change in value["policy"]["changes"])
    keys = {line["key"] for line in value["settings"]}
    assert {"policy.digest", "regime", "options.server"} <= keys
    assert not any(key.startswith(("job.", "data.", "versions.")) for key in keys), "these were the same"
    figures = {line["name"]: line for line in value["metrics"]}
    assert figures["epsilon"]["before"] is None
    assert figures["epsilon"]["after"] > 0
    assert (figures["epsilon"]["comparable"], figures["epsilon"]["change"]) == (False, None)
    assert [claim["bound"] for claim in figures["epsilon"]["claims"]] == ["none", "stated"]
    assert figures["epsilon"]["claims"][1]["unit"] == "sequence"
    assert figures["loss"]["change"] == pytest.approx(figures["loss"]["after"] - figures["loss"]["before"])
    _, out, _ = command("runs", "diff", lab, frozen)
    assert "policy tightens: privacy.mechanism" in out
    assert "epsilon: none: UNSAFE -> " in out
    assert "replace-one; not one quantity, so not compared" in out
    _, out, _ = command("runs", "diff", frozen, frozen)
    assert out.splitlines()[-4].endswith(" (+0), both at delta 1e-05, unit sequence, replace-one")
    same = said(command, "runs", "diff", lab, lab)
    assert (same["settings"], same["policy"]["changes"]) == ([], [])
    (code, _, complaint) = command("runs", "diff", lab, trained.root)
    assert (code, complaint[:15]) == (2, "error[SS-1281]:")


def test_a_finished_run_is_not_overwritten_by_accident(trained, command):
    argv = list(train_argv(trained, "alice", "wss://localhost:1", trained.root / "lab.toml"))
    argv[argv.index("--out") + 1] = folder = trained.root / "lab" / "alice"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, _, complaint = command(*argv)
    assert (code, complaint[:15]) == (2, "error[SS-1280]:")
    # With the option it fails where it fails, and as no run began the old one is still there.
    assert command(*argv, "--overwrite")[0] == 4
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_without_the_package_event_files_are_refused_before_anything_is_done(trained, command, monkeypatch):
    monkeypatch.setattr("securesplit.runs.tensorboard.find_spec", lambda name: None)
    argv = list(train_argv(trained, "alice", "wss://localhost:1", trained.root / "lab.toml"))
    argv[argv.index("--out") + 1] = trained.root / "new"
    code, _, complaint = command(*argv, "--tensorboard")
    assert (code, complaint[:15]) == (2, "error[SS-1283]:")
    assert not (trained.root / "new").exists()


@pytest.mark.parametrize("place", ["notes.jsonl", "notes.jsonl/below", "closed/out"])
@pytest.mark.parametrize("name", ["train", "baseline"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    tmp_path, command, monkeypatch, name: str, place: str
):
    (tmp_path / "notes.jsonl").write_text("{}")
    (tmp_path / "closed").mkdir()
    (tmp_path / "p.toml").write_text(policy_text())
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "closed" and access(path, mode)
    )  # Root may.
    common = ("--policy", tmp_path / "p.toml", "--data", tmp_path / "none.jsonl", "--out", tmp_path / place)
    mine = (
        ("--keys", tmp_path, "--server", "wss://localhost:1") if name == "train" else ("--job", tmp_path / "none.toml")
    )
    code, out, complaint = command(name, *common, *mine)
    assert (code, out, complaint[:15]) == (2, "", "error[SS-1002]:")
    assert place.split("/", maxsplit=1)[0] in complaint
    assert list((tmp_path / "closed").iterdir()) == []


def test_what_the_client_alone_gets_is_told_beside_the_split(trained, command, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained.root / "lab" / "alice", folder)
    record = RunRecord.model_validate_json((folder / RUN).read_text()).model_copy(
        update={"alone": (9.25, 8.125, 7.0625), "bytes_up": 123456789, "bytes_down": 12}
    )
    (folder / RUN).write_text(record.model_dump_json())
    assert "(client-only model: 7.062)" in _text(record, folder)
    assert "client-only" not in _text(record.model_copy(update={"alone": None}), folder)
    _, out, _ = command("runs", "show", folder)
    assert "alone     █▄▁ 9.2500 -> 7.0625" in out
    assert " sequences sent in this run" in out
    _, out, _ = command("runs", "diff", trained.root / "lab" / "alice", folder)
    assert "-> 123456789 (+" in out


def test_names_of_rows_are_looked_at_before_anything_is_trained(trained, command, tmp_path, monkeypatch):
    monkeypatch.setattr("securesplit.client.baseline._train", lambda *_: pytest.fail("trained"))
    for name in ("unsplit", "同じ"):
        runs = [word for _ in range(2) for word in ("--run", f"{name}={folders(trained, 'lab')}")]
        code, _, complaint = command(
            *baseline_argv(trained, tmp_path / "out", *(runs[:2] if name == "unsplit" else runs))
        )
        assert (code, complaint[:15]) == (2, "error[SS-1286]:")
        assert f"  - {name}\n" in complaint


def test_a_run_that_diverged_is_refused_before_anything_is_trained(trained, command, tmp_path, monkeypatch):
    monkeypatch.setattr("securesplit.client.baseline._train", lambda *_: pytest.fail("trained"))
    shutil.copytree(trained.root / "lab", tmp_path / "lab")
    losses = tmp_path / "lab" / "alice" / HELD_OUT
    lines = [json.loads(line) for line in losses.read_text().splitlines()]
    losses.write_text("".join(json.dumps(line | ({"nats": None} if "nats" in line else {})) + "\n" for line in lines))
    run = ",".join(str(tmp_path / "lab" / name) for name in CLIENTS)
    code, _, complaint = command(*baseline_argv(trained, tmp_path / "out", "--run", f"lost={run}"))
    assert (code, complaint[:15]) == (2, "error[SS-1284]:")
    assert "  - lost: 2 record(s)" in complaint


def baseline_argv(house, out: Path, *options: object) -> tuple[object, ...]:
    data = [word for name in CLIENTS for word in ("--data", house.root / f"{name}.jsonl")]
    return (
        "baseline", "--job", house.root / "job.toml", "--policy", house.root / "lab.toml", *data, "--held-out", 2,
        "--max-tokens", 16, "--model", house.model, "--cache", house.root / "cache", "--out", out, "--progress", "none", *options,
    )  # fmt: skip


def folders(house, kind: str) -> str:
    return ",".join(str(house.root / kind / name) for name in CLIENTS)


def test_baselines_stand_beside_the_runs_in_one_table(trained, command, tmp_path):
    runs = ("--run", f"no noise={folders(trained, 'lab')}", "--run", f"noised={folders(trained, 'frozen')}")
    value = said(command, *baseline_argv(trained, tmp_path / "out", *runs))
    rows = {row["name"]: row for row in value["rows"]}
    assert list(rows) == ["no noise", "noised", "unsplit", "client-only", "fedavg"]
    assert value["reference"] == "no noise"
    assert (value["records"], value["held_out"]) == (12, 6)
    assert {row["samples"] for row in rows.values()} == {2 * 2 * 12}
    assert rows["no noise"]["difference"] is None
    for name, row in rows.items():
        assert row["ci95"][0] <= row["loss"] <= row["ci95"][1]
        if name != "no noise":
            assert row["difference"] == pytest.approx(row["loss"] - rows["no noise"]["loss"], abs=1e-9)
            assert row["difference_ci95"][0] <= row["difference"] <= row["difference_ci95"][1]
    assert rows["noised"]["epsilon"] > 0
    assert (rows["noised"]["unit"], rows["noised"]["relation"], rows["noised"]["delta"]) == (
        "sequence",
        "replace-one",
        1e-5,
    )
    assert (rows["noised"]["bound"], rows["no noise"]["bound"], rows["unsplit"]["bound"]) == ("stated", "none", "none")
    assert rows["no noise"]["epsilon"] is rows["unsplit"]["epsilon"] is None
    assert "regime frozen" in rows["noised"]["note"]
    assert rows["no noise"]["bytes_up"] > 0 == rows["unsplit"]["bytes_up"]
    # Before any training all whole models are one and the same; of the split's clients one may have taught B a step or two before
    # another looked for the first time.
    assert rows["unsplit"]["curve"][0] == pytest.approx(rows["fedavg"]["curve"][0], abs=1e-6)
    assert rows["unsplit"]["curve"][0] == pytest.approx(rows["no noise"]["curve"][0], abs=5e-3)
    page = (tmp_path / "out" / "baseline.html").read_text()
    assert "<svg" in page
    assert "<script" not in page
    assert "no noise" in page
    assert stat.S_IMODE((tmp_path / "out" / "baseline.json").stat().st_mode) == 0o600
    kept = json.loads((tmp_path / "out" / "baseline.json").read_text())
    assert len(kept["held_out_losses"][0]["records"]) == 6
    code, _, complaint = command(*baseline_argv(trained, tmp_path / "out"))
    assert (code, complaint[:15]) == (2, "error[SS-1280]:")


def test_a_run_on_other_records_is_refused(trained, command, tmp_path):
    other = folders(trained, "lab").split(",")
    argv = baseline_argv(trained, tmp_path / "out", "--run", ",".join(reversed(other)), "--only", "client-only")
    code, out, complaint = command(*argv)
    assert (code, out, complaint[:15]) == (2, "", "error[SS-1285]:")
    assert complaint.count("  - client") >= 1
    assert command(*baseline_argv(trained, tmp_path / "out", "--run", other[0]))[0] == 2
    assert command(*baseline_argv(trained, tmp_path / "out", "--only", "magic"))[0] == 2
    assert not (tmp_path / "out").exists()


def test_another_job_is_named_in_the_row(trained, command, tmp_path):
    text = job_text(trained.model, blind=True).replace("client_lr = 1e-2", "client_lr = 1e-3")
    (trained.root / "other.toml").write_text(text)
    argv = [*baseline_argv(trained, tmp_path / "out", "--run", folders(trained, "lab"), "--only", "client-only")]
    argv[argv.index("--job") + 1] = trained.root / "other.toml"
    rows = said(command, *argv)["rows"]
    assert "another job: optimiser.client_lr" in rows[0]["note"]
    _, out, _ = command(*argv, "--overwrite")
    lines = out.splitlines()
    assert "6 groups are few" in lines[0]
    assert lines[1].startswith("model")
    assert [line.split("  ")[0] for line in lines[2:]] == ["split, tiny", "client-only"]


def test_a_run_that_was_killed_is_interrupted_and_what_it_wrote_is_there(trained, tmp_path, command):
    program = Program(
        tmp_path, "dies", python=(
            "import os, signal; from pathlib import Path\n"
            "from securesplit.runs.metrics import Metrics, Reading\n"
            "m = Metrics(Path('.'), lambda: Reading(1, 2, None))\n"
            "for i in range(1, 8): m.step(number=0, step=i, loss=float(i))\n"
            "os.kill(os.getpid(), signal.SIGKILL)"
        ),
    )  # fmt: skip
    assert program.wait() == -9
    shutil.copy(trained.root / "lab" / "alice" / "about.json", tmp_path / "about.json")
    value = said(command, "runs", "show", tmp_path)
    assert (value["state"], value["steps"], value["losses"]) == ("interrupted", 7, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])


def test_a_sparkline_is_as_wide_as_asked_and_never_wider():
    assert sparkline([]) == ""
    assert sparkline([1.0]) == "▁"
    assert sparkline([0.0, 1.0]) == "▁█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert len(sparkline([float(i) for i in range(1000)], 10)) == 10
    assert sparkline([float(i) for i in range(8)]) == "▁▂▃▄▅▆▇█"
