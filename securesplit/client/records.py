"""From a site's records to the batches of a job: texts to learn, or texts with a class where the job has a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from securesplit.data.batches import Batch, encode_records, make_batches
from securesplit.data.corpus import Record
from securesplit.data.labelled import class_tokens, encode_labelled, labelled_batches
from securesplit.errors import InputError
from securesplit.policy.schema import Gaussian, Policy
from securesplit.protocol.job import Job

_Row = TypeVar("_Row")


def job_batches(
    records: Sequence[Record],
    policy: Policy,
    job: Job,
    tokenizer: Any,
    identify: Callable[[bytes], str],
    *,
    held_out: int,
    max_tokens: int | None,
) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """Batches for training and, of the last ``held_out`` records, for evaluation.

    Args:
        records: of the site.
        policy, job: of the run.
        tokenizer: the model's own.
        identify: as :func:`securesplit.data.batches.encode_records`.
        held_out: records for evaluation.
        max_tokens: longest sequence; by default the policy's largest bucket.

    Raises:
        InputError: SS-122x for records that cannot be batched, SS-1230 when the split leaves nothing on one side, SS-1232
            when a record does not say whose it is, SS-1233 and SS-1235 for labels that do not fit the job's.
    """
    buckets, texts, users = policy.limits.buckets, [record.text for record in records], users_of(policy, records)
    longest, fill = max_tokens or buckets[-1], fill_of(tokenizer)
    size, seed = job.schedule.batch, job.adapters.seed
    if job.task is None:
        plain = encode_records(texts, tokenizer, longest, identify, users=users)
        first, last = split_rows(plain, held_out)
        return (
            make_batches(first, buckets=buckets, size=size, padding=fill, seed=seed),
            make_batches(last, buckets=buckets, size=size, padding=fill, seed=seed),
        )
    choices = class_tokens(job.task.labels, tokenizer)
    labels = [record.label for record in records]
    named = encode_labelled(texts, labels, job.task.labels, tokenizer, longest, identify, users=users)
    many, few = split_rows(named, held_out)
    return (
        labelled_batches(many, choices=choices, buckets=buckets, size=size, padding=fill, seed=seed),
        labelled_batches(few, choices=choices, buckets=buckets, size=size, padding=fill, seed=seed),
    )


def split_rows(rows: tuple[_Row, ...], held_out: int) -> tuple[tuple[_Row, ...], tuple[_Row, ...]]:
    """The rows to train on, and the last ``held_out`` to evaluate on.

    Raises:
        InputError: SS-1230 when one side is empty.
    """
    if not 0 < held_out < len(rows):
        raise InputError(
            "SS-1230",
            f"{held_out} held-out record(s) of {len(rows)} leave nothing to train or to evaluate on",
            hint="Change --held-out.",
        )
    return rows[:-held_out], rows[-held_out:]


def fill_of(tokenizer: Any) -> int:
    """The token that fills up to a bucket: the tokenizer's own for padding, else its end of text."""
    padding = getattr(tokenizer, "pad_token_id", None)
    return int(padding if padding is not None else getattr(tokenizer, "eos_token_id", 0) or 0)


def users_of(policy: Policy, records: Sequence[Record]) -> tuple[str, ...] | None:
    """Who pays for each record under unit ``user``; None under the other units, where each pays for itself.

    Raises:
        InputError: SS-1232 when some record does not say.
    """
    if not isinstance(policy.privacy, Gaussian) or policy.privacy.unit != "user":
        return None
    named = tuple(record.user for record in records if record.user is not None)
    if len(named) < len(records):
        raise InputError(
            "SS-1232",
            f"policy '{policy.name}' protects users, and {len(records) - len(named)} record(s) do not say whose they are",
            hint="Give every record a 'user' field.",
        )
    return named
