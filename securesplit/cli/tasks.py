"""``securesplit tasks``: which tasks there are, and is a file what a task reads?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securesplit.cli.choices import Ids, Split, TemplateName
from securesplit.cli.output import Output, show

if TYPE_CHECKING:
    from securesplit.data.buckets import Chosen
    from securesplit.data.tasks.survey import Bin

app = typer.Typer(help="Tasks: data formats, prompts, measures.", no_args_is_help=True)


@app.command("list")
def list_tasks(output: Output = "text") -> None:
    """Every task, what it reads, and the templates that it has."""
    from securesplit.data.tasks.registry import TASKS
    from securesplit.data.tasks.templates import templates_of

    width = max(len(task.name) for task in TASKS)
    lines = [f"{t.name:<{width}}  {t.about}; {t.format}; templates {', '.join(templates_of(t))}" for t in TASKS]
    rows = [
        {"name": t.name, "about": t.about, "format": t.format, "measure": t.measure, "language": t.language,
         "labels": [label.name for label in t.labels], "templates": list(templates_of(t))}
        for t in TASKS
    ]  # fmt: skip
    show(output, "\n".join(lines), {"tasks": rows})


@app.command("check")
def check(
    data: Annotated[Path, typer.Argument(help="A task's file, or its folder.")],
    task: Annotated[str, typer.Option("--task", help="Which format to expect; see `tasks list`.")],
    template: TemplateName = "plain",
    ids: Ids = None,
    split: Split = None,
    model: Annotated[
        Path | None, typer.Option(help="Model directory: lengths in its tokens, not in characters.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="With --model: which of this policy's buckets pad least.")] = None,
    buckets: Annotated[int, typer.Option(help="With --policy: use at most so many buckets.", min=1)] = 4,
    output: Output = "text",
) -> None:
    """Read a file as a task does, report all its faults at once, and count what it holds. No text is shown."""
    from securesplit.data.tasks.registry import read_task, task_named
    from securesplit.data.tasks.source import Source
    from securesplit.data.tasks.survey import survey
    from securesplit.data.tasks.templates import template_named

    kind = task_named(task)
    preset = template_named(template, kind)
    items = read_task(kind, Source(data, ids, split))
    unit = "characters" if model is None else "tokens"
    found = survey(kind, preset, items, _length(model))
    chosen = None if policy is None or model is None else _chosen(policy, found.lengths, buckets)
    classes = {label.name: count for label, count in zip(kind.labels, found.classes, strict=True)}
    lines = [
        f"{data}: {found.examples} examples of {task}, {found.labelled} with a gold answer, in {found.groups} groups",
        *(f"  {name}: {count}" for name, count in classes.items()),
        f"prompt and answer in {unit}:",
        *_bars(found.histogram),
    ]
    if chosen is not None:
        lines.append(f"buckets {', '.join(map(str, chosen.buckets))}: {chosen.padding:.1%} of what crosses is padding")
    show(
        output,
        "\n".join(lines),
        {
            "task": task, "template": template, "examples": found.examples, "labelled": found.labelled, "groups": found.groups,
            "classes": classes, "unit": unit, "longest": max(found.lengths),
            "histogram": [{"most": b.most, "count": b.count} for b in found.histogram],
            "buckets": None if chosen is None else list(chosen.buckets), "padding": None if chosen is None else chosen.padding,
        },
    )  # fmt: skip


def _length(model: Path | None) -> Callable[[str, str], int]:
    if model is None:
        return lambda prompt, answer: len(prompt) + len(answer)
    from securesplit.data.answers import answer_tokens, prompt_tokens
    from securesplit.model.store import load_tokenizer

    tokenizer = load_tokenizer(model)
    return lambda prompt, answer: len(prompt_tokens(prompt, tokenizer)) + len(answer_tokens(answer, tokenizer))


def _chosen(policy: Path, lengths: tuple[int, ...], count: int) -> Chosen:
    from securesplit.data.buckets import choose_buckets
    from securesplit.policy.load import load_policy

    allowed = load_policy(policy).limits.buckets
    return choose_buckets([min(length, allowed[-1]) for length in lengths], allowed, count)


def _bars(histogram: tuple[Bin, ...]) -> list[str]:
    most = max(b.count for b in histogram)
    return [f"  up to {b.most:>7}  {b.count:>7}  {'#' * round(40 * b.count / most)}".rstrip() for b in histogram]
