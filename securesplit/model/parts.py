"""A, B and C: the front, the middle and the back of a model, each a stock module with fewer layers.

Each part is built from the library's own class and a configuration of its own layers, on the meta device, and is then
given its tensors. Nothing of the model's computation is written here, so that the parts in a row compute bit for bit
what the whole computes. What this does *not* do: it protects nothing; see securesplit/privacy/gate.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from securesplit.errors import InputError
from securesplit.model.architectures import Architecture
from securesplit.model.plan import Role
from securesplit.model.precision import LossScale
from securesplit.model.prefix import prefix_cache, prefix_of

__all__ = ["Back", "Front", "Middle", "Part", "PartCache", "build_part"]


@dataclass(slots=True)
class PartCache:
    """The keys and values of one part's layers for sequences that are being decoded.

    Attributes:
        past: the library's cache of this part's layers; None when the part has none.
        length: positions seen so far; the next token's position.
    """

    past: Any
    length: int = 0

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes. A window over a longer tensor holds all of it."""
        layers = self.past.layers if self.past is not None else []
        tensors = (tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class _Absent(nn.Module):
    """Stands where a piece belongs to another party; calling it is a bug."""

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        msg = "this piece of the model belongs to another party"
        raise AssertionError(msg)


class _NoPositions(nn.Module):
    """Adds nothing: learned positions were added by the front already. A zero changes no sum and no data type."""

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=positions.device, dtype=torch.bfloat16)


class Part(nn.Module):
    """What the three parts have in common.

    Attributes:
        module: the library's module that does the work.
        architecture: the family's names.
        span: global numbers of the decoder layers held.
        layers_total: decoder layers of the whole model.
        width: D, the size of a hidden state.
        scale: of gradients within this part, where it computes in float16; None elsewhere.
    """

    role: Role

    def __init__(self, module: Any, architecture: Architecture, span: range, layers_total: int) -> None:
        super().__init__()
        self.module = module
        self.architecture = architecture
        self.span = span
        self.layers_total = layers_total
        self.width: int = module.config.hidden_size
        self.scale: LossScale | None = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Compute; see the part's ``forward``. What comes first is what the gradient goes back to."""
        call = super().__call__
        if self.scale is None or not torch.is_grad_enabled():
            return call(*arguments, **options)
        if not arguments:
            first = next(iter(options))
            rest = {name: value for name, value in options.items() if name != first}
            return self._through(lambda leaf: call(**{first: leaf}, **rest), options[first])
        return self._through(lambda leaf: call(leaf, *arguments[1:], **options), arguments[0])

    def _through(self, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        learnt = [p for p in self.parameters() if p.requires_grad]
        if self.scale is None or not (learnt or x.requires_grad):
            return run(x)
        return self.scale.through(run, x, learnt)

    @property
    def base(self) -> Any:
        """The base model inside: the module itself, or what the causal model wraps."""
        return self.module

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights (adapters aside)."""
        own = (
            p
            for n, p in self.module.named_parameters()
            if ".lora_" not in n and ".prefix_" not in n and p.is_floating_point()
        )
        return next((p.dtype for p in own), torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """Where it computes, and where its input has to be; the processor for one without weights."""
        held = next(self.module.parameters(), None)
        return torch.device("cpu") if held is None else held.device

    def global_name(self, local: str) -> str:
        """The whole model's name for a tensor or module of ``self.module``."""
        full = local if self.role == "back" else f"{self.architecture.prefix}.{local}"
        stem = f"{self.architecture.prefix}.{self.architecture.layers}."

        def shift(match: re.Match[str]) -> str:
            return f"{stem}{int(match[1]) + self.span.start}"

        return re.sub(rf"^{re.escape(stem)}(\d+)(?=\.|$)", shift, full)

    def new_cache(self) -> PartCache:
        """An empty cache for decoding with this part."""
        if not self.span:
            return PartCache(None)
        from transformers import DynamicCache

        return PartCache(DynamicCache(config=self.module.config))

    def _run(self, length: int, device: torch.device, cache: PartCache | None, **inputs: Any) -> Any:
        """Call the module, with positions that go on from the cache, behind a prefix where there is one."""
        ahead = prefix_of(self.module)
        if cache is None:
            more = self._behind(ahead, length, inputs) if ahead else {}
            return self.module(**inputs, use_cache=False, **more)
        if ahead and cache.length == 0 and cache.past is not None:
            rows = next(len(x) for x in inputs.values() if x is not None)
            prefix_cache(self._layers(), rows, self.dtype, into=cache.past)
        first = ahead + cache.length
        positions = torch.arange(first, first + length, device=device)[None]
        out = self.module(
            **inputs, position_ids=positions, past_key_values=cache.past, use_cache=cache.past is not None
        )
        cache.length += length
        return out

    def _layers(self) -> Any:
        return getattr(self.base, self.architecture.layers)

    def _behind(self, ahead: int, length: int, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the module needs to see a prefix; a mask in ``inputs`` is made longer by it."""
        first = next(x for x in inputs.values() if x is not None)
        mask = inputs.get("attention_mask")
        if mask is not None:
            inputs["attention_mask"] = torch.cat([mask.new_ones(len(mask), ahead), mask], 1)
        positions = torch.arange(ahead, ahead + length, device=first.device)[None]
        past = prefix_cache(self._layers(), len(first), self.dtype) if self.span else None
        return {"position_ids": positions, "past_key_values": past}


class Front(Part):
    """A: the embedding and the first layers."""

    role: Role = "front"

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, cache: PartCache | None = None
    ) -> torch.Tensor:
        """Tokens to hidden states.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), 1 for real tokens; None when there is no padding, or only on the right.
            cache: from :meth:`new_cache`; extended by these tokens. Sequences must then have no padding.

        Returns:
            (B, T, D), what crosses the cut. It reveals the tokens unless it goes through the gate.
        """
        return self._run(  # type: ignore[no-any-return]
            input_ids.shape[1], input_ids.device, cache, input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state


class Middle(Part):
    """B: the layers between, without embedding, norm or head."""

    role: Role = "middle"

    def forward(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, cache: PartCache | None = None
    ) -> torch.Tensor:
        """Hidden states to hidden states, (B, T, D) to (B, T, D); the arguments are as in :class:`Front`."""
        hidden = hidden.to(self.dtype)
        return self._run(  # type: ignore[no-any-return]
            hidden.shape[1], hidden.device, cache, inputs_embeds=hidden, attention_mask=attention_mask
        ).last_hidden_state


class Back(Part):
    """C: the last layers, norm, head and loss."""

    role: Role = "back"

    @property
    def base(self) -> Any:
        """The base model inside the causal model."""
        return getattr(self.module, self.architecture.prefix)

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: PartCache | None = None,
        logits_to_keep: int = 0,
    ) -> torch.Tensor:
        """Hidden states to the loss, or to logits.

        Args:
            hidden: (B, T, D).
            labels: (B, T) token ids, -100 where ignored. They are shifted inside: position t predicts label t + 1.
            attention_mask: as in :class:`Front`.
            cache: as in :class:`Front`.
            logits_to_keep: only the last so many positions' logits; 0 keeps all. Without labels only.

        Returns:
            With labels the mean cross-entropy over the labels that are not -100, in nats, (); NaN when all are -100.
            Without labels the logits, (B, T, V).
        """
        hidden = hidden.to(self.dtype)
        inputs: dict[str, Any] = {"inputs_embeds": hidden, "attention_mask": attention_mask, "labels": labels}
        if logits_to_keep and labels is None:
            inputs["logits_to_keep"] = logits_to_keep
        out = self._run(hidden.shape[1], hidden.device, cache, **inputs)
        result: torch.Tensor = out.logits if labels is None else out.loss
        return result


def build_part(
    role: Role, config: Any, architecture: Architecture, span: range, tensors: Callable[[str], torch.Tensor | None]
) -> Part:
    """Build one part and give it its tensors.

    Args:
        role: which part.
        config: the whole model's configuration.
        architecture: its family.
        span: global numbers of the part's layers.
        tensors: the tensor of a global name, or None when there is none; a Parameter is shared, never copied.

    Raises:
        InputError: SS-1403 when a tensor is missing or has another shape.
    """
    sub = architecture.sub_config(config, span)
    with torch.device("meta"):
        module = (architecture.causal_class() if role == "back" else architecture.base_class())(sub)
    base = getattr(module, architecture.prefix) if role == "back" else module
    architecture.restore_tables(base, sub)
    if role != "front":
        setattr(base, architecture.embedding, _Absent())
        if architecture.positions is not None:
            setattr(base, architecture.positions, _NoPositions())
        if architecture.dropout is not None:
            setattr(base, architecture.dropout, nn.Identity())
    if role != "back":
        setattr(base, architecture.norm, nn.Identity())
    kind: Mapping[Role, type[Part]] = {"front": Front, "middle": Middle, "back": Back}
    part = kind[role](module, architecture, span, config.num_hidden_layers)
    _fill(part, tensors)
    return part.eval()


def _fill(part: Part, tensors: Callable[[str], torch.Tensor | None]) -> None:
    """Put real tensors where the module, built on the meta device, has empty ones."""
    faults = []
    for path, owner in list(part.module.named_modules()):
        for name, empty in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            full = part.global_name(f"{path}.{name}" if path else name)
            found = tensors(full)
            if found is None:
                if empty.is_meta:
                    faults.append(f"{full}: missing")
            elif found.shape != empty.shape:
                faults.append(f"{full}: shape {tuple(found.shape)} instead of {tuple(empty.shape)}")
            elif isinstance(empty, nn.Parameter):
                setattr(owner, name, found if isinstance(found, nn.Parameter) else nn.Parameter(found))
            else:
                setattr(owner, name, found)
    if faults:
        raise InputError(
            "SS-1403",
            f"{len(faults)} tensor(s) of the {part.role} do not fit the configuration",
            hint="The files and the configuration belong to different models; write them again.",
            details=tuple(faults[:20]),
        )
