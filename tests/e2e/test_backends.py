"""Whole runs over TLS with other rings and with homomorphic envelopes, and the records that they leave."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from securesplit.aggregate.he_worker import HeWorker
from securesplit.aggregate.record import read_record
from securesplit.cli.aggregate import app
from securesplit.model.store import load_middle
from securesplit.pki.store import KeyFolder
from securesplit.protocol.job import Job
from securesplit.server.build import build_core
from securesplit.server.rounds import RoundRecords
from tests.e2e.house import CLIENTS, FROZEN, policy_of
from tests.e2e.test_rounds import alike, train_all


def job_with(house, *, rounds: int = 1, blind: bool = True, **sums: object) -> Job:
    job = house.job(rounds=rounds, epochs=1, blind=blind)
    return Job.model_validate_json(
        job.model_copy(update={"sums": job.sums.model_copy(update=sums)}).canonical(), strict=False
    )


def plain_sum(house, number: int) -> np.ndarray:
    """The oracle: contributions as Python integers, mod 2^64."""
    files = [np.load(house.root / name / f"round-{number}.npz")["contribution"] for name in CLIENTS]
    return np.array([sum(int(f[i]) for f in files) for i in range(len(files[0]))], dtype=object)


def served(house, job, policy, worker=None):
    records = RoundRecords(KeyFolder.open(house.keys / "gpu", "server"), house.root / "server")
    (house.root / "server").mkdir()
    return build_core(job, policy, load_middle(house.model), house.digest, worker=worker, records=records)


@pytest.mark.parametrize("backend", ["bfv", "ckks"])
def test_with_encryption_the_clients_open_the_plain_sum_and_the_server_holds_a_frame(house, backend):
    policy = policy_of(FROZEN)
    with HeWorker() as worker:
        core = served(house, job_with(house, backend=backend), policy, worker)
        outcome = train_all(house, core, policy, seconds=120)
    assert outcome.errors == {}
    want = plain_sum(house, 0) % (1 << 32)
    for name in CLIENTS:
        assert np.load(house.root / name / "round-0.npz")["ring_sum"].tolist() == want.tolist()
    alike(house)
    held = core.sums.last
    assert held.ring_sum.dtype == np.uint8
    assert held.aggregate is None


def test_a_wide_ring_gives_the_plain_sum_on_a_finer_grid(house):
    policy = policy_of()
    core = served(house, job_with(house, blind=False, ring_bits=64), policy)
    outcome = train_all(house, core, policy)
    assert outcome.errors == {}
    words = np.load(house.root / "bob" / "round-0.npz")["ring_sum"]
    assert words.dtype == np.uint64
    assert words.tolist() == (plain_sum(house, 0) % (1 << 64)).tolist()
    steps = words[:-1].view(np.int64)
    assert np.abs(steps).max() > 1 << 33, "more than a 32-bit ring holds"
    alike(house)


@pytest.mark.parametrize("blind", [True, False])
def test_what_train_and_serve_record_is_verified_by_whoever_has_the_authority(house, blind):
    policy = policy_of(FROZEN) if blind else policy_of()
    core = served(house, job_with(house, rounds=2, blind=blind), policy)
    assert train_all(house, core, policy).errors == {}
    files = sorted(house.root.glob("*/round-*.record"))
    assert len(files) == 8, "three clients and the server, two rounds"
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    arguments = ["verify", *map(str, files), "--ca", str(house.keys / "ca" / "cert.pem"), "--output", "json"]
    arguments += [word for name in CLIENTS for word in ("--roster", name)]
    result = CliRunner().invoke(app, arguments)
    told = json.loads(result.stdout)
    assert told["valid"], [c for r in told["rounds"] for c in r["checks"] if not c["ok"]]
    assert {tuple(r["survivors"]) for r in told["rounds"]} == {CLIENTS}
    mine = read_record(next(f for f in files if f.parent.name == "alice"))
    assert (mine.maker, mine.role, bool(mine.sum_digest)) == ("alice", "client", True)
    # Somebody changes who survived: found.
    altered = files[0].read_bytes().replace(b"carol", b"caroI")
    files[0].write_bytes(altered)
    assert CliRunner().invoke(app, arguments).exit_code != 0
