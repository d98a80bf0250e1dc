"""One round of SSA-1 in one process: every client and the server, from making keys to the sum, checked at each of them.

Left out of the measurement, as on the other side: making the updates, the network, and the identities, which are older
than a round. Everything else is in: signatures and their verification, the encoding and parsing of every message.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import cryptography
import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from vectors import CLIP, W_MAX, Case, read_case  # beside this file

from securesplit import __version__  # after the path is set
from securesplit.aggregate.client import ClientRound
from securesplit.aggregate.config import Floors, RoundConfig
from securesplit.aggregate.fit import Wishes, fit_round
from securesplit.aggregate.server import ServerRound
from securesplit.errors import RemoteProtocolError


def config_of(case: Case) -> RoundConfig:
    """The round as `securesplit aggregate simulate` sets it up; the complete graph unless the case says sparse."""
    n = case.clients
    wishes = Wishes(
        roster=tuple(f"client-{i:03d}" for i in range(n)), threshold=case.threshold,
        min_clients=max(3, n // 4 if case.sparse else case.threshold), clip=CLIP, w_max=W_MAX, blind=False,
    )  # fmt: skip
    config = fit_round(wishes, session_id=os.urandom(16), number=1, dim=case.dim, model="0" * 64, frozen="0" * 64)
    return config if case.sparse else replace(config, degree=0, share_threshold=0)


def verify(name: str, certificate: bytes, signature: bytes, data: bytes) -> None:
    """A raw public key stands for the certificate."""
    try:
        Ed25519PublicKey.from_public_bytes(certificate).verify(signature, data)
    except InvalidSignature:
        raise RemoteProtocolError("SS-6002", f"the signature of {name} is not good") from None


def client_of(config: RoundConfig, name: str, identity: Ed25519PrivateKey) -> ClientRound:
    """A client that insists on exactly this round."""
    floors = Floors(
        min_clients=config.min_clients, min_threshold=config.threshold, max_update=config.clip, blind=config.blind
    )
    return ClientRound(
        config, name, identity.public_key().public_bytes_raw(), sign=identity.sign, verify=verify, floors=floors,
        persist=lambda _answer: None,
    )  # fmt: skip


def run(config: RoundConfig, case: Case) -> tuple[float, int, ServerRound, list[ClientRound]]:
    """The round: CPU seconds, bytes up, and who took part."""
    identities, updates, weights = (
        [Ed25519PrivateKey.generate() for _ in config.roster], case.vectors(), case.weights()
    )  # fmt: skip
    begin = time.process_time()
    clients = {name: client_of(config, name, key) for name, key in zip(config.roster, identities, strict=True)}
    server, queue, up = ServerRound(config, verify), deque(), 0
    for (name, client), update, weight in zip(clients.items(), updates, weights, strict=True):
        client.contribute(update, weight)
        body = client.advertise()
        up += len(body)
        queue.extend(server.receive(name, 0, body))
    while queue:
        to, stage, body, vector = queue.popleft()
        for out in clients[to].receive(stage, body, vector):
            up += len(out.body) + (0 if out.vector is None else out.vector.nbytes)
            queue.extend(server.receive(to, out.stage, out.body, out.vector))
    assert server.result is not None
    assert server.result.aggregate is not None
    server.result.aggregate.mean  # noqa: B018  # in floats, as Flower's server has it in the end
    return time.process_time() - begin, up, server, list(clients.values())


def exact_sum(config: RoundConfig, case: Case) -> list[int]:
    """The weighted fixed-point sum and the sum of weights in plain 64-bit integers."""
    total = np.zeros(case.dim, dtype=np.int64)
    for update, weight in zip(case.vectors(), case.weights(), strict=True):
        total += np.round(update.astype(np.float64) / config.clip * config.scale).astype(np.int64) * weight
    return [*(total % (1 << config.ring_bits)).tolist(), sum(case.weights())]


def main() -> None:
    """Run one round and print its figures."""
    case = read_case()
    config = config_of(case)
    wall = time.perf_counter()
    cpu, up, server, clients = run(config, case)
    wall = time.perf_counter() - wall
    assert server.result is not None
    assert server.result.aggregate is not None
    want = exact_sum(config, case)
    sums = [server.result.aggregate, *(client.result for client in clients if client.result is not None)]
    exact = len(sums) == case.clients + 1 and all(np.array_equal(s.ring_sum, want) for s in sums)
    print(
        json.dumps(
            {
                "cpu_seconds": cpu,
                "wall_seconds": wall,
                "bytes_per_param_up": up / case.clients / case.dim,
                "max_abs_error": case.error_of(sums[0].mean),
                "correct": exact,
                "holders": config.degree or case.clients - 1,
                "versions": {
                    "securesplit": __version__,
                    "python": platform.python_version(),
                    "numpy": np.__version__,
                    "cryptography": cryptography.__version__,
                },
            }
        )
    )


if __name__ == "__main__":
    main()
