"""The public code at the cut: fewer numbers per row, centred, and a public first row that is never sent.

    client:  codes  = ((hidden - mean) * weight) @ basis.T / scale        (B, T, D) -> (B, T, k), then gate: clip, noise
    server:  hidden = ((gain * codes) * scale) @ basis / weight + mean    (B, T, k) -> (B, T, D), then B

All of it is fitted on public text (securesplit/model/fit.py), stored in one file, and known to everybody. With the gain
that the gate states, decoding is exactly linear shrinkage towards the public mean.

The sentinel. The first row of a sequence is massive in many models (an attention sink) and would spend the clip on
something that everybody knows. With a sentinel the client puts a public token in front of its text, and keeps its row;
the server puts ``row`` in front itself, and C puts ``mixed`` in front itself. Causal attention makes both constants of
the public model. Where A or B learns they stay those of the public model, so that such a split is a model of its own
kind, not bit for bit the unsplit one. Nothing on the wire changes: T rows go up and T rows come back.

What it does not protect: anything. A projection hides nothing that an attack would need. What protects is the clip and
the noise *after* :meth:`CutCode.encode`: whatever code a client is given, a hostile one too, what the gate releases has
norm at most C, so that the claim 2C/sigma does not depend on the code. Codes are finite whatever the code, too, because
entries are float32 and the arithmetic is float64: a code cannot make a client stop for some texts and not for others. A
bad code costs quality only. Row t of the codes depends on row t of the hidden states alone, so that claims per token
are those that they are without a code.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from securesplit.errors import CheckFailed, InputError

__all__ = ["Clips", "CodeFacts", "CutCode", "read_code", "refuse_other_code", "save_code"]

_KEY, _DIGEST = "securesplit", "digest"
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
_MAX_BYTES = 1 << 32

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Norm = Annotated[float, Field(ge=0)]


class Clips(BaseModel):
    """Norms of the codes of public text, from which a policy's owner may choose its clips.

    Attributes:
        rows: length of the sequences.
        sequence: quantiles 50, 90 and 99 % of a sequence's Frobenius norm, for ``clip`` at unit sequence.
        row: the same of a single row's norm.
    """

    model_config = _STRICT
    rows: Annotated[int, Field(ge=1)]
    sequence: Annotated[tuple[Norm, Norm, Norm], Field(strict=False)]
    row: Annotated[tuple[Norm, Norm, Norm], Field(strict=False)]


class CodeFacts(BaseModel):
    """What a code says about itself; covered by its digest.

    Attributes:
        model: digest of the model directory's manifest, which covers weights and cut.
        front, back: the cut, for people.
        hidden, width: D and k.
        sentinel: the public token's id, or None.
        whitened: whether every component has unit variance on the public text.
        text: SHA-256 of the public text's file.
        rows: rows that mean and basis were fitted on.
        explained: the share of those rows' variance that survives encoding and decoding.
        clips: norms of the codes.
    """

    model_config = _STRICT
    format: Annotated[int, Field(ge=1, le=1)] = 1
    model: Sha256
    front: Annotated[int, Field(ge=0, le=10_000)]
    back: Annotated[int, Field(ge=0, le=10_000)]
    hidden: Annotated[int, Field(ge=1, lt=1 << 24)]
    width: Annotated[int, Field(ge=1, lt=1 << 24)]
    sentinel: Annotated[int, Field(ge=0, lt=1 << 31)] | None
    whitened: bool
    text: Sha256
    rows: Annotated[int, Field(ge=1)]
    explained: float
    clips: Clips


@dataclass(frozen=True, slots=True, eq=False)
class CutCode:
    """A code; every tensor is public, finite and float32.

    Attributes:
        facts: what it is and where it comes from.
        mean: (D,), of A's rows.
        weight: (D,), above 0; below 1 for outlier dimensions.
        basis: (k, D), orthonormal rows when it was fitted here.
        scale: (k,), above 0; the standard deviations when whitened, else ones.
        row: (D,), A's output for the sentinel alone; None without one.
        mixed: (D,), B's output for that row alone; None without one.
        digest: SHA-256 in hex over facts and tensors.

    Raises:
        InputError: SS-1416 when a tensor has another shape or type, or holds NaN, infinity, or a zero divisor.
    """

    facts: CodeFacts
    mean: Tensor = field(repr=False)
    weight: Tensor = field(repr=False)
    basis: Tensor = field(repr=False)
    scale: Tensor = field(repr=False)
    row: Tensor | None = field(default=None, repr=False)
    mixed: Tensor | None = field(default=None, repr=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        hidden, width = self.facts.hidden, self.facts.width
        shapes = {"mean": (hidden,), "weight": (hidden,), "basis": (width, hidden), "scale": (width,)}
        if self.facts.sentinel is not None:
            shapes |= {"row": (hidden,), "mixed": (hidden,)}
        held = dict(self.tensors())
        faults = [f"{name}: missing" for name in shapes.keys() - held.keys()]
        faults += [f"{name}: not expected" for name in held.keys() - shapes.keys()]
        for name, tensor in held.items():
            if name in shapes and (tuple(tensor.shape) != shapes[name] or tensor.dtype != torch.float32):
                faults.append(f"{name}: {tuple(tensor.shape)} {tensor.dtype} instead of {shapes[name]} float32")
            elif not bool(torch.isfinite(tensor).all()):
                faults.append(f"{name}: holds NaN or infinity")
            elif name in {"weight", "scale"} and not bool((tensor >= torch.finfo(torch.float32).tiny).all()):
                faults.append(f"{name}: must be above 0")
        if width > hidden:
            faults.append(f"width {width} is more than the {hidden} of the hidden states")
        if faults:
            raise InputError(
                "SS-1416",
                f"a code at the cut has {len(faults)} fault(s)",
                hint="Fit it again: securesplit model fit.",
                details=tuple(sorted(faults)),
            )
        object.__setattr__(self, "digest", self._hashed())

    @property
    def width(self) -> int:
        """k, the columns of what crosses."""
        return self.facts.width

    def tensors(self) -> tuple[tuple[str, Tensor], ...]:
        """Names and tensors, as in the file."""
        named = (("mean", self.mean), ("weight", self.weight), ("basis", self.basis), ("scale", self.scale))
        first = (("row", self.row), ("mixed", self.mixed))
        return (*named, *((name, tensor) for name, tensor in first if tensor is not None))

    def encode(self, hidden: Tensor) -> Tensor:
        """A's output to codes, on the client, before the gate.

        Args:
            hidden: (..., D), any float type, finite.

        Returns:
            (..., k), float64, finite. Differentiable. As revealing as ``hidden``: clip and noise come after.
        """
        centred = (hidden.double() - self.mean.to(hidden.device)) * self.weight.to(hidden.device)
        return centred @ self.basis.to(centred).T / self.scale.to(hidden.device)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes to B's input, on the server, after noise and gain; the least-squares inverse of :meth:`encode`.

        Args:
            codes: (..., k), float32.

        Returns:
            (..., D), float32. Differentiable.
        """
        scaled = codes.float() * self.scale.to(codes.device)
        return scaled @ self.basis.to(codes.device) / self.weight.to(codes.device) + self.mean.to(codes.device)

    def _hashed(self) -> str:
        facts = json.dumps(self.facts.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()
        digest = hashlib.sha256(len(facts).to_bytes(8, "little") + facts)
        for name, tensor in self.tensors():  # The facts fix every shape, hence every length.
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().astype("<f4").tobytes())
        return digest.hexdigest()


def save_code(code: CutCode, path: Path) -> None:
    """Write a code as one safetensors file, facts and digest in its header; whole or not at all."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.part")
    header = {_KEY: code.facts.model_dump_json(), _DIGEST: code.digest}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in code.tensors()}, scratch, metadata=header)
    scratch.replace(path)


def read_code(path: Path) -> CutCode:
    """Read what :func:`save_code` wrote. Nothing in the file is ever run.

    Raises:
        InputError: SS-1416 when it cannot be read or is no code.
        CheckFailed: SS-1542 when it is not what was written. Somebody who alters a file on purpose also writes the new
            digest; that is for the job's digest to notice (SS-1431).
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("too large")
        with safe_open(path, framework="pt") as stream:
            header = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
        facts = CodeFacts.model_validate_json(header[_KEY])
        expected = header[_DIGEST]
        code = CutCode(facts, **tensors)
    except (OSError, SafetensorError, ValidationError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            "SS-1416",
            f"{path} is no readable code: {type(error).__name__}",
            hint="Name a file of securesplit model fit.",
        ) from None
    if code.digest != expected:
        raise CheckFailed("SS-1542", f"{path} is not the code that was written", hint="Fetch it, or fit it, again.")
    return code


def refuse_other_code(code: CutCode | None, *, digest: str | None, width: int | None, model: str) -> None:
    """Require that the code at hand is the one that a job names, and is made for its model.

    Args:
        code: from this side's own file, or None.
        digest, width: the job's, or None when it has no code.
        model: digest of the model's manifest.

    Raises:
        InputError: SS-1431.
    """
    if code is None and digest is None:
        return
    if code is None:
        what, hint = "the job has a code at the cut, and none was given here", "Name its file with --code."
    elif digest is None:
        what, hint = "a code was given, and the job has none", "Leave --code out, or use a job with a [code] table."
    elif (code.digest, code.width) != (digest, width):
        what, hint = "the job has another code than the one given here", "Use the same file on both ends."
    elif code.facts.model != model:
        what, hint = "the code was fitted to another model, or another cut of it", "Fit it to this model."
    else:
        return
    raise InputError("SS-1431", what, hint=hint)
