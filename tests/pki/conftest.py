from __future__ import annotations

from pathlib import Path

import pytest

from securesplit.pki.authority import Authority


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def authority(keys: Path) -> Authority:
    made = Authority.create(keys)
    made.issue("gpu", "server")
    made.issue("alice", "client")
    return made
