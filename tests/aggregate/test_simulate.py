"""The simulation tells the truth, also when the round is broken on purpose."""

import numpy as np
import pytest

from securesplit.aggregate import client, simulate, wire
from securesplit.aggregate.simulate import Drop, parse_drop
from securesplit.errors import InputError


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("stage", range(5))
def test_drops_leave_an_exact_sum(blind, stage):
    done = simulate.simulate(clients=7, threshold=4, dim=64, drops=(Drop(stage, 2),), blind=blind)
    assert (done.exact, done.aborted) == (True, None)
    assert done.survivors == (7 if stage > wire.MASKED else 5)
    assert done.finished == 5
    assert done.cpu_seconds > 0


def test_a_large_roster_and_many_drops():
    drops = tuple(Drop(stage, 2) for stage in range(5))
    done = simulate.simulate(clients=50, threshold=34, dim=10, drops=drops, blind=True)
    assert (done.exact, done.survivors, done.finished, done.aborted) == (True, 44, 40, None)
    assert done.degree < 49, "above 32 clients the graph is sparse"


@pytest.mark.parametrize(("bits", "backend"), [(64, "masks"), (32, "bfv"), (32, "ckks")])
def test_other_rings_and_backends_give_the_same_sum(bits, backend):
    done = simulate.simulate(clients=5, threshold=4, dim=50, drops=(Drop(2, 1),), backend=backend, ring_bits=bits)
    assert (done.exact, done.survivors, done.aborted) == (True, 4, None)


@pytest.mark.parametrize("stage", range(5))
def test_too_many_drops_abort(stage):
    done = simulate.simulate(clients=7, threshold=4, dim=8, drops=(Drop(stage, 4),))
    assert (done.exact, done.survivors, done.finished, done.aborted) == (False, 0, 0, "SS-6010")


def test_everybody_may_vanish():
    assert simulate.simulate(clients=3, threshold=2, dim=1, drops=(Drop(0, 3),)).aborted == "SS-6010"
    with pytest.raises(InputError) as error:
        simulate.simulate(clients=3, threshold=2, dim=1, drops=(Drop(0, 2), Drop(1, 2)))
    assert error.value.code == "SS-1603"


def test_a_wrong_sum_is_called_wrong(monkeypatch):
    original = client.quantise

    def off_by_one(update, weight, **grid):
        ring, clipped = original(update, weight, **grid)
        ring[0] += np.uint32(1)
        return ring, clipped

    monkeypatch.setattr(client, "quantise", off_by_one)
    assert simulate.simulate(clients=3, threshold=2, dim=8).exact is False


def test_upload_is_four_bytes_a_coordinate_and_a_little():
    done = simulate.simulate(clients=5, threshold=3, dim=200_000)
    assert 4.0 < done.bytes_per_param_up < 4.05


@pytest.mark.parametrize(
    ("text", "drop"), [("advertise:1", Drop(0, 1)), ("unmask:12", Drop(4, 12)), ("masked:0", Drop(2, 0))]
)
def test_drops_are_read(text, drop):
    assert parse_drop(text) == drop


@pytest.mark.parametrize(
    "text", ["masked", "masked:", "masked:x", "masked:-1", "late:1", ":1", "masked:1:2", "masked:99999", "masked:²"]
)
def test_bad_drops_are_refused(text):
    with pytest.raises(InputError) as error:
        parse_drop(text)
    assert error.value.code == "SS-1603"
