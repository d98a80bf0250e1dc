"""The one place that knows how each supported model family names its pieces, and each family's quirks.

The forward computation itself is never written here: a part *is* the library's own module, built from a configuration
with fewer layers (securesplit/model/parts.py). What differs between families is names, and what must happen only once
although three modules run: GPT-2's learned positions, dropout after the embedding, Gemma's scaled embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from securesplit.errors import InputError

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Names of one model family.

    Attributes:
        title: the family's name, for messages and tables.
        model_type: the configuration's ``model_type``.
        base, causal: class names in ``transformers``; ``causal`` holds ``base`` under ``prefix`` and a head.
        prefix: attribute of the base model inside the causal model.
        embedding, layers, norm: attributes of the base model.
        rotary: attribute of the rotary embedding, whose tables are computed and never stored; None if there is none.
        positions: attribute of a learned position embedding, added to the embedding and hence the front's alone.
        dropout: attribute of the dropout that follows the embedding and hence belongs to the front alone.
        attention: names of the attention projections, the default targets of LoRA.
        transposed: whether linear layers store (in, out) instead of (out, in), which peft must be told.
        refuses: configuration flags that must be off, each because it reads a layer's absolute number or the future.
    """

    title: str
    model_type: str
    base: str
    causal: str
    prefix: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    rotary: str | None = "rotary_emb"
    positions: str | None = None
    dropout: str | None = None
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    transposed: bool = False
    refuses: tuple[str, ...] = ()

    def base_class(self) -> Any:
        """The library's class of the base model."""
        return getattr(transformers, self.base)

    def causal_class(self) -> Any:
        """The library's class of the causal model."""
        return getattr(transformers, self.causal)

    def sub_config(self, config: Any, span: range) -> Any:
        """A configuration for a model of the layers ``span`` only.

        Lists with one entry per layer are cut to the span, so that a layer's local number finds its own attention type
        and the key/value cache has one entry per local layer. Weights are never tied inside one part.
        """
        sub = copy.deepcopy(config)
        kinds = getattr(sub, "layer_types", None)
        sub.num_hidden_layers = len(span)
        if kinds is not None:
            sub.layer_types = [kinds[number] for number in span]
        sub.tie_word_embeddings = False
        return sub

    def restore_tables(self, base: nn.Module, config: Any) -> None:
        """Compute on the CPU what checkpoints do not hold: rotary tables and the scale of Gemma's embedding.

        Args:
            base: the base model, built on the meta device.
            config: the configuration that it was built from.
        """
        if self.rotary is not None:
            setattr(base, self.rotary, type(getattr(base, self.rotary))(config))
        embedding = getattr(base, self.embedding)
        scale = getattr(embedding, "scalar_embed_scale", None)
        if scale is not None:
            embedding.embed_scale = torch.tensor(scale)

    def head_name(self, names: Iterable[str]) -> str:
        """The name of the head's weight among a whole model's tensors, or a back's: the one outside the base model.

        Families and releases of the library differ in it; a head may have a bias too.
        """
        return next(name for name in names if name.endswith(".weight") and not name.startswith(f"{self.prefix}."))


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("Llama", "llama", "LlamaModel", "LlamaForCausalLM"),
    Architecture("Qwen2", "qwen2", "Qwen2Model", "Qwen2ForCausalLM"),
    Architecture("Qwen3", "qwen3", "Qwen3Model", "Qwen3ForCausalLM"),
    Architecture("Mistral", "mistral", "MistralModel", "MistralForCausalLM"),
    Architecture("Gemma 2", "gemma2", "Gemma2Model", "Gemma2ForCausalLM"),
    Architecture(
        "Gemma 3 (text)",
        "gemma3_text",
        "Gemma3TextModel",
        "Gemma3ForCausalLM",
        refuses=("use_bidirectional_attention",),
    ),
    Architecture("Phi-3", "phi3", "Phi3Model", "Phi3ForCausalLM", attention=("qkv_proj", "o_proj")),
    Architecture(
        "GPT-2",
        "gpt2",
        "GPT2Model",
        "GPT2LMHeadModel",
        prefix="transformer",
        embedding="wte",
        layers="h",
        norm="ln_f",
        rotary=None,
        positions="wpe",
        dropout="drop",
        attention=("attn.c_attn", "attn.c_proj"),
        transposed=True,
        refuses=("scale_attn_by_inverse_layer_idx", "add_cross_attention"),
    ),
    Architecture(
        "GPT-NeoX",
        "gpt_neox",
        "GPTNeoXModel",
        "GPTNeoXForCausalLM",
        prefix="gpt_neox",
        embedding="embed_in",
        norm="final_layer_norm",
        dropout="emb_dropout",
        attention=("attention.query_key_value", "attention.dense"),
    ),
    Architecture("GLM", "glm", "GlmModel", "GlmForCausalLM"),
    Architecture("GLM-4", "glm4", "Glm4Model", "Glm4ForCausalLM"),
)

_BY_TYPE = {architecture.model_type: architecture for architecture in ARCHITECTURES}


def architecture_of(config: Any) -> Architecture:
    """The names of a model's family.

    Args:
        config: a ``transformers`` configuration.

    Raises:
        InputError: SS-1401 for a family that is not supported, SS-1402 for a variant of one that cannot be split.
    """
    found = _BY_TYPE.get(getattr(config, "model_type", ""))
    if found is None:
        titles = ", ".join(architecture.title for architecture in ARCHITECTURES)
        raise InputError(
            "SS-1401",
            f"models of type {getattr(config, 'model_type', None)!r} cannot be split yet",
            hint=f"Supported: {titles}.",
        )
    for flag in found.refuses:
        if getattr(config, flag, False):
            raise InputError(
                "SS-1402", f"a {found.title} model with {flag} cannot be split", hint="Use a model without this option."
            )
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            "SS-1402",
            "a quantised model cannot be split",
            hint="Store its weights as float32, float16 or bfloat16 first.",
        )
    return found
