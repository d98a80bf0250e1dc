"""SecureSplit: the middle of a language model on somebody else's GPU, without handing over the text.

The names below are the library's contract. They resolve on first use, so that importing the package, or asking the
command line for help, loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load_policy": "securesplit.policy.load",
    "Policy": "securesplit.policy.schema",
    "CutPlan": "securesplit.model.plan",
    "split_model": "securesplit.model.split",
    "Gate": "securesplit.privacy.gate",
    "Ledger": "securesplit.privacy.ledger",
    "sigma_for": "securesplit.privacy.calibrate",
    "epsilon_for": "securesplit.privacy.calibrate",
    "clip_sequence": "securesplit.privacy.clip",
    "clip_tokens": "securesplit.privacy.clip",
    "Client": "securesplit.client.client",
    "dial": "securesplit.client.dial",
    "serve": "securesplit.server.serve",
    "Session": "securesplit.protocol.session",
    "Batch": "securesplit.data.batches",
    "encode_records": "securesplit.data.batches",
    "make_batches": "securesplit.data.batches",
    "Transcript": "securesplit.protocol.transcript",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'securesplit' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
