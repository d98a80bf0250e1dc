"""Certificate, revocation list and authority are exchanged under a training run: no step is lost, no weight differs.

The oracle is the same run beside a server whose files nobody touches.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch

from securesplit.client.dial import dial
from securesplit.logged import open_journal
from securesplit.model.export import collect_adapters
from securesplit.pki.authority import Authority
from securesplit.pki.renew import renew, renew_all
from securesplit.pki.rotate import begin_rotation, finish_rotation
from tests.e2e.house import Loopback, batches_of, policy_of, sentences

POLICY = policy_of()
STEPS = 12


def values(named):
    return named.name, named.layer, named.value


def rows(house, kind):
    files = sorted((house.keys / "gpu/audit").glob("*.jsonl"))
    return [row for file in files for row in map(json.loads, file.read_text().splitlines()) if row["kind"] == kind]


def trained(house, *, changes: dict[int, Callable[[], object]]):
    """A run of some steps; before the numbered ones something is changed and taken up. Losses and both ends' weights."""
    losses, middle = [], None
    with open_journal(house.folder("gpu")) as journal:
        core = house.core(house.job(), POLICY)
        middle = core._engine.middle
        with (
            Loopback(core, house.keys, journal=journal) as loop,
            dial(loop.url, keys=house.keys / "alice", policy=POLICY, patience=20) as link,
        ):
            client = house.client(link, POLICY)
            client.train("B")
            optimiser = torch.optim.AdamW(client.parameters(), lr=1e-2)
            batches = batches_of(client, sentences(8, seed=5))
            for number in range(STEPS):
                if number in changes:
                    before = loop.shell._tls.current()
                    changes[number]()
                    deadline = time.monotonic() + 5
                    while loop.shell._tls.current() is before or loop.shell._tls.changed():
                        assert time.monotonic() < deadline, "the server takes a change up within five seconds"
                        # A step is under way while the server exchanges its context.
                        time.sleep(0.01)
                optimiser.zero_grad()
                losses.append(float(client.step(batches[number % len(batches)])))
                optimiser.step()
            with dial(loop.url, keys=house.keys / "bob", policy=POLICY, patience=20) as other:
                assert other.tls_version == "TLSv1.3"
    return losses, [tensor for part in (client.front, middle, client.back) for tensor in collect_adapters(part).tensors]


def test_everything_is_exchanged_during_training(house):
    plain = trained(house, changes={})
    authority = Authority.open(house.keys)
    told = len(rows(house, "reloaded"))
    exchanged = trained(
        house,
        changes={
            2: authority.write_crl,
            4: lambda: renew(authority, "gpu", force=True),
            6: lambda: begin_rotation(authority),
            8: lambda: renew_all(Authority.open(house.keys)),
        },
    )
    assert exchanged[0] == plain[0]
    assert len({round(loss, 6) for loss in plain[0]}) > STEPS // 2, "it learns"
    for (name, _, value), (same, _, other) in zip(map(values, exchanged[1]), map(values, plain[1]), strict=True):
        assert name == same
        assert torch.equal(value, other), name
    seen = rows(house, "reloaded")[told:]
    assert {row["what"] for row in seen} == {"crl", "certificate", "authority"}
    assert not [row for row in seen if row["code"]]
    assert not rows(house, "refused")
    assert len(rows(house, "accepted")) == 4, "alice's and bob's, once in each run: nobody had to come back"
    finish_rotation(Authority.open(house.keys))
    with Loopback(house.core(house.job(), POLICY), house.keys) as loop:
        dial(loop.url, keys=house.keys / "alice", policy=POLICY).close()
