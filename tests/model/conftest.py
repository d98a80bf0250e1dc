"""Tiny random models of every supported family."""

from __future__ import annotations

import pytest
import torch
import transformers

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GPT2 = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 6,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
_NEOX = {name: value for name, value in _SIZES.items() if name not in {"num_key_value_heads", "head_dim"}}

# The sliding windows (4) are shorter than every sequence in the tests, and layer types alternate where a family has several.
CONFIGS = {
    "llama": (transformers.LlamaConfig, _SIZES),
    "qwen2": (
        transformers.Qwen2Config,
        {**_SIZES, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    ),
    "qwen3": (transformers.Qwen3Config, _SIZES),
    "mistral": (transformers.MistralConfig, {**_SIZES, "sliding_window": 4}),
    "gemma2": (transformers.Gemma2Config, {**_SIZES, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3_text": (transformers.Gemma3TextConfig, {**_SIZES, "sliding_window": 4, "sliding_window_pattern": 3}),
    "phi3": (transformers.Phi3Config, {**_SIZES, "sliding_window": 4}),
    "gpt2": (transformers.GPT2Config, _GPT2),
    "gpt_neox": (transformers.GPTNeoXConfig, _NEOX),
    "glm": (transformers.GlmConfig, _SIZES),
    "glm4": (transformers.Glm4Config, _SIZES),
}


@pytest.fixture(scope="session")
def tiny():
    """``tiny(family, tied=False)``: a random float32 model in evaluation mode; equal arguments give equal weights."""
    torch.set_num_threads(1)

    def build(family: str, *, tied: bool = False, **changes: object) -> torch.nn.Module:
        kind, sizes = CONFIGS[family]
        config = kind(**{**sizes, "tie_word_embeddings": tied, **changes})
        generator = torch.Generator().manual_seed(7)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            # Fresh norms are all ones and fresh biases all zeros, which would hide a norm that is missing or doubled.
            if parameter.ndim == 1:
                parameter.data = torch.empty_like(parameter).normal_(0.5, 0.3, generator=generator)
        return model

    return build
