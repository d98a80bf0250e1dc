"""From the parts' adapters to one standard PEFT adapter for the whole model.

Each party saves its own part's adapters; whoever may hold them all joins them. A directory that this writes is read by
``PeftModel.from_pretrained(base, directory)``, whose logits are those of the split model: the same floats, or, for adapters
with a core, which the export multiplies into factor B, the same up to rounding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from securesplit.errors import InputError
from securesplit.model.architectures import ARCHITECTURES, Architecture
from securesplit.model.core import folded
from securesplit.model.lora import adapter_layout, read_adapters
from securesplit.model.parts import Part
from securesplit.model.plan import Role

__all__ = [
    "AdapterFacts",
    "Exported",
    "NamedTensor",
    "PartAdapters",
    "collect_adapters",
    "export_adapter",
    "read_part_adapters",
    "restore_adapters",
    "save_part_adapters",
]

_KEY = "securesplit"
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class AdapterFacts(BaseModel):
    """What a file of adapters says about itself.

    Attributes:
        role: the part they come from.
        architecture: the configuration's ``model_type``.
        layers: decoder layers of the whole model.
        rank, alpha, targets: as in :func:`securesplit.model.lora.add_adapters`, targets resolved.
        model: digest of the model directory's manifest; empty when the model was split in memory.
        policy: digest of the policy under which they learnt; empty when there was none.
    """

    model_config = _STRICT
    format: Annotated[int, Field(ge=1, le=1)] = 1
    role: Role
    architecture: Annotated[str, Field(max_length=64)]
    layers: Annotated[int, Field(ge=1, le=10_000)]
    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[float, Field(gt=0)]
    targets: Annotated[
        tuple[Annotated[str, Field(max_length=128)], ...], Field(min_length=1, max_length=64, strict=False)
    ]
    model: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    policy: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """One factor under its global name, float32."""

    name: str
    layer: int
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class PartAdapters:
    """One part's adapters, apart from the part."""

    facts: AdapterFacts
    tensors: tuple[NamedTensor, ...]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: the directory, the layers that have adapters, and those that have none."""

    directory: Path
    adapted: tuple[int, ...]
    untouched: tuple[int, ...]


def collect_adapters(part: Part, *, model: str = "", policy: str = "") -> PartAdapters:
    """Copy a part's adapters out of it.

    Args:
        part: with adapters from :func:`securesplit.model.lora.add_adapters`.
        model: digest of the model directory's manifest.
        policy: digest of the policy under which they learnt.

    Raises:
        InputError: SS-1413 when the part has none.
    """
    layout = adapter_layout(part)
    if not layout.tensors:
        raise InputError(
            "SS-1413", f"the {part.role} has no adapters", hint="A part without decoder layers never has; leave it out."
        )
    config = part.module.peft_config["default"]
    facts = AdapterFacts(
        role=part.role,
        architecture=part.architecture.model_type,
        layers=part.layers_total,
        rank=config.r,
        alpha=float(config.lora_alpha),
        targets=tuple(sorted(config.target_modules)),
        model=model,
        policy=policy,
    )
    flat, start, tensors = torch.from_numpy(read_adapters(part, layout)), 0, []
    for entry in layout.tensors:
        rows, columns = entry.shape
        tensors.append(
            NamedTensor(entry.name, entry.layer, flat[start : start + rows * columns].reshape(rows, columns).clone())
        )
        start += rows * columns
    return PartAdapters(facts, tuple(tensors))


def save_part_adapters(adapters: PartAdapters, path: Path) -> None:
    """Write ``adapter-ROLE.safetensors``: tensors under global names, the facts in the file's own header."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.part")
    save_file({t.name: t.value for t in adapters.tensors}, scratch, metadata={_KEY: adapters.facts.model_dump_json()})
    scratch.replace(path)


def read_part_adapters(path: Path) -> PartAdapters:
    """Read what :func:`save_part_adapters` wrote.

    Raises:
        InputError: SS-1414 when it is not such a file.
    """
    hint = "Give adapter-front.safetensors, adapter-middle.safetensors or adapter-back.safetensors of a run."
    try:
        with safe_open(Path(path), framework="pt") as stream:
            facts = AdapterFacts.model_validate_json((stream.metadata() or {}).get(_KEY, ""))
            values = {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, ValidationError) as error:
        raise InputError("SS-1414", f"{path} holds no adapters of a part: {type(error).__name__}", hint=hint) from None
    architecture = _architecture(facts)
    tensors = tuple(
        sorted(
            (NamedTensor(n, _layer(n, architecture, path), v) for n, v in values.items()),
            key=lambda t: (t.layer, t.name),
        )
    )
    if not tensors or any(
        t.value.dtype != torch.float32 or t.value.ndim != 2 or facts.rank not in t.value.shape for t in tensors
    ):
        raise InputError("SS-1414", f"{path} holds tensors that are not the adapters it describes", hint=hint)
    return PartAdapters(facts, tensors)


def restore_adapters(part: Part, adapters: PartAdapters) -> None:
    """Put saved values into a part that has fresh adapters of the same shape.

    Raises:
        InputError: SS-1412 when they do not fit.
    """
    from securesplit.model.lora import write_adapters

    layout = adapter_layout(part)
    if [(t.name, tuple(t.value.shape)) for t in adapters.tensors] != [(t.name, t.shape) for t in layout.tensors]:
        raise InputError(
            "SS-1412",
            f"the saved adapters do not fit this {part.role}",
            hint="Use the cut, rank and targets of the run that saved them.",
        )
    write_adapters(part, layout, torch.cat([t.value.reshape(-1) for t in adapters.tensors]).numpy())


def export_adapter(
    parts: tuple[PartAdapters, ...] | list[PartAdapters], directory: Path, base_model_name: str
) -> Exported:
    """Join parts' adapters into one PEFT directory, ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        parts: of one model and one job; layers of absent parts simply stay as they are in the base model.
        directory: made if needed; files of an earlier export in it are replaced.
        base_model_name: what PEFT shall record as the base model.

    Raises:
        InputError: SS-1413 without parts, SS-1415 when they do not belong together or speak of the same layer twice.
    """
    from peft import LoraConfig, TaskType

    if not parts:
        raise InputError("SS-1413", "there are no adapters to export", hint="Give at least one part's file.")
    first = parts[0].facts
    same = {"role": first.role, "policy": first.policy}  # The server has a policy of its own.
    if any(p.facts.model_copy(update=same) != first for p in parts):
        raise InputError(
            "SS-1415", "the adapters come from different models or jobs", hint="Take all files from one run."
        )
    if len({t.name for p in parts for t in p.tensors}) != sum(len(p.tensors) for p in parts):
        raise InputError("SS-1415", "two files hold adapters for the same layer", hint="Take all files from one cut.")
    values = {t.name: t.value for p in parts for t in _standard(p.tensors)}
    adapted = sorted({t.layer for p in parts for t in p.tensors})
    untouched = tuple(sorted(set(range(first.layers)) - set(adapted)))
    architecture = _architecture(first)
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        target_modules=list(first.targets),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=architecture.transposed,
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
        base_model_name_or_path=base_model_name,
        layers_to_transform=adapted if untouched else None,
        layers_pattern=architecture.layers if untouched else None,
    )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"base_model.model.{name}": value.contiguous() for name, value in values.items()},
        directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(directory)
    _tidy(directory / "adapter_config.json")
    return Exported(directory, tuple(adapted), untouched)


def _standard(tensors: tuple[NamedTensor, ...]) -> tuple[NamedTensor, ...]:
    """A and B of each layer, as PEFT has them; a core is multiplied into its B."""
    ending = ".lora_core.weight"
    cores = {t.name.removesuffix(ending) + ".lora_B.weight": t.value for t in tensors if t.name.endswith(ending)}
    return tuple(
        NamedTensor(t.name, t.layer, folded(t.value, cores[t.name])) if t.name in cores else t
        for t in tensors
        if not t.name.endswith(ending)
    )


def _tidy(path: Path) -> None:
    """Sort the lists that PEFT keeps as sets, so that the same adapters give the same file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    content["target_modules"] = sorted(content["target_modules"])
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _architecture(facts: AdapterFacts) -> Architecture:
    found = next((a for a in ARCHITECTURES if a.model_type == facts.architecture), None)
    if found is None:
        raise InputError(
            "SS-1401", f"models of type {facts.architecture!r} are not supported", hint="Update securesplit."
        )
    return found


def _layer(name: str, architecture: Architecture, path: Path) -> int:
    number = name.removeprefix(f"{architecture.prefix}.{architecture.layers}.").split(".", 1)[0]
    if not number.isdecimal():
        raise InputError(
            "SS-1414", f"{path} holds a tensor outside the decoder layers", hint="Take the file from a run."
        )
    return int(number)
