"""The benchmark of secure sums: what it prints, and that it fails when a result is wrong. Flower is not needed here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.aggregate import rounds
from scripts.aggregate.rounds import compare, table

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "bench-aggregate"


def figures(cpu: float, **others):
    fixed = {"wall_seconds": 2.0, "bytes_per_param_up": 4.0, "max_abs_error": 1e-7, "correct": True, "holders": 9}
    return {"cpu_seconds": cpu, "versions": {}} | fixed | others


def test_a_small_round_of_ours_alone_is_measured_and_exact(tmp_path):
    out = tmp_path / "kept.json"
    command = [sys.executable, SCRIPT, "--clients", "5", "--dim", "300", "--repeats", "2", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result == json.loads(out.read_text())[0]
    assert (result["clients"], result["dim"], result["threshold"], result["ratio"]) == (5, 300, 4, None)
    assert result["ours"]["correct"] is True
    assert len(result["ours"]["cpu_seconds"]) == 2
    assert 0 < result["ours"]["max_abs_error"] <= 0.5 / 2**20 / 2 * 1.001  # Half a step of the scale 2^20.
    assert "2/2 ours" in done.stderr
    shown = subprocess.run([sys.executable, SCRIPT, "--table", out], capture_output=True, text=True, check=True).stdout
    assert "| 5 x 300 | complete, shares to 4 |" in shown
    assert "not run" in shown
    assert "Measured on" in shown


def test_both_sides_run_in_turns_on_the_same_cases_and_the_least_ratio_comes_first(monkeypatch):
    told, cpu = [], {"ours.py": iter([1.0, 2.0, 1.0]), "flower.py": iter([4.0, 6.0, 9.0])}

    def run(python, script, arguments):
        told.append((python, script.name, arguments))
        return figures(next(cpu[script.name]))

    monkeypatch.setattr(rounds, "_run", run)
    result = compare("theirs", clients=10, dim=100, threshold=7, repeats=3, seed=5, sparse=False)
    assert [name for _, name, _ in told] == ["ours.py", "flower.py"] * 3
    assert [arguments[3] for _, _, arguments in told] == ["5", "5", "6", "6", "7", "7"]
    assert {python for python, name, _ in told if name == "flower.py"} == {"theirs"}
    assert result["ratio"] == {"min": 3.0, "median": 4.0}
    assert "**3.0** (4.0)" in table([result])


def test_a_wrong_mean_is_no_figure(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text(f"print({json.dumps(json.dumps(figures(1.0, correct=False)))})")
    with pytest.raises(RuntimeError, match="wrong"):
        rounds._run(sys.executable, script, [])


def test_a_run_that_fails_says_why(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('no such thing')")
    with pytest.raises(RuntimeError, match="no such thing"):
        rounds._run(sys.executable, script, [])
