"""The public model as an attack gets it: A at once, the rest when it is asked for, from the publisher's files."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from attacks.rowclip import row_clipped
from attacks.threat import Threat
from attacks.view import PublicModel
from securesplit.errors import InputError
from securesplit.model.code import read_code
from securesplit.model.coded import code_front
from securesplit.model.manifest import read_manifest
from securesplit.model.split import split_model
from securesplit.model.store import load_back, load_front, load_middle, load_whole

__all__ = ["public_model", "written_by"]


def public_model(
    directory: Path,
    transcript: Path,
    tokenizer: Any,
    *,
    adapter: str | None,
    threat: Threat,
    row_clip: float | None = None,
) -> PublicModel:
    """The public model of a recording.

    Args:
        directory: the model directory, with the recording's cut.
        transcript: the recording, which holds the public code at the cut where there is one.
        tokenizer: of that model.
        adapter: trained adapters, or None; A and C get them where the threat model grants more than pre-trained weights.
        threat: of the run.
        row_clip: of the policy, where it clips rows one by one.
    """
    whole = cache(lambda: load_whole(directory))
    trained = None if adapter is None else cache(lambda: _with_adapters(load_whole(directory), Path(adapter)))
    front: Any
    if trained is not None and threat.weights in {"round-start", "exact"}:
        plan = read_manifest(directory).plan
        split = split_model(trained(), plan)
        front, back = split.front, cache(lambda: split.back)
    else:
        front, back = load_front(directory), cache(lambda: load_back(directory))
    coded = transcript / "code.safetensors"
    embedding = front.base.get_input_embeddings().weight.detach()
    return PublicModel(
        front=row_clipped(code_front(front, read_code(coded) if coded.is_file() else None), row_clip),
        embedding=embedding,
        middle=cache(lambda: load_middle(directory)),
        back=back,
        whole=whole,
        trained=trained,
        sentinel=next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None),
        padding=next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), None),
        encode=lambda text: list(tokenizer.encode(text, truncation=True, max_length=1024)),
        decode=lambda ids: str(
            tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        ),
    )


def _with_adapters(whole: Any, adapter: Path) -> Any:
    """The causal model with a standard PEFT adapter merged into its weights.

    Raises:
        InputError: SS-1709 when the directory holds none in safetensors; no other format is read.
    """
    from peft import PeftModel

    if not (adapter / "adapter_model.safetensors").is_file():
        raise InputError(
            "SS-1709", f"{adapter} holds no adapter", hint="Name a directory that `model export-adapter` wrote."
        )
    return PeftModel.from_pretrained(whole, str(adapter)).merge_and_unload().eval()


def written_by(model: PublicModel, length: int) -> tuple[int, ...]:
    """What the public language model writes by itself, greedily, behind the sentinel: a guess without any observation.

    Returns:
        ``length`` ids; none where there is no whole model or no sentinel.
    """
    if model.whole is None or model.sentinel is None or not length:
        return ()
    whole = model.whole()
    ids = torch.tensor([[model.sentinel]])
    with torch.inference_mode():
        past, found = None, []
        for _ in range(length):
            out = whole(ids, past_key_values=past, use_cache=True)
            past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            found.append(int(ids))
    return tuple(found)
