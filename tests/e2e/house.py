"""One tiny system for tests: a random Llama in parts, certificates, jobs, policies, and two ways to connect them.

Nothing here is an oracle; the oracles (the unsplit model, plain sums, what a spy saw) stand in the tests.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from securesplit.client.client import Client
from securesplit.client.dial import greet
from securesplit.client.link import Link
from securesplit.data.batches import Batch, encode_records, make_batches
from securesplit.journal.log import Journal
from securesplit.logged import signer_of
from securesplit.model.manifest import read_manifest
from securesplit.model.plan import CutPlan
from securesplit.model.store import load_back, load_front, load_middle, load_tokenizer
from securesplit.model.writer import write_model
from securesplit.pki.authority import Authority
from securesplit.pki.certificate import verify_signature
from securesplit.pki.store import KeyFolder
from securesplit.policy.load import parse_policy
from securesplit.policy.schema import Policy
from securesplit.privacy.ledger import Ledger
from securesplit.protocol.codec import Caps, decode
from securesplit.protocol.job import Job
from securesplit.protocol.messages import Message
from securesplit.protocol.session import Party
from securesplit.server.build import build_core
from securesplit.server.core import ServerCore
from securesplit.transport.actions import Core
from securesplit.transport.memory import MemoryServer
from securesplit.transport.pipe import Pipe
from securesplit.transport.record import Record
from securesplit.transport.server import Listen, Shell
from securesplit.transport.tls import ContextHolder

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ("alice", "bob", "carol")
WIDTH = 32
PLAN = CutPlan(front=1, back=1)
WORDS = ("<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, 64)))
ANY = Caps(message_bytes=1 << 30)

LAB = 'mechanism = "UnsafeNoPrivacy"'
_GAUSSIAN = 'mechanism = "gaussian"\nunit = "sequence"\nrelation = "replace-one"\n'
FROZEN = (
    _GAUSSIAN
    + """epsilon = 8.0
delta = 1e-5
regime = "frozen"
[privacy.activations]
clip = 4.0
share = 0.6
releases = 1
[privacy.generation]
clip = 2.0
share = 0.4
releases = 24
"""
)
SILENT = FROZEN.split("[privacy.generation]")[0]
ROUND = (
    _GAUSSIAN
    + """epsilon = 1000.0
delta = 1e-5
regime = "round"
[privacy.activations]
clip = 4.0
share = 0.4
releases = 3
[privacy.gradients]
clip = 1.0
share = 0.3
releases = 2
[privacy.updates]
clip = 0.05
share = 0.3
releases = 2
"""
)


def policy_text(privacy: str = LAB, *, blind: bool | None = None, loopback: bool = True, **limits: object) -> str:
    """A complete policy file."""
    blind = privacy != LAB if blind is None else blind
    rows = {"min_front": 0, "min_back": 0, "max_sequences": 8, "buckets": [4, 8, 16], "max_message_bytes": 1 << 20}
    return "\n".join(
        (
            'name = "tiny"',
            'purpose = "For tests on a tiny random model, and for nothing else."',
            'cost = "Nothing is learnt from a random model in a few steps."',
            "[privacy]",
            privacy,
            "[aggregation]",
            "min_clients = 3\nmin_threshold = 2\nmax_update = 1.0",
            f"blind = {json.dumps(blind)}",
            "[limits]",
            *(f"{key} = {json.dumps(value)}" for key, value in {**rows, **limits}.items()),
            "[transport]",
            f"loopback_only = {json.dumps(loopback)}",
        )
    )


def policy_of(privacy: str = LAB, **options: object) -> Policy:
    return parse_policy(policy_text(privacy, **options))


def job_text(model: Path, *, name: str = "tiny", rounds: int = 2, epochs: int = 2, blind: bool = True) -> str:
    return f"""
name = "{name}"
model = "{model}"
[cut]
front = {PLAN.front}
back = {PLAN.back}
[adapters]
rank = 2
alpha = 4.0
targets = ["q_proj", "v_proj", "down_proj"]
seed = 7
[optimiser]
client_lr = 1e-2
server_lr = 5e-3
[schedule]
rounds = {rounds}
epochs = {epochs}
batch = 4
[sums]
roster = ["alice", "bob", "carol"]
threshold = 2
min_clients = 3
clip = 1.0
blind = {json.dumps(blind)}
stage_seconds = 3.0
"""


def build_model() -> transformers.PreTrainedModel:
    """The unsplit model; equal at every call."""
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            # The usual start is so small that every token looks alike.
            parameter.data = parameter.data * (8 if parameter.ndim == 2 else 1)
    return model


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def sentences(count: int, *, seed: int, longest: int = 14) -> tuple[str, ...]:
    """Distinct random texts of 5 to ``longest`` words."""
    generator = torch.Generator().manual_seed(seed)
    out: list[str] = []
    while len(out) < count:
        length = int(torch.randint(5, longest + 1, (1,), generator=generator))
        ids = torch.randint(3, len(WORDS), (length,), generator=generator).tolist()
        text = " ".join(WORDS[i] for i in ids)
        if text not in out:
            out.append(text)
    return tuple(out)


@dataclass(frozen=True)
class House:
    """Keys of one authority and one model directory."""

    root: Path
    keys: Path
    model: Path

    @property
    def digest(self) -> str:
        return read_manifest(self.model).digest

    def job(self, **options: object) -> Job:
        return Job.model_validate(tomllib.loads(job_text(self.model, **options)))

    def core(self, job: Job, policy: Policy, **options: object) -> ServerCore:
        return build_core(job, policy, load_middle(self.model), self.digest, **options)

    def folder(self, name: str) -> KeyFolder:
        return KeyFolder.open(self.keys / name, "server" if name == "gpu" else "client")

    def parties(self, name: str) -> tuple[Party, Party]:
        """Both ends of one connection, as TLS would have left them: the client's, the server's."""
        client, server = self.folder(name), self.folder("gpu")
        return (
            Party(client.cert_der, server.cert_der, client.sign, verify_signature),
            Party(server.cert_der, client.cert_der, server.sign, verify_signature),
        )

    def link(self, server: MemoryServer, policy: Policy, name: str = "alice") -> tuple[Link, SpyPipe]:
        mine, theirs = self.parties(name)
        spy = SpyPipe(server.connect(name, theirs))
        return greet(spy, mine, policy, name=name, server="gpu"), spy

    def client(self, link: Link, policy: Policy, ledger: Ledger | None = None) -> Client:
        return Client(
            load_front(self.model), load_back(self.model), load_tokenizer(self.model), model=self.digest, policy=policy,
            link=link, ledger=ledger,
        )  # fmt: skip

    def joined(
        self, job: Job, policy: Policy, *, name: str = "alice", ledger: Ledger | None = None
    ) -> tuple[Client, SpyPipe, ServerCore]:
        """One client and its server in memory."""
        core = self.core(job, policy)
        link, spy = self.link(MemoryServer(core), policy, name)
        return self.client(link, policy, ledger), spy, core

    def data(self, name: str, count: int, *, seed: int) -> Path:
        path = self.root / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(count, seed=seed)))
        return path


def batches_of(client: Client, texts: Sequence[str], *, size: int = 4) -> tuple[Batch, ...]:
    identify = client.ledger.key if client.ledger is not None else lambda content: content.hex()
    rows = encode_records(texts, client.tokenizer, 16, identify)
    return make_batches(rows, buckets=client.policy.limits.buckets, size=size, padding=0, seed=3)


class SpyPipe:
    """Passes everything on and keeps it: all bytes that left or reached the client."""

    def __init__(self, inner: Pipe) -> None:
        self.inner = inner
        self.sent: list[bytes] = []
        self.received: list[bytes] = []
        self.tls_version = getattr(inner, "tls_version", "memory")

    def send(self, data: bytes) -> None:
        self.sent.append(data)
        self.inner.send(data)

    def receive(self, timeout: float | None = None) -> bytes:
        self.received.append(self.inner.receive(timeout))
        return self.received[-1]

    def close(self) -> None:
        self.inner.close()

    def messages(self, kind: type[Message] = Message) -> list[Message]:
        return [m for m in (decode(data, ANY) for data in self.sent) if isinstance(m, kind)]


class Loopback:
    """A core behind the real TLS shell, in a thread."""

    def __init__(
        self, core: Core, keys: Path, *, max_message: int = 1 << 20, journal: Journal | None = None, **limits: object
    ) -> None:
        self.core = core
        listen = Listen("127.0.0.1", 0, max_message, **limits)
        self.shell = Shell(core, ContextHolder(keys / "gpu"), listen, Record(journal, signer_of))
        self.port = 0
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"wss://localhost:{self.port}"

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(20)
        if self._failed is not None:
            raise self._failed
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()
        if self._failed is not None:
            raise self._failed

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001 (handed to the test's thread)
            self._failed = error
        self._ready.set()

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()

        def ready(port: int) -> None:
            self.port = port
            self._ready.set()

        await self.shell.run(self._stop, ready)


def build_house(root: Path, *clients: str) -> House:
    torch.set_num_threads(1)
    keys, model = root / "keys", root / "model"
    authority = Authority.create(keys)
    authority.issue("gpu", "server")
    for name in (*CLIENTS, *clients):
        authority.issue(name, "client")
    write_model(build_model(), PLAN, model, tokenizer=build_tokenizer())
    return House(root, keys, model)


class Program:
    """One `securesplit` process, as a user starts it; its output lies in files, so that no pipe can fill up."""

    def __init__(self, folder: Path, label: str, *argv: object, python: str | None = None) -> None:
        self.out, self.err = folder / f"{label}.out", folder / f"{label}.err"
        start = [sys.executable, "-c", python] if python else [sys.executable, "-m", "securesplit"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [*start, *map(str, argv)], stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment, cwd=folder
            )

    def wait(self, seconds: float = 90) -> int:
        """The exit code."""
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """Ask it to end, as an operator does."""
        self.process.terminate()
        return self.wait(30)

    @property
    def said(self) -> dict[str, object]:
        """The one JSON object on stdout."""
        return json.loads(self.out.read_text())

    @property
    def complaint(self) -> str:
        return self.err.read_text()


def start_server(house: House, job: str, policy: str, *options: object, label: str = "server") -> tuple[Program, str]:
    """`securesplit serve` in a process, and the address it listens on."""
    (house.root / f"{label}.job.toml").write_text(job)
    (house.root / f"{label}.policy.toml").write_text(policy)
    server = Program(
        house.root, label, "-v", "serve", "--job", f"{label}.job.toml", "--policy", f"{label}.policy.toml", "--keys",
        house.keys / "gpu", "--listen", "127.0.0.1:0", "--threads", 1, "--output", "json", *options,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not server.out.read_text().endswith("\n"):
        assert server.process.poll() is None, server.complaint
        assert time.monotonic() < deadline, server.complaint
        time.sleep(0.05)
    return server, f"wss://localhost:{server.said['port']}"


def train_argv(house: House, name: str, url: str, policy: Path, *options: object) -> tuple[object, ...]:
    return (
        "train", "--policy", policy, "--keys", house.keys / name, "--server", url, "--data", house.root / f"{name}.jsonl",
        "--out", house.root / name, "--held-out", 2, "--max-tokens", 16, "--threads", 1, "--progress", "none",
        "--output", "json", *options,
    )  # fmt: skip
