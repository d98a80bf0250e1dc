"""Prompts by name: how a task's parts become a prompt, and what its classes are called in the answer.

Three presets. ``plain`` is this project's own, for every task. ``fl-glm`` has the cloze questions that FL-GLM (Zheng et
al., EMNLP 2024) published for ChatGLM, ``fedsea-llama`` the chat prompts of FedSEA-LLaMA (arXiv 2505.15683); both word for
word, so that results compare, but for three things: marks of the beginning and the end of a text are the tokenizer's
business; an answer follows after one blank; and where their code contradicts their task (the choices of COPA were swapped,
ReCoRD's passage stood in place of the query) the task wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter

from securesplit.data.tasks.item import Item, Parts, Turn
from securesplit.data.tasks.registry import Task
from securesplit.errors import InputError

__all__ = ["PRESETS", "Template", "answer_of", "prompt_of", "template_named", "templates_of"]


@dataclass(frozen=True, slots=True)
class Template:
    """One task in one preset.

    Attributes:
        task: its name.
        prompt: with the names of :class:`~securesplit.data.tasks.item.Parts` in braces, and ``{dialogue}``.
        names: what each class is called in the answer, in the order of the task's labels; empty where answers are texts.
        first, later: how the first question of a conversation is asked, and each later one; with ``{question}``.
        reply: an earlier answer, with ``{answer}``.
        lead: between prompt and answer; a part of the answer's tokens.
        long: the part that is shortened, from its end, where a prompt does not fit.
        gap: what stands in the prompt for a query's placeholder; empty leaves it.
    """

    task: str
    prompt: str
    names: tuple[str, ...] = ()
    first: str = ""
    later: str = ""
    reply: str = ""
    lead: str = " "
    long: str = "text"
    gap: str = ""


_YES, _MAYBE = ("Yes", "No"), ("Yes", "No", "Maybe")
_CHAT = "[INST] <<SYS>>You are a helpful assistant."
_ENTAILED = '[INST]Hypothesis: "{hypothesis}", premise:"{premise}", If the hypothesis is entailed by the premise? '

_PLAIN = (
    Template("boolq", "{text}\n\nQuestion: {question}\nAnswer yes or no:", ("yes", "no")),
    Template(
        "cb", "{premise}\n\nClaim: {hypothesis}\nDoes the text support the claim? Answer yes, no or maybe:",
        ("yes", "no", "maybe"), long="premise",
    ),
    Template("copa", "{premise}\nA: {first}\nB: {second}\nWhich one is the {relation}, A or B?", ("A", "B"), long="premise"),
    Template("multirc", "{text}\n\nQuestion: {question}\nProposed answer: {candidate}\nIs it right? Answer yes or no:", ("yes", "no")),
    Template("record", "{text}\n\nFill the gap marked ____ with a name from the text: {question}\nAnswer:", gap="____"),
    Template("rte", "{premise}\n\nClaim: {hypothesis}\nDoes it follow from the text? Answer yes or no:", ("yes", "no"), long="premise"),
    Template("wic", "1. {first}\n2. {second}\nDoes '{word}' mean the same in both? Answer yes or no:", ("yes", "no"), long="first"),
    Template("wsc", "{text}\n\nIn this text, does '{pronoun}' stand for '{noun}'? Answer yes or no:", ("yes", "no")),
    Template("coqa", "{text}\n\n{dialogue}", first="Q: {question}\nA:", later="\nQ: {question}\nA:", reply=" {answer}"),
    Template("xsum", "{text}\n\nIn one sentence:"),
    Template("huatuo", "问：{question}\n答：", lead="", long="question"),
    Template("pairs", "{text}", lead="\n"),
    Template("pairs-zh", "{text}", lead="\n"),
    Template("labels", "{text}\n\nLabel:"),
    Template("text", "", lead=""),
)  # fmt: skip

_FL_GLM = (
    Template("boolq", "{text}. Question: {question}? Answer:", _YES),
    Template("cb", '"{hypothesis}"? | [MASK], "{premise}"', _MAYBE, long="premise"),
    Template(
        "copa",
        'Choice A: "{first}" or Choice B: "{second}" Premise: {premise} The {relation} is',
        ("A", "B"),
        long="premise",
    ),
    Template("multirc", '"{text}" Question:{question} Is it answer "{candidate}"', _YES),
    Template("record", "[{text}][{question}]", gap="[MASK]"),
    Template("rte", '"{hypothesis}"? | [MASK], "{premise}"', _YES, long="premise"),
    Template("wic", '"{first}" / "{second}" Similar sense of {word}?', _YES, long="first"),
    Template("wsc", "[{text}] Is the pronoun '{pronoun}' refers to '{noun}' ?", _YES),
    Template("huatuo", "{question}", lead="", long="question"),
)

_FEDSEA = (
    Template("cb", f"{_ENTAILED}Yes, No or Maybe? Answer:[/INST]", _MAYBE, long="premise"),
    Template("coqa",
        f"{_CHAT}You need to answer my question base on the provided story.<</SYS>>The story is '{{text}}'.{{dialogue}}",
        first="My question is '{question}'.[/INST]", later="[INST]{question}[/INST]", reply=" {answer}",
    ),
    Template(
        "multirc",
        f"{_CHAT}You need to judge whether the question is Yes or No base on the provided passage.<</SYS>>"
        'The passage is "{text}".Question:"{question}". The possible answer is "{candidate}". Is it correct?[/INST]',
        _YES,
    ),
    Template("record",
        f"{_CHAT}You need to predict what @placeholder represents in the query base on the provided passage.<</SYS>>"
        "The passage is '{text}'.The query is '{question}'.[/INST]",
    ),
    Template("rte", f"{_ENTAILED}Yes or No? Answer:[/INST]", _YES, long="premise"),
    Template("wsc", "[INST][{text}] Is the pronoun '{pronoun}' refers to '{noun}' ?[/INST]", _YES),
    Template("xsum",
        f"{_CHAT}You need to summarize an abstract base on the provided passage.<</SYS>>The passage is '{{text}}'.[/INST]",
    ),
    Template("huatuo", "[INST]Question: {question}? Answer:[/INST]", long="question"),
)  # fmt: skip

PRESETS = {"plain": _PLAIN, "fl-glm": _FL_GLM, "fedsea-llama": _FEDSEA}
"""By name; the first is the default."""


def templates_of(task: Task) -> tuple[str, ...]:
    """The presets that have this task."""
    return tuple(name for name, preset in PRESETS.items() if any(t.task == task.name for t in preset))


def template_named(name: str, task: Task) -> Template:
    """A preset's template for a task.

    Raises:
        InputError: SS-1242 when there is no such preset, or it has no such task.
    """
    for template in PRESETS.get(name, ()):
        if template.task == task.name:
            return template
    raise InputError(
        "SS-1242", f"there is no template {name[:40]!r} for task '{task.name}'",
        hint=f"Templates of this task: {', '.join(templates_of(task))}.",
    )  # fmt: skip


def prompt_of(template: Template, parts: Parts) -> str:
    """The prompt. Braces in the parts are text like any other."""
    asked = [*(turn.question for turn in parts.turns), parts.question]
    pieces = [_filled(template.later if i else template.first, Turn(question, "")) for i, question in enumerate(asked)]
    for i, turn in enumerate(parts.turns):
        pieces[i] += _filled(template.reply, turn)
    return _filled(template.prompt, parts, "".join(pieces), template.gap)


def answer_of(template: Template, task: Task, item: Item) -> str | None:
    """The first gold answer in the template's words, with what leads to it; None where the file has none."""
    if not item.answers:
        return None
    gold = item.answers[0]
    if template.names:
        gold = template.names[[label.name for label in task.labels].index(gold)]
    return template.lead + gold


def _filled(text: str, parts: Parts | Turn, dialogue: str = "", gap: str = "") -> str:
    pieces: list[str] = []
    for literal, name, _, _ in Formatter().parse(text):
        pieces.append(literal)
        if name == "dialogue":
            pieces.append(dialogue)
        elif name is not None:
            value = str(getattr(parts, name))
            pieces.append(value.replace("@placeholder", gap) if gap else value)
    return "".join(pieces)
