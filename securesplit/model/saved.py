"""One part's adapters in a file: ``adapter-front.safetensors`` and its like, tensors under the whole model's names."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from securesplit.errors import InputError
from securesplit.model.architectures import ARCHITECTURES, Architecture
from securesplit.model.core import folded
from securesplit.model.embedding import drift_parameters, write_drift
from securesplit.model.joined import lengths_of
from securesplit.model.lora import MAGNITUDE, adapter_layout, read_adapters, write_adapters
from securesplit.model.parts import Part
from securesplit.model.plan import Role
from securesplit.model.prefix import KEY, VALUE, prefix_of

__all__ = [
    "AdapterFacts",
    "NamedTensor",
    "PartAdapters",
    "architecture_named",
    "collect_adapters",
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
        table: digest of all that the job says of adapters; empty when there was no job.
        rslora, dora: as in :func:`securesplit.model.lora.add_adapters`.
        prefix: positions of prefixes, which stand in place of LoRA; ``rank`` and ``alpha`` are 1 and ``targets`` empty then.
        middle: name of the state of B's adapters that they belong to, as the server keeps it; empty when it keeps none.
    """

    model_config = _STRICT
    format: Annotated[int, Field(ge=1, le=1)] = 1
    role: Role
    architecture: Annotated[str, Field(max_length=64)]
    layers: Annotated[int, Field(ge=1, le=10_000)]
    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[float, Field(gt=0)]
    targets: Annotated[tuple[Annotated[str, Field(max_length=128)], ...], Field(max_length=64, strict=False)]
    model: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    policy: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    table: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    rslora: bool = False
    dora: bool = False
    prefix: Annotated[int, Field(ge=0, le=1024)] = 0
    middle: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$", exclude_if=lambda value: not value)] = ""


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """One factor under its global name, float32; its decoder layer, or -1 for the embedding's."""

    name: str
    layer: int
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class PartAdapters:
    """One part's adapters, apart from the part."""

    facts: AdapterFacts
    tensors: tuple[NamedTensor, ...]


def collect_adapters(
    part: Part, *, model: str = "", policy: str = "", table: str = "", lengths: bool = False, middle: str = ""
) -> PartAdapters:
    """Copy a part's adapters out of it.

    Args:
        part: with adapters from :func:`securesplit.model.lora.add_adapters`.
        model: digest of the model directory's manifest.
        policy: digest of the policy under which they learnt.
        table: digest of what the job says of adapters.
        lengths: add the lengths of the adapted weights' rows, where another part of the job has DoRA: PEFT's format has it
            for all layers or for none.
        middle: name of the state of B's adapters that they belong to.

    Raises:
        InputError: SS-1413 when the part has none.
    """
    layout = adapter_layout(part)
    if not layout.tensors and not drift_parameters(part):
        raise InputError(
            "SS-1413", f"the {part.role} has no adapters", hint="A part without decoder layers never has; leave it out."
        )
    facts = _facts(part, model=model, policy=policy, table=table).model_copy(update={"middle": middle})
    flat, start, tensors = torch.from_numpy(read_adapters(part, layout)), 0, []
    for entry in layout.tensors:
        size = math.prod(entry.shape)
        tensors.append(NamedTensor(entry.name, entry.layer, flat[start : start + size].reshape(entry.shape).clone()))
        start += size
    tensors += [NamedTensor(name, -1, value.detach().cpu().clone()) for name, value in drift_parameters(part)]
    if lengths and not facts.dora:
        tensors += _lengths(part)
    return PartAdapters(facts, tuple(sorted(tensors, key=lambda t: (t.layer, t.name))))


def _facts(part: Part, *, model: str, policy: str, table: str) -> AdapterFacts:
    origin = {"model": model, "policy": policy, "table": table, "architecture": part.architecture.model_type}
    length = prefix_of(part.module)
    if length:
        return AdapterFacts.model_validate(
            {
                **origin,
                "role": part.role,
                "layers": part.layers_total,
                "rank": 1,
                "alpha": 1.0,
                "targets": (),
                "prefix": length,
            }
        )
    config = part.module.peft_config["default"]
    return AdapterFacts(
        role=part.role,
        architecture=part.architecture.model_type,
        layers=part.layers_total,
        rank=config.r,
        alpha=float(config.lora_alpha),
        targets=tuple(sorted(set(config.target_modules) - {part.architecture.embedding})),
        model=model,
        policy=policy,
        table=table,
        rslora=bool(config.use_rslora),
        dora=bool(config.use_dora),
    )


def _lengths(part: Part) -> list[NamedTensor]:
    """Of every adapted layer, by :func:`lengths_of`."""
    from peft.utils.integrations import dequantize_module_weight

    found = []
    numbers = {t.name: t.layer for t in adapter_layout(part).tensors}
    for local, layer in part.module.named_modules():
        if isinstance(getattr(layer, "lora_embedding_A", None), torch.nn.ParameterDict) and layer.lora_embedding_A:
            (adapter,) = layer.lora_embedding_A
            a, b = layer.lora_embedding_A[adapter].detach(), layer.lora_embedding_B[adapter].detach()
            # PEFT takes an embedding's columns for the rows.
            value = lengths_of(layer.get_base_layer().weight.detach().T, a, b, layer.scaling[adapter])
            found.append(NamedTensor(f"{part.global_name(local)}.{MAGNITUDE}", -1, value))
            continue
        if not isinstance(getattr(layer, "lora_A", None), torch.nn.ModuleDict) or not layer.lora_A:
            continue
        (adapter,) = layer.lora_A
        a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter]
        inner = b.weight.detach() if hasattr(b, "weight") else folded(b.outer.weight.detach(), b.core.weight.detach())
        weight = dequantize_module_weight(layer.get_base_layer()).detach()
        weight = weight.T if part.architecture.transposed else weight
        name = part.global_name(local)
        value = lengths_of(weight, a, inner, layer.scaling[adapter])
        found.append(NamedTensor(f"{name}.{MAGNITUDE}", numbers[f"{name}.lora_A.weight"], value))
    return found


def save_part_adapters(adapters: PartAdapters, path: Path) -> None:
    """Write ``adapter-ROLE.safetensors``: tensors under global names, the facts in the file's own header.

    When this returns it survives a loss of power: the state of a run that is over is thrown away.

    Raises:
        OSError: when the disk does not take it; what was there stays.
    """
    path = Path(path)
    data = save({t.name: t.value for t in adapters.tensors}, {_KEY: adapters.facts.model_dump_json()})
    scratch = path.with_name(f".{path.name}.part")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)  # noqa: PTH105 - the pair of fsync
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


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
    architecture = architecture_named(facts)
    tensors = tuple(
        sorted(
            (NamedTensor(n, _layer(n, architecture, path), v) for n, v in values.items()),
            key=lambda t: (t.layer, t.name),
        )
    )
    if not tensors or any(t.value.dtype != torch.float32 or not _plausible(t, facts) for t in tensors):
        raise InputError("SS-1414", f"{path} holds tensors that are not the adapters it describes", hint=hint)
    return PartAdapters(facts, tensors)


def _plausible(tensor: NamedTensor, facts: AdapterFacts) -> bool:
    """Whether a tensor's shape can be that of its kind."""
    if tensor.name.endswith(f".{MAGNITUDE}"):
        return tensor.value.ndim == 1
    if facts.prefix:
        return (
            tensor.name.endswith((f".{KEY}", f".{VALUE}"))
            and tensor.value.ndim == 3
            and len(tensor.value) == facts.prefix
        )
    return tensor.value.ndim == 2 and facts.rank in tensor.value.shape


def restore_adapters(part: Part, adapters: PartAdapters) -> None:
    """Put saved values into a part that has fresh adapters of the same shape.

    Raises:
        InputError: SS-1412 when they do not fit.
    """
    layout = adapter_layout(part)
    # Lengths that were added for the sake of an export follow from the rest.
    held = [
        t for t in adapters.tensors if t.layer >= 0 and (adapters.facts.dora or not t.name.endswith(f".{MAGNITUDE}"))
    ]
    drift = [t for t in adapters.tensors if t.layer < 0 and not t.name.endswith(f".{MAGNITUDE}")]
    fits = [(t.name, tuple(t.value.shape)) for t in held] == [(t.name, t.shape) for t in layout.tensors]
    if not fits or [(t.name, t.value.shape) for t in drift] != [(n, p.shape) for n, p in drift_parameters(part)]:
        raise InputError(
            "SS-1412",
            f"the saved adapters do not fit this {part.role}",
            hint="Use the cut, rank and targets of the run that saved them.",
        )
    if held:
        write_adapters(part, layout, torch.cat([t.value.reshape(-1) for t in held]).numpy())
    if drift:
        write_drift(part, torch.cat([t.value.reshape(-1) for t in drift]).numpy())


def architecture_named(facts: AdapterFacts) -> Architecture:
    """The family that a file speaks of.

    Raises:
        InputError: SS-1401 for one that is not supported.
    """
    found = next((a for a in ARCHITECTURES if a.model_type == facts.architecture), None)
    if found is None:
        raise InputError(
            "SS-1401", f"models of type {facts.architecture!r} are not supported", hint="Update securesplit."
        )
    return found


def _layer(name: str, architecture: Architecture, path: Path) -> int:
    if name.startswith(f"{architecture.prefix}.{architecture.embedding}.lora_"):
        return -1
    number = name.removeprefix(f"{architecture.prefix}.{architecture.layers}.").split(".", 1)[0]
    if not number.isdecimal():
        raise InputError(
            "SS-1414", f"{path} holds a tensor outside the decoder layers", hint="Take the file from a run."
        )
    return int(number)
