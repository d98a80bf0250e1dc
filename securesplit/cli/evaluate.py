"""``securesplit eval``: what predictions are worth; or which checkpoint is best, through the split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from securesplit.cli.choices import Ids, Split, TemplateName
from securesplit.cli.connection import Cache, Code, Evidence, Model, connection
from securesplit.cli.output import Output, show
from securesplit.cli.passphrase import KeyPassFd, KeyPassFile
from securesplit.cli.policy_sign import Trusted
from securesplit.cli.progress import ProgressStyle, reporting

if TYPE_CHECKING:
    from securesplit.client.selection import Selected
    from securesplit.data.tasks.score import Scores


def evaluate(
    task: Annotated[str, typer.Option("--task", help="Format and measures of the data; see `tasks list`.")],
    data: Annotated[Path, typer.Option(help="The task's file, with gold answers.")],
    predictions: Annotated[
        Path | None, typer.Option(help='JSON lines {"id", "prediction"}, to be scored; nothing is sent anywhere.')
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(help="Output directories of training runs, as 'run/*': the best of them, through the split."),
    ] = None,
    subset: Annotated[
        int | None, typer.Option(help="About so many examples choose the best; all when absent.", min=1)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --checkpoints: folder for predictions; a run goes on there.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="With --checkpoints: policy file of this side.")] = None,
    keys: Annotated[Path | None, typer.Option(help="With --checkpoints: key folder of this party.")] = None,
    server: Annotated[str | None, typer.Option(help="With --checkpoints: wss://host:port")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="With --checkpoints: at most so many tokens an answer.", min=1)
    ] = 16,
    stop: Annotated[
        list[str] | None, typer.Option(help="With --checkpoints: a text that ends an answer; may be repeated.")
    ] = None,
    perplexity: Annotated[
        bool, typer.Option("--perplexity", help="With --checkpoints: of the gold answers, too; one more release each.")
    ] = False,
    template: TemplateName = "plain",
    ids: Ids = None,
    split: Split = None,
    limit: Annotated[int | None, typer.Option(help="Use the first so many examples.")] = None,
    model: Model = None,
    cache: Cache = None,
    code: Code = None,
    evidence: Evidence = None,
    policy_key: Trusted = None,
    key_pass_file: KeyPassFile = None,
    key_pass_fd: KeyPassFd = None,
    progress: ProgressStyle = "auto",
    output: Output = "text",
) -> None:
    """Score predictions by the task's official measures, with intervals; unparsable and missing answers are wrong.

    With --checkpoints the answers are generated through the split: each prompt and each fed-back token is a release under the
    policy, and charged.
    """
    from securesplit.data.tasks.chosen import Chosen, read_tasked
    from securesplit.data.tasks.score import read_predictions, score

    if (predictions is None) == (checkpoints is None):
        raise typer.BadParameter("give exactly one of --predictions and --checkpoints")
    tasked = read_tasked(Chosen(task, template, ids, split), data, limit)
    if predictions is not None:
        scores = score(tasked.task, tasked.items, read_predictions(predictions, tasked.items))
        show(output, _lines(scores), _values(scores))
        return
    if out is None or policy is None or keys is None or server is None or checkpoints is None:
        raise typer.BadParameter("--checkpoints needs --out, --policy, --keys and --server")

    from securesplit.client.predict import Asking, Site, require_comparable, split_predictor
    from securesplit.client.selection import Plan, matching, select

    folders = matching(checkpoints)
    way = connection(
        policy, keys, server, policy_key, (key_pass_file, key_pass_fd), model=model, cache=cache, code=code, evidence=evidence,
    )  # fmt: skip
    site = Site(
        way.policy, keys, server, way.model, way.cache, way.code, way.evidence, passphrase=way.passphrase,
    )  # fmt: skip
    require_comparable(site.policy, folders)
    golden = tuple(item for item in tasked.items if item.answers)
    asking = Asking(max_new_tokens, tuple(stop or ()), perplexity)
    settings = f"{template}:{asking.settings}:{site.policy.digest}"
    predict = split_predictor(site, tasked.task, tasked.template, asking)
    with reporting(progress) as report:
        found = select(Plan(tasked.task, golden, tasked.template, settings, subset), folders, predict, out, report)
    tried = [{"checkpoint": str(path), **_values(scores)} for path, scores in found.tried]
    show(
        output,
        f"{_lines(found.scores)}\n{_tried(found)}",
        {**_values(found.scores), "best": str(found.best), "tried": tried},
    )


def _lines(scores: Scores) -> str:
    head = f"{scores.task}: {scores.examples} examples in {scores.groups} groups"
    missing = scores.examples - scores.answered
    if missing or scores.unparsable:
        head += f"; wrong because missing {missing}, because unparsable {scores.unparsable}"
    rows = [
        f"  {m.name:<10} {m.estimate.value:.4f}"
        + ("" if m.estimate.low is None else f"  95% {m.estimate.low:.4f} to {m.estimate.high:.4f}")
        for m in scores.measures
    ]
    return "\n".join([head, *rows])


def _tried(found: Selected) -> str:
    """Which checkpoint is the best, and what the choice was made from."""
    from securesplit.aggregate.findings import printable

    measured = [
        f"  {printable(str(path))}: {', '.join(f'{m.name} {m.estimate.value:.4f}' for m in scores.measures)}"
        for path, scores in found.tried
    ]
    first = found.tried[0][1]
    head = f"best of {len(found.tried)} by {first.measures[0].name} on {first.examples} examples: {printable(str(found.best))}"
    return "\n".join([head, *measured])


def _values(scores: Scores) -> dict[str, Any]:
    return {
        "task": scores.task, "examples": scores.examples, "groups": scores.groups, "missing": scores.examples - scores.answered,
        "unparsable": scores.unparsable, "metrics": {m.name: m.estimate.value for m in scores.measures},
        "intervals": {m.name: None if m.estimate.low is None else [m.estimate.low, m.estimate.high] for m in scores.measures},
    }  # fmt: skip
