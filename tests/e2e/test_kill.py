"""kill -9 at any time: whatever a recording proxy saw is in the ledger, and the ledger opens again."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from securesplit.privacy.ledger import Ledger
from securesplit.protocol.codec import Caps, decode
from securesplit.protocol.messages import Backward, Forward
from tests.e2e.nursery import policy_of

ROOT = Path(__file__).parents[2]
_ANY = Caps(message_bytes=1 << 40)


def bred(folder: Path, lives: int, regime: str, seed: int) -> int:
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.nursery", str(folder), str(lives), regime, str(seed)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def blocks_on(wire: bytes) -> list[bytes]:
    """Every record's rows that left, message by message; a torn last message never reached the server."""
    out, lengths, at = [], (), 0
    while at + 4 <= len(wire):
        size = int.from_bytes(wire[at : at + 4], "little")
        data, at = wire[at + 4 : at + 4 + size], at + 4 + size
        if len(data) < size:
            continue
        message = decode(data, _ANY)
        if isinstance(message, Forward):
            lengths = message.lengths
        if isinstance(message, Forward | Backward):
            rows = message.hidden if isinstance(message, Forward) else message.gradient
            width = rows.shape[1] * {"f32": 4, "bf16": 2}[rows.dtype]
            ends = np.cumsum(lengths) * width
            out += [rows.data[e - n * width : e] for e, n in zip(ends.tolist(), lengths, strict=True)]
    return out


def check(folder: Path, regime: str) -> tuple[int, int]:
    """Compare wire and ledger; the numbers of different blocks and of entries."""
    ledger = Ledger(folder / "ledger", anchors=folder / "anchors")
    ledger.verify()
    paid = Counter(entry.payload for entry in ledger.entries() if entry.channel in {"cut", "gradient", "decode"})
    mu_squared = sum(entry.units for entry in ledger.entries())
    ledger.close()
    seen = {hashlib.sha256(block).hexdigest() for block in blocks_on((folder / "wire").read_bytes())}
    assert seen, "no life got as far as sending anything"
    assert seen <= set(paid), "something left that nobody paid for"
    assert max(paid.values()) == 1, "two charges have the same noise"
    assert mu_squared > 0
    if regime == "frozen":  # A never moves, so a record's one release is the same in every life.
        assert sum(1 for e in paid) <= 6 + 2 * 3 * 100 + 100
    return len(seen), len(paid)


@pytest.mark.parametrize(("regime", "lives"), [("frozen", 6), ("step", 6)])
def test_the_ledger_never_counts_less_than_the_wire_saw(tmp_path, regime, lives):
    killed = bred(tmp_path / "site", lives, regime, seed=len(regime))
    assert killed > 0
    check(tmp_path / "site", regime)


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["frozen", "round", "step"])
def test_a_hundred_kills(tmp_path, regime, capsys):
    killed = bred(tmp_path / "site", 100, regime, seed=100)
    seen, paid = check(tmp_path / "site", regime)
    with capsys.disabled():
        print(
            f"\n{regime}: 100 lives, {killed} killed; {seen} blocks on the wire, all of {paid} paid for in the ledger"
        )
    assert killed >= 50


def test_the_nursery_policies_are_legal():
    assert {policy_of(regime).privacy.regime for regime in ("frozen", "round", "step")} == {"frozen", "round", "step"}
