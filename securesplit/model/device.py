"""On which device a part computes: a processor, or a GPU.

What crosses a connection and what is written to disk is on the processor always; parts bring their input to their own
device, and whoever encodes their output brings it back. On a GPU torch is told to use algorithms that give the same bits each
time, because a server that is started again does its last steps once more and compares (SS-1295). What this does not
give: the bits of another kind of device.
"""

from __future__ import annotations

import os

import torch

from securesplit.errors import InputError

__all__ = ["device_named"]


def device_named(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:N``.

    To be asked before anything is computed on a GPU: cuBLAS reads its setting when it begins.

    Raises:
        InputError: SS-1255 for another name, or a device that is not there.
    """
    kind, colon, number = name.partition(":")
    if kind == "cpu" and not colon:
        return torch.device("cpu")
    if kind != "cuda" or (colon and not (number.isascii() and number.isdigit() and len(number) < 4)):
        raise InputError("SS-1255", "the device has no name that is known", hint="cpu, cuda, or cuda:0 and so on.")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= there:
        raise InputError(
            "SS-1255",
            f"the device {name} is not there: torch {torch.__version__} sees {there} GPU(s)",
            hint="Install a torch build with CUDA and a driver that fits it, or use --device cpu.",
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    return torch.device("cuda", int(number or 0))
