"""Templates: what each makes of a task by hand, that names are known to the parser of answers, and that prompts fit."""

from __future__ import annotations

from dataclasses import fields
from string import Formatter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.data.tasks.fit import examples_of, fitted
from securesplit.data.tasks.item import Item, Parts, Turn
from securesplit.data.tasks.registry import TASKS, task_named
from securesplit.data.tasks.templates import PRESETS, answer_of, prompt_of, template_named, templates_of
from securesplit.errors import InputError
from securesplit.measures.classes import named_class

EVERY = [(preset, template) for preset, templates in PRESETS.items() for template in templates]


def item(task: str, **options) -> Item:
    answers = {"classes": ("true",), "multirc": ("false",)}.get(task_named(task).measure, ("gold",))
    return Item("0", "0", Parts(**options), answers)


@pytest.mark.parametrize(("preset", "template"), EVERY, ids=[f"{p}-{t.task}" for p, t in EVERY])
def test_a_template_is_whole(preset, template):
    task = task_named(template.task)
    slots = {
        name
        for text in (template.prompt, template.first, template.later)
        for _, name, _, _ in Formatter().parse(text)
        if name
    }
    assert slots <= {f.name for f in fields(Parts)} | {"dialogue"}
    assert template.long in slots or not slots, "what is shortened stands in the prompt"
    assert len(template.names) == len(task.labels)
    for index, name in enumerate(template.names):
        assert named_class(template.lead + name, task.labels) == index, "the model's right answer is scored as right"
    assert template_named(preset, task) is template


def test_every_task_has_a_plain_template_and_a_missing_one_is_told():
    for task in TASKS:
        assert templates_of(task)[0] == "plain"
    with pytest.raises(InputError, match="SS-1242") as caught:
        template_named("fedsea-llama", task_named("boolq"))
    assert "plain, fl-glm" in caught.value.hint


@pytest.mark.parametrize(
    ("task", "preset", "parts", "prompt"),
    [
        ("boolq", "fl-glm", Parts(text="It is", question="is it"), "It is. Question: is it? Answer:"),
        ("copa", "fl-glm", Parts(premise="It fell.", first="x", second="y", relation="cause"),
         'Choice A: "x" or Choice B: "y" Premise: It fell. The cause is'),
        ("record", "fl-glm", Parts(text="P", question="@placeholder swims"), "[P][[MASK] swims]"),
        ("record", "plain", Parts(text="P @placeholder", question="@placeholder swims"),
         "P ____\n\nFill the gap marked ____ with a name from the text: ____ swims\nAnswer:"),
        ("multirc", "fedsea-llama", Parts(text="P", question="Q", candidate="A"),
         ('[INST] <<SYS>>You are a helpful assistant.You need to judge whether the question is Yes or No base on the provided '
         'passage.<</SYS>>The passage is "P".Question:"Q". The possible answer is "A". Is it correct?[/INST]')),
        ("coqa", "fedsea-llama", Parts(text="S", question="Q3", turns=(Turn("Q1", "A1"), Turn("Q2", "A2"))),
         ("[INST] <<SYS>>You are a helpful assistant.You need to answer my question base on the provided story.<</SYS>>The story "
         "is 'S'.My question is 'Q1'.[/INST] A1[INST]Q2[/INST] A2[INST]Q3[/INST]")),
        ("coqa", "plain", Parts(text="S", question="Q2", turns=(Turn("Q1", "A1"),)), "S\n\nQ: Q1\nA: A1\nQ: Q2\nA:"),
        ("huatuo", "plain", Parts(question="头疼？"), "问：头疼？\n答："),
        ("pairs", "plain", Parts(text="{question} {0} {"), "{question} {0} {"),
    ],
)  # fmt: skip
def test_prompts_by_hand(task, preset, parts, prompt):
    assert prompt_of(template_named(preset, task_named(task)), parts) == prompt


def test_answers_in_the_template_s_words():
    copa = task_named("copa")
    assert answer_of(template_named("fl-glm", copa), copa, Item("0", "0", Parts(), ("1",))) == " B"
    record = task_named("record")
    assert answer_of(template_named("plain", record), record, Item("0", "0", Parts(), ("Ada", "Bo"))) == " Ada"
    assert answer_of(template_named("plain", record), record, Item("0", "0", Parts(), ())) is None


def fit(task: str, one: Item, most: int):
    kind = task_named(task)
    (example,) = fitted(
        kind,
        template_named("plain", kind),
        [one],
        prompt_length=len,
        answer_length=lambda text: len(text) + 1,
        most=most,
    )
    return example


@settings(deadline=None, max_examples=60)
@given(
    text=st.text(alphabet="ab \n", max_size=300),
    question=st.text(alphabet="xy", min_size=1, max_size=9),
    most=st.integers(70, 400),
)
def test_a_prompt_fits_by_losing_the_end_of_its_passage_alone(text, question, most):
    one = item("boolq", text=text, question=question)
    example = fit("boolq", one, most)
    tail = f"\n\nQuestion: {question}\nAnswer yes or no:"
    assert example.answer == " yes"
    assert len(example.prompt) + len(example.answer) + 1 <= most
    assert example.prompt.endswith(tail)
    assert text.startswith(example.prompt.removesuffix(tail))
    if len(text + tail) + 5 <= most:
        assert example.prompt == text + tail


def test_the_most_of_the_passage_is_kept():
    example = fit("boolq", item("boolq", text="a" * 500, question="q"), 100)
    assert len(example.prompt) == 100 - len(" yes") - 1


def test_without_a_passage_the_beginning_is_lost_and_an_answer_never_is():
    turns = tuple(Turn("q" * 20, "a" * 20) for _ in range(10))
    one = Item("0", "0", Parts(text="story", question="last?", turns=turns), ("gold",))
    example = fit("coqa", one, 60)
    assert example.prompt.endswith("\nQ: last?\nA:")
    assert (len(example.prompt), example.answer) == (60 - len(" gold") - 1, " gold")
    long = Item("0", "0", Parts(text="p", question="q"), ("g" * 60,))
    with pytest.raises(InputError, match="SS-1244") as caught:
        fit("coqa", long, 60)
    assert "1 answer(s)" in caught.value.what


def test_a_text_alone_is_cut_at_its_end():
    one = Item("0", "0", Parts(), ("abcdefgh",))
    assert fit("text", one, 6).answer == "abcde", "one place is for the end"
    assert examples_of(task_named("text"), template_named("plain", task_named("text")), [one])[0].prompt == ""
