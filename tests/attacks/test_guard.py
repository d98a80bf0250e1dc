"""The attack process cannot open what the server did not write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name", ["truth.jsonl", "notes.txt", "sum-0000.safetensors.txt", "asum-0000.safetensors", "sum-.safetensors"]
)
def test_the_attack_process_cannot_open_what_the_server_did_not_write(tmp_path, name):
    (tmp_path / name).write_text("the truth")
    for recorded in (
        "0000.bin",
        "0000.peer",
        "transcript.json",
        "code.safetensors",
        "sum-0000.safetensors",
        "sum-12345.safetensors",
    ):
        (tmp_path / recorded).write_text("recorded")
    (tmp_path / "link.bin").symlink_to(tmp_path / name)
    code = (
        "import sys, pathlib; from attacks.guard import guard; home = pathlib.Path(sys.argv[1]); guard(home)\n"
        "for part in ('0000.bin', '0000.peer', 'transcript.json', 'code.safetensors', 'sum-0000.safetensors', 'sum-12345.safetensors'):\n"
        "    assert (home / part).read_text() == 'recorded'\n"
        f"for path in (home / {name!r}, home / 'link.bin', home / '..' / home.name / {name!r}):\n"
        "    try: path.read_text()\n"
        "    except PermissionError: continue\n"
        "    sys.exit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
