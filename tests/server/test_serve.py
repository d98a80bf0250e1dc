"""What `serve` refuses before it listens."""

from __future__ import annotations

import pytest

from securesplit.errors import PolicyDenied
from securesplit.server.serve import serve
from tests.e2e.house import policy_of


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"colluders": 1}, "colluders"),
        ({"clip": 2.0}, "max_update"),
        ({"roster": ("alice", "bob", "dan", "eve")}, "half"),
    ],
)
def test_a_job_that_no_client_could_take_is_refused_with_every_reason(house, changes, word):
    job = house.job()
    job = job.model_copy(update={"sums": job.sums.model_copy(update=changes)})
    with pytest.raises(PolicyDenied, match="SS-2001") as refused:
        serve(job, policy_of(), keys=house.keys / "gpu", listen="127.0.0.1:0", ready=lambda *_: pytest.fail("listens"))
    assert any(word in detail for detail in refused.value.details)
