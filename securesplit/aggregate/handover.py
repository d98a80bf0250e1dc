"""What a client that was away for whole rounds gets from the others: the values that all hold alike where a round begins.

It asks by a key that it draws and signs. Each of the others seals an answer for that key: the round, the digest of the
values under its own signature, and, if it was asked for them, the values. They count once enough clients have signed the same
digest of the same round, so the server, who hands all of this on, and a few clients on its side can change nothing; and
none but the one that asked can read it. Pure: the network, and who asks whom, are the callers' affair.

    T = H("handover|", job, model, asker, donor, round asked for, asker's key)
    key of the box = HKDF-SHA256(X25519, salt T), donor's key fresh for it; ChaCha20-Poly1305

How many are enough: one fewer than the job's threshold. The asker is the last one that a sum needs, so what it takes on their
word is no more than a sum with them takes: among ``threshold`` clients one at least, besides it, is honest wherever sums are safe.

What this does not protect: whoever is on the roster may ask, and then holds what every client of the sums holds. The server
sees who asked, who answered, and how much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import msgpack
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from securesplit.aggregate.keys import Channel, bind, open_box, seal_box, share_key
from securesplit.aggregate.roster import Verify
from securesplit.errors import AggregationAborted, SecureSplitError

__all__ = ["Answers", "Common", "Sealed", "Wanted", "common_of", "seal_answer"]


@dataclass(frozen=True, slots=True, eq=False)
class Common:
    """What all clients hold alike where a round begins.

    Attributes:
        round: which one, from 0; the number of rounds before it.
        heard: see :class:`securesplit.aggregate.client.ClientRound`; of the last sum.
        values: (d,) float32, little-endian when they travel.
    """

    round: int
    heard: bytes = field(repr=False)
    values: npt.NDArray[np.float32] = field(repr=False)

    def digest(self, job: str, model: str) -> bytes:
        """SHA-256 of all of it, and of the job and the model that it belongs to."""
        return bind("common", b"", (*_about(job, model), _number(self.round), self.heard, self.payload))

    @property
    def payload(self) -> bytes:
        """The values as bytes."""
        return self.values.astype("<f4").tobytes()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a client asks.

    Attributes:
        job, model: digests, of the session.
        round: the next one of who asks.
        name: who asks.
        key: X25519 public, 32 bytes, fresh.
    """

    job: str
    model: str
    round: int
    name: str
    key: bytes

    @property
    def statement(self) -> bytes:
        """What the asker signs."""
        parts = (*_about(self.job, self.model), _number(self.round), self.name.encode(), self.key)
        return b"securesplit.join.v1|" + bind("join", b"", parts)

    def transcript(self, donor: str) -> bytes:
        """T of the module, 32 bytes."""
        parts = (*_about(self.job, self.model), self.name.encode(), donor.encode(), _number(self.round), self.key)
        return bind("handover", b"", parts)

    def signed(self, donor: str, number: int, digest: bytes) -> bytes:
        """What a donor signs about the values."""
        return b"securesplit.handover.v1|" + bind("held", self.transcript(donor), (_number(number), digest))


@dataclass(frozen=True, slots=True)
class Sealed:
    """An answer on its way."""

    key: bytes
    box: bytes = field(repr=False)


class _Content(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)
    certificate: Annotated[bytes, Field(min_length=1, max_length=4096)]
    round: Annotated[int, Field(ge=0, lt=1 << 31)]
    digest: Annotated[bytes, Field(min_length=32, max_length=32)]
    signature: Annotated[bytes, Field(min_length=8, max_length=1024)]
    heard: Annotated[bytes, Field(max_length=64)]
    values: Annotated[bytes, Field(repr=False)]


def common_of(number: int, heard: bytes, payload: bytes) -> Common:
    """From bytes.

    Raises:
        ValueError: when they are no float32 numbers.
    """
    return Common(number, heard, np.frombuffer(payload, dtype="<f4").astype(np.float32))


def seal_answer(
    wanted: Wanted,
    common: Common,
    *,
    name: str,
    certificate: bytes,
    values: bytes,
    sign: Callable[[bytes], bytes],
    randomness: Callable[[int], bytes],
) -> Sealed:
    """A donor's answer.

    Args:
        wanted: whose signature the donor has verified.
        common: what it holds.
        name, certificate: of the donor; DER.
        values: those of ``common`` as they were released, or nothing, where their digest is enough.
        sign: by the donor's certificate key.
        randomness: a CSPRNG.

    Raises:
        AggregationAborted: SS-6003 for a degenerate key of the asker.
    """
    digest = common.digest(wanted.job, wanted.model)
    content = _Content(
        certificate=certificate, round=common.round, digest=digest, signature=sign(wanted.signed(name, common.round, digest)),
        heard=common.heard, values=values,
    )  # fmt: skip
    channel, transcript = Channel(randomness(32)), wanted.transcript(name)
    key = share_key(channel, wanted.key, transcript, sender=name, receiver=wanted.name, other=wanted.name)
    packed = msgpack.packb(content.model_dump(), use_bin_type=True)
    return Sealed(channel.public, seal_box(key, packed, transcript, sender=name, receiver=wanted.name))


class Answers:
    """Collects what others answer, until it counts.

    Args:
        wanted: what was asked.
        channel: with the private part of its key.
        roster: who may answer.
        needed: how many must have signed the same.
        verify: checks a certificate, its name and its signature; raises.

    Attributes:
        refused: those of the roster in whose name something came that was no answer, in order; for people to read.
    """

    def __init__(
        self, wanted: Wanted, channel: Channel, *, roster: tuple[str, ...], needed: int, verify: Verify
    ) -> None:
        self.refused: list[str] = []
        self._wanted, self._channel = wanted, channel
        self._roster = frozenset(roster) - {wanted.name}
        self._needed, self._verify = needed, verify
        self._said: dict[str, tuple[int, bytes]] = {}  # Of each, what it said last.
        self._values: dict[str, Common] = {}

    @property
    def agreed(self) -> int:
        """How many have signed the same so far; at most as many as are needed, where values are all that is missing."""
        said = list(self._said.values())
        return min(max((said.count(one) for one in said), default=0), self._needed)

    def take(self, name: str, sealed: Sealed) -> Common | None:
        """One answer; what counts by now, or None. An answer that is none is passed over: another's may be good.

        Args:
            name: whose it is said to be.
            sealed: as it came.
        """
        try:
            content = self._opened(name, sealed)
            signed = self._wanted.signed(name, content.round, content.digest)
            self._verify(name, content.certificate, content.signature, signed)
        except SecureSplitError:
            if name in self._roster and name not in self.refused:
                self.refused.append(name)
            return None
        if content.round < self._wanted.round:  # It is behind itself.
            return None
        said = self._said[name] = content.round, content.digest
        self._keep(name, content)
        if sum(other == said for other in self._said.values()) < self._needed:
            return None
        return next((self._values[n] for n, other in self._said.items() if other == said and n in self._values), None)

    def _opened(self, name: str, sealed: Sealed) -> _Content:
        if name not in self._roster:
            raise AggregationAborted("SS-6003", "a client outside the roster answers")
        w, transcript = self._wanted, self._wanted.transcript(name)
        key = share_key(self._channel, sealed.key, transcript, sender=name, receiver=w.name, other=name)
        packed = open_box(key, sealed.box, transcript, sender=name, receiver=w.name)
        try:
            return _Content.model_validate(msgpack.unpackb(packed, raw=False))
        except (ValueError, msgpack.UnpackException, ValidationError, RecursionError):
            raise AggregationAborted("SS-6011", f"the answer of {name} is malformed") from None

    def _keep(self, name: str, content: _Content) -> None:
        """The values of an answer, when they are what its digest says; in the place of those that it gave before."""
        self._values.pop(name, None)
        if not content.values or len(content.values) % 4:
            return
        common = common_of(content.round, content.heard, content.values)
        if common.digest(self._wanted.job, self._wanted.model) == content.digest:
            self._values[name] = common


def _about(job: str, model: str) -> tuple[bytes, bytes]:
    return job.encode(), model.encode()


def _number(number: int) -> bytes:
    return number.to_bytes(8, "big")
