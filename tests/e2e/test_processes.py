"""Server and clients as processes, started by the command line as a user starts them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from securesplit.model.export import export_adapter, read_part_adapters
from securesplit.protocol.messages import Backward, Forward
from securesplit.protocol.transcript import Transcript
from tests.e2e.house import CLIENTS, FROZEN, Program, job_text, policy_text, start_server, train_argv

KEYS = {"steps", "loss", "epsilon", "bytes_up", "bytes_down"}

# A client that keeps its part of the last sum and then kills itself, as `kill -9` does, right after its masked vector.
SUICIDE = """
import os, signal
import numpy as np
import securesplit.client.rounds as rounds
from securesplit.aggregate.client import ClientRound
from securesplit.cli.main import main
send, contribute, given = rounds._Line.say, ClientRound.contribute, {}
def keep(self, update, weight):
    clipped = contribute(self, update, weight)
    given[self.config.round] = self.contribution.copy()
    return clipped
def vanish(line, message):
    send(line, message)
    if message.round == 1 and message.stage == 2:
        np.savez("carol.given.npz", last=given[1])
        os.kill(os.getpid(), signal.SIGKILL)
ClientRound.contribute, rounds._Line.say = keep, vanish
main()
"""


def whole_run(house, policy, *, blind, carol=None):
    """Everybody's processes; the clients by name and the server's exit code."""
    for seed, name in enumerate(CLIENTS):
        house.data(f"{name}.jsonl", 6, seed=40 + seed)
    server, url = start_server(
        house, job_text(house.model, blind=blind), policy, "--record", "record", "--out", house.root / "server"
    )
    file = house.root / "server.policy.toml"
    clients = {
        name: Program(house.root, name, *train_argv(house, name, url, file), python=carol if name == "carol" else None)
        for name in CLIENTS
    }
    codes = {name: client.wait() for name, client in clients.items()}
    assert server.process.poll() is None, server.complaint
    assert server.stop() == 0, server.complaint
    return clients, codes, server


def adapter(house, name, part):
    return load_file(house.root / name / f"adapter-{part}.safetensors")


def opened(house, name, number):
    return np.load(house.root / name / f"round-{number}.npz")


@pytest.mark.slow  # The same run, with clients in threads, is in test_rounds.py.
def test_private_two_rounds(house):
    clients, codes, server = whole_run(house, policy_text(FROZEN), blind=True)
    assert codes == dict.fromkeys(CLIENTS, 0), [c.complaint for c in clients.values()]
    for number in (0, 1):
        total = sum(opened(house, n, number)["contribution"].astype(np.uint64) for n in CLIENTS) % (1 << 32)
        assert all(np.array_equal(opened(house, n, number)["ring_sum"], total) for n in CLIENTS)
    backs = [adapter(house, name, "back") for name in CLIENTS]
    assert all(torch.equal(backs[0][key], other[key]) for other in backs[1:] for key in backs[0])
    transcript = Transcript.load(house.root / "record")
    assert {peer for _, peer in transcript.peers} == set(CLIENTS)
    up = down = 0
    for client in clients.values():
        said = client.said
        assert said.keys() >= KEYS
        assert (said["tls"], said["unit"], said["relation"]) == ("TLSv1.3", "sequence", "replace-one")
        assert 0 < said["epsilon"] <= 8.0
        up, down = up + said["bytes_up"], down + said["bytes_down"]
    # What the clients counted is what the server recorded, less greeting (Hello, Confirm) and farewell (KeepAnchor, Seal, Bye).
    seen = transcript.bytes_seen()
    sent = [[len(data) for way, data in transcript.frames(number) if way == 0] for number, _ in transcript.peers]
    assert seen[0] - up == sum(sum(sizes[:2] + sizes[-3:]) for sizes in sent)
    assert 0 < seen[1] - down < 3 * 400  # The answer to the last checkpoint, after the record was written.
    kinds = [type(m) for number, _ in transcript.peers for _, m in transcript.messages(number)]
    assert Backward not in kinds
    assert kinds.count(Forward) <= 6 * 3
    assert "Traceback" not in server.complaint
    for text in house.root.glob("*.jsonl"):
        assert text.read_text().split('"')[3] not in server.complaint


def test_open_two_rounds_and_one_client_is_killed_in_the_second(house, tmp_path):
    clients, codes, server = whole_run(house, policy_text(), blind=False, carol=SUICIDE)
    assert codes == {"alice": 0, "bob": 0, "carol": -9}, [c.complaint for c in clients.values()]
    last = np.load(house.root / "carol.given.npz")["last"].astype(np.uint64)
    total = (last + sum(opened(house, n, 1)["contribution"].astype(np.uint64) for n in ("alice", "bob"))) % (1 << 32)
    for name in ("alice", "bob"):
        assert np.array_equal(opened(house, name, 1)["ring_sum"], total)
        assert clients[name].said["survivors"] == [list(CLIENTS)] * 2
        assert clients[name].said["epsilon"] is None
    for part in ("front", "back"):
        mine, theirs = (adapter(house, name, part) for name in ("alice", "bob"))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    files = [house.root / "alice" / "adapter-front.safetensors", house.root / "server" / "adapter-middle.safetensors"]
    files.append(house.root / "alice" / "adapter-back.safetensors")
    done = export_adapter([read_part_adapters(file) for file in files], tmp_path / "peft", "tiny")
    assert (done.adapted, done.untouched) == ((0, 1, 2, 3), ())
    assert "Traceback" not in server.complaint
