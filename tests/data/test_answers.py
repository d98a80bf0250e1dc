"""Answer-only loss, the cache of tokens, and the choice of buckets."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import stat
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from securesplit.data.answers import Answered, answer_tokens, encode_answers, prompt_tokens, tokenise
from securesplit.data.batches import IGNORED, bucket_of, encode_records, make_batches
from securesplit.data.buckets import choose_buckets
from securesplit.data.cache import cached
from securesplit.errors import InputError


@dataclass(frozen=True)
class Asked:
    prompt: str
    answer: str | None


class Letters:
    """One token a letter; 1 begins a text, 2 ends one."""

    eos_token_id: int | None = 2

    def __init__(self, *, ends: bool = False) -> None:
        self.ends = ends

    def encode(self, text, *, add_special_tokens=True, truncation=False, max_length=99):
        del truncation
        ids = [ord(letter) for letter in text][:max_length]
        return [1, *ids, *([2] if self.ends else [])] if add_special_tokens else ids


def identify(text: bytes) -> str:
    return hmac.new(b"k" * 32, text, hashlib.sha256).hexdigest()


def encoded(*asked: Asked, most: int = 16, users=None):
    rows = tokenise(asked, Letters())
    return encode_answers(rows, [f"{a.prompt}{a.answer}" for a in asked], most, identify, users=users)


def test_a_batch_by_hand():
    rows = encoded(Asked("ab", " c"), Asked("q", "d"))
    (batch,) = make_batches(rows, buckets=(8,), size=2, padding=0, seed=1)
    place = batch.sources.index(0)
    assert batch.tokens[place].tolist() == [1, *b"ab", *b" c", 2, 0, 0]
    assert batch.labels[place].tolist() == [IGNORED] * 3 + [*b" c", 2] + [IGNORED] * 2
    assert batch.labels[1 - place].tolist() == [IGNORED] * 2 + [*b"d", 2] + [IGNORED] * 4
    assert batch.scored == 5


def test_a_prompt_has_the_same_tokens_with_and_without_an_answer():
    for tokenizer in (Letters(), Letters(ends=True)):
        (row,) = tokenise([Asked("ab", "c")], tokenizer)
        assert list(row.tokens[: row.start]) == prompt_tokens("ab", tokenizer) == [1, *b"ab"]
        assert list(row.tokens[row.start :]) == answer_tokens("c", tokenizer) == [*b"c", 2]


def test_a_text_alone_is_learnt_whole():
    (row,) = tokenise([Asked("", "abc")], Letters())
    assert row == Answered((1, *b"abc", 2), 0)
    (batch,) = make_batches(encoded(Asked("", "abc")), buckets=(8,), size=1, padding=0, seed=1)
    assert batch.labels[0].tolist() == [1, *b"abc", 2, IGNORED, IGNORED, IGNORED]


def test_names_tell_masks_and_repetitions_apart():
    one, two, again = encoded(Asked("ab", "c"), Asked("a", "bc"), Asked("ab", "c"))
    assert one.tokens == two.tokens == again.tokens
    assert len({one.content, two.content, again.content}) == 3
    assert len({one.record, again.record}) == 2, "leaving one out would tell that it equals another"
    plain = encode_records(["abc"], Letters(), 16, identify)[0]
    assert plain.content != one.content
    by_user = encoded(Asked("ab", "c"), Asked("q", "r"), users=["ann", "ann"])
    assert by_user[0].record == by_user[1].record == identify(b"user:ann")


def test_what_cannot_be_learnt_is_counted():
    with pytest.raises(InputError, match="SS-1245") as caught:
        tokenise([Asked("a", None), Asked("b", "c")], Letters())
    assert "1 example(s)" in caught.value.what
    with pytest.raises(InputError, match="SS-1222"):
        encoded(Asked("ab", "c" * 20))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.text("ab", min_size=1, max_size=6), st.text("cd", min_size=1, max_size=6)), min_size=1, max_size=8
    ),
    st.integers(0, 9),
)
def test_every_answer_token_is_learnt_and_no_prompt_token(pairs, seed):
    rows = encoded(*(Asked(p, a) for p, a in pairs))
    for batch in make_batches(rows, buckets=(8, 16), size=3, padding=0, seed=seed):
        for row, source in enumerate(batch.sources):
            prompt, answer = pairs[source]
            learnt = [t for t in batch.labels[row].tolist() if t != IGNORED]
            assert learnt == [*answer.encode(), 2]
            assert batch.labels[row, : len(prompt) + 1].eq(IGNORED).all()


class TestCache:
    ASKED = (Asked("ab", "c"), Asked("", "你好"))
    ROWS = (Answered((1, 2, 3), 2), Answered((4,), 0))

    def kept(self, folder, *, asked=ASKED, under="m"):
        made = []
        rows = cached(folder, asked, under, lambda: made.append(1) or self.ROWS)
        assert rows == self.ROWS
        return not made

    def test_a_second_start_makes_nothing(self, tmp_path):
        folder = tmp_path / "tokens"
        assert not self.kept(folder)
        assert self.kept(folder)
        (file,) = folder.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert set(load(file.read_bytes())) == {"tokens", "lengths", "starts"}
        assert not self.kept(None)
        assert not self.kept(None)

    def test_another_content_is_another_file(self, tmp_path):
        self.kept(tmp_path)
        assert not self.kept(tmp_path, under="other")
        assert not self.kept(tmp_path, asked=(Asked("a", "bc"), Asked("", "你好")))
        assert not self.kept(tmp_path, asked=(Asked("ab", None), Asked("", "你好")))
        assert len(list(tmp_path.iterdir())) == 4

    @pytest.mark.parametrize("at", [0, 9, 60, -1])
    def test_a_damaged_file_is_made_again(self, tmp_path, at):
        self.kept(tmp_path)
        (file,) = tmp_path.iterdir()
        data = bytearray(file.read_bytes())
        data[at] ^= 0x41
        file.write_bytes(data)
        assert not self.kept(tmp_path)
        assert self.kept(tmp_path)

    def test_altered_tensors_links_and_stubs_are_not_trusted(self, tmp_path):
        self.kept(tmp_path)
        (file,) = tmp_path.iterdir()
        arrays = load(file.read_bytes())
        for change in (
            {"tokens": arrays["tokens"] + 1}, {"starts": np.array([9, 0])}, {"lengths": np.array([-1, 5])}, {"tokens": arrays["tokens"].astype(np.int32)},
        ):  # fmt: skip
            file.write_bytes(save({**arrays, **change}, metadata={"key": file.stem, "content": "0" * 64}))
            assert not self.kept(tmp_path)
        file.write_bytes(b"")
        assert not self.kept(tmp_path)
        file.replace(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
        assert not self.kept(tmp_path)
        assert not file.is_symlink()

    def test_a_folder_that_cannot_be_used(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="SS-1246"):
            self.kept(tmp_path / "file")


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=30),
    allowed=st.lists(st.integers(1, 64), min_size=0, max_size=5, unique=True).map(
        lambda b: (*sorted(set(b) - {64}), 64)
    ),
    count=st.integers(1, 6),
)
def test_no_choice_of_buckets_pads_less(lengths, allowed, count):
    found = choose_buckets(lengths, allowed, count)
    assert set(found.buckets) <= set(allowed)
    assert len(found.buckets) <= count

    def crossing(buckets):
        return sum(bucket_of(n, buckets) for n in lengths)

    least = min(
        crossing(some)
        for size in range(1, count + 1)
        for some in itertools.combinations(allowed, size)
        if some[-1] >= max(lengths)
    )
    assert crossing(found.buckets) == least
    assert found.padding == pytest.approx(1 - sum(lengths) / least)


def test_a_length_over_the_largest_bucket_is_refused():
    with pytest.raises(InputError, match="SS-1222"):
        choose_buckets([9], (4, 8), 2)
