"""The attack process: ``python -m attacks.worker``, a task on stdin, events on stdout.

It is a process of its own so that the truth is nowhere in its memory; and by attacks/guard.py it cannot read the truth
from the disk either.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TextIO

from attacks.config import config
from attacks.exchange import Failed, Known, Progress, Recovered, Task
from attacks.guard import guard
from securesplit.errors import InputError, SecureSplitError


def perform(task: Task, send: TextIO) -> None:
    """Carry out a task; every event is one line.

    Raises:
        SecureSplitError: of any kind, for the parent to show.
    """
    import torch

    from attacks.prior import prior_from
    from attacks.suite import fitting, learn, run
    from attacks.view import PublicModel, public_facts, read_view
    from securesplit.data.corpus import read_corpus
    from securesplit.model.code import read_code
    from securesplit.model.coded import code_front
    from securesplit.model.manifest import read_manifest
    from securesplit.model.store import load_front, load_tokenizer
    from securesplit.protocol.transcript import Transcript

    def say(event: Progress | Known | Recovered) -> None:
        send.write(event.model_dump_json() + "\n")
        send.flush()

    # Small matrices gain little from many threads, and lose much to their waiting when the cores are shared.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    settings = config()
    profile, search = settings.profiles[task.profile], settings.search
    transcript, directory = Transcript.load(task.transcript), Path(task.model)
    if public_facts(transcript).model != read_manifest(directory).digest:
        raise InputError(
            "SS-1706",
            "the recording was made with another model than the one given",
            hint="Give the model, with the same cut, that the server's job names.",
        )
    view = read_view(transcript, task.keys)
    names = fitting(view, task.attacks)
    front, tokenizer = load_front(directory), load_tokenizer(directory)
    coded = Path(task.transcript) / "code.safetensors"
    code = read_code(coded) if coded.is_file() else None
    embedding = front.base.get_input_embeddings().weight.detach()
    texts = [record.text for record in read_corpus(Path(task.aux))] if task.aux else []
    model = PublicModel(front=code_front(front, code), embedding=embedding)
    say(Progress(attack="public text", done=0, total=1))
    with torch.inference_mode():
        prior = prior_from(texts, lambda text: tokenizer.encode(text, truncation=True, max_length=1024), len(embedding))
        say(Known(common=tuple(prior.favourites[:100].tolist()), positional=prior.positional, informed=prior.informed))
        known = learn(model, prior, view, profile, search)
    say(Progress(attack="public text", done=1, total=1))
    for name in names:
        say(run(name, view, known, say))


def main() -> int:
    """Read the task, guard, perform, report."""
    task = Task.model_validate_json(sys.stdin.readline())
    guard(Path(task.transcript))
    # Nothing but events may reach the parent: libraries that print write to stderr from here on.
    send, sys.stdout = sys.stdout, sys.stderr
    try:
        perform(task, send)
    except SecureSplitError as error:
        failed = Failed(
            error=type(error).__name__, code=error.code, what=error.what, hint=error.hint, details=error.details
        )
        send.write(failed.model_dump_json() + "\n")
        send.flush()
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
