"""``securesplit model fit``: fit the public code at the cut to public text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from securesplit.cli.computing import Threads, take
from securesplit.cli.connection import Cache, cache_or_default
from securesplit.cli.output import Output, show
from securesplit.cli.progress import ProgressStyle, reporting

if TYPE_CHECKING:
    from torch import Tensor


def fit(
    model: Annotated[str, typer.Option("--model", help="An alias (smollm2-135m), a directory, or a hub id.")],
    text: Annotated[
        Path,
        typer.Option(
            "--text", help="PUBLIC text: jsonl, json or plain. Never private text: the code carries its statistics out."
        ),
    ],
    width: Annotated[
        int, typer.Option("--width", help="Numbers per row that cross instead of the hidden size.", min=1)
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write; every party gets a copy.")],
    front: Annotated[int, typer.Option("--front", help="Decoder layers in front with the client.", min=0)] = 2,
    back: Annotated[int, typer.Option("--back", help="Decoder layers behind with the client.", min=0)] = 2,
    sentinel: Annotated[
        bool, typer.Option("--sentinel", help="Put a public token first, whose massive row is never sent.")
    ] = False,
    whiten: Annotated[bool, typer.Option("--whiten", help="Give every component unit variance.")] = False,
    rows: Annotated[
        int, typer.Option("--rows", help="Length of the sequences that the clips are told for.", min=2)
    ] = 48,
    limit: Annotated[int, typer.Option("--limit", help="Use at most so many sequences of text.", min=1)] = 1024,
    cache: Cache = None,
    threads: Threads = 0,
    progress: ProgressStyle = "auto",
    output: Output = "text",
) -> None:
    """Fit the public code at the cut: a mean, a projection and a public first row, from public text alone."""
    from securesplit.model.code import save_code
    from securesplit.model.fit import fit_code
    from securesplit.model.manifest import hash_file, read_manifest
    from securesplit.model.plan import CutPlan
    from securesplit.model.resolve import resolve_model
    from securesplit.model.store import load_front, load_middle, load_tokenizer

    take(threads)
    directory = resolve_model(model, cache_or_default(cache), CutPlan(front, back))
    tokenizer = load_tokenizer(directory)
    windows = _windows(text, tokenizer, rows, limit)
    with reporting(progress) as report:
        code = fit_code(
            load_front(directory), load_middle(directory), windows, width=width, model=read_manifest(directory).digest,
            text=hash_file(text), sentinel=_sentinel(tokenizer) if sentinel else None, whiten=whiten,
            progress=lambda done, total: report("public text", done, total, None),
        )  # fmt: skip
    save_code(code, out)
    facts = code.facts
    show(
        output,
        f"{out}: {facts.width} of {facts.hidden} numbers per row, {facts.explained:.1%} of the public variance, "
        f"{facts.rows} rows\n"
        f"norm of a sequence of {facts.clips.rows} rows, quantiles 50/90/99 %: "
        f"{' / '.join(f'{norm:.3g}' for norm in facts.clips.sequence)}; of a row: "
        f"{' / '.join(f'{norm:.3g}' for norm in facts.clips.row)}\n"
        f'for the job:\n[code]\ndigest = "{code.digest}"\nwidth = {facts.width}',
        {"path": str(out), "digest": code.digest, **facts.model_dump(mode="json")},
    )


def _windows(text: Path, tokenizer: Any, rows: int, limit: int) -> Tensor:
    """The text's tokens, one text after another, cut into sequences of one length, (N, rows).

    Raises:
        InputError: SS-12xx when the text cannot be read, SS-1417 when it is shorter than one sequence.
    """
    import torch

    from securesplit.data.corpus import read_corpus
    from securesplit.errors import InputError

    ids: list[int] = []
    for record in read_corpus(text):
        ids += tokenizer.encode(record.text, add_special_tokens=False)
        if len(ids) >= rows * limit:
            break
    count = min(len(ids) // rows, limit)
    if count == 0:
        raise InputError("SS-1417", f"the public text has fewer than {rows} tokens", hint="Give more text.")
    return torch.tensor(ids[: count * rows]).reshape(count, rows)


def _sentinel(tokenizer: Any) -> int:
    """The token that stands first: the tokenizer's beginning of text, else its end.

    Raises:
        InputError: SS-1417 when it has neither.
    """
    from securesplit.errors import InputError

    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise InputError("SS-1417", "the tokenizer has no token for a sentinel", hint="Leave --sentinel out.")
