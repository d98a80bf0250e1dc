"""Tokenised data kept for the next start: safetensors, never pickle, for this user's eyes alone.

A file is named by the SHA-256 of all that its content follows from: the examples' whole texts, what tokenises and cuts
them, and the version of this format. It carries the SHA-256 of its tensors; one that was damaged or altered is as good as absent. Tokens are as
private as the text: folder 0700, files 0600. What it does not protect: a thief of the disk reads them, as he does the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from securesplit.data.answers import Answered, Asked
from securesplit.errors import InputError

__all__ = ["cached"]

_VERSION = b"securesplit.tokens.v1"
_MAX_BYTES = 1 << 32
_Array = npt.NDArray[np.int64]


def cached(
    folder: Path | None, examples: Sequence[Asked], under: str, make: Callable[[], tuple[Answered, ...]]
) -> tuple[Answered, ...]:
    """The tokens of these examples, from the cache or made and kept.

    Args:
        folder: where; None keeps nothing.
        examples: as text, uncut.
        under: names all else that decides the tokens: the model's digest, tokenizer included, and the rule of cutting.
        make: tokenises; called when nothing is kept.

    Raises:
        InputError: SS-1246 when the folder cannot be used.
    """
    if folder is None:
        return make()
    key = _key(examples, under)
    path = folder / f"{key}.safetensors"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (found := _read(path, key, len(examples))) is not None:
            return found
        made = make()
        _write(path, key, made)
    except OSError as error:
        raise InputError(
            "SS-1246",
            f"the cache {folder} cannot be used: {type(error).__name__}",
            hint="Name another folder, or none.",
        ) from None
    return made


def _key(examples: Sequence[Asked], under: str) -> str:
    digest = hashlib.sha256(_VERSION)
    for text in (under, *(part for e in examples for part in (e.prompt, "\0" if e.answer is None else e.answer))):
        data = text.encode("utf-8")
        digest.update(struct.pack("<Q", len(data)) + data)
    return digest.hexdigest()


def _write(path: Path, key: str, rows: tuple[Answered, ...]) -> None:
    arrays = {
        "tokens": np.asarray([token for row in rows for token in row.tokens], dtype=np.int64),
        "lengths": np.asarray([len(row.tokens) for row in rows], dtype=np.int64),
        "starts": np.asarray([row.start for row in rows], dtype=np.int64),
    }
    data = save(arrays, metadata={"key": key, "content": _digest(arrays)})
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _read(path: Path, key: str, count: int) -> tuple[Answered, ...] | None:
    """None for a file that is absent, or not what was written."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size > _MAX_BYTES:
        return None
    data = path.read_bytes()
    try:
        arrays = load(data)
        kept = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]).get("__metadata__", {})
    except (SafetensorError, ValueError, struct.error, RecursionError, KeyError):
        return None
    if set(arrays) != {"tokens", "lengths", "starts"} or any(
        a.dtype != np.int64 or a.ndim != 1 for a in arrays.values()
    ):
        return None
    tokens, lengths, starts = (arrays[name] for name in ("tokens", "lengths", "starts"))
    sound = len(lengths) == len(starts) == count and (starts >= 0).all() and (starts <= lengths).all()
    if not sound or lengths.sum() != len(tokens) or kept != {"key": key, "content": _digest(arrays)}:
        return None
    ends = np.cumsum(lengths)
    return tuple(
        Answered(tuple(tokens[end - length : end].tolist()), int(start))
        for end, length, start in zip(ends.tolist(), lengths.tolist(), starts.tolist(), strict=True)
    )


def _digest(arrays: dict[str, _Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        data = arrays[name].astype("<i8").tobytes()
        digest.update(f"{name}:{len(data)}:".encode() + data)
    return digest.hexdigest()
