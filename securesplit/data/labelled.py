"""Records with a class: the text goes in, and C is to name the class at one public place.

    tokens    fill ... fill  text ... text  fill
    labels    -100 ...                -100  class

Padding stands in front, so that the class is asked for at the last position of every row: where it is asked for, and
where the text ends, say nothing of the text's length. The last token is public; its row crosses like all others, and its
label, which the loss compares with what follows the text, is the only one that counts. The class is never among the
tokens, which A sees and the server gets noised.

Names of classes are public: they stand in the job. What this does not protect: the text, beyond what the gate does; and
that all records of a site belong to the named classes, which the server learns when a run begins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from securesplit.data.batches import Batch, Encoded, Tokenizer, bucket_of, encode_records, make_batches
from securesplit.errors import InputError

__all__ = ["Labelled", "Plain", "class_tokens", "encode_labelled", "labelled_batches"]


class Plain(Protocol):
    """The one method of a Hugging Face tokenizer that is used for names of classes."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The text's token ids, with or without the model's own special tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Labelled:
    """One record as tokens, and its class.

    Attributes:
        encoded: the text's tokens; its ``content`` names them as rows of this kind, which other jobs' rows are not.
        label: the class, as an index into the task's names.
        content: a name for the text and the names together, keyed like the record. Not for the class: a corrected one keeps the
            answer that was given, because a fresh answer would show that it was corrected.
    """

    encoded: Encoded
    label: int
    content: str


def class_tokens(names: Sequence[str], tokenizer: Plain) -> tuple[int, ...]:
    """The token that stands for each class: the first one of its name.

    Args:
        names: of the classes, in the job's order; public.
        tokenizer: the model's own.

    Raises:
        InputError: SS-1233 when a name has no token or begins like an earlier one; the message names the class.
    """
    found: list[int] = []
    for name in names:
        tokens = tokenizer.encode(name, add_special_tokens=False)
        if not tokens or tokens[0] in found:
            raise InputError(
                "SS-1233",
                f"the label {name!r} begins with no token of its own",
                hint="Let the job name labels that differ in their first token of this model.",
            )
        found.append(int(tokens[0]))
    return tuple(found)


def encode_labelled(
    texts: Sequence[str],
    labels: Sequence[str | None],
    names: Sequence[str],
    tokenizer: Tokenizer,
    max_tokens: int,
    identify: Callable[[bytes], str],
    *,
    users: Sequence[str] | None = None,
) -> tuple[Labelled, ...]:
    """Tokenise texts, leaving room for the place at which the class is asked for.

    Args:
        texts: one record each.
        labels: the name of each record's class.
        names: all names, in the job's order.
        tokenizer, identify, users: as :func:`securesplit.data.batches.encode_records`.
        max_tokens: longest sequence, that place included.

    Raises:
        InputError: SS-1220, SS-1221 as there; SS-1235 when records have no label or one that is not named. The message
            counts them and quotes neither text nor label.
    """
    missing = sum(label is None for label in labels)
    unknown = sum(label is not None and label not in names for label in labels)
    if missing or unknown:
        raise InputError(
            "SS-1235",
            f"{missing} record(s) have no label, and {unknown} have one that the job does not name",
            hint="Give every record a 'label' field with one of the job's labels.",
        )
    rows = encode_records(texts, tokenizer, max_tokens - 1, identify, users=users)
    found: list[Labelled] = []
    for row in rows:
        label = labels[row.source]
        assert label is not None
        # The class is no part of the name: a corrected label that drew a new answer would show that it was corrected.
        named = json.dumps([row.content, list(names)]).encode()
        framed = replace(row, content=identify(b"framed:" + row.content.encode()))
        found.append(Labelled(framed, list(names).index(label), identify(b"label:" + named)))
    return tuple(found)


def labelled_batches(
    records: Sequence[Labelled],
    *,
    choices: tuple[int, ...],
    buckets: tuple[int, ...],
    size: int,
    padding: int,
    seed: int,
) -> tuple[Batch, ...]:
    """Group records by bucket, shuffle, and stack; none of it depends on the classes.

    Args:
        records: of :func:`encode_labelled`.
        choices: of :func:`class_tokens`.
        buckets, size, seed: as :func:`securesplit.data.batches.make_batches`.
        padding: the token in front of texts and behind them; its rows are noised like all others.

    Raises:
        InputError: SS-1222, SS-1223 as there.
    """
    of = {record.encoded.source: record for record in records}
    framed = [_framed(record.encoded, buckets, padding) for record in records]
    out: list[Batch] = []
    for batch in make_batches(framed, buckets=buckets, size=size, padding=padding, seed=seed):
        rows = [of[source] for source in batch.sources]
        named = replace(batch, choices=choices, labelled=tuple(row.content for row in rows))
        out.append(named.with_classes(torch.tensor([row.label for row in rows], dtype=torch.int64)))
    return tuple(out)


def _framed(row: Encoded, buckets: tuple[int, ...], padding: int) -> Encoded:
    """A whole row of public length: padding, the text, and the place at which the class is asked for."""
    room = bucket_of(len(row.tokens) + 1, buckets) - len(row.tokens) - 1
    return replace(row, tokens=(padding,) * room + row.tokens + (padding,))
