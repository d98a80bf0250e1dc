"""Several clients' requests as one computation: what fails for one of them fails for nobody else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from securesplit.protocol.messages import Blob, Forward
from securesplit.server.connection import Together
from securesplit.server.course import Ask
from securesplit.server.requests import Requests
from securesplit.server.steps import Steps

ROWS = Blob(dtype="int8", shape=(1, 4), data=bytes(4 + 4))


def asks() -> tuple[Ask, ...]:
    return tuple(Ask(n, name, Forward(step=0, lengths=(1,), learn=True, hidden=ROWS)) for n, name in enumerate("ab", 1))


def together(forward) -> Together:
    engine = SimpleNamespace(forward=forward, waiting=frozenset())
    done = Requests(lambda: engine, None, "int8", Steps(lambda: engine, "int8")).run(asks()).run()
    assert isinstance(done, Together)
    return done


def test_an_answer_that_cannot_be_written_is_its_owners_alone():
    """Rows of one client that make B overflow must not close the connections of all."""
    done = together(lambda batches, learn: (torch.ones(1, 4), torch.full((1, 4), float("nan"))))
    assert [answer.client for answer in done.answers] == ["a"]
    assert [ask.name for ask in done.asks] == ["b"]
    assert done.error.code == "SS-4019"


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_a_failing_computation_is_told_to_everybody_in_it(error):
    def fail(batches, learn):
        raise error

    done = together(fail)
    assert [ask.name for ask in done.asks] == ["a", "b"]
    assert done.error.code == "SS-4190"
