"""Hostile vectors in a round with homomorphic encryption: whoever sends one is out with a code, and the others get their sum."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import numpy as np
import pytest

from securesplit.aggregate import wire
from securesplit.aggregate.client import ClientRound
from securesplit.aggregate.config import Floors
from securesplit.aggregate.fixedpoint import vector_digest
from securesplit.aggregate.he_worker import HeWorker
from securesplit.aggregate.keys import statement
from securesplit.aggregate.server import ServerRound
from securesplit.errors import SecureSplitError
from tests.aggregate.conftest import Cohort, make_config, signed, stream

HEADER = 44


@pytest.fixture(scope="module")
def worker():
    with HeWorker() as one:
        yield one


class Encrypted(Cohort):
    """A cohort whose vectors are encrypted; eve's is what ``forge`` makes of it."""

    def __init__(self, worker: HeWorker, forge: Callable[[np.ndarray, list[np.ndarray]], np.ndarray]) -> None:
        self.worker, self.forge, self.frames, self.codes = worker, forge, [], {}
        super().__init__(make_config(threshold=4, min_clients=4, blind=True, backend="bfv"))
        self.server = ServerRound(self.config, self.verify, worker=worker)

    def client(self, name: str, *, seed: str | None = None, config=None, floors: Floors | None = None) -> ClientRound:
        return ClientRound(
            self.config, name, self.identities[name].public_key().public_bytes_raw(), sign=self.identities[name].sign,
            verify=self.verify, floors=Floors(min_clients=3, min_threshold=2, max_update=1.0, blind=False),
            persist=self.answered[name].append, randomness=os.urandom if seed is None else stream(f"{seed}|{name}"),
            worker=self.worker,
        )  # fmt: skip

    def signed_anew(self, body: bytes, vector: np.ndarray) -> bytes:
        """Eve is a client with a key of her own: what she sends, she signs."""
        said = wire.decode(wire.Masked, body).model_copy(update={"vector_digest": vector_digest(vector)})
        data = statement("masked", self.server._t2, wire.unsigned(said))
        return wire.encode(said.model_copy(update={"signature": self.identities["eve"].sign(data)}))

    def send(self, name: str, stage: int, body: bytes, vector: np.ndarray | None) -> list:
        if stage == 2 and vector is not None:
            if name == "eve":
                vector = self.forge(vector, self.frames)
                body = self.signed_anew(body, vector)
            else:
                self.frames.append(vector)
        try:
            return super().send(name, stage, body, vector)
        except SecureSplitError as error:  # The server's core closes that connection; the round loses that client.
            self.codes[name] = error.code
            return self.server.leave(name)


def flipped(frame: np.ndarray, at: int) -> np.ndarray:
    out = frame.copy()
    out[at] ^= 0xFF
    return out


FORGED: dict[str, tuple[Callable[[np.ndarray, list[np.ndarray]], np.ndarray], str]] = {
    "random bytes": (lambda f, _: np.frombuffer(os.urandom(f.size), np.uint8), "SS-6014"),
    "nothing": (lambda _f, _: np.zeros(0, np.uint8), "SS-6014"),
    "cut short": (lambda f, _: f[:-1], "SS-6014"),
    "a byte more": (lambda f, _: np.append(f, np.uint8(0)), "SS-6014"),
    "another scheme": (lambda f, _: flipped(f, 5), "SS-6014"),
    "another dimension": (lambda f, _: flipped(f, 16), "SS-6014"),
    "another key": (lambda f, _: flipped(f, 30), "SS-6014"),
    "a ciphertext of 4 GiB announced": (lambda f, _: np.concatenate([f[:HEADER], np.frombuffer(struct.pack("<I", 0xFFFFFFFF), np.uint8), f[HEADER + 4 :]]), "SS-6014"),
    "a ciphertext without SEAL's magic": (lambda f, _: flipped(f, HEADER + 4), "SS-6014"),
    "a ciphertext that says it is compressed": (lambda f, _: flipped(f, HEADER + 9), "SS-6014"),
    "parameters of another context": (lambda f, _: flipped(f, HEADER + 4 + 16 + 40), ""),
    "words instead of a frame": (lambda _f, _: np.arange(8, dtype=np.uint32), "SS-6014"),
}  # fmt: skip


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_frame_costs_its_sender_the_round_and_nobody_else(worker, what):
    forge, code = FORGED[what]
    cohort = Encrypted(worker, forge).run()
    honest = [name for name in cohort.config.roster if name != "eve"]
    assert worker.pid is not None
    if code:
        assert cohort.codes == {"eve": code}
        assert {n: type(e).__name__ for n, e in cohort.failed.items() if n != "eve"} == {}
        want = cohort.plain_sum(honest)
        assert [signed(cohort.clients[n].result.ring_sum) for n in honest] == [want] * len(honest)
    else:  # Whichever layer of the process finds it: never a wrong sum.
        for name in honest:
            result = cohort.clients[name].result
            assert result is None or signed(result.ring_sum) in (
                cohort.plain_sum(honest),
                cohort.plain_sum(cohort.config.roster),
            )


def test_another_clients_frame_sent_as_ones_own_is_no_way_to_a_second_sum(worker):
    """A replayed ciphertext is a good one; what it adds is another's masked words, which the masks then do not cancel."""
    cohort = Encrypted(worker, lambda frame, frames: frames[0] if frames else frame).run()
    for name in ("amir", "bea", "chloe", "dan"):
        result = cohort.clients[name].result
        if result is not None:
            assert signed(result.ring_sum) != cohort.plain_sum(["amir", "bea", "chloe", "dan"])
