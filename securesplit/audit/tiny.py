"""A whole tiny client: a random Llama in parts, made-up records, the product's own training loop and generation.

The model is public and random, and nothing is learnt; what matters is which bytes leave. Its randomness comes from a fixed
seed in a generator of its own; noise does not.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from securesplit.aggregate.answered import AnswerLog
from securesplit.audit.cohort import MODEL, Cohort, job_for
from securesplit.client.client import Client
from securesplit.client.train import Trainer
from securesplit.data.batches import Batch
from securesplit.model.lora import Learned
from securesplit.model.plan import CutPlan
from securesplit.model.split import Split, split_model
from securesplit.policy.schema import Channel, Gaussian, Policy
from securesplit.privacy.ledger import Ledger
from securesplit.privacy.released import Codec
from securesplit.server.build import build_core

_VOCABULARY, _WIDTH = 64, 32
_FILL = 0
_HELD_OUT = 2


def trainable(policy: Policy) -> Policy:
    """The policy with as many releases as a whole tiny run makes, of the same shares; itself where it has them.

    A run that the budget stops shows nothing of how C and A learn. With more releases each is noised more, and nothing else
    changes.
    """
    privacy = policy.privacy
    assert isinstance(privacy, Gaussian)
    user, clients = privacy.unit == "user", len(job_for(policy).sums.roster)
    wanted = {
        # A user's three records and, because nobody says whose a prompt is, the prompt.
        "activations": 4 if user else 1 if privacy.regime == "frozen" else 2,
        "gradients": 3 if user else 1,
        "updates": 2 if user else 1,
        "generation": clients,  # Each client of a roster has its part.
    }
    changed: dict[str, object] = {}
    for name, releases in wanted.items():
        channel: Channel | None = getattr(privacy, name)
        if channel is not None and channel.releases < releases:
            changed[name] = channel.model_copy(update={"releases": releases})
    return policy.model_copy(update={"privacy": privacy.model_copy(update=changed)}) if changed else policy


class Letters:
    """A tokenizer of one token a letter."""

    pad_token_id = _FILL
    eos_token_id = 1

    def encode(self, text: str, **_: object) -> list[int]:
        """Ids of the letters."""
        return [2 + ord(letter) % (_VOCABULARY - 2) for letter in text]

    def decode(self, ids: list[int], **_: object) -> str:
        """Some letters."""
        return "".join(chr(96 + i) for i in ids)


class TinySite:
    """A client of a tiny model with its server and peers, all in memory.

    Args:
        policy: the site's own.
        folder: for keys and the ledger; empty or new.
        codec: of the wire.

    Attributes:
        client: as in production.
        cohort: the wire, with its tap.
        ledger: the site's.
        answers: which sums were answered.
        training, held_out: made-up records; under unit ``user`` three of those trained on are one user's, in two batches.
    """

    def __init__(self, policy: Policy, folder: Path, *, codec: Codec = "f32") -> None:
        job = job_for(policy, codec=codec)
        self.policy, self.job = policy, job
        self.cohort = Cohort(folder, policy, job, build_core(job, policy, self._parts().middle, MODEL))
        self.cohort.invite()
        self.answers = AnswerLog(folder / "answered.log")
        self.ledger = self.cohort.ledger()
        self.client = self._client(self.ledger)
        self.training = tuple(self._batch(i) for i in range(_HELD_OUT))
        self.held_out = (self._batch(_HELD_OUT),)

    def close(self) -> None:
        """Close the files."""
        self.ledger.close()
        self.answers.close()

    def restart(self) -> None:
        """What a new process of the site does: the ledger is opened again, A and C start where the job started."""
        self.ledger.close()
        self.ledger = self.cohort.ledger()
        self.cohort.rejoin()
        self.client = self._client(self.ledger)

    def train(self) -> None:
        """The product's training loop: evaluation, local work, a secure sum, evaluation."""
        Trainer(self.client, self.training, self.held_out, answers=self.answers, progress=lambda *_: None).run()

    def _client(self, ledger: Ledger) -> Client:
        parts = self._parts()
        made = _Leading(
            parts.front, parts.back, Letters(), model=MODEL, policy=self.policy, link=self.cohort.link, ledger=ledger
        )
        made.cohort = self.cohort
        return made

    def _parts(self) -> Split:
        cut = CutPlan(front=self.job.cut.front, back=self.job.cut.back)
        config: Any = transformers.LlamaConfig(
            vocab_size=_VOCABULARY, hidden_size=_WIDTH, intermediate_size=48, num_hidden_layers=cut.front + 1 + cut.back,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2 * max(self.policy.limits.buckets) + 64,
            pad_token_id=_FILL, bos_token_id=None, eos_token_id=1, tie_word_embeddings=False,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return split_model(transformers.AutoModelForCausalLM.from_config(config).eval(), cut)

    def _batch(self, number: int) -> Batch:
        bucket, rows = self.policy.limits.buckets[0], self.job.schedule.batch
        real = max(2, bucket - 2) if bucket > 2 else bucket
        generator = torch.Generator().manual_seed(number)
        tokens = torch.full((rows, bucket), _FILL)
        tokens[:, :real] = torch.randint(2, _VOCABULARY, (rows, real), generator=generator)
        labels = torch.where(torch.arange(bucket) < real, tokens, torch.tensor(-100))
        names = [self.ledger.key(bytes(row.tolist())) for row in tokens]
        keys, privacy = list(names), self.policy.privacy
        if isinstance(privacy, Gaussian) and privacy.unit == "user" and number < _HELD_OUT:
            mine = slice(None) if number == 0 else slice(1)
            keys[mine] = [self.ledger.key(b"a user")] * len(keys[mine])
        batch = Batch(
            tokens=tokens, labels=labels, lengths=(real,) * rows, bucket=bucket, records=tuple(keys),
            sources=tuple(range(rows)), contents=tuple(hashlib.sha256(k.encode()).hexdigest() for k in names),
        )  # fmt: skip
        if self.job.task is None:
            return batch
        classes, choices = len(self.job.task.labels), torch.arange(len(self.job.task.labels)) % _VOCABULARY
        named = replace(batch, choices=tuple(choices.tolist()), labelled=batch.contents)
        return named.with_classes(torch.randint(classes, (rows,), generator=generator))


class _Leading(Client):
    """A client whose peers have no model and say of what all hold alike whatever it says."""

    cohort: Cohort

    def alike_digest(self, number: int, factor: Learned, heard: bytes = b"") -> bytes:
        """See :class:`Client`."""
        self.cohort.alike = super().alike_digest(number, factor, heard)
        return self.cohort.alike
