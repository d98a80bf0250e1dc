"""Write a model directory (securesplit/model/store.py says what is in it), whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from securesplit.errors import InputError
from securesplit.model.architectures import Architecture, architecture_of
from securesplit.model.manifest import (
    CONFIG,
    MANIFEST,
    Manifest,
    PartFile,
    PlainFile,
    check_file,
    hash_file,
    read_manifest,
)
from securesplit.model.plan import ROLES, CutPlan, Role
from securesplit.model.store import load_config

__all__ = ["resplit", "write_model"]

_NOT_PORTABLE = (
    "transformers_version",
    "_name_or_path",
    "_model_name_or_path",
    "quantization_config",
    "id2label",
    "label2id",
)
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def write_model(
    model: Any, plan: CutPlan, target: Path, *, tokenizer: Any = None, progress: Callable[[float], None] | None = None
) -> Manifest:
    """Write a causal model as a model directory, whole or not at all.

    Args:
        model: a ``transformers`` causal model of a supported family, all weights of one data type.
        plan: where to cut.
        target: the directory to make. One that exists already is left alone if another process made it meanwhile.
        tokenizer: written beside it, if given.
        progress: called with the fraction written, 0 to 1.

    Raises:
        InputError: SS-1400, SS-1401 or SS-1402 when the model or the cut is not possible.
    """
    source = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    with _fresh(target) as scratch:
        (scratch / CONFIG).write_text(_portable(model.config), encoding="utf-8")
        model.generation_config.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        return _write_parts(
            scratch, load_config(scratch), plan, names=sorted(source), tensor=source.__getitem__, progress=progress
        )


def resplit(source: Path, plan: CutPlan, target: Path, *, progress: Callable[[float], None] | None = None) -> Manifest:
    """Cut a complete model directory elsewhere. Tensors are read one file at a time and never all at once.

    Raises:
        InputError: SS-1405 when one of the source's files is missing, SS-1400 for an impossible cut.
        CheckFailed: SS-1540 when a file of the source was altered.
    """
    manifest = read_manifest(source)
    files = {}
    for part in manifest.parts:
        check_file(source / part.file, part.sha256)
        files.update(dict.fromkeys(part.tensors, source / part.file))

    def tensor(name: str) -> torch.Tensor:
        with safe_open(files[name], framework="pt") as stream:
            return cast("torch.Tensor", stream.get_tensor(name))

    with _fresh(target) as scratch:
        check_file(source / CONFIG, manifest.config.sha256)
        for plain in (manifest.config, *manifest.client_files):
            shutil.copyfile(source / plain.file, scratch / plain.file)
        return _write_parts(scratch, load_config(scratch), plan, names=sorted(files), tensor=tensor, progress=progress)


@contextmanager
def _fresh(target: Path) -> Iterator[Path]:
    """A scratch directory beside ``target`` that takes its name when all went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=target.parent))
    try:
        yield scratch
        try:
            scratch.rename(target)
        except OSError:
            # Another process may have written the same directory meanwhile; it is as good as ours, if it is the same.
            if not (target / MANIFEST).is_file() or read_manifest(target).digest != read_manifest(scratch).digest:
                raise InputError(
                    "SS-1408", f"{target} is in the way", hint="Choose a directory that does not exist yet."
                ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _portable(config: Any) -> str:
    """The configuration as JSON, without what only tells where and by which release it was written."""
    content = json.loads(config.to_json_string(use_diff=False))
    for key in _NOT_PORTABLE:
        content.pop(key, None)
    content["architectures"] = [architecture_of(config).causal]
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _plain(path: Path) -> PlainFile:
    return PlainFile(file=path.name, sha256=hash_file(path), bytes=path.stat().st_size)


def _owner(name: str, architecture: Architecture, plan: CutPlan, layers: int) -> Role:
    """The part that a tensor of the whole model belongs to."""
    stem = f"{architecture.prefix}.{architecture.layers}."
    if name.startswith(stem):
        return plan.spans(layers).role_of(int(name.removeprefix(stem).split(".", 1)[0]))
    first = tuple(
        f"{architecture.prefix}.{piece}." for piece in (architecture.embedding, architecture.positions) if piece
    )
    return "front" if name.startswith(first) else "back"


def _write_parts(
    scratch: Path,
    config: Any,
    plan: CutPlan,
    *,
    names: list[str],
    tensor: Callable[[str], torch.Tensor],
    progress: Callable[[float], None] | None,
) -> Manifest:
    """Write three files and the manifest beside a configuration that is there already."""
    architecture = architecture_of(config)
    plan.spans(config.num_hidden_layers)
    embedding = f"{architecture.prefix}.{architecture.embedding}.weight"
    tied = bool(config.tie_word_embeddings)
    head = architecture.head_name(names)
    entries, dtypes = [], set()
    for index, role in enumerate(ROLES):
        mine = tuple(n for n in names if _owner(n, architecture, plan, config.num_hidden_layers) == role)
        # A tied head is stored once more, so that the back never needs the front's file.
        tensors = {n: tensor(embedding if tied and n == head else n).contiguous() for n in mine}
        dtypes |= {value.dtype for value in tensors.values()}
        path = scratch / f"{role}.safetensors"
        save_file(tensors, path)
        entries.append(
            PartFile(
                name=role, file=cast("Any", path.name), sha256=hash_file(path), bytes=path.stat().st_size, tensors=mine
            )
        )
        if progress is not None:
            progress((index + 1) / len(ROLES))
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        raise InputError(
            "SS-1402",
            "the model's weights are not all of one float type",
            hint="Store them all as float32, float16 or bfloat16.",
        )
    manifest = Manifest(
        architecture=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        front=plan.front,
        back=plan.back,
        dtype=cast("Any", _DTYPES[dtypes.pop()]),
        tied=tied,
        config=_plain(scratch / CONFIG),
        parts=tuple(entries),
        client_files=tuple(
            _plain(p)
            for p in sorted(scratch.iterdir())
            if p.is_file() and p.name != CONFIG and p.suffix != ".safetensors"
        ),
    )
    (scratch / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    return manifest
