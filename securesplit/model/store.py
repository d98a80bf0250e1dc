"""A model on disk, one file of weights per party, so that a process can only load what is its own.

A model directory holds ``config.json``, ``manifest.json``, ``{front,middle,back}.safetensors`` under the whole model's
tensor names, and the tokenizer. A server needs the middle, the configuration and the manifest; a client all but the
middle. Weights are memory-mapped: several clients on one machine share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from securesplit.errors import CheckFailed, InputError
from securesplit.model.architectures import architecture_of
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
from securesplit.model.parts import Back, Front, Middle, Part, build_part
from securesplit.model.plan import ROLES, Role

__all__ = [
    "FileState",
    "load_back",
    "load_config",
    "load_front",
    "load_middle",
    "load_tokenizer",
    "load_whole",
    "verify_model",
]


@dataclass(frozen=True, slots=True)
class FileState:
    """One file of a model directory after :func:`verify_model`; ``state`` is ``ok`` or ``absent``."""

    file: str
    state: str


def load_front(directory: Path) -> Front:
    """A, from ``front.safetensors`` alone; in evaluation mode.

    Raises:
        InputError: SS-1404 and SS-1405 for a directory that lacks what this party needs, SS-1403 for tensors that do
            not fit the configuration.
        CheckFailed: SS-1540 when a file is not the one that the manifest names.
    """
    return cast("Front", _load(directory, "front"))


def load_middle(directory: Path) -> Middle:
    """B, from ``middle.safetensors`` alone; as :func:`load_front`."""
    return cast("Middle", _load(directory, "middle"))


def load_back(directory: Path) -> Back:
    """C, from ``back.safetensors`` alone; as :func:`load_front`."""
    return cast("Back", _load(directory, "back"))


def load_whole(directory: Path) -> Any:
    """The unsplit causal model from all three files, for comparisons and attacks; in evaluation mode.

    Raises:
        InputError, CheckFailed: as :func:`load_front`.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    config = _checked_config(directory, manifest)
    architecture = architecture_of(config)
    tensors: dict[str, torch.Tensor] = {}
    for role in ROLES:
        tensors.update(_read_part(directory, manifest, role))
    with torch.device("meta"):
        model = architecture.causal_class()(config)
    architecture.restore_tables(getattr(model, architecture.prefix), config)
    if manifest.tied:
        del tensors[architecture.head_name(tensors)]
    model.load_state_dict(tensors, strict=False, assign=True)
    if manifest.tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise InputError(
            "SS-1403",
            f"{len(empty)} tensor(s) of the model are missing",
            hint="Write the directory again.",
            details=tuple(empty[:20]),
        )
    return model.eval()


def load_config(directory: Path) -> Any:
    """The model's configuration, from ``config.json``; no code of the directory is ever run.

    Raises:
        InputError: SS-1404 when there is no readable configuration.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(Path(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            "SS-1404", f"{directory} has no usable {CONFIG}: {type(error).__name__}", hint="Write the directory again."
        ) from None


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a client's model directory.

    Raises:
        InputError: SS-1405 when the directory has none.
    """
    from transformers import AutoTokenizer

    try:
        if not (Path(directory) / "tokenizer_config.json").is_file():
            # The library would make up an empty tokenizer.
            raise FileNotFoundError
        return AutoTokenizer.from_pretrained(Path(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            "SS-1405",
            f"{directory} has no usable tokenizer: {type(error).__name__}",
            hint="A client's directory needs one.",
        ) from None


def verify_model(directory: Path) -> tuple[FileState, ...]:
    """Recompute the hash of every file that is there; a party rightly lacks the files of the others.

    Raises:
        InputError: SS-1404 without a manifest, SS-1405 without a configuration or without any part.
        CheckFailed: SS-1540 naming every file that is not the manifest's.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    states, altered = [], []
    entries: tuple[PartFile | PlainFile, ...] = (manifest.config, *manifest.parts, *manifest.client_files)
    for entry in entries:
        path = directory / entry.file
        present = path.is_file()
        if present and hash_file(path) != entry.sha256:
            altered.append(entry.file)
        states.append(FileState(entry.file, "ok" if present else "absent"))
    if altered:
        raise CheckFailed(
            "SS-1540",
            f"{len(altered)} file(s) of {directory} are not those of its manifest",
            hint="Write the directory again.",
            details=tuple(altered),
        )
    present_files = {state.file for state in states if state.state == "ok"}
    if CONFIG not in present_files or not any(part.file in present_files for part in manifest.parts):
        raise InputError(
            "SS-1405", f"{directory} lacks {CONFIG} or holds no part at all", hint="Write the directory again."
        )
    return tuple(states)


def _load(directory: Path, role: Role) -> Part:
    directory = Path(directory)
    manifest = read_manifest(directory)
    config = _checked_config(directory, manifest)
    tensors = _read_part(directory, manifest, role)
    span = manifest.plan.spans(manifest.layers).of(role)
    return build_part(role, config, architecture_of(config), span, tensors.get)


def _checked_config(directory: Path, manifest: Manifest) -> Any:
    """The configuration, if it is the manifest's and agrees with it."""
    check_file(directory / CONFIG, manifest.config.sha256)
    config = load_config(directory)
    if (config.model_type, config.num_hidden_layers, config.hidden_size) != (
        manifest.architecture,
        manifest.layers,
        manifest.hidden,
    ):
        raise InputError(
            "SS-1404",
            f"{CONFIG} and {MANIFEST} of {directory} describe different models",
            hint="Write the directory again.",
        )
    return config


def _read_part(directory: Path, manifest: Manifest, role: Role) -> dict[str, torch.Tensor]:
    """Check one party's file and map its tensors into memory. No other file of weights is opened."""
    entry = manifest.part(role)
    path = directory / entry.file
    check_file(path, entry.sha256)
    try:
        with safe_open(path, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise InputError(
            "SS-1403", f"{path} is not a safetensors file: {type(error).__name__}", hint="Write the directory again."
        ) from None
