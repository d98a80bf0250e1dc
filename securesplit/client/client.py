"""One site: partitions A and C, the gate, the ledger, and a link to the server that runs B."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from securesplit.admit import ring_steps
from securesplit.client.answers import answered
from securesplit.client.generate import Generated, Piece, Prompt, Sampling, generate, generate_batch, stream
from securesplit.client.guardian import Guardian
from securesplit.client.link import Link
from securesplit.client.middle import Observer, RememberingMiddle, RemoteMiddle
from securesplit.client.replay import PATIENCE
from securesplit.client.sharing import alike_digest, frozen_digest
from securesplit.client.step import cross, forward, step
from securesplit.data.batches import Batch
from securesplit.errors import InputError
from securesplit.learning import prepare, tune
from securesplit.model.code import CutCode, refuse_other_code
from securesplit.model.coded import code_back, code_front
from securesplit.model.dropout import dropping, step_key
from securesplit.model.embedding import drift_parameters, read_drift, write_drift
from securesplit.model.lora import (
    Layout,
    Learned,
    adapter_layout,
    adapter_parameters,
    read_adapters,
    set_trainable_factor,
    write_adapters,
)
from securesplit.model.manifest import read_manifest
from securesplit.model.parts import Back, Front
from securesplit.model.plan import CutPlan
from securesplit.model.resolve import resolve_model
from securesplit.model.store import load_back, load_front, load_middle, load_tokenizer
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.gate import Gate
from securesplit.privacy.ledger import Ledger


class Client:
    """A site that trains and generates through a split model.

    What it holds: A and C, private text, keys, the ledger. What leaves it goes through ``gate``; see
    docs/threat-model.md for what that does not cover.

    Args:
        front, back: A and C, without adapters; those of the job are added here.
        tokenizer: of the model, or None when only tokens are used.
        model: digest of the model's manifest; must be the server's.
        policy: this site's own.
        link: an open session.
        ledger: this site's, or None under UnsafeNoPrivacy.
        code: the public code at the cut, when the job has one; from a file of this site's own, never from the server.
        observe: told which batch went out under which step, on this site alone.

    Raises:
        InputError: SS-1430 when the server serves another model or cut, SS-1431 when its job wants another code.
    """

    def __init__(
        self,
        front: Front,
        back: Back,
        tokenizer: object | None,
        *,
        model: str,
        policy: Policy,
        link: Link,
        ledger: Ledger | None,
        code: CutCode | None = None,
        observe: Observer | None = None,
    ) -> None:
        job = link.job
        if link.model != model:
            raise InputError(
                "SS-1430",
                "the server serves another model, or another cut of it",
                hint="Pull the same model with the same cut on both ends.",
            )
        wanted = (None, None) if job.code is None else (job.code.digest, job.code.width)
        refuse_other_code(code, digest=wanted[0], width=wanted[1], model=model)
        self.front, self.back, self.tokenizer, self.code = front, back, tokenizer, code
        self.coded_front, self.coded_back = code_front(front, code), code_back(back, code)
        self.policy, self.link, self.ledger, self.job = policy, link, ledger, job
        self.patience = PATIENCE
        for part in (front, back):
            prepare(part, job)
        self._fresh = self.snapshot()
        # The same rows through another code are another release.
        version = model if code is None else f"{model}:{code.digest}"
        if job.precision is not None and job.precision.front is not None:
            version += f":{job.precision.front}"
        if ledger is not None and link.anchor:
            ledger.check_sealed(link.anchor)
        self.gate = Gate(
            policy,
            ledger,
            version=version,
            state=self._state,
            codec=job.codec,
            roster=job.sums.roster,
            front=job.cut.front,
            ring=ring_steps(job),
            witness=link.let,
        )
        link.narrow(front.width, None if code is None else code.width)
        self.remote = RemoteMiddle(link, self.gate, observe=observe)
        self.middle: Callable[..., Tensor] = RememberingMiddle(self.remote) if self.regime == "frozen" else self.remote
        self.train(None)

    def mark(self, slot: int = 0, *, ended: bool = False) -> str:
        """Let the server keep the state of B's adapters, for a checkpoint to name.

        Args:
            slot: 0 for the best one, else 1 to the job's ``schedule.checkpoints``; another state there is let go.
            ended: that of the last secure sum's end, in place of the present one.

        Returns:
            Its name in hex; empty where B does not learn, and where the job or the server keeps none.
        """
        schedule = self.job.schedule
        if self.regime == "frozen" or not (schedule.checkpoints or (slot == 0 and schedule.keep_best)):
            return ""
        return self.link.mark(slot=slot, ended=ended).hex()

    def keep_anchor(self) -> None:
        """Let the server keep the ledger's head, sealed, so that an older image of this machine is refused later."""
        if self.ledger is not None:
            self.link.keep_anchor(self.ledger.seal())

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        plan: CutPlan,
        policy: Policy,
        link: Link,
        *,
        ledger: Ledger | None = None,
        cache: Path | None = None,
        code: CutCode | None = None,
        observe: Observer | None = None,
        watch: int = 0,
    ) -> Client:
        """Load A and C of a model and join them to a link.

        Args:
            model: an alias, a model directory, or a hub id.
            plan: the cut; must be the job's.
            policy: this site's own; the client enforces what the link's session is bound to, which is at least as strict.
            link: from :func:`securesplit.dial`.
            ledger: this site's; by default the one beside the link's keys.
            cache: where pulled models lie; by default under the home directory.
            code, observe: see :class:`Client`.
            watch: compute one of so many steps of the server's part here, from the published B, and end the run where the
                server's answers are not like it (securesplit/client/guardian.py); 0 for none. Takes B's weights and memory.

        Raises:
            InputError: SS-1430 for another model or cut than the server's, SS-1431 for another code, SS-14xx when the model
                cannot be loaded.
        """
        if (plan.front, plan.back) != (link.job.cut.front, link.job.cut.back):
            raise InputError(
                "SS-1430",
                "the server's job has another cut",
                hint=f"Use CutPlan(front={link.job.cut.front}, back={link.job.cut.back}).",
            )
        directory = resolve_model(str(model), cache or Path.home() / ".cache" / "securesplit" / "models", plan)
        policy = link.bound(policy)
        if ledger is None and not policy.unsafe and link.folder is not None:
            ledger = Ledger(link.folder.path / "ledger")
        client = cls(
            load_front(directory), load_back(directory), load_tokenizer(directory), model=read_manifest(directory).digest,
            policy=policy, link=link, ledger=ledger, code=code, observe=observe,
        )  # fmt: skip
        if watch:
            learns = client.regime != "frozen"
            published = load_middle(directory)
            if link.job.adapters.method == "prefix":  # Even a fresh one changes what B computes.
                tune(published, link.job.adapters, "middle")
            client.remote.guardian = Guardian(published, every=watch, learns=learns, code=code)
        return client

    @property
    def regime(self) -> str:
        """``frozen``, ``round`` or ``step`` by the policy; ``open`` when it protects nothing."""
        return self.policy.privacy.regime if isinstance(self.policy.privacy, Gaussian) else "open"

    @property
    def trained(self) -> tuple[Front | Back, ...]:
        """The parts on this side whose adapters learn; in regime ``frozen`` C alone, or releases would leak training."""
        return (self.back,) if self.regime == "frozen" else (self.front, self.back)

    @property
    def summed(self) -> tuple[Front | Back, ...]:
        """The parts whose adapters the secure sums carry: those that learn, without what the job leaves at each site."""
        mode = self.job.mode
        return tuple(part for part in self.trained if part.role not in mode.personal) if mode.summed else ()

    def train(self, factor: Learned | None) -> None:
        """Choose which LoRA factors learn on this side, and whether B is to learn; None for evaluation.

        A part that stays at this site learns both whenever the others learn anything: no sum asks it to stand still.
        """
        for part in (self.front, self.back):
            learned = factor if part in self.summed or factor is None else "both"
            set_trainable_factor(part, learned if part in self.trained else None)
        self.remote.learn = factor is not None and self.regime != "frozen"

    def parameters(self) -> list[torch.nn.Parameter]:
        """What an optimiser on this side may change now."""
        own = [p for _, p in drift_parameters(self.front) if p.requires_grad]  # Last: it is in no layout.
        return [*(p for part in self.trained for p in adapter_parameters(part)), *own]

    def layouts(self, factor: Learned | None = None) -> tuple[Layout, ...]:
        """The adapters that take part in the secure sums, part by part."""
        return tuple(adapter_layout(part, factor) for part in self.summed)

    def read(self, factor: Learned | None = None) -> npt.NDArray[np.float32]:
        """Values of those adapters, one vector."""
        empty = np.zeros(0, dtype=np.float32)
        return np.concatenate(
            [empty, *(read_adapters(p, layout) for p, layout in zip(self.summed, self.layouts(factor), strict=True))]
        )

    def write(self, values: npt.NDArray[np.float32], factor: Learned | None = None) -> None:
        """Set those adapters from one vector."""
        start = 0
        for part, layout in zip(self.summed, self.layouts(factor), strict=True):
            write_adapters(part, layout, values[start : start + layout.size])
            start += layout.size

    def reset(self) -> None:
        """Give every adapter on this side the value that the job started from."""
        self.install(self._fresh)

    def snapshot(self) -> tuple[npt.NDArray[np.float32], ...]:
        """Every adapter's value on this side, A's and C's, and the embedding's drift, one vector each."""
        held = (read_adapters(part, adapter_layout(part)) for part in (self.front, self.back))
        return (*held, read_drift(self.front))

    def install(self, values: tuple[npt.NDArray[np.float32], ...]) -> None:
        """Set every adapter on this side to what :meth:`snapshot` gave."""
        for part, held in zip((self.front, self.back), values[:2], strict=True):
            write_adapters(part, adapter_layout(part), held)
        write_drift(self.front, values[2])

    def _state(self) -> str:
        """SHA-256 of the adapters whose state shapes what is released; the gate asks at every release.

        In regime ``frozen`` that is A alone: C learns freely there, because nothing that it shapes is released but generated
        tokens, which are charged to all records. Elsewhere gradients come through C as well.
        """
        digest = hashlib.sha256()
        for part in (self.front,) if self.regime == "frozen" else (self.front, self.back):
            digest.update(read_adapters(part, adapter_layout(part)).tobytes())
        digest.update(read_drift(self.front).tobytes())
        return digest.hexdigest()

    def frozen_digest(self, number: int, factor: Learned) -> str:
        """SHA-256 of what must be alike at all clients before a sum, in hex; the server reads it.

        It covers round, layouts, the seed of the start, the mode of sharing and the policy, so that no two policies meet in
        one sum: each client's claim counts on what its peers may generate. Adapter values are covered only where they are
        no secret: in regime ``frozen`` what learns comes from updates without noise, and a digest of it would let the server
        test guesses; a factor that never moves from its public start is covered there too. Never a site's own B.

        Args:
            number: the round, from 0.
            factor: what the sum carries.
        """
        return frozen_digest(self, number, factor)

    def alike_digest(self, number: int, factor: Learned, heard: bytes = b"") -> bytes:
        """SHA-256, 32 bytes, over the values of all that must be equal at all clients before a sum, in every regime.

        Take it before the local work of the round: it covers the common start of what is summed, and what stands still, in
        A and C, without a site's own B under ``share-a``. In regime ``frozen`` it must stay hidden from the server, who
        could test guesses of C against it.

        Args:
            number: the round, from 0.
            factor: what the sum carries.
        """
        return alike_digest(self, number, factor, heard)

    def origin_digest(self, factor: Learned) -> bytes:
        """SHA-256 of every value that an update of this factor starts from. It stays on this site."""
        values = b"".join(values.astype("<f4").tobytes() for values in self.snapshot())
        return hashlib.sha256(f"securesplit.origin.v1|{factor}|".encode() + values).digest()

    def step(self, batch: Batch, *, at: int = 0) -> float:
        """Forward and backward of one batch; see securesplit/client/step.py. Gradients stay in the adapters.

        Args:
            batch: what to learn from.
            at: this client's number of the step in the job; with it the same step, done again, drops the same numbers.
        """
        batch, responded = answered(batch, self.gate)
        self.remote.about(batch, responded)
        with dropping(self.trained, step_key(self.job.adapters.seed, self.link.name, at)):
            return step(batch, self.coded_front, self.gate, self.middle, self.coded_back)

    def loss(self, batch: Batch) -> float:
        """The loss of one batch in nats per token, without learning. A release like any other."""
        self.remote.about(batch)
        learn, self.remote.learn = self.remote.learn, False
        with torch.no_grad():
            value = float(forward(batch, self.coded_front, self.gate, self.middle, self.coded_back))
        self.remote.learn = learn
        return value

    def evaluate(self, batches: tuple[Batch, ...]) -> float:
        """Mean loss over the predicted tokens of several batches, in nats. It stays on this site."""
        counts = [batch.scored for batch in batches]
        return sum(self.loss(batch) * count for batch, count in zip(batches, counts, strict=True)) / sum(counts)

    def accuracy(self, batches: tuple[Batch, ...]) -> float | None:
        """The share of records whose class C names, 0 to 1; None where records have no class. It stays on this site.

        A release like any other: after :meth:`evaluate` of the same records in the same state the same bytes go out again.
        """
        self.train(None)
        right = total = 0
        for batch in batches:
            if batch.classes is None:
                return None
            self.remote.about(batch)
            with torch.no_grad():
                mixed = cross(batch, self.coded_front, self.gate, self.middle)
                logits = self.coded_back(mixed, logits_to_keep=2)[:, 0]  # What follows the text, as the loss has it.
            right += int((logits[:, list(batch.choices)].argmax(1) == batch.classes).sum())
            total += len(batch.records)
        return right / total if total else None

    def generate(self, prompt: Prompt, *, max_new_tokens: int = 32, sampling: Sampling | None = None) -> Generated:
        """Continue a prompt; see securesplit/client/generate.py for what it costs."""
        return generate(self, prompt, max_new_tokens=max_new_tokens, sampling=sampling or Sampling())

    def stream(
        self, prompt: Prompt, *, max_new_tokens: int = 32, sampling: Sampling | None = None, ends: int | None = None
    ) -> Iterator[Piece]:
        """The same, text as it comes; the last piece says why it ended. ``ends``: another token that ends it."""
        return stream(self, prompt, max_new_tokens=max_new_tokens, sampling=sampling or Sampling(), ends=ends)

    def generate_batch(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 32, sampling: Sampling | None = None
    ) -> tuple[Generated, ...]:
        """Continue several prompts at once; each gets what it would get alone."""
        return generate_batch(self, prompts, max_new_tokens=max_new_tokens, sampling=sampling or Sampling())
