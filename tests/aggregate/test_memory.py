"""What a client holds at most while it takes part in a sum, as tracemalloc sees it; NumPy reports its buffers to it.

The promise is three vectors of ring words plus 16 MiB beyond the caller's own update. Here the 16 MiB are 2: what does
not grow with d is scratch space for pieces, keys, and messages of a small roster.
"""

import gc
import tracemalloc
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from securesplit.aggregate.fixedpoint import open_ring, quantise, vector_digest, word_type
from securesplit.aggregate.masks import add_streams

DIM = 1 << 22
SMALL = 2 << 20
ROSTER = ("amir", "bea", "chloe")


@dataclass
class Held:
    """Bytes beyond those held at the beginning."""

    start: int

    @property
    def peak(self) -> int:
        return tracemalloc.get_traced_memory()[1] - self.start

    @property
    def now(self) -> int:
        return tracemalloc.get_traced_memory()[0] - self.start


@contextmanager
def measured():
    gc.collect()
    tracemalloc.start()
    try:
        yield Held(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()


def update_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.3, DIM).astype(np.float32)


@pytest.fixture
def recorded(cohort_of):
    """The server's messages to one client in a whole round, and that client once more, at its beginning."""

    def run(bits: int, *, blind: bool):
        changes = {"roster": ROSTER, "threshold": 2, "min_clients": 3, "dim": DIM, "blind": blind, "ring_bits": bits}
        cohort = cohort_of(seed="memory", **changes)
        cohort.updates = {name: update_of(seed) for seed, name in enumerate(ROSTER)}
        cohort.run()
        assert not cohort.failed
        messages = [(stage, body, vector) for to, stage, body, vector in cohort.down if to == "amir"]
        return messages, cohort.client("amir", seed="memory"), cohort.clients["amir"].result

    return run


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("bits", [32, 64])
def test_a_client_holds_at_most_three_vectors_in_a_whole_round(recorded, bits, blind):
    """Its contribution, the vector that it sends or the one that arrives, and one more."""
    messages, client, before = recorded(bits, blind=blind)
    update, limit = update_of(0), 3 * DIM * bits // 8 + SMALL
    with measured() as held:
        client.contribute(update, 1)
        client.advertise()
        for stage, body, vector in messages:
            # As it comes from the network: bytes that nobody else holds.
            arrived = None if vector is None else np.frombuffer(vector.tobytes(), dtype=vector.dtype)
            sent = client.receive(stage, body, arrived)
            assert held.peak <= limit, f"stage {stage}: {held.peak / (DIM * bits // 8):.2f} vectors"
            del sent, arrived
        assert client.result is not None
        for _ in client.result.pieces():
            pass
        assert held.peak <= limit
    assert np.array_equal(client.result.ring_sum, before.ring_sum)


@pytest.mark.parametrize("bits", [32, 64])
def test_the_work_on_a_vector_needs_no_room_that_grows_with_it(bits):
    vector, update = DIM * bits // 8, update_of(1)
    with measured() as held:
        ring, _ = quantise(update, 2, scale=1000, clip=0.5, w_max=10, bits=bits)
        assert held.peak <= vector + SMALL
        tracemalloc.reset_peak()
        add_streams(ring, [bytes(32)] * 3, [bytes(32)])
        add_streams(ring, [bytes(32)], [bytes(32)] * 3)
        vector_digest(ring)
        assert held.peak <= vector + SMALL
        tracemalloc.reset_peak()
        for silent in (False, True):
            opened = open_ring(ring, ("a", "b"), scale=1000, clip=0.5, w_max=10, silent=silent)
        for _ in opened.pieces():
            pass
        assert held.peak <= vector + SMALL
        tracemalloc.reset_peak()
        assert opened.mean.nbytes == 8 * DIM
        assert held.peak <= vector + 8 * DIM + SMALL


@pytest.mark.parametrize("bits", [32, 64])
def test_the_measure_sees_a_copy(bits):
    """Without this, a NumPy that stopped reporting would make every test above pass."""
    ring = np.zeros(DIM, dtype=word_type(bits))
    with measured() as held:
        kept = ring.copy()
        assert held.now >= kept.nbytes
