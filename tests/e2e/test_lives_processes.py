"""kill -9 of the server's process inside secure sums, and a new one on its port; the clients' processes never notice more."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.house import CLIENTS, SILENT, Program, job_text, policy_text, start_server, train_argv

MOMENTS = ("0-2", "0-kept", "1-4")

# A client that stops at these moments, right after it said something, until the test has killed the server.
HALTING = """
import pathlib, time
from securesplit.client.link import Link
from securesplit.cli.main import main
from securesplit.protocol.messages import RoundKept, Secagg
tell, left = Link.tell, ["0-2", "0-kept", "1-4"]
def halting(link, message):
    tell(link, message)
    if isinstance(message, (RoundKept, Secagg)):
        moment = f"{message.round}-{getattr(message, 'stage', 'kept')}"
        if left and moment == left[0]:
            left.pop(0)
            flag = pathlib.Path(f"at-{moment}")
            flag.touch()
            while flag.exists():
                time.sleep(0.02)
Link.tell = halting
main()
"""


@pytest.mark.slow
def test_the_servers_process_is_killed_three_times_inside_sums(house):
    for seed, name in enumerate(CLIENTS):
        house.data(f"{name}.jsonl", 6, seed=40 + seed)
    job = job_text(house.model) + "attempts = 50\nquorum = 3\n"
    server, url = start_server(house, job, policy_text(SILENT))
    file = house.root / "server.policy.toml"
    clients = {
        name: Program(house.root, name, *train_argv(house, name, url, file), python=HALTING if name == "bob" else None)
        for name in CLIENTS
    }
    for number, moment in enumerate(MOMENTS):
        flag, deadline = house.root / f"at-{moment}", time.monotonic() + 90
        while not flag.exists():
            assert time.monotonic() < deadline, [server.complaint, *(c.complaint for c in clients.values())]
            time.sleep(0.02)
        server.kill()
        port = url.rpartition(":")[2]
        server, again = start_server(
            house, job, policy_text(SILENT), "--listen", f"127.0.0.1:{port}", label=f"server-{number}"
        )
        assert again == url
        flag.unlink()
    codes = {name: client.wait(120) for name, client in clients.items()}
    assert codes == dict.fromkeys(CLIENTS, 0), [c.complaint for c in clients.values()]
    assert server.stop() == 0
    for number in (0, 1):
        files = {name: np.load(house.root / name / f"round-{number}.npz") for name in CLIENTS}
        total = sum(kept["contribution"].astype(np.uint64) for kept in files.values()) % (1 << 32)
        assert all(np.array_equal(kept["ring_sum"], total) for kept in files.values())
    backs = [load_file(house.root / name / "adapter-back.safetensors") for name in CLIENTS]
    assert all(torch.equal(backs[0][key], other[key]) for other in backs[1:] for key in backs[0])
    assert all(client.said["survivors"] == [list(CLIENTS)] * 2 for client in clients.values())
    # One release of each record, and no more, whatever was lost.
    assert {
        channel["releases"]
        for client in clients.values()
        for channel in client.said["channels"]
        if channel["channel"] == "cut"
    } == {6}
