"""One mode's run as a user makes it: `securesplit serve`, and `securesplit train` for every client, each its own process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from securesplit.pki.authority import Authority

__all__ = ["MODES", "OPEN_POLICY", "Site", "Sizes", "compare", "prepare", "run_mode"]

MODES = {
    "splitfed-v2": 'mode = "splitfed-v2"\norder = "roster"',
    "splitfed-v1": 'mode = "splitfed-v1"',
    "splitfed-v3": 'mode = "splitfed-v3"\nevery = 2',
    "sequential": 'mode = "sequential"',
    "client-batch": 'mode = "client-batch"',
    "hierarchical": 'mode = "hierarchical"\nevery = 2\ngroups = [["c0", "c1"], ["c2", "c3"]]',
    "personal-back": 'mode = "splitfed-v2"\norder = "roster"\npersonal = ["back"]',
}
OPEN_POLICY = """name = "bench"
purpose = "Nothing is protected: for measuring on public text, and for nothing else."
cost = "Everything that crosses the cut can be read."
[privacy]
mechanism = "UnsafeNoPrivacy"
[aggregation]
min_clients = 3
min_threshold = 2
max_update = 1.0
blind = true
[limits]
min_front = 0
min_back = 0
max_sequences = 16
buckets = [{tokens}]
max_message_bytes = 16777216
[transport]
loopback_only = true
"""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the measurement: ``records`` are those that each client trains on, ``held_out`` those it keeps."""

    clients: int
    records: int
    held_out: int
    rounds: int
    epochs: int
    batch: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Site:
    """Files of one measurement."""

    folder: Path
    model: str
    sizes: Sizes

    @property
    def names(self) -> tuple[str, ...]:
        """Of the clients."""
        return tuple(f"c{i}" for i in range(self.sizes.clients))

    def job(self, mode: str) -> str:
        """The job file of one mode."""
        # Whoever learns alone in a round does so in one round of as many, so that all modes see equally many samples.
        rounds = self.sizes.rounds * (self.sizes.clients if mode == "sequential" else 1)
        return f"""name = "bench"
model = "{self.model}"
[cut]
front = 2
back = 2
[adapters]
rank = 8
alpha = 16.0
targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
seed = 7
[optimiser]
client_lr = 1e-3
server_lr = 5e-4
[schedule]
rounds = {rounds}
epochs = {self.sizes.epochs}
batch = {self.sizes.batch}
[sums]
roster = {json.dumps(self.names)}
threshold = {len(self.names) // 2 + 1}
min_clients = 3
clip = 1.0
blind = true
weights = "uniform"
stage_seconds = 600.0
[training]
straggler_seconds = 600.0
{MODES[mode]}
"""


def prepare(folder: Path, data: Path, model: str, sizes: Sizes) -> Site:
    """Keys, policy, and a file of texts for each client; what exists stays."""
    site = Site(folder, model, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "policy.toml").write_text(OPEN_POLICY.format(tokens=sizes.tokens), encoding="utf-8")
    if not (folder / "keys").exists():
        authority = Authority.create(folder / "keys")
        authority.issue("gpu", "server")
        for name in site.names:
            authority.issue(name, "client")
    texts = [_text(line) for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    each = sizes.records + sizes.held_out
    for number, name in enumerate(site.names):
        # Neighbours in such files come from one source: dealt out in turns, clients hold like texts.
        mine = texts[number :: len(site.names)][:each]
        if len(mine) < each:
            sys.exit(f"{data} has too few texts for {len(site.names)} clients with {each} each")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in mine), encoding="utf-8")
    return site


def _text(line: str) -> str:
    raw = json.loads(line)
    return str(raw["passage"]["text"] if "passage" in raw else raw["text"])


def run_mode(site: Site, mode: str) -> None:
    """Serve and train; skipped when its records are there."""
    out = site.folder / mode
    if all((out / name / "run.json").is_file() for name in site.names):
        return
    out.mkdir(exist_ok=True)
    (out / "job.toml").write_text(site.job(mode), encoding="utf-8")
    cli = [sys.executable, "-m", "securesplit"]
    policy, keys = str(site.folder / "policy.toml"), site.folder / "keys"
    began = time.monotonic()
    with (out / "server.out").open("w+") as said, (out / "server.err").open("w") as complaint:
        server = subprocess.Popen(  # ourselves
            [*cli, "serve", "--job", str(out / "job.toml"), "--policy", policy, "--keys", str(keys / "gpu"), "--listen",
             "127.0.0.1:0", "--threads", "2", "--output", "json"], stdout=said, stderr=complaint,
        )  # fmt: skip
        try:
            url = f"wss://localhost:{_port(server, out / 'server.out')}"
            clients = [
                subprocess.Popen(  # ourselves
                    [*cli, "train", "--policy", policy, "--keys", str(keys / name), "--server", url, "--data",
                     str(site.folder / f"{name}.jsonl"), "--out", str(out / name), "--held-out", str(site.sizes.held_out),
                     "--threads", "1", "--progress", "none", "--output", "json"],
                    stdout=subprocess.DEVNULL, stderr=(out / f"{name}.err").open("w"),
                )
                for name in site.names
            ]  # fmt: skip
            ended = [client.wait() for client in clients]
            if any(ended):
                sys.exit(f"{mode}: a client failed; see {out}")
        finally:
            server.terminate()
            server.wait()
    print(f"{mode}: {time.monotonic() - began:.0f} s", file=sys.stderr)


def _port(server: subprocess.Popen[bytes], said: Path) -> int:
    while server.poll() is None:
        if (text := said.read_text(encoding="utf-8")).endswith("\n"):
            return int(json.loads(text)["port"])
        time.sleep(0.1)
    sys.exit("the server did not start")


def compare(site: Site, modes: list[str]) -> object:
    """The table of `securesplit baseline`, which trains the unsplit model on the same batches."""
    argv = [sys.executable, "-m", "securesplit", "baseline", "--job", str(site.folder / "splitfed-v2" / "job.toml")]
    argv += ["--policy", str(site.folder / "policy.toml"), "--held-out", str(site.sizes.held_out)]
    for name in site.names:
        argv += ["--data", str(site.folder / f"{name}.jsonl")]
    for mode in modes:
        argv += ["--run", f"{mode}=" + ",".join(str(site.folder / mode / name) for name in site.names)]
    argv += ["--out", str(site.folder / "compared"), "--overwrite", "--output", "json"]
    found = subprocess.run(argv, check=True, capture_output=True, text=True)  # ourselves
    return json.loads(found.stdout)
