"""The manifest of a model directory: what the three files are, and the one digest that both ends compare."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from securesplit.errors import CheckFailed, InputError
from securesplit.model.plan import CutPlan, Role

__all__ = [
    "CONFIG",
    "MANIFEST",
    "Manifest",
    "PartFile",
    "PlainFile",
    "check_file",
    "hash_file",
    "read_manifest",
]

CONFIG = "config.json"
MANIFEST = "manifest.json"
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)
_MAX_BYTES = 1 << 24

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]


class PartFile(BaseModel):
    """One party's weights.

    Attributes:
        name: whose they are; ``file`` is always ``NAME.safetensors``.
        bytes: size of the file.
        tensors: names of the whole model's tensors in it, sorted.
    """

    model_config = _STRICT
    name: Role
    file: Literal["front.safetensors", "middle.safetensors", "back.safetensors"]
    sha256: Sha256
    bytes: Count
    tensors: Annotated[tuple[Annotated[str, Field(max_length=256)], ...], Field(strict=False)]

    @model_validator(mode="after")
    def _named_alike(self) -> PartFile:
        if self.file != f"{self.name}.safetensors":
            msg = "a part's file carries the part's name"
            raise ValueError(msg)
        return self


class PlainFile(BaseModel):
    """A configuration or tokenizer file. The name is a bare one, so that a manifest cannot point elsewhere."""

    model_config = _STRICT
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]
    sha256: Sha256
    bytes: Count


class Manifest(BaseModel):
    """Everything a party must know of a model directory.

    Attributes:
        format: version of this file.
        architecture: the configuration's ``model_type``.
        layers, hidden, vocabulary: sizes of the whole model.
        front, back: the cut.
        dtype: data type of all weights.
        tied: whether the head is the embedding; it is then stored in the front and in the back.
        config: the configuration, which every party needs.
        parts: front, middle, back, in this order.
        client_files: tokenizer and generation files, which a server does not need.
    """

    model_config = _STRICT
    format: Literal[1] = 1
    architecture: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
    layers: Annotated[int, Field(ge=1, le=10_000)]
    hidden: Annotated[int, Field(ge=1, lt=1 << 24)]
    vocabulary: Annotated[int, Field(ge=1, lt=1 << 31)]
    front: Annotated[int, Field(ge=0, le=10_000)]
    back: Annotated[int, Field(ge=0, le=10_000)]
    dtype: Literal["float32", "float16", "bfloat16"]
    tied: bool
    config: PlainFile
    parts: Annotated[tuple[PartFile, ...], Field(min_length=3, max_length=3, strict=False)]
    client_files: Annotated[tuple[PlainFile, ...], Field(max_length=64, strict=False)] = ()

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        if tuple(part.name for part in self.parts) != ("front", "middle", "back"):
            msg = "parts must be front, middle and back, in this order"
            raise ValueError(msg)
        if self.front + self.back >= self.layers:
            msg = "the cut leaves no layer for the middle"
            raise ValueError(msg)
        return self

    @property
    def plan(self) -> CutPlan:
        """The cut."""
        return CutPlan(self.front, self.back)

    def part(self, role: Role) -> PartFile:
        """One part's entry."""
        return next(part for part in self.parts if part.name == role)

    def canonical(self) -> bytes:
        """The bytes that are hashed: JSON, sorted keys, no spaces, without the client's own files.

        Tokenizer files stay out because their exact bytes differ between releases of the tokenizer library, and the
        server neither has nor needs them; :func:`securesplit.model.store.verify_model` checks them all the same.
        """
        content = self.model_dump(mode="json", exclude={"client_files"})
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`canonical`, in hex; both ends state it in their first messages."""
        return hashlib.sha256(self.canonical()).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a model directory.

    Raises:
        InputError: SS-1404 when there is none, or when it breaks the schema (one detail per fault).
    """
    path = Path(directory) / MANIFEST
    hint = "Write the directory with 'securesplit model pull' or 'securesplit model split'."
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError("SS-1404", f"{path} is too large for a manifest", hint=hint)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "SS-1404", f"{directory} has no readable {MANIFEST}: {type(error).__name__}", hint=hint
        ) from None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        details = tuple(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults[:20])
        raise InputError("SS-1404", f"{path} has {error.error_count()} fault(s)", hint=hint, details=details) from None


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_file(path: Path, sha256: str) -> None:
    """Require that a file is there and is the one that was written.

    Raises:
        InputError: SS-1405 when it is absent.
        CheckFailed: SS-1540 when its content is another.
    """
    if not path.is_file():
        raise InputError("SS-1405", f"{path} is missing", hint="This party's file must be in its model directory.")
    if hash_file(path) != sha256:
        raise CheckFailed(
            "SS-1540",
            f"{path} is not the file that the manifest names",
            hint="Delete the directory and write it again.",
        )
