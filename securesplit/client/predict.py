"""Predictions through the split: greedy answers to a task's prompts, by a checkpoint of a training run.

What it costs: the prompt of every example is a release, and so is every token that is fed back; see
securesplit/client/generate.py. Answers are private and stay here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from securesplit.client.checkpoints import middle_of
from securesplit.client.client import Client
from securesplit.client.generate import Generated, generate_each
from securesplit.client.likelihood import likelihoods
from securesplit.client.run import open_client
from securesplit.client.sampling import Sampling
from securesplit.client.selection import Predictor
from securesplit.data.answers import prompt_tokens
from securesplit.data.tasks.fit import fitted
from securesplit.data.tasks.item import Item
from securesplit.data.tasks.registry import Task
from securesplit.data.tasks.score import Prediction
from securesplit.data.tasks.templates import Template
from securesplit.errors import BudgetExhausted, InputError
from securesplit.pki.passphrase import Passphrase
from securesplit.policy.schema import Gaussian, Policy

__all__ = ["Asking", "Site", "require_comparable", "split_predictor"]


@dataclass(frozen=True, slots=True)
class Site:
    """This party; the fields are options of ``securesplit eval``."""

    policy: Policy
    keys: Path
    server: str
    model: str | None = None
    cache: Path | None = None
    code: Path | None = None
    evidence: Path | None = None
    passphrase: Passphrase | None = None


def require_comparable(policy: Policy, checkpoints: Sequence[Path]) -> None:
    """Several checkpoints can be compared where each is evaluated with the server's part that it belongs to.

    Raises:
        InputError: SS-1248 for several checkpoints of a regime in which B learns, too, where some name no state of it: the
            server would compute with its present one, and answers would be those of halves that never belonged together.
            SS-1305, SS-1414 for one whose files do not belong together, or are none.
    """
    frozen = isinstance(policy.privacy, Gaussian) and policy.privacy.regime == "frozen"
    nameless = [path for path in checkpoints if not middle_of(path)] if len(checkpoints) > 1 and not frozen else []
    if nameless:
        raise InputError(
            "SS-1248",
            f"{len(nameless)} of {len(checkpoints)} checkpoints name no state of the server's part, which learnt under policy "
            f"'{policy.name}': {', '.join(path.name for path in nameless)}",
            hint="Train by a job with schedule.checkpoints, or evaluate one checkpoint at a time beside the server of its run.",
        )


@dataclass(frozen=True, slots=True)
class Asking:
    """How answers are made.

    Attributes:
        max_new_tokens: of each answer.
        stop: texts that end an answer.
        perplexity: whether the likelihood of the gold answers is wanted, too: one more release of each example. Of texts
            alone it always is, and nothing else.
        batch: how many prompts cross together.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    perplexity: bool = False
    batch: int = 8

    @property
    def settings(self) -> str:
        """All that predictions depend on; as before where nothing new is asked for."""
        extra = json.dumps([self.stop, self.perplexity]) if self.stop or self.perplexity else ""
        return f"{self.max_new_tokens}{extra}"


def split_predictor(site: Site, task: Task, template: Template, asking: Asking) -> Predictor:
    """A predictor that dials the server once for each checkpoint.

    Args:
        site: who asks.
        task, template: how prompts are made; they are shortened to fit the policy's largest bucket.
        asking: how answers are made; always greedily.
    """

    def predict(checkpoint: Path, items: Sequence[Item]) -> Iterator[Prediction]:
        with open_client(
            site.policy, site.keys, site.server, model=site.model, cache=site.cache, adapters=checkpoint, code=site.code,
            evidence=site.evidence, passphrase=site.passphrase,
        ) as client:  # fmt: skip
            tokenizer: Any = client.tokenizer
            examples = fitted(
                task, template, items, most=_most(client, asking),
                prompt_length=lambda text: len(prompt_tokens(text, tokenizer)),
            )  # fmt: skip
            alone = task.measure == "text"  # Texts alone are asked nothing: how likely they are is all that there is.
            for start in range(0, len(items), asking.batch):
                part = slice(start, start + asking.batch)
                chosen = examples[part]
                wanted = alone or asking.perplexity
                known = list(likelihoods(client, task, template, items[part])) if wanted else [None] * len(chosen)
                made = ((i, None) for i in range(len(chosen))) if alone else _answers(client, [e.prompt for e in chosen], asking)  # fmt: skip
                for i, answer in made:
                    likely = known[i]
                    nats, tokens = (None, None) if likely is None else (likely.nats, likely.tokens)
                    said = None if answer is None else answer.text.strip()
                    yield Prediction(id=chosen[i].id, prediction=said, nats=nats, tokens=tokens)

    return predict


def _most(client: Client, asking: Asking) -> int:
    """Tokens of a prompt: a bucket of the policy, with room for the answer in the model."""
    positions: int | None = getattr(client.front.module.config, "max_position_embeddings", None)
    sentinel = client.code is not None and client.code.facts.sentinel is not None
    room = [] if positions is None else [positions - asking.max_new_tokens + 1 - sentinel]
    if not isinstance(client.policy.privacy, Gaussian):
        return max(1, min(client.policy.limits.buckets[-1], *room))
    fitting = [bucket for bucket in client.policy.limits.buckets if not room or bucket <= room[0]]
    return fitting[-1] if fitting else client.policy.limits.buckets[0]


def _answers(client: Client, prompts: Sequence[str], asking: Asking) -> Iterator[tuple[int, Generated]]:
    """Together, each with its place, as soon as it is there: what was fed back for it is paid, whatever fails behind it.

    Those that are left where the budget has not room for all are asked one by one, so that it is used up to its end.
    """
    sampling = Sampling(stop=asking.stop)
    left = dict(enumerate(prompts))
    try:
        for i, answer in generate_each(client, prompts, max_new_tokens=asking.max_new_tokens, sampling=sampling):
            del left[i]
            yield i, answer
    except BudgetExhausted:
        if len(left) == 1:
            raise
        for i, prompt in left.items():
            yield i, client.generate(prompt, max_new_tokens=asking.max_new_tokens, sampling=sampling)
