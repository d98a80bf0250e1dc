"""The audit of a policy whose clients share the noise of a sum."""

import pytest

from securesplit.audit.run import run_audit
from tests.e2e.house import ROUND, policy_of

SHARED = ROUND.replace("clip = 0.05", "clip = 0.05\nhonest = 2").replace("1000.0", "32.0")


@pytest.mark.slow  # Half a minute: the parts are the same as in the default tests, the policy is another.
def test_shared_noise_is_audited_as_the_sum_that_the_server_sees():
    verdict = run_audit(policy_of(SHARED, blind=True))
    assert verdict.ok, verdict.red
