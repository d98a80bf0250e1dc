"""Records with a class: where it is asked for says nothing of the text, and it is never among the tokens."""

from __future__ import annotations

import hashlib
import hmac

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.data.batches import IGNORED, encode_records
from securesplit.data.labelled import class_tokens, encode_labelled, labelled_batches
from securesplit.errors import InputError

BUCKETS = (4, 8, 16)
NAMES = ("yes", "no")
CHOICES = (ord("y"), ord("n"))
FILL = 7


class Letters:
    """One token a letter, so that every expectation can be written by hand."""

    def encode(self, text: str, *, truncation: bool = False, max_length: int = 99, add_special_tokens: bool = True):
        del truncation
        return [ord(letter) for letter in text][:max_length]


def identify(text: bytes) -> str:
    return hmac.new(b"k" * 32, text, hashlib.sha256).hexdigest()


def encoded(texts, labels, *, names=NAMES, longest=16, users=None):
    return encode_labelled(texts, labels, names, Letters(), longest, identify, users=users)


def batched(texts, labels, *, size=8, seed=1, **options):
    return labelled_batches(
        encoded(texts, labels, **options), choices=CHOICES, buckets=BUCKETS, size=size, padding=FILL, seed=seed
    )


def test_a_batch_by_hand():
    (batch,) = batched(["ab"], ["no"])
    assert batch.tokens.tolist() == [[FILL, ord("a"), ord("b"), FILL]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, IGNORED, ord("n")]]
    assert batch.classes.tolist() == [1]
    assert (batch.choices, batch.bucket, batch.scored, batch.most_scored) == (CHOICES, 4, 1, 1)
    assert batch.records == (identify(b"ab"),), "the text alone says who pays, as in any other job"


def test_the_place_of_the_class_counts_towards_the_bucket():
    for length, bucket in ((2, 4), (3, 4), (4, 8), (7, 8), (8, 16), (15, 16)):
        (batch,) = batched(["a" * length], ["yes"])
        assert batch.bucket == bucket == batch.tokens.shape[1]
    (batch,) = batched(["abcdef"], ["yes"], longest=4)
    assert batch.tokens.tolist() == [[*b"abc", FILL]], "cut so that it fits"


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(2, 15), min_size=1, max_size=20),
    data=st.data(),
    size=st.integers(1, 7),
    seed=st.integers(0, 1 << 32),
)
def test_length_does_not_move_the_label_and_the_label_is_no_token(lengths, data, size, seed):
    texts = ["".join(chr(200 + 20 * i + j) for j in range(n)) for i, n in enumerate(lengths)]
    labels = data.draw(st.lists(st.sampled_from(NAMES), min_size=len(texts), max_size=len(texts)))
    one = batched(texts, labels, size=size, seed=seed)
    seen = {}
    for batch in one:
        assert (batch.labels[:, :-1] == IGNORED).all()
        assert batch.lengths == (batch.bucket,) * len(batch.records), "the last row is a token as well"
        assert not set(batch.tokens.flatten().tolist()) & set(CHOICES)
        for row, source in enumerate(batch.sources):
            want = [ord(letter) for letter in texts[source]]
            room = batch.bucket - len(want) - 1
            assert batch.tokens[row].tolist() == [FILL] * room + want + [FILL]
            assert batch.labels[row, -1] == CHOICES[NAMES.index(labels[source])]
            seen[source] = int(batch.classes[row])
    assert seen == {i: NAMES.index(label) for i, label in enumerate(labels)}
    # With every class another, tokens, order and all that A and the server meet are the same.
    other = batched(texts, [NAMES[1 - NAMES.index(label)] for label in labels], size=size, seed=seed)
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine.tokens, theirs.tokens)
        assert (mine.records, mine.sources, mine.contents) == (theirs.records, theirs.sources, theirs.contents)
        assert mine.labelled == theirs.labelled, "a fresh answer would show that a label was corrected"


def test_contents_name_these_rows_and_labels_name_text_class_and_names():
    first, second = encoded(["abcd", "efgh"], ["yes", "yes"])
    assert first.encoded.content != second.encoded.content
    assert first.content != second.content
    # The same tokens as text to learn are other rows: padded elsewhere.
    (plain,) = encode_records(["abcd"], Letters(), 15, identify)
    assert plain.tokens == first.encoded.tokens
    assert plain.content != first.encoded.content
    (turned,) = encoded(["abcd"], ["yes"], names=("no", "yes"))
    assert turned.encoded == first.encoded
    assert turned.content != first.content, "the same number would mean another class"


def test_under_unit_user_a_person_pays_for_each_answer():
    rows = encoded(["abcd", "efgh"], ["yes", "no"], users=["ann", "ann"])
    assert rows[0].encoded.record == rows[1].encoded.record == identify(b"user:ann")
    assert rows[0].content != rows[1].content


def test_singles_and_other_classes():
    (batch,) = batched(["abc", "def"], ["yes", "no"])
    for i, single in enumerate(batch.singles()):
        assert single.classes.tolist() == [batch.classes[i]]
        assert (single.choices, single.labelled) == (CHOICES, batch.labelled[i : i + 1])
    answers = 1 - batch.classes
    changed = batch.with_classes(answers)
    assert torch.equal(changed.tokens, batch.tokens)
    assert changed.labels[:, -1].tolist() == [CHOICES[i] for i in answers.tolist()]
    assert batch.classes.tolist() != changed.classes.tolist(), "the first one is left as it was"


def test_class_tokens_are_first_tokens_and_differ():
    assert class_tokens(NAMES, Letters()) == CHOICES
    for names, fault in ((("yes", "yellow"), "'yellow'"), (("yes", ""), "''")):
        with pytest.raises(InputError, match="SS-1233") as caught:
            class_tokens(names, Letters())
        assert fault in str(caught.value)


def test_records_without_a_named_label_are_counted_and_not_quoted():
    texts, labels = ["Wilhelmina", "Ann", "Ben", "Cid"], ["yes", None, "maybe", "perhaps"]
    with pytest.raises(InputError, match="SS-1235") as caught:
        encoded(texts, labels)
    said = f"{caught.value}{caught.value.hint}{caught.value.details}"
    assert "1 record(s)" in said
    assert "2 have one" in said
    assert not [word for word in (*texts, "maybe", "perhaps") if word in said]
