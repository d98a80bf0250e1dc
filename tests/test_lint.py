"""The linter refuses what runs code out of data, everywhere, and looks for what bandit looks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FORBIDDEN = {
    "pickle": ("import pickle\n\nprint(pickle.loads(b''))\n", {"TID251", "S301"}),
    "torch.load": ("import torch\n\nprint(torch.load('x'))\n", {"TID251"}),
    "torch.load by another name": ("from torch import load\n\nprint(load('x'))\n", {"TID251"}),
    "marshal": ("import marshal\n\nprint(marshal.loads(b''))\n", {"TID251"}),
    "joblib": ("import joblib\n\nprint(joblib)\n", {"TID251"}),
    "exec": ("exec('1')\n", {"S102"}),
    "a shell": ("import subprocess\n\nsubprocess.run('ls', shell=True, check=True)\n", {"S602", "S607"}),
    "TLS without a check": ("import ssl\n\nprint(ssl._create_unverified_context())\n", {"S323"}),
    "a weak hash": ("import hashlib\n\nprint(hashlib.md5(b''))\n", {"S324"}),
    "randomness that is none": ("import random\n\nprint(random.random())\n", {"S311"}),
}


def rules(source: str, name: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format", "json", "--stdin-filename", str(ROOT / name), "-"],
        input=source, capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    return {fault["code"] for fault in json.loads(done.stdout)}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_linter_refuses(what):
    source, expected = FORBIDDEN[what]
    assert expected <= rules(source, "securesplit/subject.py")


@pytest.mark.parametrize("place", ["tests/subject.py", "scripts/subject.py", "attacks/subject.py"])
def test_pickle_is_refused_everywhere(place):
    assert "TID251" in rules("import pickle\n\nprint(pickle)\n", place)
