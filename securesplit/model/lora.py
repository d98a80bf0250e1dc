"""LoRA adapters on a part, the same ones whatever the cut, and their values as one flat vector.

Each layer's factor A is drawn from (seed, the module's name in the whole model), so that two parts of any cut, and the
unsplit model, start from the same adapters; factor B starts at zero. The flat vector is what clients sum under secure
aggregation. The mean of clients' updates to one factor is the update of the mean model while the other stands still,
which is not true of the mean of two factors that are then multiplied. What a job's clients train and sum is said in
securesplit/client/sharing.py. With a core (securesplit/model/core.py) A and B are constants, and R between them learns.

What this does not do: an adapter trained on private text carries that text's traces. Nothing here clips or noises.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from securesplit.errors import InputError
from securesplit.model.architectures import Architecture, architecture_of
from securesplit.model.core import CORE, OUTER, insert_cores, orthonormal
from securesplit.model.dropout import key_adapters
from securesplit.model.embedding import set_trainable_drift, start_drift
from securesplit.model.parts import Part
from securesplit.model.prefix import KEY, VALUE, insert_prefixes, start_of_prefix

__all__ = [
    "AdapterTensor",
    "Factor",
    "Layout",
    "Learned",
    "adapter_layout",
    "adapter_parameters",
    "add_adapters",
    "add_prefixes",
    "read_adapters",
    "set_trainable_factor",
    "write_adapters",
]

Factor = Literal["A", "B", "core", "prefix"]
Learned = Factor | Literal["both"]
"""One factor, or A and B together."""

_ADAPTER = "default"
MAGNITUDE = "lora_magnitude_vector"
"""DoRA's lengths of a weight's rows, as PEFT's files call them."""
_NAMES = {
    f"lora_A.{_ADAPTER}.weight": "lora_A.weight",
    f"lora_B.{_ADAPTER}.weight": "lora_B.weight",
    f"lora_B.{_ADAPTER}.{OUTER}.weight": "lora_B.weight",
    f"lora_B.{_ADAPTER}.{CORE}.weight": "lora_core.weight",
    f"lora_magnitude_vector.{_ADAPTER}.weight": MAGNITUDE,
    KEY: KEY,
    VALUE: VALUE,
}
_SUFFIX = re.compile(rf"\.({'|'.join(map(re.escape, _NAMES))})$")


@dataclass(frozen=True, slots=True)
class AdapterTensor:
    """One factor of one adapter.

    Attributes:
        name: as in a PEFT file, without its prefix, e.g. ``model.layers.5.self_attn.q_proj.lora_A.weight``.
        layer: global number of the decoder layer.
        shape: (rank, in) for A, (out, rank) for B, (rank, rank) for a core, (out,) for DoRA's lengths.
    """

    name: str
    layer: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which number of a flat vector belongs where: tensors by layer, then by name, each in C order."""

    tensors: tuple[AdapterTensor, ...]

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def digest(self) -> str:
        """SHA-256 in hex over names and shapes in order; equal exactly when two vectors may be added."""
        rows = [[tensor.name, *tensor.shape] for tensor in self.tensors]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def add_adapters(
    model: Part | Any,
    rank: int,
    alpha: float,
    targets: tuple[str, ...] = (),
    *,
    seed: int,
    core: bool = False,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    embedding: bool = False,
) -> Layout:
    """Put fresh LoRA adapters on a part, or on an unsplit model, and freeze everything else.

    Args:
        model: a :class:`Part`, or a causal model of the library.
        rank, alpha: the update of a weight is ``alpha / rank * B @ A``.
        targets: endings of the names of linear layers inside decoder layers; empty means the attention projections.
        seed: public; 0 to 2**63 - 1.
        core: put a square matrix R of zeros between the factors, which then are constants: ``alpha / rank * B @ R @ A``.
        dropout: probability that a number in front of A is left out; only within ``dropout.dropping``.
        rslora: ``alpha / sqrt(rank)`` in place of ``alpha / rank``.
        dora: learn the lengths of the adapted weight's rows besides (arXiv:2402.09353).
        embedding: adapt the embedding too; it is in no layout (securesplit/model/embedding.py).

    Returns:
        The layout of all factors. Adapters are float32, whatever the part's own data type, and trainable.

    Raises:
        InputError: SS-1410 for targets that name no linear layer, SS-1411 when there are adapters already.
    """
    inner, architecture = _inner(model)
    if _factors(model):
        raise InputError(
            "SS-1411", "this part has adapters already", hint="Load the part anew to start from fresh ones."
        )
    inner.requires_grad_(False)  # noqa: FBT003 - torch's own signature
    wanted = [*_targets(model, targets), *((architecture.embedding,) if embedding else ())]
    if not wanted:
        return Layout(())
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=wanted,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=architecture.transposed,
        use_rslora=rslora,
        use_dora=dora,
    )
    inject_adapter_in_model(config, inner, adapter_name=_ADAPTER)
    if core:
        insert_cores(inner, _ADAPTER)
    if dropout:
        key_adapters(inner, _ADAPTER, dropout, lambda local: _global(model, local))
    _start(model, seed, core=core)
    set_trainable_factor(model, "both")
    return adapter_layout(model)


def add_prefixes(model: Part | Any, length: int, *, seed: int) -> Layout:
    """Put prefixes on a part's layers, or an unsplit model's, in place of LoRA, and freeze everything else.

    Args:
        model: as in :func:`add_adapters`.
        length: positions.
        seed: public.

    Raises:
        InputError: SS-1253 for a model in which a prefix would go out of sight.
    """
    inner, architecture = _inner(model)
    inner.requires_grad_(False)  # noqa: FBT003 - torch's own signature
    insert_prefixes(inner, architecture, length)
    for tensor, parameter in _factors(model):
        parameter.data = torch.from_numpy(start_of_prefix(tensor.name, tensor.shape, seed)).to(parameter.device)
    set_trainable_factor(model, "both")
    return adapter_layout(model)


def adapter_layout(model: Part | Any, factor: Learned | None = None) -> Layout:
    """The layout of a part's adapters, or of one factor of each, or of A and B; empty when there are none."""
    return Layout(tuple(tensor for tensor, _ in _factors(model) if factor is None or _is(tensor, factor)))


def adapter_parameters(model: Part | Any) -> Iterator[nn.Parameter]:
    """The adapters' parameters that are being trained now, in layout order; for an optimiser."""
    return (parameter for _, parameter in _factors(model) if parameter.requires_grad)


def read_adapters(model: Part | Any, layout: Layout) -> NDArray[np.float32]:
    """The adapters' values as one vector.

    Returns:
        A fresh float32 array, (layout.size,).

    Raises:
        InputError: SS-1412 when the layout is not of this part.
    """
    held = _select(model, layout)
    if not held:
        return np.zeros(0, dtype=np.float32)
    return np.concatenate([parameter.detach().float().cpu().numpy().reshape(-1) for parameter in held])


def write_adapters(model: Part | Any, layout: Layout, flat: NDArray[np.float32]) -> None:
    """Set the adapters' values from one vector.

    Args:
        flat: float32, (layout.size,), finite.

    Raises:
        InputError: SS-1412 when layout or vector do not fit this part, or a value is not finite; nothing is changed.
    """
    held = _select(model, layout)
    if flat.dtype != np.float32 or flat.shape != (layout.size,) or not bool(np.isfinite(flat).all()):
        raise InputError(
            "SS-1412",
            f"an adapter vector must hold {layout.size} finite float32 numbers",
            hint="Both ends must run the same job.",
        )
    start = 0
    with torch.no_grad():
        for parameter in held:
            values = flat[start : start + parameter.numel()].reshape(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values.copy()))
            start += parameter.numel()


def set_trainable_factor(model: Part | Any, factor: Learned | None) -> None:
    """Choose which factors are trained; the others are frozen and hold their values. None freezes all.

    ``both`` is all that may learn: A and B with DoRA's lengths, or the core of an adapter that has one.
    """
    set_trainable_drift(model, learns=factor is not None)
    held = _factors(model)
    if factor == "both" and any(_is(tensor, "core") for tensor, _ in held):
        factor = "core"
    for tensor, parameter in held:
        whole = tensor.name.endswith((MAGNITUDE, KEY, VALUE))
        learns = factor is not None and (_is(tensor, factor) or (factor == "both" and whole))
        parameter.requires_grad_(learns)
        if not parameter.requires_grad:
            parameter.grad = None


def _inner(model: Part | Any) -> tuple[Any, Architecture]:
    if isinstance(model, Part):
        return model.module, model.architecture
    return model, architecture_of(model.config)


def _is(tensor: AdapterTensor, factor: Learned) -> bool:
    if factor == "prefix":
        return tensor.name.endswith((KEY, VALUE))
    endings = ("A", "B") if factor == "both" else (factor,)
    return tensor.name.endswith(tuple(f".lora_{ending}.weight" for ending in endings))


def _global(model: Part | Any, local: str) -> str:
    return model.global_name(local) if isinstance(model, Part) else local


def _linear_layers(model: Part | Any) -> Iterator[str]:
    """Linear layers inside decoder layers, as ``NUMBER.rest.of.the.name`` with the global number."""
    from transformers.pytorch_utils import Conv1D

    inner, architecture = _inner(model)
    stem = f"{architecture.prefix}.{architecture.layers}."
    for local, module in inner.named_modules():
        full = _global(model, local)
        if full.startswith(stem) and isinstance(module, (nn.Linear, Conv1D)):
            yield full.removeprefix(stem)


def _targets(model: Part | Any, targets: tuple[str, ...]) -> tuple[str, ...]:
    """What is adapted: the targets, or the attention projections; nothing in a part without linear layers."""
    wanted = targets or _inner(model)[1].attention
    linear = {name.split(".", 1)[1] for name in _linear_layers(model)}
    missing = tuple(t for t in wanted if not any(name == t or name.endswith(f".{t}") for name in linear))
    if linear and missing:
        raise InputError(
            "SS-1410",
            f"no linear layer is called {', '.join(missing)}",
            hint=f"There are: {', '.join(sorted(linear))}.",
        )
    return wanted if linear else ()


def _start(model: Part | Any, seed: int, *, core: bool) -> None:
    """Give every factor its public start."""
    start_drift(model, seed)
    for tensor, parameter in _factors(model):
        if tensor.name.endswith(MAGNITUDE):  # The lengths of the base's rows, as PEFT has measured them.
            parameter.data = parameter.data.float()
            continue
        values = _initial(tensor, seed, core=core)
        parameter.data = torch.from_numpy(values).to(parameter.device)


def _factors(model: Part | Any) -> list[tuple[AdapterTensor, nn.Parameter]]:
    """Every factor with its parameter, in layout order."""
    inner, architecture = _inner(model)
    pattern = re.compile(rf"^{re.escape(architecture.prefix)}\.{re.escape(architecture.layers)}\.(\d+)\.")
    found = []
    for local, parameter in inner.named_parameters():
        if ending := _SUFFIX.search(local):
            name = _global(model, f"{local[: ending.start()]}.{_NAMES[ending[1]]}")
            layer = pattern.match(name)
            assert layer is not None, "adapters stand in decoder layers only"
            found.append((AdapterTensor(name, int(layer[1]), tuple(parameter.shape)), parameter))
    return sorted(found, key=lambda pair: (pair[0].layer, pair[0].name))


def _select(model: Part | Any, layout: Layout) -> list[nn.Parameter]:
    held = dict(_factors(model))
    if not all(tensor in held for tensor in layout.tensors):
        raise InputError(
            "SS-1412", "the adapter layout is not of this part", hint="Both ends must run the same job and cut."
        )
    return [held[tensor] for tensor in layout.tensors]


def _initial(tensor: AdapterTensor, seed: int, *, core: bool) -> NDArray[np.float32]:
    """Zeros for B; for A uniform in ±1/sqrt(in), which is what Kaiming's rule with a = sqrt(5) gives, as in PEFT.

    With a core, that one is zeros and B has orthonormal columns. The generator is keyed by the seed and the name: it is for
    equal starts, not for secrets.
    """
    if _is(tensor, "core" if core else "B"):
        return np.zeros(tensor.shape, dtype=np.float32)
    key = hashlib.sha256(f"securesplit.lora.v1|{seed}|{tensor.name}".encode()).digest()
    uniform = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little"))).random(
        tensor.shape, dtype=np.float32
    )
    if _is(tensor, "B"):
        return orthonormal(uniform * 2 - 1)
    return ((uniform * 2 - 1) / np.float32(math.sqrt(tensor.shape[1]))).astype(np.float32)
