"""What the demo needs before any process starts: certificates, text for each party, jobs, policies; all in one folder."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from securesplit.data.corpus import Record, read_corpus
from securesplit.data.notes import ward_notes
from securesplit.errors import InputError
from securesplit.pki.authority import Authority
from securesplit.policy.load import load_policy
from securesplit.policy.schema import Policy

CLIENTS = ("alice", "bob", "carol")
TRAIN, HELD_OUT, PUBLIC = 12, 4, 240
MAX_TOKENS = 48
_SEED = 20260101


@dataclass(frozen=True, slots=True)
class Scene:
    """A prepared folder.

    Attributes:
        directory: everything lies in here.
        policy, lab: the protecting and the unprotecting policy file.
        rules: the protecting policy, loaded.
        public: text that the attacker may have; no client has it.
        prompt: the beginning of a text that nobody trains on.
        synthetic: whether the text is made up.
    """

    directory: Path
    policy: Path
    lab: Path
    rules: Policy
    public: Path
    prompt: str
    synthetic: bool

    def data(self, client: str) -> Path:
        """A client's private text."""
        return self.directory / "data" / f"{client}.jsonl"

    def job(self, run: str) -> Path:
        """The job file of ``unprotected`` or ``protected``."""
        return self.directory / f"job-{run}.toml"

    def keys(self, name: str) -> Path:
        """A party's key folder."""
        return self.directory / "keys" / name


def prepare(out: Path | None, data: Path | None, policy: Path | None, model: str) -> Scene:
    """Make the folder, the certificates, the data files and the jobs.

    Raises:
        InputError: SS-1160 when the folder holds something already, SS-1161 when there are too few records, and those of
            the data and policy files.
    """
    directory = out or Path("runs") / f"demo-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    if directory.exists() and any(directory.iterdir()):
        raise InputError("SS-1160", f"{directory} is not empty", hint="Name a new directory with --out.")
    policy_file = policy or shipped_policy("balanced")
    rules = load_policy(policy_file)
    private, public, prompt = _texts(data)
    (directory / "data").mkdir(parents=True, exist_ok=True)
    for index, client in enumerate(CLIENTS):
        size = len(private) // len(CLIENTS)
        _write(directory / "data" / f"{client}.jsonl", private[index * size : (index + 1) * size])
    _write(directory / "public.jsonl", public)
    scene = Scene(
        directory=directory, policy=policy_file, lab=shipped_policy("lab"), rules=rules, public=directory / "public.jsonl",
        prompt=prompt, synthetic=data is None,
    )  # fmt: skip
    authority = Authority.create(directory / "keys")
    authority.issue("gpu", "server")
    for client in CLIENTS:
        authority.issue(client, "client")
    # Adapters on clean activations learn from small steps; on noised ones C has to turn round before anything helps.
    scene.job("unprotected").write_text(_job(model, blind=False, client_lr=1e-3, server_lr=5e-4), encoding="utf-8")
    scene.job("protected").write_text(
        _job(model, blind=rules.aggregation.blind, client_lr=4e-3, server_lr=1e-3), encoding="utf-8"
    )
    return scene


def shipped_policy(name: str) -> Path:
    """A policy that comes with the product.

    Raises:
        InputError: SS-1162 when it is not where it should be.
    """
    package = Path(__file__).parents[2]
    for folder in (package / "policies", package.parent / "policies"):
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    raise InputError(
        "SS-1162", f"the policy {name}.toml is missing from this installation", hint="Name one with --policy."
    )


def _texts(data: Path | None) -> tuple[list[Record], list[Record], str]:
    need = len(CLIENTS) * (TRAIN + HELD_OUT)
    if data is None:
        notes = [Record(note.text, note.pii) for note in ward_notes(need + 1, _SEED)]
        public = [Record(note.text, note.pii) for note in ward_notes(PUBLIC, _SEED + 1)]
        seen = {record.text for record in notes}
        question = notes[-1].text.rpartition(" Answer:")[0]
        return notes[:need], [r for r in public if r.text not in seen], f"{question} Answer:"
    # Once each: a text that two parties hold would be known to the attacker beforehand.
    records = list({record.text: record for record in read_corpus(data)}.values())[: need + PUBLIC + 1]
    if len(records) < need + 25:
        raise InputError(
            "SS-1161", f"{data} has {len(records)} records; the demo needs {need + 25}", hint="Give a larger file."
        )
    random.Random(_SEED).shuffle(records)  # noqa: S311 (a public order, not a secret)
    prompt = " ".join(records[-1].text.split()[:12])
    return records[:need], records[need:-1], prompt


def _write(path: Path, records: list[Record]) -> None:
    lines = (json.dumps({"text": r.text, "pii": list(r.pii)}, ensure_ascii=False) + "\n" for r in records)
    path.write_text("".join(lines), encoding="utf-8")


def _job(model: str, *, blind: bool, client_lr: float, server_lr: float) -> str:
    roster = json.dumps(list(CLIENTS))
    return f"""# Written by the demo. A commented job stands in examples/job.toml.
name = "demo"
model = {json.dumps(model)}
codec = "f32"
cut = {{ front = 2, back = 2 }}
optimiser = {{ client_lr = {client_lr}, server_lr = {server_lr} }}
schedule = {{ rounds = 2, epochs = 2, batch = 4 }}
sums = {{ roster = {roster}, threshold = 2, min_clients = 3, clip = 1.0, blind = {str(blind).lower()} }}

[adapters]
rank = 8
alpha = 16.0
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
seed = 7
"""
