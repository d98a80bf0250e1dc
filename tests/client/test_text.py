"""Text while it comes: whole characters, nothing of a stop text, and in the end what the tokenizer says of all tokens."""

from __future__ import annotations

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from securesplit.client.text import Spoken, Stops

FEW = settings(deadline=None, max_examples=60)
TEXT = st.text(st.sampled_from("abc .,'你好世界éß🙂👩‍⚕️\n"), max_size=24)


def bytewise() -> transformers.PreTrainedTokenizerFast:
    """A token for each byte, so that a Chinese character takes three and an emoji four."""
    inner = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


def fallback() -> transformers.PreTrainedTokenizerFast:
    """Letters, and bytes for all else, as Llama's tokenizer has them."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {letter: 256 + i for i, letter in enumerate("abc.,'")}
    inner = Tokenizer(models.BPE({**vocabulary, "▁": 300, "<unk>": 301}, [], byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback(), decoders.Fuse()]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)  # fmt: skip


TOKENIZERS = {"bytes": bytewise(), "fallback": fallback()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@FEW
@given(TEXT)
def test_pieces_are_whole_characters_and_together_the_text(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids, spoken = tokenizer.encode(text), Spoken(tokenizer)
    pieces = [spoken.add(i) for i in ids]
    pieces.append(spoken.end())
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""


@FEW
@example([160, 102, 160, 244, 172, 160, 116, 163, 234, 254, 127, 234])
@given(st.lists(st.sampled_from(TOKENIZERS["bytes"].encode("你好世界é🙂")) | st.integers(0, 255), max_size=60))
def test_bytes_without_sense_lose_no_character_that_has_any(ids):
    """As noise makes them: what is unfinished for long hides neither what is whole nor what becomes so."""
    tokenizer = TOKENIZERS["bytes"]
    spoken = Spoken(tokenizer)
    pieces = [*map(spoken.add, ids), spoken.end()]
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_goes_on_behind_many_bytes_without_sense(kind):
    tokenizer = TOKENIZERS[kind]
    (first, *_), rest = tokenizer.encode("你")[-3:], tokenizer.encode("abc")
    spoken = Spoken(tokenizer)
    said = "".join(spoken.add(i) for i in [*[first] * 300, *rest]) + spoken.end()
    assert said.endswith("abc")
    assert set(said[:-3]) - {" "} == {"\ufffd"}  # Some tokenizers begin a word with a blank.


def test_a_character_waits_for_its_last_byte():
    tokenizer = TOKENIZERS["bytes"]
    spoken = Spoken(tokenizer)
    assert [spoken.add(i) for i in tokenizer.encode("a你🙂")] == ["a", "", "", "你", "", "", "", "🙂"]


def test_bytes_that_never_become_a_character_are_shown_in_the_end():
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer.encode("a你")[:-1]
    spoken = Spoken(tokenizer)
    assert "".join(spoken.add(i) for i in ids) == "a"
    assert set(spoken.end()) == {"\ufffd"}
    long = Spoken(tokenizer)
    assert "\ufffd" in "".join(long.add(ids[1]) for _ in range(20)), "nothing is held back for ever"


def cut(text: str, sizes: list[int]) -> list[str]:
    out, at = [], 0
    for size in sizes:
        out.append(text[at : at + size])
        at += size
    return [*out, text[at:]]


def by_hand(text: str, stops: list[str]) -> tuple[str, bool]:
    """One character after another: the first stop text that is complete ends it."""
    for end in range(1, len(text) + 1):
        ended = [s for s in stops if text[:end].endswith(s)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


@settings(deadline=None, max_examples=200)
@given(
    st.text(st.sampled_from("ab\n"), max_size=20),
    st.lists(st.text(st.sampled_from("ab\n"), min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 5), max_size=8),
)
def test_however_a_text_is_cut_it_ends_at_the_same_place(text, stops, sizes):
    found, shown = Stops(stops), ""
    for piece in cut(text, sizes):
        shown += found.add(piece)
        assert by_hand(text, stops)[0].startswith(shown), "nothing is shown that may be part of a stop text"
    shown += found.end()
    assert (shown, found.found) == by_hand(text, stops)
    assert found.add("more") == "" or not found.found


def test_only_what_could_become_a_stop_text_is_held_back():
    stops = Stops(["###", "END"])
    assert [stops.add(t) for t in ("one #", "two ##", " E", "NE", "ND", "x")] == ["one ", "#two ", "## ", "EN", "", ""]
    assert stops.found
    assert stops.end() == ""
