"""A toy classification for tests: the first word of a record decides its class, and texts of two lengths follow it.

Nothing here is an oracle.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from securesplit.client.client import Client
from securesplit.client.records import job_batches
from securesplit.data.batches import Batch
from securesplit.data.corpus import Record
from securesplit.protocol.job import Job, Task
from tests.e2e.house import ROUND, WORDS, House

NAMES = ("w60", "w61")
FIRST = ("w10", "w20")
LABELS = "[privacy.labels]\nclasses = 2\nshare = {share}\n"


def labels_policy(regime: str, *, activations: int, updates: int, share: float = 0.02, size: float = 0.9) -> str:
    """A policy with answered labels; releases of a record at the cut and into sums."""
    head, _, rest = ROUND.partition("[privacy.gradients]")
    rest = "[privacy.updates]" + rest.partition("[privacy.updates]")[2]
    head = (
        head.replace('"round"', f'"{regime}"')
        .replace("share = 0.4", f"share = {size}")
        .replace("= 3\n", f"= {activations}\n")
    )
    rest = rest.replace("share = 0.3", f"share = {1 - size - share:.4f}").replace("= 2\n", f"= {updates}\n")
    return head + LABELS.format(share=share) + rest


def records(count: int, *, seed: int, longest: int = 3) -> tuple[Record, ...]:
    """Records of 2 to ``longest`` words, with their label; classes in turns."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Record] = {}
    while len(out) < count:
        label = len(out) % 2
        length = int(torch.randint(1, longest, (1,), generator=generator))
        ids = torch.randint(30, len(WORDS) - 4, (length,), generator=generator).tolist()
        text = " ".join((FIRST[label], *(WORDS[i] for i in ids)))
        out.setdefault(text, Record(text, label=NAMES[label]))
    return tuple(out.values())


def with_task(job: Job, names: tuple[str, ...] = NAMES, **schedule: int) -> Job:
    """The same job as a classification."""
    return job.model_copy(update={"task": Task(labels=names), "schedule": job.schedule.model_copy(update=schedule)})


def batches(
    client: Client, found: tuple[Record, ...], held_out: int = 1
) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
    """As ``run_training`` makes them."""
    identify = client.ledger.key if client.ledger is not None else lambda content: content.hex()
    return job_batches(found, client.policy, client.job, client.tokenizer, identify, held_out=held_out, max_tokens=None)


@dataclass(frozen=True)
class Ward(House):
    """A house whose clients have records with a class."""

    def data(self, name: str, count: int, *, seed: int) -> Path:
        path = self.root / name
        lines = [{"text": r.text, "label": r.label} for r in records(count, seed=seed)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path
