"""Conversations become prompts as the tokenizer's own library renders them, or are refused; what does not fit is counted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.client.chat import template
from securesplit.client.chat.conversation import Conversation, Message
from securesplit.client.chat.template import fit, render
from securesplit.errors import InputError
from tests.e2e.desk import TEMPLATE
from tests.e2e.house import WORDS, build_tokenizer

SETTINGS = settings(max_examples=40, deadline=None)
TOKENIZER = build_tokenizer()
TOKENIZER.chat_template = TEMPLATE
SAYING = st.lists(st.sampled_from(WORDS[3:40]), min_size=1, max_size=5).map(" ".join)
SAID = st.tuples(st.sampled_from(["system", "user", "assistant"]), SAYING)


def conversation(*said: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, text) for role, text in said))


@SETTINGS
@given(said=st.lists(SAID, max_size=6), last=SAYING)
def test_a_prompt_is_what_the_template_says(said, last):
    whole = conversation(*said, ("user", last))
    rendered = render(whole, TOKENIZER)
    assert (rendered.dropped, rendered.stop) == (0, ())
    text = TOKENIZER.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in whole.messages], add_generation_prompt=True, tokenize=False
    )
    assert rendered.tokens == tuple(TOKENIZER.encode(text))


@SETTINGS
@given(said=st.lists(SAID, max_size=8), last=SAYING, longest=st.integers(2, 60))
def test_the_newest_turns_are_kept_and_so_is_every_system_message(said, last, longest):
    whole = conversation(*said, ("user", last))
    alone = conversation(*((r, t) for r, t in said if r == "system"), ("user", last))
    if len(render(alone, TOKENIZER).tokens) > longest:
        with pytest.raises(InputError, match="SS-1275"):
            fit(whole, TOKENIZER, longest)
        return
    rendered = fit(whole, TOKENIZER, longest)
    assert len(rendered.tokens) <= longest
    # The oracle: begin at each message of the user in turn; the first start that fits is what is kept.
    starts = [0, *(i for i, m in enumerate(whole.messages) if m.role == "user")]
    spoken = [i for i, m in enumerate(whole.messages) if m.role != "system"]
    starts = sorted({i for i in starts if i == 0 or i > spoken[0]})
    options = [
        render(
            conversation(*((m.role, m.content) for j, m in enumerate(whole.messages) if j >= i or m.role == "system")),
            TOKENIZER,
        )
        for i in starts
    ]
    fitting = next(i for i, option in enumerate(options) if len(option.tokens) <= longest)
    assert (rendered.tokens, rendered.dropped) == (options[fitting].tokens, fitting)


def test_a_long_history_is_rendered_few_times(monkeypatch):
    """A program may send thousands of turns with each request; others wait behind it."""
    calls = 0

    def counted(*args):
        nonlocal calls
        calls += 1
        return render(*args)

    monkeypatch.setattr(template, "render", counted)
    rendered = fit(conversation(*[("user", "w3"), ("assistant", "w4")] * 300, ("user", "w5")), TOKENIZER, 20)
    assert 280 < rendered.dropped <= 300
    assert calls <= 12


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_a_control_token_in_a_message_is_refused(role):
    whole = conversation((role, "w3 <eos> w4"), ("user", "w5"))
    with pytest.raises(InputError) as caught:
        render(whole, TOKENIZER)
    assert caught.value.code == "SS-1276"
    assert caught.value.details == (f"message 0 ({role})",)
    render(conversation(("user", "w3 <unk> w4")), TOKENIZER)


@pytest.mark.parametrize("said", [[], [("system", "w3")], [("user", "w3"), ("assistant", "w4")], [("assistant", "w4")]])
def test_without_a_question_there_is_nothing_to_answer(said):
    with pytest.raises(InputError, match="SS-1278"):
        render(conversation(*said), TOKENIZER)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('private ' + messages[0].content) }}",
        "{% for %}",
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_a_template_that_fails_is_told_without_what_was_said(template):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError) as caught:
        render(conversation(("user", "w33")), tokenizer)
    assert caught.value.code == "SS-1278"
    assert "w33" not in str(caught.value)


def test_without_a_template_the_plain_form_is_used_and_stops_before_the_next_question():
    plain = build_tokenizer()
    whole = conversation(("system", "w3"), ("user", "w4"), ("assistant", "w5"), ("user", "w6"))
    rendered = render(whole, plain)
    assert rendered.tokens == tuple(plain.encode("w3\nUser: w4\nAssistant: w5\nUser: w6\nAssistant:"))
    assert rendered.stop == ("\nUser:",)


def test_a_conversation_does_not_show_its_text():
    whole = Conversation.begun("secret instruction").said("user", "secret question")
    assert "secret" not in repr(whole)
    assert "secret" not in repr(render(conversation(("user", "w3")), TOKENIZER))
    assert whole.mine == ("secret question",)
    assert Conversation.begun().messages == ()


def test_the_token_that_ends_a_message_is_found_in_the_template():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w63"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} w63 {% endfor %}"
    assert render(conversation(("user", "w3")), tokenizer).ends == WORDS.index("w63")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    assert render(conversation(("user", "w3")), tokenizer).ends == tokenizer.eos_token_id
    assert render(conversation(("user", "w3")), TOKENIZER).ends is None, "w60 to w62 are words, not control tokens"
