"""Whether a run begins, goes on, or is over: the folder ``state`` in a run's ``--out`` directory."""

from __future__ import annotations

from pathlib import Path

from securesplit.errors import InputError
from securesplit.kept.folder import Kept
from securesplit.pki.files import remove_folder

__all__ = ["STATE", "clean", "is_finished", "is_unfinished", "ready"]

STATE = "state"


def is_finished(out: Path) -> bool:
    """Whether the run of this directory came to its end.

    Raises:
        InputError: SS-1292 when that cannot be told.
    """
    return Kept.finished_at(out / STATE) is True


def is_unfinished(out: Path) -> bool:
    """Whether this directory holds a run that can go on.

    Raises:
        InputError: SS-1292 when that cannot be told.
    """
    return Kept.finished_at(out / STATE) is False


def ready(out: Path, *, resume: bool) -> tuple[Path, bool]:
    """The state folder, for a run that may begin or go on, and whether it goes on: an unfinished one lies there.

    Args:
        out: the run's directory.
        resume: go on with a run that was interrupted; where there is none, one begins.

    Raises:
        InputError: SS-1290 when an unfinished run lies there and nobody said to go on with it, SS-1292.
    """
    place = out / STATE
    finished = Kept.finished_at(place)
    if finished is False and not resume:
        raise InputError(
            "SS-1290",
            f"{out} holds a run that was interrupted",
            hint="Go on with it by --resume, or name another --out directory; what it sent is paid for either way.",
        )
    return place, finished is False


def clean(place: Path) -> Path:
    """The same folder, without what a finished run left there; only once the new run really begins.

    Raises:
        InputError: SS-1292.
    """
    if Kept.finished_at(place):
        remove_folder(place)
    return place
