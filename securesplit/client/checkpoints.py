"""Checkpoints of a run on this site: ``round-N/`` for the last rounds, ``best/``, and the end's beside ``run.json``.

Each is A's and C's adapters; where B learns, their files name the state of B's adapters that belongs to them, which the server
keeps (securesplit/server/former.py). With ``--checkpoints 'run/*'`` each is then evaluated with its own B.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from securesplit.client.client import Client
from securesplit.errors import InputError
from securesplit.learning import table_of
from securesplit.model.embedding import drift_parameters
from securesplit.model.export import collect_adapters, read_part_adapters, save_part_adapters
from securesplit.model.lora import adapter_layout
from securesplit.pki.files import folder_in_one_step, remove_folder

__all__ = ["keep_round", "middle_of", "round_folder", "save_adapters"]

_log = logging.getLogger(__name__)
_ROUND = re.compile(r"round-(\d+)")


def round_folder(out: Path, number: int) -> Path:
    """Where a round's checkpoint lies, beside ``round-N.npz``; rounds count from 0."""
    return out / f"round-{number}"


def save_adapters(out: Path, client: Client, middle: str = "") -> None:
    """Write the adapters of A and C, those that there are, into a folder.

    Args:
        out: there already.
        client: whose.
        middle: name of the state of B that belongs to them.
    """
    for part, name in ((client.front, "front"), (client.back, "back")):
        if adapter_layout(part).tensors or drift_parameters(part):
            save_part_adapters(
                collect_adapters(
                    part,
                    model=client.link.model,
                    policy=client.policy.digest,
                    table=table_of(client.job),
                    lengths=client.job.adapters.any_dora,
                    middle=middle,
                ),
                out / f"adapter-{name}.safetensors",
            )


def keep_round(client: Client, out: Path | None, number: int) -> None:
    """A round is over: keep its adapters, let the server keep B's, and let go what the job keeps no longer.

    Where rounds end with secure sums, B is as it was when this round's sum ended, whatever others have taught it since.

    Args:
        client: as the round left it.
        out: of the run; None for a run that leaves no files.
        number: from 0; -1 before the first round, of which nothing is kept.

    Raises:
        InputError: SS-1804 when the disk does not take it.
    """
    most = client.job.schedule.checkpoints
    if most is None or out is None or number < 0:
        return
    if not (middle := client.mark(1 + number % most, ended=client.job.mode.summed)) and client.regime != "frozen":
        _log.warning("the server keeps no state of its part for the checkpoint of round %d", number)
    # Before a crash this round may have been over already; B may have been another then.
    if (place := round_folder(out, number)).is_dir():
        remove_folder(place)
    with folder_in_one_step(place) as scratch:
        save_adapters(scratch, client, middle)
    for path, other in _rounds(out):
        if not number - most < other <= number:
            remove_folder(path)


def middle_of(checkpoint: Path) -> str:
    """Name of the state of B's adapters that a checkpoint belongs to; empty when it names none, or is none.

    Raises:
        InputError: SS-1305 when its parts belong to two. SS-1414 for a damaged file.
    """
    files = sorted(checkpoint.glob("adapter-*.safetensors"))
    names = {read_part_adapters(path).facts.middle for path in files if path.stem != "adapter-middle"}
    if len(names) > 1:
        raise InputError(
            "SS-1305",
            f"the parts in {checkpoint} belong to two states of the server's part",
            hint="Name a folder as a training run wrote it; do not put files of two checkpoints into one.",
        )
    return names.pop() if names else ""


def _rounds(out: Path) -> Iterator[tuple[Path, int]]:
    for path in sorted(out.glob("round-*")):
        if path.is_dir() and (found := _ROUND.fullmatch(path.name)):
            yield path, int(found[1])
