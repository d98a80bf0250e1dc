"""Records to tokens, and tokens to batches of one public length.

The server learns how long the tensors are that it receives. Every sequence is therefore padded up to one of a few public
lengths, the policy's buckets, and a batch holds sequences of one bucket only. What stays visible is the bucket, the
number of sequences in it and the order of batches (threat-model.md, O7).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from securesplit.errors import InputError

__all__ = ["IGNORED", "Batch", "Encoded", "Tokenizer", "bucket_of", "encode_records", "make_batches"]

IGNORED = -100
"""The label that transformers' losses leave out."""


class Tokenizer(Protocol):
    """The one method of a Hugging Face tokenizer that is used here."""

    def encode(self, text: str, *, truncation: bool, max_length: int) -> list[int]:
        """The text's token ids, special tokens of the model's own convention included, at most ``max_length``."""
        ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """One record as tokens.

    Attributes:
        source: its index among the texts that were encoded, so that text and labels can be found again.
        record: its id in the privacy ledger.
        tokens: at least two ids, in order.
        content: a name for the tokens, keyed like the record.
        learnt: index of the first token that is learnt; the labels of those before it are left out of the loss.
    """

    source: int
    record: str
    tokens: tuple[int, ...]
    content: str = ""
    learnt: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Sequences of one public length. Stays on the client; no part of it is sent as it is.

    Attributes:
        tokens: (B, T) int64, padded on the right; in front where records have classes (securesplit/data/labelled.py).
        labels: (B, T) int64, equal to ``tokens`` with -100 on padding and before what is learnt; the shift by one is the loss's business.
        lengths: tokens of each row up to its padding on the right.
        bucket: T.
        records: ledger ids of the rows.
        sources: each row's index among the texts that were encoded.
        contents: each row's name for its tokens, keyed like its record; empty when there is none.
        classes: (B,) int64, each row's class; None where text is learnt. No part of ``tokens``.
        choices: the token that stands for each class; public.
        labelled: each row's name as something that has a class, keyed like its record.
    """

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    bucket: int
    records: tuple[str, ...]
    sources: tuple[int, ...]
    contents: tuple[str, ...] = ()
    classes: Tensor | None = None
    choices: tuple[int, ...] = ()
    labelled: tuple[str, ...] = ()

    @property
    def scored(self) -> int:
        """How many labels the loss is over, all rows together. Private where texts have lengths."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @property
    def most_scored(self) -> int:
        """The most labels that one row can have; public."""
        return self.bucket if self.classes is None else 1

    def with_classes(self, classes: Tensor) -> Batch:
        """The same rows, where C is to name these classes, (B,), at the last position."""
        labels = torch.full_like(self.tokens, IGNORED)
        labels[:, -1] = torch.tensor(self.choices, dtype=torch.int64)[classes]
        return replace(self, labels=labels, classes=classes)

    def singles(self) -> tuple[Batch, ...]:
        """The rows as batches of one each, in order."""
        return tuple(
            Batch(
                tokens=self.tokens[i : i + 1],
                labels=self.labels[i : i + 1],
                lengths=self.lengths[i : i + 1],
                bucket=self.bucket,
                records=self.records[i : i + 1],
                sources=self.sources[i : i + 1],
                contents=self.contents[i : i + 1],
                classes=None if self.classes is None else self.classes[i : i + 1],
                choices=self.choices,
                labelled=self.labelled[i : i + 1],
            )
            for i in range(len(self.records))
        )


def encode_records(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    max_tokens: int,
    identify: Callable[[bytes], str],
    *,
    users: Sequence[str] | None = None,
) -> tuple[Encoded, ...]:
    """Tokenise texts and cut them at ``max_tokens``.

    Texts of fewer than two tokens are left out, because there is nothing to predict in them. Equal texts stay apart, are
    named by their place among their equals, and each pays and gets noise of its own: whether a record is sent, and whether
    two records leave as the same bytes, must not tell that one equals another.

    Args:
        texts: one record each.
        tokenizer: the model's own.
        max_tokens: longest sequence, in tokens; at least 2.
        identify: turns the record's text, as UTF-8, into its ledger id; a keyed hash, so that an id tells nobody whether
            a guessed text is in the ledger. It sees the whole text: another ``max_tokens`` draws on the same budget.
        users: whose each text is, under unit ``user``; the ledger id then names the person, who pays for all of them.

    Raises:
        InputError: SS-1220 when ``max_tokens`` is below 2, SS-1221 when no text is left.
    """
    if max_tokens < 2:
        raise InputError(
            "SS-1220",
            f"sequences of at most {max_tokens} tokens have nothing to predict",
            hint="Use at least 2 tokens.",
        )
    kept: list[Encoded] = []
    equals: Counter[tuple[bytes, tuple[int, ...]]] = Counter()
    for source, text in enumerate(texts):
        tokens = tuple(tokenizer.encode(text, truncation=True, max_length=max_tokens))
        if len(tokens) >= 2:
            payer = text.encode("utf-8") if users is None else b"user:" + users[source].encode("utf-8")
            place = equals[payer, tokens]
            equals[payer, tokens] += 1
            again = b"" if place == 0 else b"again %d:" % place
            content = identify(again + b"tokens:" + b",".join(b"%d" % token for token in tokens))
            payer = payer if users is not None else again + payer
            kept.append(Encoded(source, identify(payer), tokens, content))
    if not kept:
        raise InputError("SS-1221", "no text is longer than one token", hint="Give longer records.")
    return tuple(kept)


def bucket_of(length: int, buckets: tuple[int, ...]) -> int:
    """The smallest public length that holds ``length`` tokens.

    Args:
        length: real tokens.
        buckets: rising public lengths, the policy's ``limits.buckets``.

    Raises:
        InputError: SS-1222 when the sequence is longer than the largest bucket.
    """
    for bucket in buckets:
        if length <= bucket:
            return bucket
    raise InputError(
        "SS-1222",
        f"a sequence of {length} tokens is longer than the largest bucket ({max(buckets, default=0)})",
        hint="Cut sequences at the largest bucket, or add a bucket to the policy's limits.",
    )


def make_batches(
    sequences: Sequence[Encoded], *, buckets: tuple[int, ...], size: int, padding: int, seed: int
) -> tuple[Batch, ...]:
    """Group sequences by bucket, shuffle, and stack.

    The order of rows and of batches follows from ``seed``, the number of sequences and their buckets. It is visible to the
    server and protects nothing; another seed per epoch only serves the optimiser.

    Args:
        sequences: of :func:`encode_records`.
        buckets: rising public lengths, the policy's ``limits.buckets``.
        size: B, the largest number of rows of a batch; the last batch of a bucket may be smaller.
        padding: the token id that fills up; its rows are noised like all others, and its labels are left out.
        seed: public.

    Raises:
        InputError: SS-1222 a sequence over the largest bucket, SS-1223 a size below 1.
    """
    if size < 1:
        raise InputError("SS-1223", f"batches of {size} sequences are empty", hint="Use a batch of at least 1.")
    generator = torch.Generator().manual_seed(seed)
    groups: dict[int, list[Encoded]] = {bucket: [] for bucket in buckets}
    for index in torch.randperm(len(sequences), generator=generator).tolist():
        groups[bucket_of(len(sequences[index].tokens), buckets)].append(sequences[index])
    batches = [
        _stack(group[start : start + size], bucket, padding)
        for bucket, group in groups.items()
        for start in range(0, len(group), size)
    ]
    return tuple(batches[index] for index in torch.randperm(len(batches), generator=generator).tolist())


def _stack(rows: Sequence[Encoded], bucket: int, padding: int) -> Batch:
    shape = (len(rows), bucket)
    tokens = torch.full(shape, padding, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        length = len(row.tokens)
        tokens[index, :length] = torch.tensor(row.tokens, dtype=torch.int64)
        labels[index, row.learnt : length] = tokens[index, row.learnt : length]
    return Batch(
        tokens=tokens,
        labels=labels,
        lengths=tuple(len(row.tokens) for row in rows),
        bucket=bucket,
        records=tuple(row.record for row in rows),
        sources=tuple(row.source for row in rows),
        contents=tuple(row.content for row in rows),
    )
