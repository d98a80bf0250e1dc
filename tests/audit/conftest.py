from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch

from securesplit.audit.bench import Bench
from securesplit.audit.builtin import builtin_policy
from securesplit.policy.schema import Labels, Policy


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fixed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise keys from a counter, so that a statistical test answers the same in every run. No production path has this."""
    numbers = count()
    monkeypatch.setattr(
        "securesplit.privacy.lattice.fresh_key",
        lambda: hashlib.sha256(b"an audit's noise" + next(numbers).to_bytes(8, "little")).digest(),
    )


@pytest.fixture
def bench_of(tmp_path: Path) -> Callable[[Policy], Bench]:
    folders = count()
    return lambda policy: Bench(policy, tmp_path / f"bench{next(folders)}")


def labelled_policy(classes: int = 2) -> Policy:
    """The built-in policy with answered labels in place of noised gradients."""
    policy = builtin_policy()
    privacy = policy.privacy.model_copy(update={"gradients": None, "labels": Labels(share=0.1, classes=classes)})
    return policy.model_copy(update={"privacy": privacy})
