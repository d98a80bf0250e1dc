"""One client's held-out records: what each is asked, how a model does on it, and what the task's measures make of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from securesplit.client.joined import Joined
from securesplit.client.pooled import Texts
from securesplit.client.records import job_batches
from securesplit.client.tasked import tasked_batches
from securesplit.data.answers import prompt_tokens
from securesplit.data.corpus import read_corpus
from securesplit.data.tasks.chosen import Chosen, Tasked, read_tasked
from securesplit.data.tasks.fit import fitted
from securesplit.data.tasks.item import Item
from securesplit.data.tasks.score import Measured, Prediction, read_predictions, score
from securesplit.measures.interval import estimate, mean
from securesplit.policy.schema import Policy
from securesplit.protocol.job import Job
from securesplit.runs.losses import RecordLoss

__all__ = ["Asked", "Judged", "Site", "judge", "lengths", "measured", "predicted", "read_site"]


@dataclass(frozen=True, slots=True)
class Asked:
    """How data is read; the fields are options of ``securesplit baseline``, as in the split run."""

    job: Job
    policy: Policy
    held_out: int
    limit: int | None
    max_tokens: int | None
    tasked: Chosen | None
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Site:
    """One client's data: batches, and what its held-out records are asked where there is a task."""

    texts: Texts
    tasked: Tasked | None
    items: tuple[Item, ...]
    prompts: tuple[tuple[int, ...], ...]
    groups: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """One client's held-out records under one model."""

    losses: tuple[RecordLoss, ...]
    right: tuple[bool, ...] | None
    answers: tuple[Prediction, ...]


def read_site(asked: Asked, path: Path, tokenizer: Any, model: str) -> Site:
    """One client's data, as its own run would batch it; records need no names, because nothing is charged."""
    policy, job = asked.policy, asked.job
    if asked.tasked is None:
        records = read_corpus(path, asked.limit)
        made = job_batches(
            records, policy, job, tokenizer, _nameless, held_out=asked.held_out, max_tokens=asked.max_tokens
        )
        texts = Texts(*made)
        return Site(texts, None, (), (), tuple(str(source) for source in _sources(texts)))
    tasked = read_tasked(asked.tasked, path, asked.limit)
    made = tasked_batches(
        tasked, policy, job, tokenizer, _nameless, model=model, held_out=asked.held_out, max_tokens=asked.max_tokens
    )
    texts = Texts(*made)
    items = tuple(tasked.items[source] for source in _sources(texts))
    prompts: tuple[tuple[int, ...], ...] = ()
    if asked.max_new_tokens and job.task is None and tasked.task.measure != "text":
        examples = fitted(
            tasked.task, tasked.template, items, most=asked.max_tokens or policy.limits.buckets[-1],
            prompt_length=lambda text: len(prompt_tokens(text, tokenizer)),
        )  # fmt: skip
        prompts = tuple(tuple(prompt_tokens(example.prompt, tokenizer)) for example in examples)
    return Site(texts, tasked, items, prompts, tuple(item.group for item in items))


def _nameless(content: bytes) -> str:
    del content
    return ""


def _sources(texts: Texts) -> tuple[int, ...]:
    return tuple(sorted(source for batch in texts.held_out for source in batch.sources))


def lengths(site: Site) -> tuple[RecordLoss, ...]:
    """Place and number of predicted tokens of each held-out record, without a loss."""
    return tuple(
        sorted(
            (
                RecordLoss(source=source, nats=0.0, tokens=count)
                for batch in site.texts.held_out
                for source, count in zip(batch.sources, (batch.labels[:, 1:] != -100).sum(1).tolist(), strict=True)
            ),
            key=lambda loss: loss.source,
        )
    )


def judge(model: Joined, site: Site, count: int, tokenizer: Any) -> Judged:
    """Every held-out record under a model: its loss, its class where there are classes, greedy answers where it is asked."""
    answers = []
    for item, prompt in zip(site.items, site.prompts, strict=False):
        new = model.answer(prompt, count, stop=tokenizer.eos_token_id)
        answers.append(Prediction(id=item.id, prediction=str(tokenizer.decode(new, skip_special_tokens=True)).strip()))
    held_out = site.texts.held_out
    return Judged(model.record_losses(held_out), model.named_right(held_out), tuple(answers))


def measured(job: Job, sites: Sequence[Site], judged: Sequence[Judged]) -> tuple[Measured, ...]:
    """The task's measures of the answers; of a job with classes the accuracy; else none."""
    right = [r for j in judged for r in (j.right or ())]
    if job.task is not None and right:
        groups = [f"{i}/{group}" for i, site in enumerate(sites) for group in site.groups]
        return (Measured("accuracy", estimate([(float(r), 1.0) for r in right], groups, mean)),)
    return _scored(sites, [j.answers for j in judged])


def predicted(sites: Sequence[Site], files: Sequence[Path]) -> tuple[Measured, ...]:
    """The measures of a run's own answers, from files."""
    answers: list[tuple[Prediction, ...]] = []
    for file, site in zip(files, sites, strict=False):
        assert site.tasked is not None
        held = {item.id for item in site.items}
        answers.append(tuple(p for p in read_predictions(file, site.tasked.items) if str(p.id) in held))
    return _scored(sites, answers) if answers else ()


def _scored(sites: Sequence[Site], answers: Sequence[tuple[Prediction, ...]]) -> tuple[Measured, ...]:
    """All clients' answers together; names get their client's number in front, because two files may use the same."""
    items, given = list[Item](), list[Prediction]()
    for i, (site, said) in enumerate(zip(sites, answers, strict=True)):
        items += [
            replace(
                item, id=f"{i}/{item.id}", group=f"{i}/{item.group}", question=item.question and f"{i}/{item.question}"
            )
            for item in site.items
        ]
        given += [p.model_copy(update={"id": f"{i}/{p.id}"}) for p in said]
    task = next((site.tasked.task for site in sites if site.tasked is not None), None)
    return () if task is None or not given else score(task, items, given).measures
