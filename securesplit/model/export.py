"""From the parts' adapters to one standard PEFT adapter for the whole model.

Each party saves its own part's adapters; whoever may hold them all joins them. A directory that this writes is read by
``PeftModel.from_pretrained(base, directory)``, whose logits are those of the split model: the same floats, or, for adapters
with a core, which the export multiplies into factor B, the same up to rounding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from securesplit.errors import InputError
from securesplit.model.core import folded
from securesplit.model.joined import peft_config
from securesplit.model.prefix import KEY, VALUE
from securesplit.model.saved import (
    AdapterFacts,
    NamedTensor,
    PartAdapters,
    architecture_named,
    collect_adapters,
    read_part_adapters,
    restore_adapters,
    save_part_adapters,
)

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


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: the directory, the layers that have adapters, and those that have none."""

    directory: Path
    adapted: tuple[int, ...]
    untouched: tuple[int, ...]


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
    if not parts:
        raise InputError("SS-1413", "there are no adapters to export", hint="Give at least one part's file.")
    first = parts[0].facts
    said = all(p.facts.table for p in parts)
    beside = {p.facts.middle for p in parts if p.facts.role != "middle"}
    of = {p.facts.middle for p in parts if p.facts.role == "middle"}
    if len(beside) == 1 and all((*beside, *of)) and of - beside:
        raise InputError(
            "SS-1415",
            "the client's adapters belong to another state of the server's part than this file holds",
            hint=f"Take former/{min(beside)}/adapter-middle.safetensors of the server's --out.",
        )
    if len(beside) > 1 or any(_origin(p.facts, said=said) != _origin(first, said=said) for p in parts):
        raise InputError(
            "SS-1415", "the adapters come from different models or jobs", hint="Take all files from one run."
        )
    if len({t.name for p in parts for t in p.tensors}) != sum(len(p.tensors) for p in parts):
        raise InputError("SS-1415", "two files hold adapters for the same layer", hint="Take all files from one cut.")
    if first.prefix:
        return _export_prefixes(parts, Path(directory), base_model_name)
    values = {t.name: t.value for p in parts for t in _standard(p.tensors)}
    adapted = sorted({t.layer for p in parts for t in p.tensors if t.layer >= 0})
    untouched = tuple(sorted(set(range(first.layers)) - set(adapted)))
    config = peft_config(parts, architecture_named(first), first.layers, base_model_name)
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


def _export_prefixes(parts: Sequence[PartAdapters], directory: Path, base_model_name: str) -> Exported:
    """PEFT's prefix tuning holds keys and values of all layers in one table, or of none."""
    from peft import PrefixTuningConfig, TaskType

    first, held = parts[0].facts, {(t.layer, t.name.rsplit(".", 1)[1]): t.value for p in parts for t in p.tensors}
    numbers = range(first.layers)
    missing = [n for n in numbers if (n, KEY) not in held or (n, VALUE) not in held]
    if missing:
        raise InputError(
            "SS-1415",
            f"{len(missing)} layers have no prefix in these files, and PEFT's format has one for every layer or for none",
            hint="Give the files of all parts: the server's as well as a client's.",
        )
    length, heads, size = held[0, KEY].shape
    rows = [held[n, kind].reshape(length, heads * size) for n in numbers for kind in (KEY, VALUE)]
    config = PrefixTuningConfig(
        num_virtual_tokens=length, token_dim=heads * size, num_transformer_submodules=1, num_attention_heads=heads,
        num_layers=first.layers, encoder_hidden_size=heads * size, task_type=TaskType.CAUSAL_LM, inference_mode=True,
        base_model_name_or_path=base_model_name,
    )  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    table = {"prompt_embeddings": torch.cat(rows, 1).contiguous()}
    save_file(table, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    return Exported(directory, tuple(numbers), ())


def _origin(facts: AdapterFacts, *, said: bool) -> AdapterFacts:
    """What must be one for all parts, of which all or not all say which job's table they follow; the server has a policy of its own, and a job may give each part its own shape."""
    own: dict[str, object] = {"role": "front", "policy": "", "middle": ""}
    if not said:  # Files of before there were tables, or of parts without a job.
        own |= {"table": ""}
    else:
        own |= {"rank": 1, "alpha": 1.0, "targets": (), "rslora": False, "dora": False}
    return facts.model_copy(update=own)


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
    if isinstance(content["target_modules"], list):
        content["target_modules"] = sorted(content["target_modules"])
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
