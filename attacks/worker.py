"""The attack process: ``python -m attacks.worker``, a task on stdin, events on stdout.

It is a process of its own so that the truth is nowhere in its memory; and by attacks/guard.py it cannot read the truth
from the disk either.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import numpy.typing as npt

from attacks.config import config
from attacks.exchange import Answer, Examined, Failed, Known, Progress, Skipped, Task
from attacks.guard import guard
from securesplit.errors import InputError, SecureSplitError

if TYPE_CHECKING:
    from attacks.knowledge import Knowledge
    from attacks.view import ServerView


def perform(task: Task, send: TextIO) -> None:
    """Carry out a task; every event is one line.

    Raises:
        SecureSplitError: of any kind, for the parent to show.
    """
    import torch

    from attacks.forensics import examine
    from attacks.knowledge import Pair, learn
    from attacks.prior import prior_from
    from attacks.public import public_model, written_by
    from attacks.suite import Given, fitting, run
    from securesplit.data.corpus import read_corpus
    from securesplit.model.store import load_tokenizer

    def say(event: Progress | Known | Skipped | Examined | Answer) -> None:
        send.write(event.model_dump_json() + "\n")
        send.flush()

    # Small matrices gain little from many threads, and lose much to their waiting when the cores are shared.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    profile, place, directory = config().profiles[task.profile], Path(task.transcript), Path(task.model)
    view = _view(task)
    tokenizer = load_tokenizer(directory)
    model = public_model(
        directory, place, tokenizer, adapter=task.adapter, threat=task.threat, row_clip=view.noise.row_clip
    )
    assert model.encode is not None
    public = read_corpus(Path(task.aux)) if task.aux else ()
    records = [record for record in public[: 50 if task.threat.text == "fifty" else None] if model.encode(record.text)]
    names = sorted({record.label for record in records if record.label is not None})
    given = Given(candidates=bool(task.candidates), labels=len(names) > 1)
    chosen, skipped = fitting(view, task.attacks, task.threat, profile, given)
    say(Progress(attack="public text", done=0, total=1))
    prior = prior_from([record.text for record in records], model.encode, len(model.embedding))
    frequent = tuple(prior.favourites[:5000].tolist())
    longest = max((len(seen.rows) for seen in view.sightings), default=0)
    say(
        Known(
            common=frequent[:100], frequent=frequent, positional=prior.positional, written=written_by(model, longest),
            informed=prior.informed, releases=max((seen.releases for seen in view.sightings), default=1),
        )
    )  # fmt: skip
    known = learn(
        model, prior, view, profile, task.threat, colluder=[Pair(told.key, told.tokens) for told in task.pairs],
        seed=task.seed, candidates=task.candidates,
        attributes=[-1 if record.label is None else names.index(record.label) for record in records] if names else (),
    )  # fmt: skip
    say(Progress(attack="public text", done=1, total=1))
    for left_out in skipped:
        say(left_out)
    for found in examine(view, _mean_state(known)):
        say(Examined(name=found.name, statistic=found.statistic, threshold=found.threshold, passed=found.passed))
    for attack in chosen:
        repeats = profile.seeds if config().attacks[attack.name].random else 1
        for seed in range(task.seed, task.seed + repeats):
            say(run(attack, view, known.reseeded(seed), say))


def _view(task: Task) -> ServerView:
    """What the recording shows.

    Raises:
        InputError: SS-1706 when it was made with another model; SS-1301, SS-1707, SS-1708, SS-1720 when it cannot be read.
    """
    from attacks.sums import read_sums
    from attacks.view import public_facts, read_view
    from securesplit.model.manifest import read_manifest
    from securesplit.protocol.transcript import Transcript

    transcript = Transcript.load(task.transcript)
    transcript.require_whole()
    facts = public_facts(transcript)
    if facts.model != read_manifest(Path(task.model)).digest:
        raise InputError(
            "SS-1706",
            "the recording was made with another model than the one given",
            hint="Give the model, with the same cut, that the server's job names.",
        )
    view = read_view(transcript, task.keys, most=task.threat.releases)
    return replace(view, trained=task.adapter is not None, sums=read_sums(Path(task.transcript), facts))


def _mean_state(known: Knowledge) -> npt.NDArray[np.float64]:
    """(T, D), the mean of public sequences' states: the direction in which a missing clip shows."""
    import torch

    with torch.inference_mode():
        return np.asarray(known.model.front(known.public[:64]).double().mean(0).numpy())


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
