"""Tokens and batches: nothing lost, nothing mixed, one public length per batch."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.data.batches import IGNORED, Encoded, bucket_of, encode_records, make_batches
from securesplit.errors import InputError

BUCKETS = (4, 8, 16)


class Letters:
    """One token a letter, so that every expectation can be written by hand."""

    def encode(self, text: str, *, truncation: bool, max_length: int) -> list[int]:
        assert truncation
        return [ord(letter) for letter in text][:max_length]


def identify(text: bytes) -> str:
    return hmac.new(b"k" * 32, text, hashlib.sha256).hexdigest()


def sequences(*lengths: int) -> tuple[Encoded, ...]:
    return tuple(Encoded(i, f"r{i}", tuple(range(100 * i + 1, 100 * i + 1 + n))) for i, n in enumerate(lengths))


def test_encoding_cuts_identifies_and_points_back():
    found = encode_records(["abcdef", "x", "", "gh"], Letters(), 4, identify)
    assert [(e.source, e.tokens) for e in found] == [(0, (97, 98, 99, 100)), (3, (103, 104))]
    assert found[0].record == identify(b"abcdef")  # The whole text, not the cut one.


def test_texts_that_become_equal_by_the_cut_stay_apart():
    # Whether a record is sent must not depend on another one.
    found = encode_records(["abcd", "abce", "abd"], Letters(), 3, identify)
    assert [e.source for e in found] == [0, 1, 2]
    assert found[0].tokens == found[1].tokens
    assert found[0].record != found[1].record
    assert found[0].content == found[1].content != found[2].content


@pytest.mark.parametrize(
    ("texts", "cut", "code"), [(["ab"], 1, "SS-1220"), (["a", ""], 4, "SS-1221"), ([], 4, "SS-1221")]
)
def test_encoding_refuses_what_cannot_be_learnt_from(texts, cut, code):
    with pytest.raises(InputError) as caught:
        encode_records(texts, Letters(), cut, identify)
    assert caught.value.code == code


def test_a_batch_by_hand():
    (batch,) = make_batches(sequences(3), buckets=BUCKETS, size=2, padding=0, seed=1)
    assert batch.tokens.tolist() == [[1, 2, 3, 0]]
    assert batch.labels.tolist() == [[1, 2, 3, IGNORED]]
    assert (batch.lengths, batch.bucket, batch.records, batch.sources) == ((3,), 4, ("r0",), (0,))


def test_a_token_equal_to_padding_keeps_its_label():
    (batch,) = make_batches([Encoded(0, "r", (0, 5, 0))], buckets=(4,), size=1, padding=0, seed=1)
    assert batch.labels.tolist() == [[0, 5, 0, IGNORED]]


def test_the_seed_alone_orders():
    many = sequences(*[3] * 20)
    one, again, other = (make_batches(many, buckets=BUCKETS, size=3, padding=0, seed=s) for s in (5, 5, 6))
    assert [b.records for b in one] == [b.records for b in again]
    assert [b.records for b in one] != [b.records for b in other]


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(2, 16), max_size=30), size=st.integers(1, 7), seed=st.integers(0, 1 << 32))
def test_every_token_arrives_once_in_a_batch_of_its_bucket(lengths, size, seed):
    given_ = sequences(*lengths)
    batches = make_batches(given_, buckets=BUCKETS, size=size, padding=-7, seed=seed)
    seen = {}
    for batch in batches:
        assert batch.tokens.shape == batch.labels.shape == (len(batch.records), batch.bucket)
        assert 1 <= len(batch.records) <= size
        for row, record in enumerate(batch.records):
            real = batch.lengths[row]
            assert batch.bucket == min(b for b in BUCKETS if b >= real)
            assert batch.tokens[row, real:].tolist() == [-7] * (batch.bucket - real)
            assert batch.labels[row, real:].tolist() == [IGNORED] * (batch.bucket - real)
            assert batch.labels[row, :real].tolist() == batch.tokens[row, :real].tolist()
            assert given_[batch.sources[row]].record == record
            seen[record] = tuple(batch.tokens[row, :real].tolist())
    assert seen == {e.record: e.tokens for e in given_}
    # At most one batch of each bucket is not full.
    for bucket in BUCKETS:
        assert sum(1 for b in batches if b.bucket == bucket and len(b.records) < size) <= 1


def test_singles_are_the_rows_in_order():
    (batch,) = make_batches(sequences(3, 4), buckets=BUCKETS, size=2, padding=0, seed=2)
    singles = batch.singles()
    assert [s.tokens.tolist() for s in singles] == [[row] for row in batch.tokens.tolist()]
    assert [s.labels.tolist() for s in singles] == [[row] for row in batch.labels.tolist()]
    assert tuple(s.lengths + s.records + s.sources for s in singles) == tuple(
        zip(batch.lengths, batch.records, batch.sources, strict=True)
    )
    assert {s.bucket for s in singles} == {batch.bucket}


def test_a_sequence_over_the_largest_bucket_is_refused_not_cut():
    with pytest.raises(InputError) as caught:
        make_batches(sequences(17), buckets=BUCKETS, size=1, padding=0, seed=0)
    assert caught.value.code == "SS-1222"
    assert bucket_of(16, BUCKETS) == 16


def test_an_empty_batch_is_refused():
    with pytest.raises(InputError) as caught:
        make_batches(sequences(3), buckets=BUCKETS, size=0, padding=0, seed=0)
    assert caught.value.code == "SS-1223"


def test_under_unit_user_all_records_of_a_person_have_one_payer_and_contents_of_their_own():
    found = encode_records(["abcd", "efgh", "ijkl"], Letters(), 4, identify, users=["ann", "bob", "ann"])
    assert found[0].record == found[2].record != found[1].record
    assert len({row.content for row in found}) == 3
    assert found[0].record == identify(b"user:ann")


def test_equal_records_are_named_apart_so_that_no_release_tells_that_they_are_equal():
    """Replace-one may replace a record by a copy of another; the same bytes twice would show it with certainty."""
    found = encode_records(["abcd", "abcd", "abcd"], Letters(), 4, identify)
    assert len({row.record for row in found}) == len({row.content for row in found}) == 3
    by_user = encode_records(["abcd", "abcd", "abcd"], Letters(), 4, identify, users=["ann", "ann", "bob"])
    assert by_user[0].record == by_user[1].record != by_user[2].record
    assert by_user[0].content != by_user[1].content
    again = encode_records(["abcd", "abcd", "abcd"], Letters(), 4, identify)
    assert [row.record for row in again] == [row.record for row in found]
