"""The `openai` package, unchanged, against the endpoint; what comes out is what the unsplit model says."""

from __future__ import annotations

import pytest
import torch

from securesplit.client.chat.toll import Toll
from tests.e2e.desk import TEMPLATE, served
from tests.e2e.house import FROZEN, build_house, build_model, build_tokenizer, policy_of

openai = pytest.importorskip("openai", reason="the openai package is not installed; it is in the test group")

SAID = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w10 w11 w12"}]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    house = build_house(tmp_path_factory.mktemp("openai") / "house")
    with served(house, policy_of()) as running:
        yield running


@pytest.fixture
def program(one):
    with openai.OpenAI(base_url=one.ready.url, api_key=one.ready.token, max_retries=0) as client:
        yield client


def unsplit(prompt: str, count: int) -> tuple[str, int, int]:
    """The whole model's greedy words after a prompt, the prompt's tokens, the new ones."""
    tokenizer = build_tokenizer()
    ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        out = build_model().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    new = out[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), ids.shape[1], int((new != tokenizer.eos_token_id).sum())


def rendered(messages: list[dict[str, str]]) -> str:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def test_the_models(program):
    models = program.models.list().data
    assert [m.id for m in models] == ["model"]
    assert program.models.retrieve("model").id == "model"
    with pytest.raises(openai.NotFoundError):
        program.models.retrieve("gpt-4o")


def test_a_chat_answer_is_the_unsplit_model_s(program):
    made = program.chat.completions.create(model="model", messages=SAID, max_completion_tokens=6)
    text, asked, new = unsplit(rendered(SAID), 6)
    choice = made.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", text)
    assert choice.finish_reason == ("length" if new == 6 else "stop")
    assert (made.object, made.model) == ("chat.completion", "model")
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (asked, new)
    assert made.usage.total_tokens == asked + new
    assert made.securesplit == {"dropped_turns": 0, "epsilon": None}


def test_a_streamed_answer_is_the_same_in_pieces(program):
    text, asked, new = unsplit(rendered(SAID), 6)
    with program.chat.completions.create(
        model="model", messages=SAID, max_tokens=6, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(pieces) == text
    assert len(pieces) > 1, "it came in pieces"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == ("length" if new == 6 else "stop")
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (asked, new)
    assert len({c.id for c in chunks}) == 1


def test_a_conversation_goes_on_with_what_was_answered(program):
    messages = [{"role": "user", "content": "w7"}]
    for asked in ("w8", "w9"):
        made = program.chat.completions.create(model="model", messages=messages, max_tokens=2)
        assert made.choices[0].message.content == unsplit(rendered(messages), 2)[0]
        # As programs do it: the whole object, with all its empty fields, comes back.
        messages = [*messages, made.choices[0].message.model_dump(), {"role": "user", "content": asked}]
        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        made = program.chat.completions.create(model="model", messages=messages, max_tokens=2)
        assert made.choices[0].message.content == unsplit(rendered(plain), 2)[0]


def test_plain_completions_whole_and_streamed(program):
    text, asked, new = unsplit("w20 w21 w22", 5)
    made = program.completions.create(model="model", prompt="w20 w21 w22", max_tokens=5)
    assert (made.choices[0].text, made.usage.prompt_tokens, made.usage.completion_tokens) == (text, asked, new)
    with program.completions.create(model="model", prompt=["w20 w21 w22"], max_tokens=5, stream=True) as stream:
        assert "".join(c.choices[0].text for c in stream) == text


def test_stop_and_seed(program):
    text, *_ = unsplit("w20 w21 w22", 5)
    word = text.split()[2]
    made = program.completions.create(model="model", prompt="w20 w21 w22", max_tokens=5, stop=[word])
    assert made.choices[0].text == text[: text.index(word)]
    assert made.choices[0].finish_reason == "stop"

    def drawn(seed):
        made = program.completions.create(model="model", prompt="w20", max_tokens=8, temperature=2, seed=seed)
        return made.choices[0].text

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"fly": 1}}, "fly"),
    ],
)
def test_what_is_not_done_is_refused_by_name(program, more, field):
    with pytest.raises(openai.BadRequestError) as caught:
        program.chat.completions.create(model="model", messages=SAID, **more)
    assert caught.value.code == "SS-1272"
    assert caught.value.param == field


def test_fields_that_ask_for_nothing_are_taken(program):
    made = program.chat.completions.create(
        model="model", messages=SAID, max_tokens=1, n=1, user="somebody", logprobs=False, frequency_penalty=0, tools=[],
        response_format={"type": "text"},
    )  # fmt: skip
    assert made.choices[0].message.content == unsplit(rendered(SAID), 1)[0]


def test_other_refusals_have_the_classes_that_programs_know(one, program):
    with pytest.raises(openai.NotFoundError):
        program.chat.completions.create(model="gpt-4o", messages=SAID)
    with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=one.ready.url, api_key="wrong") as wrong:
        wrong.models.list()
    with pytest.raises(openai.BadRequestError) as caught:
        program.chat.completions.create(model="model", messages=[{"role": "user", "content": " ".join(["w3"] * 40)}])
    assert caught.value.code == "SS-1275"


def test_old_turns_that_do_not_fit_are_dropped_and_counted(program):
    long = [
        {"role": "user", "content": "w20 w21 w22 w23 w24 w25"}, {"role": "assistant", "content": "w30 w31"},
        {"role": "user", "content": "w40 w41 w42"},
    ]  # fmt: skip
    messages = [{"role": "system", "content": "w5 w6"}, *long]
    made = program.chat.completions.create(model="model", messages=messages, max_tokens=3)
    kept = [messages[0], messages[-1]]  # Three markers and eleven words are 18 tokens; 16 fit.
    assert made.choices[0].message.content == unsplit(rendered(kept), 3)[0]
    assert made.securesplit["dropped_turns"] == 1


def test_under_a_private_policy_a_budget_is_told_and_ends(tmp_path, open_ledger):
    house, ledger = build_house(tmp_path / "house"), open_ledger()
    policy = policy_of(FROZEN)  # 24 generated tokens for three sites, one prompt of each record.
    toll = Toll()
    with (
        served(house, policy, ledger=ledger, toll=toll) as one,
        openai.OpenAI(base_url=one.ready.url, api_key=one.ready.token, max_retries=2) as program,
    ):
        made = program.chat.completions.create(model="model", messages=SAID, max_tokens=5)
        ours = made.securesplit
        assert (ours["unit"], ours["budget"], ours["tokens_left"]) == ("sequence", 8.0, 4)
        assert 0 < ours["epsilon"] < 8
        entries = len(list(ledger.entries()))
        turns = [*SAID, {"role": "assistant", "content": "w9"}, {"role": "user", "content": "w50"}]
        for messages, count in ((turns, 2), (SAID, 40)):
            with pytest.raises(openai.RateLimitError) as caught:
                program.chat.completions.create(model="model", messages=messages, max_tokens=count)
            assert caught.value.code in {"SS-5001", "SS-5002"}
        assert len(list(ledger.entries())) == entries, "nothing was sent, and nothing charged"
