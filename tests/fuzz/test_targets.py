"""Every fuzz target with hypothesis: seeds, seeds with damage, and anything else. scripts/fuzz looks further."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

EXAMPLES = {"policy": 120, "certificate": 150}


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_taken(name):
    target = TARGETS[name]
    seeds = target.seeds()
    assert len(seeds) >= 2
    for seed in seeds:
        target(seed)
    accepted = 0
    for seed in seeds:
        try:
            target.run(seed)
        except target.declared:
            continue
        accepted += 1
    assert accepted >= 2  # A fuzzer that begins with refusals alone finds little.


def damaged(seed: bytes, at: int, gone: int, put: bytes) -> bytes:
    place = at % (len(seed) + 1)
    return seed[:place] + put + seed[place + gone :]


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_declared_errors_escapes(name):
    target = TARGETS[name]
    seeds = st.sampled_from(target.seeds())
    damage = st.builds(damaged, seeds, st.integers(0, 1 << 16), st.integers(0, 9), st.binary(max_size=6))

    @given(
        data=damage
        | damage.flatmap(
            lambda d: st.builds(damaged, st.just(d), st.integers(0, 1 << 16), st.integers(0, 9), st.binary(max_size=6))
        )
        | st.binary(max_size=200)
    )
    @settings(max_examples=EXAMPLES.get(name, 250), deadline=None, suppress_health_check=list(HealthCheck))
    def run(data: bytes) -> None:
        target(data)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_every_truncation_of_a_seed(name):
    target = TARGETS[name]
    for seed in target.seeds()[:4]:
        for end in range(0, len(seed), max(1, len(seed) // 60)):
            target(seed[:end])
