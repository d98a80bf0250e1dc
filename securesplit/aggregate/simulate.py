"""A whole secure round in one process: real keys, signatures, messages and masks; only the network is missing.

Every simulated client has an Ed25519 identity whose raw public key stands for its certificate. Updates are drawn from a
normal distribution, of which some coordinates are clipped; they are test data, so numpy's generator draws them.
"""

from __future__ import annotations

import os
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from securesplit.aggregate.client import ClientRound
from securesplit.aggregate.config import Backend, Floors, RoundConfig
from securesplit.aggregate.fit import Wishes, fit_round
from securesplit.aggregate.fixedpoint import Floats, Words
from securesplit.aggregate.graph import COMPLETE_UP_TO
from securesplit.aggregate.server import ServerRound
from securesplit.aggregate.wire import ABORT, ADVERTISE, MASKED, STAGES, Delivery, Vector
from securesplit.errors import InputError, RemoteProtocolError

if TYPE_CHECKING:
    from securesplit.aggregate.he_worker import HeWorker

__all__ = ["Drop", "Simulation", "parse_drop", "simulate"]

_CLIP = 0.5
_W_MAX = 255


@dataclass(frozen=True, slots=True)
class Drop:
    """``count`` clients vanish instead of sending their message of ``stage`` (its number)."""

    stage: int
    count: int


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a simulated round ended with.

    Attributes:
        exact: every client that finished, and the server unless the round is blind, holds exactly the integer sum of
            the survivors' weighted fixed-point updates, as added up apart from the protocol; False when aborted.
        survivors: number of clients whose updates are in the sum; 0 when aborted.
        finished: number of clients that opened the sum.
        cpu_seconds: processor time of all parties together, from advertising to opening, quantising included;
            drawing the data and the check are not.
        bytes_per_param_up: bytes sent by the clients that sent a masked vector, by client and coordinate.
        aborted: the code that ended the round without a sum, or None.
        degree: how many clients hold each client's shares; all others in the complete graph.
        share_threshold: how many shares give a secret.
        colluders: how many clients may side with the server.
    """

    exact: bool
    survivors: int
    finished: int
    cpu_seconds: float
    bytes_per_param_up: float
    aborted: str | None
    degree: int
    share_threshold: int
    colluders: int


def parse_drop(text: str) -> Drop:
    """A drop from ``STAGE:COUNT``.

    Raises:
        InputError: SS-1603 when it is not of that form.
    """
    stage, _, count = text.partition(":")
    if stage not in STAGES or not (count.isascii() and count.isdigit() and len(count) <= 4):
        raise InputError(
            "SS-1603", f"{text!r} is not STAGE:COUNT", hint=f"STAGE is one of {', '.join(STAGES)}; COUNT is a number."
        )
    return Drop(STAGES.index(stage), int(count))


def _verify(name: str, certificate: bytes, signature: bytes, data: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(certificate).verify(signature, data)
    except (InvalidSignature, ValueError):
        raise RemoteProtocolError("SS-6002", f"the signature of {name} is not good") from None


class _Cohort:
    """The simulated clients, their data, and which of them vanish before which stage."""

    def __init__(self, config: RoundConfig, drops: tuple[Drop, ...], worker: HeWorker | None) -> None:
        self.config = config
        self._seed = int.from_bytes(os.urandom(8), "big")
        floors = Floors(
            min_clients=config.min_clients, min_threshold=config.threshold, max_update=config.clip, blind=config.blind
        )
        self.rounds: dict[str, ClientRound] = {}
        for name in config.roster:
            identity = Ed25519PrivateKey.generate()
            certificate = identity.public_key().public_bytes_raw()
            self.rounds[name] = ClientRound(
                config,
                name,
                certificate,
                sign=identity.sign,
                verify=_verify,
                floors=floors,
                persist=lambda _answer: None,
                worker=worker,
            )
        # The last names of the roster vanish, each once.
        doomed = iter(reversed(config.roster))
        self.vanishing = {next(doomed): drop.stage for drop in drops for _ in range(drop.count)}

    def data(self, name: str) -> tuple[Floats, int]:
        """The client's update and weight, the same at every call; about one coordinate in twenty is beyond the clip."""
        rng = np.random.default_rng((self._seed, self.config.position(name)))
        weight = int(rng.integers(1, self.config.w_max, endpoint=True))
        return rng.normal(0.0, self.config.clip / 2, self.config.dim), weight

    def plain_sum(self, names: tuple[str, ...]) -> list[int]:
        """The weighted sum in 64-bit integers and, last, the sum of weights: what the round must give, without a ring."""
        c = self.config
        total = np.zeros(c.dim + 1, dtype=np.int64)
        for name in names:
            update, weight = self.data(name)
            total[: c.dim] += (
                np.round(np.minimum(np.maximum(update, -c.clip), c.clip) / c.clip * c.scale).astype(np.int64) * weight
            )
            total[c.dim] += weight
        return total.tolist()


@dataclass(slots=True)
class _Meter:
    """Processor time and bytes sent up, by client."""

    cpu: float = 0.0
    up: dict[str, int] = field(default_factory=dict)


def _run(server: ServerRound, cohort: _Cohort, meter: _Meter) -> None:
    queue: deque[Delivery] = deque()

    def send(name: str, stage: int, body: bytes, vector: Vector | None) -> None:
        if cohort.vanishing.get(name, len(STAGES)) > stage:
            meter.up[name] = meter.up.get(name, 0) + len(body) + (0 if vector is None else vector.nbytes)
            queue.extend(server.receive(name, stage, body, vector))

    for name, client in cohort.rounds.items():
        update, weight = cohort.data(name)
        begin = time.process_time()
        client.contribute(update, weight)
        send(name, ADVERTISE, client.advertise(), None)
        meter.cpu += time.process_time() - begin
    begin = time.process_time()
    while queue or not server.finished:
        if not queue:
            queue.extend(server.timeout())
            continue
        to, stage, body, vector = queue.popleft()
        if stage == ABORT or cohort.vanishing.get(to, len(STAGES)) < stage:
            continue
        for out in cohort.rounds[to].receive(stage, body, vector):
            send(to, *out)
    meter.cpu += time.process_time() - begin


def simulate(
    *,
    clients: int,
    threshold: int,
    dim: int,
    drops: tuple[Drop, ...] = (),
    blind: bool = False,
    backend: Backend = "masks",
    ring_bits: Literal[32, 64] = 32,
    colluders: int | None = None,
) -> Simulation:
    """Run one round over simulated clients.

    Args:
        clients: size of the roster; above 32 the graph is sparse.
        threshold: how many must agree.
        dim: d, coordinates of an update.
        drops: who vanishes when; the counts of several drops add up.
        blind: whether the sum is hidden from the server; always with homomorphic encryption.
        backend: how sums are hidden.
        ring_bits: 32 or 64.
        colluders: how many clients may side with the server; by default one in five, if the threshold allows.

    Raises:
        InputError: SS-1601 when the round cannot be set up, SS-1603 when more clients would vanish than there are, or an
            error of the worker.
    """
    least = max(3, threshold if clients <= COMPLETE_UP_TO else clients // 4)
    config = fit_round(
        Wishes(
            roster=tuple(f"client-{i:03d}" for i in range(clients)), threshold=threshold, min_clients=least, clip=_CLIP,
            w_max=_W_MAX, blind=blind or backend != "masks", colluders=colluders, ring_bits=ring_bits, backend=backend,
        ),
        session_id=os.urandom(16), number=1, dim=dim, model="0" * 64, frozen="0" * 64,
    )  # fmt: skip
    if sum(drop.count for drop in drops) > clients:
        raise InputError("SS-1603", "more clients would vanish than there are", hint="Lower the counts of --drop.")
    with ExitStack() as stack:
        worker = None
        if backend != "masks":
            from securesplit.aggregate.he_worker import HeWorker

            worker = stack.enter_context(HeWorker())
        cohort, server, meter = _Cohort(config, drops, worker), ServerRound(config, _verify, worker=worker), _Meter()
        _run(server, cohort, meter)
        meter.cpu += worker.cpu_seconds if worker is not None else 0.0
    return _outcome(config, cohort, server, meter)


def _outcome(config: RoundConfig, cohort: _Cohort, server: ServerRound, meter: _Meter) -> Simulation:
    senders = [name for name in config.roster if cohort.vanishing.get(name, len(STAGES)) > MASKED]
    up = sum(meter.up.get(name, 0) for name in senders) / max(1, len(senders)) / config.dim
    opened = [r.result for r in cohort.rounds.values() if r.result is not None]
    exact, survivors = False, tuple[str, ...]()
    if server.result is not None:
        survivors = server.result.survivors
        known = [*opened, server.result.aggregate] if server.result.aggregate is not None else opened
        want = cohort.plain_sum(survivors)
        exact = all(a.survivors == survivors and _centred(a.ring_sum) == want for a in known) and bool(opened)
    return Simulation(
        exact=exact, survivors=len(survivors), finished=len(opened), cpu_seconds=meter.cpu, bytes_per_param_up=up,
        aborted=server.aborted if server.result is None else None, degree=config.degree or len(config.roster) - 1,
        share_threshold=config.shares_needed, colluders=config.colluders,
    )  # fmt: skip


def _centred(ring: Words) -> list[int]:
    half, whole = 1 << (8 * ring.itemsize - 1), 1 << (8 * ring.itemsize)
    return [word if word < half else word - whole for word in ring.tolist()]
