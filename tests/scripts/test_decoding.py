"""The measurement of sessions, with a tiny model: real processes, every text compared, and figures that add up."""

from __future__ import annotations

import pytest

from scripts.decoding.sessions import Unsplit, measure, prepare
from securesplit.model.store import load_tokenizer
from tests.e2e.house import build_house, build_model


class Other(Unsplit):
    """An unsplit model that says something else."""

    def tokens(self, prompts, count):
        return [[token + 1 for token in row] for row in super().tokens(prompts, count)]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return build_house(tmp_path_factory.mktemp("decoding") / "house")


@pytest.fixture(scope="module")
def site(house):
    return prepare(house.root / "bench", str(house.model), 2, front=1, back=1)


PROMPTS = ["w4 w5 w6", "w7 w8 w9"]


def test_every_cell_is_measured_and_every_text_compared(house, site):
    unsplit = Unsplit(build_model(), load_tokenizer(house.model))
    found = measure(site, unsplit, PROMPTS, at_once=(1, 2), tokens=4, rounds=2)
    assert [(cell.what, cell.texts) for cell in found] == [
        ("unsplit, one batch", 1),
        ("split, one session each", 1),
        ("unsplit, one batch", 2),
        ("split, one session each", 2),
        ("split, one batch", 2),
    ]
    assert all(0 < cell.least <= cell.tokens_per_second <= cell.most for cell in found)


@pytest.mark.slow
def test_a_text_that_is_not_the_unsplit_models_is_told(house, site):
    with pytest.raises(AssertionError, match="unsplit model's"):
        measure(site, Other(build_model(), load_tokenizer(house.model)), PROMPTS, at_once=(1,), tokens=2, rounds=1)
