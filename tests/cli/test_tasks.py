"""`tasks` and `eval` as people call them: counts and figures without a word of the data, faults with exit 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from securesplit.cli.evaluate import _tried
from securesplit.client.selection import Selected
from securesplit.data.tasks.score import Measured, Scores
from securesplit.measures.interval import Estimate
from securesplit.model.saved import AdapterFacts, NamedTensor, PartAdapters, save_part_adapters
from tests.data.tasks.test_readers import MULTIRC
from tests.e2e.house import Program, job_text, policy_text, start_server, train_argv

SECRET = "owl"


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "val.jsonl"
    path.write_text(json.dumps(MULTIRC) + "\n")
    return path


def test_list_names_every_task(command):
    code, out, _ = command("tasks", "list")
    assert code == 0
    assert len(out.splitlines()) == 15
    code, out, _ = command("tasks", "list", "--output", "json")
    tasks = {task["name"]: task for task in json.loads(out)["tasks"]}
    assert tasks["multirc"]["templates"] == ["plain", "fl-glm", "fedsea-llama"]
    assert {"boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc", "coqa", "xsum", "huatuo"} < set(tasks)


def test_check_counts_and_shows_no_text(command, data):
    code, out, err = command("tasks", "check", data, "--task", "multirc")
    assert (code, err) == (0, "")
    assert "3 examples of multirc, 3 with a gold answer, in 1 groups" in out
    assert SECRET not in out
    code, out, _ = command(
        "tasks", "check", data, "--task", "multirc", "--template", "fedsea-llama", "--output", "json"
    )
    found = json.loads(out)
    assert (found["examples"], found["labelled"], found["groups"], found["classes"]) == (
        3,
        3,
        1,
        {"true": 1, "false": 2},
    )
    assert sum(b["count"] for b in found["histogram"]) == 3
    assert found["unit"] == "characters"


def test_check_counts_tokens_and_chooses_buckets(command, house, tmp_path):
    path, policy = tmp_path / "a.jsonl", tmp_path / "policy.toml"
    path.write_text("".join(json.dumps({"prompt": "w3 " * n, "answer": "w4"}) + "\n" for n in (1, 2, 5, 9)))
    policy.write_text(policy_text())
    code, out, _ = command(
        "tasks",
        "check",
        path,
        "--task",
        "pairs",
        "--model",
        house.model,
        "--policy",
        policy,
        "--buckets",
        2,
        "--output",
        "json",
    )
    found = json.loads(out)
    assert (code, found["unit"], found["longest"]) == (0, "tokens", 11)
    # Lengths 3, 4, 7, 11: buckets 4 and 16 carry 8 + 32, buckets 8 and 16 carry 24 + 16.
    assert found["buckets"] in ([4, 16], [8, 16])
    assert found["padding"] == pytest.approx(1 - 25 / 40)


def test_a_malformed_file_is_exit_2_with_every_place(command, data):
    data.write_text(f'{json.dumps(MULTIRC)}\n{{"idx": 1}}\n{SECRET}\n')
    code, out, err = command("tasks", "check", data, "--task", "multirc")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert lines[0] == "error[SS-1240]: the data has 2 fault(s)"
    assert [line.split(": ")[0] for line in lines[1:3]] == [f"  - {data}:2", f"  - {data}:3"]
    assert lines[3].startswith("hint: ")
    assert SECRET not in err
    assert command("tasks", "check", data, "--task", "nothing")[0] == 2
    assert command("tasks", "check", data, "--task", "multirc", "--template", "nothing")[0] == 2


def test_eval_of_predictions(command, data, tmp_path):
    said = tmp_path / "preds.jsonl"
    said.write_text('{"id": "7/20/0", "prediction": "yes"}\n{"id": "7/20/1", "prediction": "owl?"}\n')
    code, out, err = command("eval", "--task", "multirc", "--data", data, "--predictions", said, "--output", "json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    # Question 20: right 1 0, said 1 1. Question 21: right 0, nothing said, which counts as 1.
    assert found["metrics"] == {"f1a": 0.5, "f1m": pytest.approx(2 * 0.25 / 1.25), "em": 0, "em1": 1}
    assert (found["missing"], found["unparsable"], found["examples"]) == (1, 1, 3)
    assert found["intervals"]["f1a"] is None, "one passage says nothing of others"
    code, out, _ = command("eval", "--task", "multirc", "--data", data, "--predictions", said)
    assert "f1a        0.5000" in out
    said.write_text('{"id": "7/20/9", "prediction": "yes"}\n')
    code, _, err = command("eval", "--task", "multirc", "--data", data, "--predictions", said)
    assert (code, f"{said}:1: " in err) == (2, True)


def test_eval_wants_predictions_or_checkpoints(command, data, tmp_path):
    assert command("eval", "--task", "multirc", "--data", data)[0] == 2
    assert command("eval", "--task", "multirc", "--data", data, "--checkpoints", "x/*")[0] == 2
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_text())
    for name in ("a", "b"):
        (tmp_path / "run" / name).mkdir(parents=True)
        facts = AdapterFacts(role="back", architecture="llama", layers=4, rank=2, alpha=4.0, targets=("q_proj",))
        one = NamedTensor("model.layers.3.self_attn.q_proj.lora_A.weight", 0, torch.zeros(2, 4))
        save_part_adapters(PartAdapters(facts, (one,)), tmp_path / "run" / name / "adapter-back.safetensors")
    rest = ("--out", tmp_path / "out", "--policy", policy, "--keys", tmp_path, "--server", "wss://127.0.0.1:1")
    for pattern, told in (
        (tmp_path / "none/*", "no folder matches"),
        (tmp_path / "run/*", "2 of 2 checkpoints name no state of the server's part"),
    ):
        code, _, err = command("eval", "--task", "multirc", "--data", data, "--checkpoints", pattern, *rest)
        assert (code, told in err, "SS-1248" in err) == (2, True, True), err


def test_scoring_loads_no_torch(data, tmp_path):
    said = tmp_path / "preds.jsonl"
    said.write_text('{"id": "7/20/0", "prediction": "yes"}\n')
    argv = [
        "securesplit",
        "eval",
        "--task",
        "multirc",
        "--data",
        str(data),
        "--predictions",
        str(said),
        "--output",
        "json",
    ]
    code = (
        f"import sys; sys.argv = {argv!r}\nfrom securesplit.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_which_checkpoint_is_best_is_told_with_what_the_others_are_worth():
    def scored(*values: float) -> Scores:
        names = ("em", "f1")[: len(values)]
        return Scores(
            "pairs",
            20,
            20,
            0,
            20,
            tuple(Measured(n, Estimate(v, 0.0, 1.0, 20)) for n, v in zip(names, values, strict=True)),
        )

    tried = ((Path("run/round-0"), scored(0.25, 0.5)), (Path("run/\x1b[2J"), scored(0.125, 0.375)))
    lines = _tried(Selected(Path("run/round-0"), tried, scored(0.2, 0.4))).split("\n")
    assert lines[0] == "best of 2 by em on 20 examples: run/round-0"
    assert lines[1] == "  run/round-0: em 0.2500, f1 0.5000"
    assert lines[2].endswith(": em 0.1250, f1 0.3750")
    assert "\x1b" not in lines[2]


@pytest.mark.slow
def test_three_sites_learn_answers_and_one_of_them_is_evaluated_through_the_split(house, tmp_path):
    """Everything in processes of its own: `serve`, three `train --task`, `eval --checkpoints`, and that once more."""
    policy = house.root / "policy.toml"
    policy.write_text(policy_text())
    for name in ("alice", "bob", "carol"):
        rows = [{"prompt": f"w{5 + i} w{9 + i}", "answer": f"w{20 + i % 3}"} for i in range(6)]
        (house.root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server, url = start_server(house, job_text(house.model, blind=False), policy_text())
    try:
        extra = ("--task", "pairs", "--keep-tokens", house.root / "kept")
        sites = [Program(house.root, n, *train_argv(house, n, url, policy, *extra)) for n in ("alice", "bob", "carol")]
        for site in sites:
            assert site.wait() == 0, site.complaint
            assert site.said["loss"] < site.said["initial_loss"]
        words = (
            "eval", "--task", "pairs", "--data", house.root / "alice.jsonl", "--checkpoints", house.root / "alice", "--subset", 2, "--out",
            tmp_path / "scores", "--policy", policy, "--keys", house.keys / "alice", "--server", url, "--max-new-tokens", 2, "--progress", "none",
            "--output", "json",
        )  # fmt: skip
        once = Program(house.root, "eval", *words)
        assert once.wait() == 0, once.complaint
        assert once.said["best"] == str(house.root / "alice")
        assert once.said["examples"] == 6
        assert set(once.said["metrics"]) == {"em", "f1", "rouge_1", "rouge_2", "rouge_l", "bleu_4"}
        again = Program(house.root, "again", *words)
        assert again.wait() == 0, again.complaint
        assert again.said == once.said
    finally:
        assert server.stop() == 0, server.complaint
