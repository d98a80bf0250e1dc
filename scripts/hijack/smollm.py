"""The pre-trained model, made-up notes, and the noise of the shipped policies: what a cell's name stands for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.hijack.study import detection, watch, worth
from scripts.hijack.world import Parts, Setting
from securesplit.data.notes import ward_notes
from securesplit.model.plan import CutPlan
from securesplit.model.resolve import resolve_model
from securesplit.model.store import load_back, load_front, load_middle, load_tokenizer
from securesplit.policy.load import load_policy
from securesplit.policy.schema import Gaussian
from securesplit.privacy.plan import plan_for

ROOT = Path(__file__).resolve().parents[2]
PUBLIC, PRIVATE, VICTIMS = (99, 500), (5, 400), (7, 60)
"""Seed and number of notes; texts of different seeds share templates and no person."""
WATCHED, READ = 16, 24
"""Tokens of a sequence in the two kinds of cells."""


def cell(name: str, *, steps: int | None, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Run ``detect:RATE:NOISE`` or ``worth:VARIANT:NOISE``."""
    kind, what, noise = name.split(":")
    mu = mu_of(noise)
    if kind == "detect":
        setting = Setting(mu=mu, server_rate=float(what), batch=2, seed=13)
        seen = watch(
            parts(),
            setting,
            notes(*PRIVATE, WATCHED),
            notes(*PUBLIC, WATCHED),
            steps or 200,
            progress,
            other=what == "1e-4",
        )
        return {
            "mu": mu,
            "detection": detection(seen),
            "sampled": detection(seen, every=5),
            "steps": [asdict(s) for s in seen],
        }
    setting = Setting(mu=mu, batch=4, seed=12)
    texts = (notes(*PRIVATE, READ), notes(*PUBLIC, READ), notes(*VICTIMS, READ))
    return {"mu": mu, "worth": asdict(worth(what, parts(), setting, *texts, steps or 100, progress))}


def mu_of(noise: str) -> float:
    """mu of one release at the cut: of a shipped policy, or as it stands; 0 for ``none``."""
    if noise == "none":
        return 0.0
    if noise not in {"balanced", "strict"}:
        return float(noise)
    privacy = load_policy(ROOT / "policies" / f"{noise}.toml").privacy
    assert isinstance(privacy, Gaussian)
    return plan_for(privacy).cut.mu


@cache
def _directory() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return resolve_model("smollm2-135m", home / "securesplit" / "models", CutPlan(front=2, back=2))


def parts() -> Parts:
    """SmolLM2-135M, cut 2/26/2."""
    where = _directory()
    return Parts(lambda: load_front(where), lambda: load_middle(where), lambda: load_back(where))


def notes(seed: int, count: int, length: int) -> Tensor:
    """(N, length) tokens of the notes that are long enough."""
    tokenizer = load_tokenizer(_directory())
    rows = (tokenizer.encode(note.text)[:length] for note in ward_notes(count, seed=seed))
    return torch.tensor([row for row in rows if len(row) == length])
