"""Tiny models in parts, and what a server sees of a training step on them; the step is the product's own.

Nothing here is an oracle: labels are compared with the tokens that went in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import transformers

from attacks.config import Profile, config
from attacks.knowledge import Knowledge, learn
from attacks.prior import Prior, prior_from
from attacks.view import Key, Noise, PublicModel, ServerView, Sighting
from securesplit.client.step import step
from securesplit.data.batches import IGNORED, Batch
from securesplit.model.plan import CutPlan
from securesplit.model.split import split_model
from securesplit.policy.schema import Policy
from securesplit.privacy.gate import Gate

VOCABULARY, WIDTH = 96, 32
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip


def build(kind: str) -> transformers.PreTrainedModel:
    """The unsplit model of a family; equal at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        if kind == "gpt2":
            model = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=4, n_head=4, n_positions=64, initializer_range=0.3
                )
            )
        elif kind == "gemma2":
            model = transformers.Gemma2ForCausalLM(
                transformers.Gemma2Config(**_SIZES, head_dim=8, final_logit_softcapping=5.0)
            )
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True))
    return model.eval()


@dataclass(frozen=True)
class Site:
    """A, B and C of one model, and the model itself."""

    whole: transformers.PreTrainedModel
    front: torch.nn.Module
    middle: torch.nn.Module
    back: torch.nn.Module
    layers: int

    def public(self) -> PublicModel:
        return PublicModel(
            front=self.front, embedding=self.front.base.get_input_embeddings().weight.detach(),
            middle=lambda: self.middle, back=lambda: self.back, whole=lambda: self.whole, sentinel=1,
        )  # fmt: skip


def site(back: int, kind: str = "llama") -> Site:
    whole = build(kind)
    parts = split_model(whole, CutPlan(front=1, back=back))
    return Site(whole, parts.front, parts.middle, parts.back, back)


def draw(count: int, length: int, seed: int) -> torch.Tensor:
    """(count, length) tokens, falling in frequency with their number, never 0."""
    weights = 1 / torch.arange(1, VOCABULARY).double()
    generator = torch.Generator().manual_seed(seed)
    return 1 + torch.multinomial(weights, count * length, replacement=True, generator=generator).view(count, length)


def prior_of(texts: torch.Tensor, vocabulary: int = VOCABULARY) -> Prior:
    """Public text, as the attacker has it."""
    return prior_from([str(i) for i in range(len(texts))], lambda number: texts[int(number)].tolist(), vocabulary)


def lesson(
    where: Site,
    tokens: torch.Tensor,
    unsafe: Policy,
    *,
    forward: float = 0.0,
    backward: float = 0.0,
    lengths: tuple[int, ...] = (),
    seed: int = 0,
) -> ServerView:
    """One training step as the server sees it; both noises, in units of the rows' root mean square, are torch's own.

    A test's noise is no release.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = tokens.clone()
    for row, length in enumerate(lengths):
        labels[row, length:] = IGNORED
    seen: dict[str, torch.Tensor] = {}

    def middle(private):
        rows = private.graph.detach()
        seen["sigma"] = forward * rows.square().mean().sqrt()
        seen["rows"] = rows + seen["sigma"] * torch.randn(rows.shape, generator=generator)
        with torch.no_grad():
            seen["output"] = where.middle(seen["rows"])
        return seen["output"].requires_grad_()

    batch = Batch(
        tokens=tokens, labels=labels, lengths=lengths or (tokens.shape[1],) * len(tokens), bucket=tokens.shape[1],
        records=tuple(map(str, range(len(tokens)))), sources=tuple(range(len(tokens))),
    )  # fmt: skip
    step(batch, where.front, Gate(unsafe, None), middle, where.back)
    gradient = seen["output"].grad
    sigma = backward * gradient[:, :-1].square().mean().sqrt()
    gradient = gradient + sigma * torch.randn(gradient.shape, generator=generator)
    rows, output = seen["rows"].numpy(), seen["output"].detach().numpy()
    sightings = tuple(
        Sighting(Key("a", 0, i), rows[i], rows[i], 1, output[i], gradient[i].numpy()) for i in range(len(tokens))
    )
    return ServerView(
        sightings, Noise(float(seen["sigma"]), None), Noise(float(sigma), None), cut=(1, where.layers)
    )  # fmt: skip


def profile(**changes: object) -> Profile:
    return config().profiles["smoke"].model_copy(update={"rows": 3000, **changes})


def known_of(where: Site, view: ServerView, public: torch.Tensor | None = None, **changes: object) -> Knowledge:
    public = draw(80, 24, seed=99) if public is None else public
    return learn(where.public(), prior_of(public), view, profile(**changes))


def recovery(answer, tokens: torch.Tensor, lengths: tuple[int, ...] = ()) -> float:
    """Part of the true tokens, from the answer's first position on, that it names."""
    hits = total = 0
    for row, (got, want) in enumerate(zip(answer.tokens, tokens.tolist(), strict=True)):
        end = lengths[row] if lengths else len(want)
        hits += sum(g == w for g, w in zip(got[answer.first : end], want[answer.first : end], strict=True))
        total += end - answer.first
    return hits / total


def run(attack, view: ServerView, known: Knowledge):
    assert attack.blocked(view, known.threat) is None
    return attack.run(view, known, lambda *_: None)


def shuffled(view: ServerView) -> ServerView:
    """Every sequence with another one's gradient and output, while its key stays."""
    moved = (*view.sightings[1:], view.sightings[0])
    return replace(
        view,
        sightings=tuple(replace(new, key=old.key) for old, new in zip(view.sightings, moved, strict=True)),
    )  # fmt: skip
