"""A tiny random model with a tokenizer, texts for it, and recordings written with the product's own recorder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from attacks.config import Search, settings_of
from securesplit.model.manifest import read_manifest
from securesplit.model.plan import CutPlan
from securesplit.model.store import load_front
from securesplit.model.writer import write_model
from securesplit.policy.schema import Policy
from securesplit.privacy.clip import clip_sequence
from securesplit.privacy.plan import plan_for
from securesplit.protocol.codec import encode
from securesplit.protocol.messages import Blob, Forward, Hello
from securesplit.protocol.transcript import Recorder

VOCABULARY = 120
WIDTH = 32


@pytest.fixture(scope="session")
def search() -> Search:
    return settings_of("vocabulary", Search)


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory):
    """``model_dirs(front)``: a model directory of the same random model, cut after so many layers."""
    torch.set_num_threads(1)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")
    home = tmp_path_factory.mktemp("models")

    def cut(front: int) -> Path:
        target = home / f"cut-{front}"
        if not target.exists():
            write_model(model, CutPlan(front=front, back=1), target, tokenizer=tokenizer)
        return target

    return cut


@pytest.fixture(scope="session")
def fronts(model_dirs):
    """``fronts(layers)``: partition A of the tiny model, and its (V, E) embedding."""

    def load(layers: int):
        front = load_front(model_dirs(layers))
        return front, front.base.get_input_embeddings().weight.detach()

    return load


@pytest.fixture(scope="session")
def draw():
    """``draw(count, length, seed)``: (count, length) tokens, falling in frequency with their number, never 0."""

    def sample(count: int, length: int, seed: int) -> torch.Tensor:
        weights = 1 / torch.arange(1, VOCABULARY).double()
        generator = torch.Generator().manual_seed(seed)
        return 1 + torch.multinomial(weights, count * length, replacement=True, generator=generator).view(count, length)

    return sample


def policy(privacy: dict[str, object]) -> Policy:
    return Policy.model_validate(
        {
            "name": "tiny",
            "purpose": "a policy for the tests of the attacks",
            "cost": "nothing, since nobody uses it",
            "privacy": privacy,
            "aggregation": {"min_clients": 3, "min_threshold": 2, "blind": True, "max_update": 1.0},
            "limits": {
                "min_front": 0, "min_back": 0, "max_sequences": 64, "buckets": (8, 12, 16), "max_message_bytes": 1 << 20,
            },
            "transport": {"loopback_only": True},
        }
    )  # fmt: skip


@pytest.fixture(scope="session")
def unsafe() -> Policy:
    return policy({"mechanism": "UnsafeNoPrivacy"})


@pytest.fixture(scope="session")
def private():
    """``private(epsilon, clip)``: a frozen-regime policy with one release of activations."""

    def make(epsilon: float, clip: float) -> Policy:
        return policy(
            {
                "mechanism": "gaussian", "unit": "sequence", "relation": "replace-one", "epsilon": epsilon, "delta": 1e-5,
                "regime": "frozen", "activations": {"clip": clip, "share": 1.0, "releases": 1},
            }
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def record(model_dirs):
    """``record(directory, tokens, policy, ...)``: a recording of three clients and its truth.

    The noise is torch's, from a seed: a recording for a test is no release.
    """

    def write(directory: Path, tokens: torch.Tensor, rules: Policy, *, layers=2, padded=0, per_step=2, cheat=1.0):
        front = load_front(model_dirs(layers))
        count = len(tokens)
        with torch.inference_mode():
            hidden = front(torch.nn.functional.pad(tokens, (0, padded)))
        if not rules.unsafe:
            channel = plan_for(rules.privacy).cut
            noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(11))
            hidden = clip_sequence(hidden, channel.clip) + cheat * channel.sigma * noise
        lines = []
        for client in range(3):
            recorder = Recorder(directory, peer=f"spiffe://test/client{client}", number=client)
            recorder.record(0, 0, encode(Hello(version=1, nonce=bytes(32), policy=rules.digest)))
            mine = list(range(client, count, 3))
            for step, start in enumerate(range(0, len(mine), per_step)):
                rows = mine[start : start + per_step]
                recorder.record(0, step, forward(step, hidden[rows]))
                for row, index in enumerate(rows):
                    ids = tokens[index].tolist()
                    truth = {"peer": f"spiffe://test/client{client}", "step": step, "row": row, "tokens": ids}
                    text = " ".join(f"w{i}" for i in ids)
                    lines.append(json.dumps({**truth, "text": text, "pii": [f"w{ids[2]} w{ids[3]}"]}))
            recorder.close()
        facts = {
            "policy": rules.model_dump(mode="json"),
            "job": None,
            "model": read_manifest(model_dirs(layers)).digest,
        }
        (directory / "transcript.json").write_text(json.dumps({**facts, "version": "test"}))
        (directory / "truth.jsonl").write_text("\n".join(lines) + "\n")
        return directory

    return write


@pytest.fixture(scope="session", name="forward")
def forward_fixture():
    """``forward(step, hidden, cache=0)``: the bytes of a Forward message."""
    return forward


def forward(step: int, hidden: torch.Tensor, *, cache: int = 0, learn: bool = False) -> bytes:
    rows = hidden.reshape(-1, hidden.shape[-1]).numpy().astype("<f4")
    blob = Blob(dtype="f32", shape=rows.shape, data=rows.tobytes())
    return encode(Forward(step=step, lengths=(hidden.shape[1],) * len(hidden), cache=cache, learn=learn, hidden=blob))
