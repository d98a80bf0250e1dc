"""A cohort of clients and a server in one process, with hooks for whoever wants to misbehave."""

import hashlib
import os
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from securesplit.aggregate import wire
from securesplit.aggregate.client import ClientRound, State
from securesplit.aggregate.config import Floors, RoundConfig
from securesplit.aggregate.server import ServerRound
from securesplit.errors import AggregationAborted, ConnectionFailed, LocalProtocolError, RemoteProtocolError

NAMES = ("amir", "bea", "chloe", "dan", "eve")
MODEL = hashlib.sha256(b"model").hexdigest()
FROZEN = hashlib.sha256(b"frozen").hexdigest()


def stream(label: str) -> Callable[[int], bytes]:
    """Deterministic randomness: SHAKE-256 of a label, read piece by piece."""
    at = 0

    def read(n: int) -> bytes:
        nonlocal at
        at += n
        return hashlib.shake_256(label.encode()).digest(at)[at - n :]

    return read


def values(label: str, count: int) -> np.ndarray:
    """Doubles in [-0.7, 0.7), of which those beyond the clip of 0.5 get clipped; the same under every numpy."""
    words = np.frombuffer(hashlib.shake_256(label.encode()).digest(4 * count), dtype="<i4")
    return words / 2**31 * 0.7


def make_config(**changes: object) -> RoundConfig:
    fields: dict[str, object] = {
        "session_id": bytes(range(16)), "round": 1, "roster": NAMES, "threshold": 3, "min_clients": 3, "dim": 7,
        "scale": 1000, "clip": 0.5, "w_max": 10, "model": MODEL, "frozen": FROZEN, "blind": False,
    }  # fmt: skip
    return RoundConfig(**(fields | changes))  # type: ignore[arg-type]


class Cohort:
    """Clients of one roster with one server.

    ``answered`` stands for the disks of all clients; keep it from one cohort to the next to model restarts.
    """

    def __init__(self, config: RoundConfig, *, seed: str | None = None, answered: dict[str, list[bytes]] | None = None):
        self.config = config
        self.server = ServerRound(config, self.verify)
        self.answered = {name: [] for name in config.roster} if answered is None else answered
        self.identities = {
            n: Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"id|" + n.encode()).digest()) for n in config.roster
        }
        self.updates = {n: values(f"update|{n}", config.dim) for n in config.roster}
        self.weights = {n: 1 + i % config.w_max for i, n in enumerate(config.roster)}
        self.clients = {n: self.client(n, seed=seed) for n in config.roster}
        self.up: list[tuple[str, int, bytes, np.ndarray | None]] = []
        self.down: list[tuple[str, int, bytes, np.ndarray | None]] = []
        self.failed: dict[str, Exception] = {}

    def client(
        self, name: str, *, seed: str | None = None, config: RoundConfig | None = None, floors: Floors | None = None
    ) -> ClientRound:
        config = config or self.config
        return ClientRound(
            config, name, self.identities[name].public_key().public_bytes_raw(), sign=self.identities[name].sign, verify=self.verify,
            floors=floors or Floors(min_clients=3, min_threshold=2, max_update=1.0, blind=False), persist=self.answered[name].append,
            randomness=os.urandom if seed is None else stream(f"{seed}|{name}"),
        )  # fmt: skip

    def verify(self, name: str, certificate: bytes, signature: bytes, data: bytes) -> None:
        if certificate != self.identities[name].public_key().public_bytes_raw():
            raise ConnectionFailed("SS-3999", "another certificate than the permitted one")
        try:
            Ed25519PublicKey.from_public_bytes(certificate).verify(signature, data)
        except InvalidSignature:
            raise ConnectionFailed("SS-3998", "bad signature") from None

    def start(self, vanish: dict[str, int] | None = None) -> list:
        """Contribute and advertise; returns the server's first deliveries."""
        queue = []
        for name, client in self.clients.items():
            client.contribute(self.updates[name], self.weights[name])
            if (vanish or {}).get(name, 9) > 0:
                queue += self.send(name, 0, client.advertise(), None)
        return queue

    def send(self, name: str, stage: int, body: bytes, vector: np.ndarray | None) -> list:
        self.up.append((name, stage, body, vector))
        return self.server.receive(name, stage, body, vector)

    def run(self, vanish: dict[str, int] | None = None, tamper: Callable | None = None, until: int = 9) -> "Cohort":
        """Drive the round. ``vanish``: name to stage it does not send; ``tamper(delivery) -> delivery | None``.

        Deliveries of stage ``until`` and later are kept back (in ``down``), so that a test can forge its own.
        """
        vanish = vanish or {}
        queue = deque(self.start(vanish))
        while queue or not self.server.finished:
            if not queue:
                if self.server.stage > until:
                    return self
                queue.extend(self.server.timeout())
                continue
            delivery = queue.popleft()
            if tamper is not None:
                delivery = tamper(delivery)
                if delivery is None:
                    continue
            self.down.append(tuple(delivery))
            to, stage, body, vector = delivery
            if vanish.get(to, 99) < stage or (stage >= until and stage != 15) or to in self.failed:
                continue
            try:
                outgoing = self.clients[to].receive(stage, body, vector)
            except Exception as error:  # noqa: BLE001 - the test looks at it
                self.failed[to] = error
                queue.extend(self.server.leave(to))
                continue
            for out in outgoing:
                if vanish.get(to, 9) > out.stage:
                    queue.extend(self.send(to, *out))
        return self

    def told(self, name: str, stage: int) -> wire.Body:
        """The honest body of a stage to a client, as ``run(until=stage)`` held it back."""
        kinds = {0: wire.Roster, 1: wire.Routed, 2: wire.Survivors, 3: wire.Bundle, 4: wire.Result}
        return wire.decode(kinds[stage], next(b for to, s, b, _ in self.down if (to, s) == (name, stage)))

    def refusal(self, name: str, stage: int, body: wire.Body | bytes, vector: np.ndarray | None = None) -> str:
        """Give a client a forged body: it must refuse for good and forget its secrets. Returns the code."""
        member, data = self.clients[name], wire.encode(body) if isinstance(body, wire.Body) else body
        with pytest.raises((AggregationAborted, RemoteProtocolError)) as seen:
            member.receive(stage, data, vector)
        assert (member.state, member._secrets, member._held, member._group) == (State.ABORTED, None, {}, b"")
        with pytest.raises(LocalProtocolError):
            member.receive(stage, data, vector)
        return seen.value.code

    def plain_sum(self, names) -> list[int]:
        """The oracle: Python integers, round half to even, no numpy and no ring."""
        c = self.config
        total = [0] * (c.dim + 1)
        for name in names:
            for k, x in enumerate(self.updates[name].tolist()):
                total[k] += round(max(-1.0, min(1.0, x / c.clip)) * c.scale) * self.weights[name]
            total[c.dim] += self.weights[name]
        return total


def signed(ring: np.ndarray) -> list[int]:
    return [v if v < 1 << 31 else v - (1 << 32) for v in ring.tolist()]


@pytest.fixture
def config_of():
    return make_config


@pytest.fixture
def cohort_of():
    def build(*, seed: str | None = None, answered: dict | None = None, **changes: object) -> Cohort:
        return Cohort(make_config(**changes), seed=seed, answered=answered)

    return build


@pytest.fixture
def signed_of():
    return signed
