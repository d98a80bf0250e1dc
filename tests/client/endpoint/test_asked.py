"""Requests in OpenAI's form become a value or a list of all their faults; a body that was understood means what it says."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.client.endpoint.asked import Ask, Defaults, asked
from securesplit.client.sampling import Sampling, probabilities
from securesplit.errors import InputError

SETTINGS = settings(max_examples=80, deadline=None)
DEFAULTS = Defaults(7, Sampling(temperature=0.5, top_p=0.9))
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


def read(body: object, *, chat: bool = True) -> Ask:
    return asked(json.dumps(body).encode(), chat=chat, defaults=DEFAULTS, seed=99)


def faults(body: object, *, chat: bool = True) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        read(body, chat=chat)
    assert caught.value.code == "SS-1272"
    return caught.value.details


def taken(data: bytes, *, chat: bool) -> Ask | InputError:
    try:
        return asked(data, chat=chat, defaults=DEFAULTS, seed=0)
    except InputError as error:
        return error


MESSAGES = [{"role": "user", "content": "hello"}]


@SETTINGS
@given(
    said=st.lists(
        st.tuples(st.sampled_from(["system", "developer", "user", "assistant"]), TEXT), min_size=1, max_size=5
    ),
    parts=st.booleans(),
    temperature=st.none() | st.floats(0, 2),
    seed=st.none() | st.integers(-(1 << 63), (1 << 63) - 1),
    most=st.none() | st.integers(1, 4096),
    stop=st.none()
    | st.text("ab", min_size=1, max_size=3)
    | st.lists(st.text("ab", min_size=1, max_size=3), max_size=4),
    stream=st.booleans(),
)
def test_a_good_body_means_what_it_says(said, parts, temperature, seed, most, stop, stream):
    messages = [
        {
            "role": role,
            "content": [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}] if parts else text,
        }
        for role, text in said
    ]
    body = {
        "model": "m", "messages": messages, "temperature": temperature, "seed": seed, "max_completion_tokens": most, "stop": stop,
        "stream": stream, "n": 1,
    }  # fmt: skip
    ask = read(body)
    assert [(m.role, m.content) for m in ask.conversation.messages] == [
        ("system" if role == "developer" else role, text) for role, text in said
    ]
    assert ask.max_new_tokens == (most or 7)
    assert ask.sampling.temperature == (0.5 if temperature is None else temperature)
    assert ask.sampling.seed == (99 if seed is None else seed)
    assert ask.sampling.top_p == 0.9
    assert ask.sampling.stop == ((stop,) if isinstance(stop, str) else tuple(stop or ()))
    assert (ask.stream, ask.usage) == (stream, False)


@SETTINGS
@given(data=st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["model", "messages", "prompt", "n", "x"]), inner),
    max_leaves=10,
).map(lambda v: json.dumps(v).encode()))  # fmt: skip
def test_any_bytes_are_a_request_or_refused_by_code(data):
    for chat in (True, False):
        found = taken(data, chat=chat)
        assert isinstance(found, Ask) or (found.code == "SS-1272" and found.details)


@SETTINGS
@given(
    broken=st.dictionaries(
        st.sampled_from(
            ["temperature", "top_p", "seed", "max_tokens", "stream", "tools", "logprobs", "response_format", "fly"]
        ),
        st.just("wrong"),
        min_size=1,
    )
)
def test_every_fault_is_named_at_once(broken):
    found = faults({"model": "m", "messages": MESSAGES, **broken})
    assert {fault.partition(":")[0].partition(".")[0] for fault in found} == set(broken)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": "x", "name": "bob"},
        {"role": "assistant", "content": "x", "tool_calls": [{}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": 3},
    ],
)
def test_messages_of_other_kinds_are_refused(message):
    assert faults({"model": "m", "messages": [message]})


def test_single_rules():
    good = {"model": "m", "messages": MESSAGES}
    assert "old name" in faults({**good, "max_tokens": 3, "max_completion_tokens": 4})[0]
    assert "stream_options" in faults({**good, "stream_options": {"include_usage": True}})[0]
    assert read({**good, "stream": True, "stream_options": {"include_usage": True}}).usage
    assert faults({**good, "messages": []})
    assert faults({**good, "n": 2})
    assert faults({**good, "n": True})
    assert faults({**good, "prompt": "x"})
    assert faults({**good, "stop": ["a"] * 5})
    assert faults({**good, "stop": [""]})
    assert faults({**good, "temperature": 2.1})
    assert faults({**good, "store": True})
    assert faults({**good, "functions": [{}]})
    text = {"model": "m", "prompt": "x"}
    assert read(text, chat=False).text == "x"
    assert read({**text, "prompt": ["x"], "best_of": 1, "echo": False}, chat=False).text == "x"
    assert faults({**text, "prompt": ["x", "y"]}, chat=False)
    assert faults({**text, "prompt": [1, 2]}, chat=False)
    assert faults({**text, "echo": True}, chat=False)
    assert faults({**text, "best_of": 2}, chat=False)
    assert faults({**text, "suffix": "z"}, chat=False)


def test_names_that_are_not_ours_are_repeated_only_where_they_are_plain():
    assert faults({"model": "m", "messages": MESSAGES, "fly_high": 1})[0].startswith("fly_high:")
    assert "patient" not in faults({"model": "m", "messages": MESSAGES, "the patient said": 1})[0]


def test_half_a_character_is_no_text():
    with pytest.raises(InputError, match="SS-1272"):
        asked(b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}', chat=True, defaults=DEFAULTS, seed=0)


GOOD = {"model": "m", "messages": MESSAGES}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"stop": ""}, ["stop.0"]),
        ({"stop": ["a"] * 5}, ["stop"]),
        ({"stop": 3}, ["stop"]),
        ({"messages": []}, ["messages"]),
        ({"messages": [{"role": "user", "content": 3}]}, ["messages.0.content"]),
        ({"messages": [{"role": "user", "content": None}]}, ["messages.0.content"]),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}, {"role": "q", "content": []}]}, ["messages.0.name", "messages.1.role"]),
        ({"stop": [""], "n": 2, "top_k": -2}, ["n", "top_k", "stop.0"]),
    ],
)  # fmt: skip
def test_a_fault_is_told_once_and_where_it_is(more, told):
    found = faults({**GOOD, **more})
    assert [fault.partition(":")[0] for fault in found] == told
    assert not any(word in fault for fault in found for word in ("constrained", "tuple", "Tuple", "?"))


@pytest.mark.parametrize("prompt", ["", [], ["a", "b"], [1, 2], [[1]], [""], 3])
def test_a_prompt_that_is_none_is_told_once(prompt):
    (found,) = faults({"model": "m", "prompt": prompt}, chat=False)
    assert found.partition(":")[0] in {"prompt", "prompt.0"}


def test_edges_that_other_programs_send_as_nothing():
    usual = Defaults(7, Sampling(temperature=1.0, top_k=5, top_p=0.9))

    def sampling(**more):
        return asked(json.dumps({**GOOD, **more}).encode(), chat=True, defaults=usual, seed=0).sampling

    assert [sampling(**more).top_k for more in ({}, {"top_k": None}, {"top_k": 0}, {"top_k": -1}, {"top_k": 1})] == [
        5,
        5,
        None,
        None,
        1,
    ]
    logits = torch.tensor([0.0, 3.0, 2.9, -50.0])
    assert torch.equal(probabilities(logits, sampling(top_p=0)), torch.tensor([0.0, 1, 0, 0], dtype=torch.float64))
    assert sampling(top_p=1).top_p == 1
    read({**GOOD, "top_logprobs": 0, "logprobs": False})
    read({**GOOD, "messages": [{"role": "assistant", "content": "x", "annotations": [], "tool_calls": []}, *MESSAGES]})
    assert faults({"model": "m", "prompt": "x", "logprobs": 0}, chat=False), "0 asks for the chosen tokens' own"
