"""Tokens a second of sessions that generate at once, beside the unsplit model on the same machine in turns.

The server is a process of its own, `securesplit serve`, reached over mTLS on loopback; the sessions are threads of this one,
each with a connection, a certificate and an A and C of its own. Nothing is protected: noise changes what is said, not how
fast, except for its own cost, which `scripts/bench` measures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Barrier

import torch

from scripts.modes.cells import OPEN_POLICY
from securesplit.client.client import Client
from securesplit.client.run import open_client
from securesplit.pki.authority import Authority
from securesplit.policy.load import load_policy

__all__ = ["Figures", "Site", "Unsplit", "measure", "prepare"]

_JOB = """name = "bench"
model = "{model}"
[cut]
front = {front}
back = {back}
[adapters]
rank = 2
alpha = 4.0
targets = []
seed = 7
[optimiser]
client_lr = 1e-3
server_lr = 5e-4
[schedule]
rounds = 1
epochs = 1
batch = 1
[sums]
roster = ["c0", "c1", "c2"]
threshold = 2
min_clients = 3
clip = 1.0
blind = true
"""


@dataclass(frozen=True, slots=True)
class Site:
    """Files of one measurement; ``sessions`` certificates of guests."""

    folder: Path
    model: str
    sessions: int

    def keys(self, number: int) -> Path:
        """Of one session."""
        return self.folder / "keys" / f"g{number}"


@dataclass(frozen=True, slots=True)
class Figures:
    """One cell of the table.

    Attributes:
        what: who computed.
        texts: that were generated at once.
        tokens_per_second: of all texts together; the median of the rounds.
        least, most: of the rounds.
    """

    what: str
    texts: int
    tokens_per_second: float
    least: float
    most: float


class Unsplit:
    """The whole model in one process, as `transformers` generates: greedy, with its own cache."""

    def __init__(self, model: torch.nn.Module, tokenizer: object) -> None:
        self._model, self._tokenizer = model, tokenizer

    def tokens(self, prompts: list[str], count: int) -> list[list[int]]:
        """``count`` tokens for each prompt; all prompts have to be equally long."""
        rows = torch.tensor([self._tokenizer.encode(prompt) for prompt in prompts])  # type: ignore[attr-defined]
        with torch.no_grad():
            made = self._model.generate(  # type: ignore[operator]
                rows, attention_mask=torch.ones_like(rows), max_new_tokens=count, do_sample=False, eos_token_id=None
            )
        return [row[rows.shape[1] :].tolist() for row in made]


def prepare(folder: Path, model: str, sessions: int, *, front: int = 2, back: int = 2) -> Site:
    """Keys, policy, job and the server's limits; keys that exist stay."""
    folder.mkdir(parents=True, exist_ok=True)
    site = Site(folder, model, sessions)
    (folder / "policy.toml").write_text(OPEN_POLICY.format(tokens=512), encoding="utf-8")
    (folder / "job.toml").write_text(_JOB.format(model=model, front=front, back=back), encoding="utf-8")
    guests = [f"g{number}" for number in range(sessions)]
    (folder / "limits.toml").write_text(f"guests = {json.dumps(guests)}\n", encoding="utf-8")
    if not (folder / "keys").exists():
        authority = Authority.create(folder / "keys")
        authority.issue("gpu", "server")
    for guest in guests:
        if not (folder / "keys" / guest).exists():
            Authority.open(folder / "keys").issue(guest, "client")
    return site


@contextmanager
def _served(site: Site) -> Iterator[str]:
    command = [
        sys.executable, "-m", "securesplit", "serve", "--job", str(site.folder / "job.toml"), "--policy",
        str(site.folder / "policy.toml"), "--keys", str(site.folder / "keys" / "gpu"), "--listen", "127.0.0.1:0", "--limits",
        str(site.folder / "limits.toml"), "--threads", "1", "--output", "json",
    ]  # fmt: skip
    said = site.folder / "server.out"
    with said.open("w") as out, (site.folder / "server.err").open("w") as complaint:
        server = subprocess.Popen(command, stdout=out, stderr=complaint)  # ourselves
        try:
            while not (text := said.read_text(encoding="utf-8")).endswith("\n"):
                if server.poll() is not None:
                    sys.exit(f"the server did not start; see {site.folder / 'server.err'}")
                time.sleep(0.1)
            yield f"wss://localhost:{json.loads(text)['port']}"
        finally:
            server.terminate()
            server.wait()


def measure(
    site: Site, unsplit: Unsplit, prompts: list[str], *, at_once: tuple[int, ...], tokens: int, rounds: int
) -> tuple[Figures, ...]:
    """All cells, in turns, so that somebody else's work falls on all of them.

    Every text of a session is compared with the unsplit model's.

    Args:
        site: of :func:`prepare`.
        unsplit: the model, whole.
        prompts: one for each session, of equally many tokens.
        at_once: numbers of sessions.
        tokens: new ones of each text.
        rounds: repetitions.

    Raises:
        AssertionError: when a session's text is another than the unsplit model's.
    """
    policy = load_policy(site.folder / "policy.toml")
    wanted = [unsplit.tokens([prompt], tokens)[0] for prompt in prompts]
    taken: dict[tuple[str, int], list[float]] = {}
    with _served(site) as url, ExitStack() as opened, ThreadPoolExecutor(max(at_once)) as pool:
        clients = [
            opened.enter_context(open_client(policy, site.keys(number), url, model=site.model))
            for number in range(max(at_once))
        ]
        for client in clients:
            client.tokenizer.eos_token = None

        def all_of(count: int) -> None:
            barrier = Barrier(count)

            def one(number: int) -> list[int]:
                barrier.wait(60)
                return list(clients[number].generate(prompts[number], max_new_tokens=tokens).tokens)

            found = [job.result() for job in [pool.submit(one, number) for number in range(count)]]
            assert found == wanted[:count], "a session's text is not the unsplit model's"

        def batch(client: Client, count: int) -> None:
            client.generate_batch(prompts[:count], max_new_tokens=tokens)

        cells: list[tuple[str, int, Callable[[], object]]] = []
        for count in at_once:
            cells.append(("unsplit, one batch", count, lambda n=count: unsplit.tokens(prompts[:n], tokens)))  # type: ignore[misc]
            cells.append(("split, one session each", count, lambda n=count: all_of(n)))  # type: ignore[misc]
            if count > 1:
                cells.append(("split, one batch", count, lambda n=count: batch(clients[0], n)))  # type: ignore[misc]
        for number in range(rounds + 1):
            for what, count, run in cells:
                start = time.perf_counter()
                run()
                if number:  # The first round warms up.
                    taken.setdefault((what, count), []).append(count * tokens / (time.perf_counter() - start))
    return tuple(Figures(what, n, median(rates), min(rates), max(rates)) for (what, n), rates in taken.items())
