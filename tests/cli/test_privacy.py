"""`securesplit privacy`: the keys that callers rely on, held against numerical integration, and the ledger's account."""

from __future__ import annotations

import json
import math
import sqlite3

import mpmath
import pytest

from securesplit.policy.load import parse_policy
from securesplit.privacy.gate import Gate
from securesplit.privacy.ledger import Ledger
from securesplit.privacy.plan import plan_for
from tests.e2e.house import FROZEN, policy_text


def delta_of(epsilon: float, mu: float) -> float:
    """delta(epsilon) of a Gaussian mechanism by integrating max(0, p - e^epsilon q); no closed form is used."""
    with mpmath.workdps(30):
        crossing = mpmath.mpf(epsilon) / mu + mpmath.mpf(mu) / 2
        return float(
            mpmath.quad(
                lambda z: mpmath.npdf(z, mu, 1) - mpmath.exp(epsilon) * mpmath.npdf(z, 0, 1),
                [crossing, crossing + 2, crossing + 6, crossing + 14],
            )
        )


@pytest.mark.parametrize(("epsilon", "delta", "releases"), [(8.0, 1e-5, 1), (1.0, 1e-6, 7), (0.3, 1e-4, 100)])
def test_calibrate(command, epsilon, delta, releases):
    code, out, err = command(
        "privacy", "calibrate", "--epsilon", epsilon, "--delta", delta, "--unit", "sequence", "--releases", releases,
        "--output", "json",
    )  # fmt: skip
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found.keys() >= {"mu", "sigma_over_clip", "noise_multiplier", "sensitivity_over_clip", "epsilon", "delta"}
    assert (found["sensitivity_over_clip"], found["epsilon"], found["delta"]) == (2.0, epsilon, delta)
    assert (found["unit"], found["relation"], found["releases"]) == ("sequence", "replace-one", releases)
    # All releases together have mu; one has sensitivity 2 C, so its noise is sqrt(k) 2 C / mu.
    assert found["sigma_over_clip"] == pytest.approx(2 * math.sqrt(releases) / found["mu"], rel=1e-9)
    assert found["noise_multiplier"] == found["sigma_over_clip"] / found["sensitivity_over_clip"]
    spent = delta_of(epsilon, found["mu"])
    assert 0.999 * delta < spent <= delta * (1 + 1e-6)


def test_calibrate_refuses_what_makes_no_sense(command):
    for epsilon, delta, releases in (("-1", "1e-5", "1"), ("1", "2", "1"), ("1", "1e-5", "0"), ("nan", "1e-5", "1")):
        code, out, err = command(
            "privacy", "calibrate", "--epsilon", epsilon, "--delta", delta, "--unit", "sequence", "--releases", releases
        )
        assert (code, out) == (2, ""), (epsilon, delta, releases)
        assert err.startswith("error[SS-1531]: ")
    for wrong in (("--unit", "token"), ("--unit", "sequence", "--relation", "add-remove")):
        assert command("privacy", "calibrate", "--epsilon", "1", "--delta", "1e-5", *wrong)[0] == 2


def test_the_ledgers_account(command, tmp_path):
    import torch

    policy = parse_policy(policy_text(FROZEN))
    plan = plan_for(policy.privacy)
    ledger = Ledger(tmp_path / "ledger")
    gate = Gate(policy, ledger)
    gate.release(torch.ones(2, 4, 8), at="cut", records=("a", "b"))
    gate.release(torch.ones(1, 1, 8), at="decode")
    head = ledger.head()
    ledger.close()
    code, out, err = command("privacy", "ledger", "--ledger", tmp_path / "ledger", "--output", "json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["unit"], found["relation"], found["delta"], found["head"]) == ("sequence", "replace-one", 1e-5, head)
    assert found["mu"] == pytest.approx(math.hypot(plan.cut.mu, plan.decode.mu))
    assert {c["channel"]: c["releases"] for c in found["channels"]} == {"cut": 2, "decode": 1}
    assert delta_of(found["epsilon"], found["mu"]) == pytest.approx(1e-5, rel=1e-3)
    code, out, _ = command("privacy", "ledger", "--ledger", tmp_path / "ledger")
    assert code == 0
    assert "unit sequence, replace-one" in out


def test_an_absent_and_a_changed_ledger(command, tmp_path):
    code, _, err = command("privacy", "ledger", "--ledger", tmp_path / "nowhere")
    assert (code, err.split(":")[0]) == (2, "error[SS-1532]")
    assert not (tmp_path / "nowhere").exists()
    import torch

    ledger = Ledger(tmp_path / "ledger")
    Gate(parse_policy(policy_text(FROZEN)), ledger).release(torch.ones(1, 4, 8), at="cut", records=("a",))
    ledger.close()
    with sqlite3.connect(tmp_path / "ledger" / "ledger.sqlite") as raw:
        raw.execute("UPDATE entries SET units = 1")
    raw.close()
    code, out, err = command("privacy", "ledger", "--ledger", tmp_path / "ledger", "--output", "json")
    assert (code, out) == (1, "")
    assert err.startswith("error[SS-1521]: ")
