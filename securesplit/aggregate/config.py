"""What one secure sum is about, and the floors below which a client takes no part.

Both ends build the same :class:`RoundConfig` from the job, the session and the model that they hold. Its hash enters
every key, ciphertext and signature of the round, so two parties that disagree on any field cannot complete it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from securesplit.aggregate.graph import require_graph
from securesplit.aggregate.masks import PRGS, Prg
from securesplit.errors import AggregationAborted, InputError

__all__ = ["MAX_CLIENTS", "Backend", "Floors", "RoundConfig", "check_floors", "largest_scale"]

Backend = Literal["masks", "bfv", "ckks"]

MAX_CLIENTS = 256
"""Every client checks every other one's signature, and the server routes a box for each pair that shares."""

MAX_DIM = 1 << 28
MAX_ENCRYPTED = 1 << 24
MAX_WEIGHT = 1 << 16
MAX_SCALE = 1 << 40  # In float64 a value's product with S is then still exact to far less than half a step.
_HEX = re.compile(r"^[0-9a-f]{64}$")


def largest_scale(clients: int, w_max: int, ring_bits: int = 32) -> int:
    """The largest power of two S <= 2^40 with ``clients * w_max * S <= 2^(ring_bits - 1) - 1``, so that no sum can wrap.

    Raises:
        InputError: SS-1601 when even S = 1 would wrap.
    """
    room = ((1 << (ring_bits - 1)) - 1) // max(1, clients * w_max)
    if room < 1:
        what = f"{clients} clients with weights up to {w_max} do not fit a {ring_bits}-bit ring"
        raise InputError("SS-1601", what, hint="Lower w_max.")
    return min(MAX_SCALE, 1 << (room.bit_length() - 1))


@dataclass(frozen=True, slots=True)
class RoundConfig:
    """One round's public parameters. An illegal one cannot be built.

    Attributes:
        session_id: 16 random bytes that name the session.
        round: number of the round; rises strictly within a session.
        roster: certificate names of all permitted clients, sorted, unique; from the consortium, never from the server.
        threshold: how many clients must sign one set of survivors before a sum is opened: ``2 threshold > n + colluders``,
            so that no two sets can both be signed. In the complete graph also t, the shares that give a secret.
        min_clients: m_min, fewest masked vectors in a sum.
        colluders: c, how many clients may side with the server without anybody else's update being opened. A sum covers at
            least ``min_clients - c`` others.
        dim: d, number of coordinates of an update; the ring vector has one more, for the sum of weights.
        scale: S, steps from 0 to ``clip``: an update x becomes ``rint(clip(x / clip, -1, 1) * S)``.
        clip: C, largest absolute value of a coordinate; model units.
        w_max: largest weight of a client.
        model: SHA-256 (hex) of the model and adapters that everyone must hold.
        frozen: SHA-256 (hex) of everything else that must be equal: the frozen LoRA factor, names, shapes and order.
        blind: whether the sum is hidden from the server.
        ring_bits: 32 or 64; words of that many bits, of which a sum may use all but the sign.
        degree: k, how many others each client gives shares to; 0 for the complete graph. See graph.py.
        share_threshold: t of the sparse graph; 0 in the complete one.
        prg: the generator of all masks; ``aes256ctr``, or ``chacha20`` where processors have no AES instructions.
        backend: ``masks``; or ``bfv`` or ``ckks``, which encrypt the masked words once more under a key of the clients.

    Raises:
        InputError: SS-1601 with one detail per fault, among them the overflow rule ``n * w_max * S <= 2^(ring_bits-1) - 1``
            and the bounds on the sparse graph.
    """

    session_id: bytes
    round: int
    roster: tuple[str, ...]
    threshold: int
    min_clients: int
    dim: int
    scale: int
    clip: float
    w_max: int
    model: str
    frozen: str
    blind: bool
    colluders: int = 0
    ring_bits: Literal[32, 64] = 32
    degree: int = 0
    share_threshold: int = 0
    backend: Backend = "masks"
    prg: Prg = "aes256ctr"

    def __post_init__(self) -> None:
        faults = (*self._roster_faults(), *self._number_faults())
        if faults:
            raise InputError(
                "SS-1601", f"this secure sum cannot be set up: {faults[0]}", details=faults if len(faults) > 1 else (),
                hint="Correct [sums] of the job; docs/protocol.md, SSA-1, states the limits.",
            )  # fmt: skip

    def _roster_faults(self) -> list[str]:
        n, faults = len(self.roster), []
        if n < 3:
            faults.append(f"a roster of {n}: with fewer than 3 clients a sum shows one client's update to another")
        if n > MAX_CLIENTS:
            faults.append(f"a roster of {n}: at most {MAX_CLIENTS} clients")
        if list(self.roster) != sorted(set(self.roster)):
            faults.append("the roster is not sorted or names a client twice")
        if not all(1 <= len(name) <= 128 and name.isprintable() for name in self.roster):
            faults.append("a name of the roster is empty, longer than 128 characters or not printable")
        if not n / 2 < self.threshold <= n:
            faults.append(
                f"threshold {self.threshold}: it must be more than half of the roster of {n}, and at most {n}"
            )
        elif self.colluders < 0 or 2 * self.threshold <= n + self.colluders:
            what = f"colluders {self.colluders}: twice the threshold must be more than roster and colluders together"
            faults.append(what)
        if not 3 <= self.min_clients <= max(n, 3):
            faults.append(f"min_clients {self.min_clients}: it must lie between 3 and the roster of {n}")
        elif self.min_clients - self.colluders < 2:  # Otherwise the server and its friends could know all but one.
            faults.append(
                f"min_clients {self.min_clients}: fewer than 2 of them are left beside {self.colluders} colluders"
            )
        return faults or self._graph_faults()

    def _graph_faults(self) -> list[str]:
        n = len(self.roster)
        if self.degree == 0 and self.share_threshold == 0:
            return []
        if self.colluders < n // 10:  # Its bounds have a cliff behind the number that it was made for.
            return [f"colluders {self.colluders}: a sparse graph must withstand at least {n // 10} of {n} clients"]
        try:
            require_graph(
                self.degree, self.share_threshold, clients=n, quorum=self.quorum, colluders=self.colluders,
                smallest=self.min_clients - self.colluders,
            )  # fmt: skip
        except InputError as error:
            return [error.what]
        return []

    def _number_faults(self) -> list[str]:
        faults = []
        if len(self.session_id) != 16:
            faults.append("the session id is not 16 bytes")
        if not 0 <= self.round < 1 << 53:
            faults.append("the round number is out of range")
        if not 1 <= self.dim <= MAX_DIM:
            faults.append(f"dim {self.dim}: it must lie between 1 and {MAX_DIM}")
        if not 1 <= self.w_max <= MAX_WEIGHT:
            faults.append(f"w_max {self.w_max}: it must lie between 1 and {MAX_WEIGHT}")
        if not (math.isfinite(self.clip) and self.clip > 0):
            faults.append("clip must be finite and above 0")
        if not (_HEX.fullmatch(self.model) and _HEX.fullmatch(self.frozen)):
            faults.append("model and frozen must be SHA-256 digests in hex")
        return [*faults, *self._ring_faults()]

    def _ring_faults(self) -> list[str]:
        faults = []
        if self.ring_bits not in (32, 64):
            faults.append(f"ring_bits {self.ring_bits}: it must be 32 or 64")
        elif not 1 <= self.scale <= MAX_SCALE or len(self.roster) * self.w_max * self.scale >= 1 << (
            self.ring_bits - 1
        ):
            top = f"2^{self.ring_bits - 1} - 1"
            faults.append(
                f"scale {self.scale}: roster * w_max * scale must lie between 1 and {top}, or a sum could wrap"
            )
        if self.prg not in PRGS:
            faults.append(f"prg must be {' or '.join(PRGS)}")
        if self.backend not in ("masks", "bfv", "ckks"):
            faults.append("backend must be masks, bfv or ckks")
        elif self.backend != "masks" and self.dim >= MAX_ENCRYPTED:
            faults.append(f"dim {self.dim}: at most {MAX_ENCRYPTED - 1} with encryption")
        elif self.backend != "masks" and (self.ring_bits != 32 or not self.blind):
            faults.append(
                f"backend {self.backend}: it encrypts 32-bit words, and the sum is hidden from the server: set blind"
            )
        return faults

    def canonical(self) -> bytes:
        """The bytes that are hashed: JSON, sorted keys, no spaces, ASCII."""
        fields: dict[str, object] = {name: getattr(self, name) for name in self.__slots__}
        fields |= {"proto": "ssa-1"}
        fields |= {"session_id": self.session_id.hex(), "roster": list(self.roster), "clip": float(self.clip)}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")

    @property
    def digest(self) -> bytes:
        """cfg_hash, 32 bytes: ``SHA-256("ssa-1/cfg|" + canonical())``."""
        return _digest(self)

    @property
    def shares_needed(self) -> int:
        """t, how many shares give a secret."""
        return self.share_threshold or self.threshold

    @property
    def honest(self) -> int:
        """Fewest clients that sides neither with the server nor looks, in any sum that is opened; for noise that counts on them.

        One client is counted as a colluder in any case: whoever opens a sum knows its own part of the noise. In the sparse
        graph a server may leave honest survivors out of the sum, down to the number that the graph was made for.
        """
        return (self.min_clients if self.degree else self.quorum) - max(1, self.colluders)

    @property
    def quorum(self) -> int:
        """Fewest clients whose masked vectors make a sum: the larger of threshold and min_clients."""
        return max(self.threshold, self.min_clients)

    def position(self, name: str) -> int:
        """The client's abscissa in Shamir's scheme: its place in the roster, counted from 1."""
        return self.roster.index(name) + 1


@lru_cache(maxsize=64)
def _digest(config: RoundConfig) -> bytes:
    """Every message of a round carries it."""
    return hashlib.sha256(b"ssa-1/cfg|" + config.canonical()).digest()


@dataclass(frozen=True, slots=True)
class Floors:
    """What a client insists on, from its own policy; no server can lower it.

    Attributes:
        min_clients: fewest updates in a sum that this client takes part in.
        min_threshold: fewest clients that must agree to open a sum. More than half of the roster is required in any
            case, and twice the threshold must exceed the roster and ``RoundConfig.colluders`` together.
        max_update: largest coordinate of an update that may count, in model units; bounds ``RoundConfig.clip``.
        blind: whether the sum must be hidden from the server.
        min_colluders: how many colluding clients a round must withstand at least.
        min_honest: how many clients of every sum must be left beside the colluders, because this client's noise counts on
            theirs.
    """

    min_clients: int
    min_threshold: int
    max_update: float
    blind: bool
    min_colluders: int = 0
    min_honest: int = 1


def check_floors(config: RoundConfig, name: str, floors: Floors) -> None:
    """Refuse a round that is below this client's floors.

    Raises:
        AggregationAborted: SS-6001 with one detail per breach; SS-6003 when the client is not in the roster.
    """
    if name not in config.roster:
        raise AggregationAborted(
            "SS-6003",
            "this client is not in the round's roster",
            hint="Compare the job's roster with the certificate's name.",
        )
    breaches = []
    if config.threshold < floors.min_threshold:
        breaches.append(f"threshold {config.threshold} is below this client's floor of {floors.min_threshold}")
    if config.min_clients < floors.min_clients:
        breaches.append(f"min_clients {config.min_clients} is below this client's floor of {floors.min_clients}")
    if config.colluders < floors.min_colluders:
        breaches.append(f"colluders {config.colluders} is below this client's floor of {floors.min_colluders}")
    if floors.min_honest > 1 and config.honest < floors.min_honest:
        breaches.append(
            f"a sum may hold {config.honest} honest clients; this client's noise counts on {floors.min_honest}"
        )
    if config.clip > floors.max_update:
        breaches.append(f"clip {config.clip:g} is above this client's max_update of {floors.max_update:g}")
    if floors.blind and not config.blind:
        breaches.append("the sum would be visible to the server; this client takes part in blind rounds only")
    if breaches:
        raise AggregationAborted(
            "SS-6001", f"the round breaks this client's policy: {breaches[0]}", details=tuple(breaches) if len(breaches) > 1 else (),
            hint="Change the job, or, after thought, [aggregation] of the policy.",
        )  # fmt: skip
