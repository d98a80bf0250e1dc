"""The benchmark of the hijacking server: its tables from finished cells, and what its names stand for."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.hijack.smollm import mu_of
from scripts.hijack.study import WORTH, Seen, detection
from scripts.hijack.table import CELLS, tables

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench-hijack"


def run_of(likeness: float, steps: int = 40) -> list[Seen]:
    return [Seen(1.0, (1.0, 1.0, 1.0), {"whole": (likeness, likeness, 1.0), "rare": None}) for _ in range(steps)]


def test_detection_counts_honest_alarms_and_hijacks_from_every_start():
    found = detection(run_of(0.0))
    assert (found["watched"], found["false_alarms"], found["blunt"]) == (40, 0, 0.0)
    assert found["caught"]["whole"] == {"rate": 1.0, "watched": 1}
    assert found["caught"]["rare"] == {"rate": 0.0, "watched": math.inf}
    # Half a likeness is missing 0.47 in each step, nine tenths 0.07.
    assert detection(run_of(0.5))["caught"]["whole"]["watched"] == 1
    assert detection(run_of(0.9))["caught"]["whole"]["watched"] == 6
    assert detection(run_of(0.98))["caught"]["whole"]["rate"] == 0
    assert 5 <= detection(run_of(0.0), every=4)["watched"] <= 16


def test_the_tables_hold_every_finished_cell(tmp_path):
    seen = run_of(0.0)
    steps = [{"outputs": s.outputs, "honest": s.honest, "hijacked": s.hijacked} for s in seen]
    worth = {
        "variant": "full",
        "recovery": 0.5,
        "ridge": 0.4,
        "trap": 0.5,
        "kappa": 0.2,
        "bound": 1.0,
        "hits": [12, 10],
    }
    cells = [
        {"cell": "detect:1e-3:none", "mu": 0.0, "detection": detection(seen), "sampled": {}, "steps": steps},
        {"cell": "worth:full:37", "mu": 37.0, "worth": worth},
    ]
    file = tmp_path / "cells.json"
    file.write_text(json.dumps(cells))
    told = subprocess.run([sys.executable, SCRIPT, "--table", file], capture_output=True, text=True, check=True).stdout
    assert told.strip() == tables(json.loads(file.read_text()))
    assert "| 0.001, none | 40 | 0 |" in told
    assert "| rare | 0.00 (never) |" in told
    assert "| 37 (37.00) | full | 0.500" in told


def test_every_cell_has_a_meaning():
    for cell in CELLS:
        kind, what, noise = cell.split(":")
        assert mu_of(noise) >= 0
        assert float(what) > 0 if kind == "detect" else what in WORTH
    assert mu_of("none") == 0
    assert 0 < mu_of("strict") < mu_of("balanced") < 2
    with pytest.raises(ValueError, match="float"):
        mu_of("nothing")
