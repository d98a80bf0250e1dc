"""What each mode learns and sums, and what of it two digests cover: the one that the server reads, and the hidden one."""

from __future__ import annotations

import numpy as np
import pytest

from securesplit.client.sharing import turn_of
from securesplit.model.lora import adapter_layout, read_adapters, write_adapters
from securesplit.protocol.job import Job
from tests.e2e.house import FROZEN, LAB, policy_of

MODES = ("alternating", "frozen-a", "share-a", "core", "naive")


def job_of(house, sharing) -> Job:
    raw = house.job().model_dump(mode="json")
    raw["adapters"] |= {"sharing": sharing} | ({"inexact": True} if sharing == "naive" else {})
    return Job.model_validate(raw)


@pytest.fixture
def site(house, open_ledger):
    """``site(sharing, privacy)``: a client of such a job."""
    ledger = open_ledger()

    def make(sharing, privacy=LAB):
        held = None if privacy == LAB else ledger
        return house.joined(job_of(house, sharing), policy_of(privacy), ledger=held)[0]

    return make


def nudge(part, factor):
    layout = adapter_layout(part, factor)
    write_adapters(part, layout, read_adapters(part, layout) + np.float32(0.25))


def moved_by(client, digest):
    """Which (part, factor), moved by a quarter, change a digest."""
    found, before = set(), digest()
    for part in (client.front, client.back):
        for factor in ("A", "B", "core"):
            layout = adapter_layout(part, factor)
            if not layout.tensors:
                continue
            kept = read_adapters(part, layout)
            nudge(part, factor)
            if digest() != before:
                found.add((part.role, factor))
            write_adapters(part, layout, kept)
    assert digest() == before
    return found


def both(*factors):
    return {(role, factor) for role in ("front", "back") for factor in factors}


def test_what_is_learnt_and_what_is_summed():
    told = {mode: [(turn_of(mode, n).learned, turn_of(mode, n).summed) for n in range(3)] for mode in MODES}
    assert told == {
        "alternating": [("B", "B"), ("A", "A"), ("B", "B")],
        "frozen-a": [("B", "B")] * 3,
        "share-a": [("both", "A")] * 3,
        "core": [("core", "core")] * 3,
        "naive": [("both", "both")] * 3,
    }


ALIKE = {
    "alternating": both("A", "B"), "frozen-a": both("A", "B"), "share-a": both("A"), "core": both("A", "B", "core"),
    "naive": both("A", "B"),
}  # fmt: skip


@pytest.mark.parametrize("sharing", MODES)
@pytest.mark.parametrize("privacy", [LAB, FROZEN], ids=["open", "frozen"])
def test_the_hidden_digest_covers_all_that_must_be_equal_and_no_more(site, sharing, privacy):
    client, twin = site(sharing, privacy), site(sharing, privacy)
    factor = turn_of(sharing, 1).summed
    assert len(client.alike_digest(1, factor)) == 32
    assert client.alike_digest(1, factor) == twin.alike_digest(1, factor)
    assert client.alike_digest(1, factor) != client.alike_digest(2, factor)
    assert client.alike_digest(1, factor).hex() != client.frozen_digest(1, factor)
    assert moved_by(client, lambda: client.alike_digest(1, factor)) == ALIKE[sharing]


@pytest.mark.parametrize("sharing", MODES)
def test_in_open_the_server_reads_a_digest_of_all_that_is_common(site, sharing):
    client, factor = site(sharing), turn_of(sharing, 1).summed
    assert moved_by(client, lambda: client.frozen_digest(1, factor)) == ALIKE[sharing]


@pytest.mark.parametrize("sharing", MODES)
def test_in_frozen_the_server_reads_a_digest_of_public_constants_alone(site, sharing):
    client, factor = site(sharing, FROZEN), turn_of(sharing, 1).summed
    constant = {"frozen-a": both("A"), "core": both("A", "B")}.get(sharing, set())
    assert moved_by(client, lambda: client.frozen_digest(1, factor)) == constant


def test_no_two_modes_meet_in_one_sum(site):
    clients = [site(mode) for mode in MODES if mode != "core"]
    assert len({client.frozen_digest(0, "B") for client in clients}) == 4
    assert len({client.alike_digest(0, "B") for client in clients}) == 4


@pytest.mark.parametrize("sharing", MODES)
def test_reset_gives_back_the_public_start(site, sharing):
    client = site(sharing)
    start = client.read()
    for part in (client.front, client.back):
        for factor in ("A", "B", "core"):
            nudge(part, factor)
    assert not np.array_equal(client.read(), start)
    client.reset()
    assert np.array_equal(client.read(), start)
