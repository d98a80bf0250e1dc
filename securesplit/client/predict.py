"""Predictions through the split: greedy answers to a task's prompts, by a checkpoint of a training run.

What it costs: the prompt of every example is a release, and so is every token that is fed back; see
securesplit/client/generate.py. Answers are private and stay here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from securesplit.client.run import open_client
from securesplit.client.sampling import Sampling
from securesplit.client.selection import Predictor
from securesplit.data.answers import prompt_tokens
from securesplit.data.tasks.fit import fitted
from securesplit.data.tasks.item import Item
from securesplit.data.tasks.registry import Task
from securesplit.data.tasks.score import Prediction
from securesplit.data.tasks.templates import Template
from securesplit.errors import InputError
from securesplit.policy.schema import Gaussian, Policy

__all__ = ["Site", "require_comparable", "split_predictor"]


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


def require_comparable(policy: Policy, checkpoints: Sequence[Path]) -> None:
    """Several checkpoints can be compared where the server's part is the same for all of them.

    Raises:
        InputError: SS-1248 for several checkpoints of a regime in which B learns, too: the server serves one state of it, and
            answers of the other checkpoints would be those of halves that never belonged together.
    """
    frozen = isinstance(policy.privacy, Gaussian) and policy.privacy.regime == "frozen"
    if len(checkpoints) > 1 and not frozen:
        raise InputError(
            "SS-1248", f"{len(checkpoints)} checkpoints of policy '{policy.name}' need {len(checkpoints)} states of the server's part",
            hint="Evaluate one checkpoint at a time, beside a server that serves its state; regime 'frozen' has only one.",
        )  # fmt: skip


def split_predictor(site: Site, task: Task, template: Template, *, max_new_tokens: int) -> Predictor:
    """A predictor that dials the server once for each checkpoint.

    Args:
        site: who asks.
        task, template: how prompts are made; they are shortened to fit the policy's largest bucket.
        max_new_tokens: of each answer.
    """

    def predict(checkpoint: Path, items: Sequence[Item]) -> Iterator[Prediction]:
        with open_client(
            site.policy, site.keys, site.server, model=site.model, cache=site.cache, adapters=checkpoint, code=site.code,
            evidence=site.evidence,
        ) as client:  # fmt: skip
            tokenizer: Any = client.tokenizer
            examples = fitted(
                task, template, items, most=site.policy.limits.buckets[-1],
                prompt_length=lambda text: len(prompt_tokens(text, tokenizer)),
            )  # fmt: skip
            for example in examples:
                made = client.generate(example.prompt, max_new_tokens=max_new_tokens, sampling=Sampling())
                yield Prediction(id=example.id, prediction=made.text.strip())

    return predict
