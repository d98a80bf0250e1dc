"""What makes the attack process unable to read the truth: an audit hook, which Python has no means to remove."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

_RECORDED = frozenset({".bin", ".peer"})
_NAMED = re.compile(r"transcript\.json|code\.safetensors|sum-[0-9]{4,}\.safetensors")
_TRUTH = "truth.jsonl"


def guard(transcript: Path) -> None:
    """Make this process unable to open the truth: any ``truth.jsonl``, and whatever else lies beside a recording.

    It stops mistakes of our own code, which is what it is for. It would not stop native code that bypasses Python.
    """
    home = os.path.realpath(transcript)

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.path.realpath(os.fsdecode(arguments[0]))
        folder, name = os.path.split(path)
        recorded = _NAMED.fullmatch(name) is not None or os.path.splitext(name)[1] in _RECORDED  # noqa: PTH122 - runs at every open
        if name == _TRUTH or (folder == home and not recorded):
            msg = "the attack process may read nothing but the recording"
            raise PermissionError(msg)

    sys.addaudithook(refuse)
