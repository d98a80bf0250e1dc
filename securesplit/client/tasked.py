"""A task's examples as batches of a job: prompts that fit, answers that alone are learnt, tokens kept for the next start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from securesplit.client.records import fill_of, job_batches, split_rows, users_of
from securesplit.data.answers import answer_tokens, encode_answers, prompt_tokens, tokenise
from securesplit.data.batches import Batch, make_batches
from securesplit.data.cache import cached
from securesplit.data.corpus import Record
from securesplit.data.tasks.chosen import Tasked
from securesplit.data.tasks.fit import Example, examples_of, fitted
from securesplit.data.tasks.item import Item
from securesplit.policy.schema import Policy
from securesplit.protocol.job import Job

__all__ = ["tasked_batches"]

_log = logging.getLogger(__name__)


def tasked_batches(
    tasked: Tasked,
    policy: Policy,
    job: Job,
    tokenizer: Any,
    identify: Callable[[bytes], str],
    *,
    model: str,
    held_out: int,
    max_tokens: int | None,
) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """Batches for training and evaluation, as :func:`securesplit.client.records.job_batches`.

    A job with a ``[task]`` of its own asks for a class at one place: there the prompt is the text, and the class's name in the
    data is its label.

    Args:
        tasked: of :func:`securesplit.data.tasks.chosen.read_tasked`.
        held_out: so many examples at least, from the end: a group, such as a passage's questions, is held out whole or not at
            all, unless all examples are of one group.
        model: digest of the model's manifest.

    Raises:
        InputError: as there; SS-1244 for answers that leave no room, SS-1245 for examples without an answer, SS-1246 for a
            cache that cannot be used.
    """
    held_out = _in_groups(tasked.items, held_out)
    buckets = policy.limits.buckets
    longest = max_tokens or buckets[-1]
    if job.task is not None:
        # No answer is among the tokens there; one place is kept for where the class is asked for.
        bare = _fitted(tasked, tokenizer, longest - 1, answers=False)
        named = [Record(e.prompt, user=e.user, label=i.label) for i, e in zip(tasked.items, bare, strict=True)]
        return job_batches(named, policy, job, tokenizer, identify, held_out=held_out, max_tokens=max_tokens)
    records = tasked.records
    rows = cached(
        tasked.kept,
        examples_of(tasked.task, tasked.template, tasked.items),
        f"{model}:{tasked.task.name}:{tasked.template.long}:{longest}",
        lambda: tokenise(_fitted(tasked, tokenizer, longest, answers=True), tokenizer),
    )
    texts, users = [record.text for record in records], users_of(policy, records)
    encoded = encode_answers(rows, texts, longest, identify, users=users)
    size, seed, fill = job.schedule.batch, job.adapters.seed, fill_of(tokenizer)
    first, last = split_rows(encoded, held_out)
    return (
        make_batches(first, buckets=buckets, size=size, padding=fill, seed=seed),
        make_batches(last, buckets=buckets, size=size, padding=fill, seed=seed),
    )


def _in_groups(items: Sequence[Item], held_out: int) -> int:
    """So many examples from the end, and those before them that share a passage with the first of these, unless that is all."""
    count = held_out
    while 0 < count < len(items) and items[-count - 1].group == items[-count].group:
        count += 1
    if held_out < len(items) <= count:
        _log.warning("all examples are of one passage: what is held out shares it with what is learnt")
        return held_out
    return count


def _fitted(tasked: Tasked, tokenizer: Any, most: int, *, answers: bool) -> tuple[Example, ...]:
    return fitted(
        tasked.task,
        tasked.template,
        tasked.items,
        prompt_length=lambda text: len(prompt_tokens(text, tokenizer)),
        answer_length=(lambda text: len(answer_tokens(text, tokenizer))) if answers else None,
        most=most,
    )
