"""`securesplit policy`: exit codes, one JSON object, and all faults of a file at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from securesplit.policy.load import load_policy
from securesplit.privacy.plan import plan_for
from tests.e2e.house import FROZEN, policy_text

SHIPPED = Path(__file__).resolve().parent.parent.parent / "policies"


@pytest.mark.parametrize("name", ["strict", "balanced", "lab"])
def test_the_shipped_policies_are_valid_and_say_whom_they_are_for(command, name):
    path = SHIPPED / f"{name}.toml"
    code, out, err = command("policy", "check", path, "--output", "json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found.keys() == {"valid", "errors", "warnings", "digest"}
    assert (found["valid"], found["errors"]) == (True, [])
    assert found["digest"] == load_policy(path).digest
    assert any("UnsafeNoPrivacy" in w for w in found["warnings"]) == (name == "lab")
    code, out, _ = command("policy", "show", path)
    policy = load_policy(path)
    assert code == 0
    assert policy.purpose in out
    assert policy.cost in out


def test_show_prints_the_noise_that_follows_from_the_budget(command):
    code, out, _ = command("policy", "show", SHIPPED / "balanced.toml", "--output", "json")
    channels = {c["channel"]: c for c in json.loads(out)["channels"]}
    assert code == 0
    assert channels.keys() == {"cut", "decode"}
    plan = plan_for(load_policy(SHIPPED / "balanced.toml").privacy)
    assert channels["cut"]["sigma"] == plan.cut.sigma
    # sigma = 2 C / mu, from the printed numbers alone.
    for channel in channels.values():
        assert channel["sigma"] == pytest.approx(2 * channel["clip"] / channel["mu"])


FAULTS = {
    "unknown key": ("epsilon = 8.0", "epsilon = 8.0\nepsilom = 1.0"),
    "missing unit": ('unit = "sequence"\n', ""),
    "negative epsilon": ("epsilon = 8.0", "epsilon = -8.0"),
    "not a number": ("epsilon = 8.0", "epsilon = nan"),
    "infinite": ("delta = 1e-5", "delta = inf"),
    "a text where a number is due": ("epsilon = 8.0", 'epsilon = "8"'),
    "shares above one": ("share = 0.6", "share = 0.7"),
    "a sum that the server sees": ("blind = true", "blind = false"),
    "buckets that fall": ("[4, 8, 16]", "[16, 8]"),
    "two clients": ("min_clients = 3", "min_clients = 2"),
    "another mechanism": ('mechanism = "gaussian"', 'mechanism = "none"'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_policy_is_refused_with_exit_2(command, tmp_path, fault):
    old, new = FAULTS[fault]
    text = policy_text(FROZEN)
    assert text.count(old) == 1
    path = tmp_path / "p.toml"
    path.write_text(text.replace(old, new))
    code, out, err = command("policy", "check", path, "--output", "json")
    found = json.loads(out)
    assert (code, err) == (2, "")
    assert (found["valid"], found["digest"]) == (False, None)
    assert len(found["errors"]) == 1
    code, out, err = command("policy", "check", path)
    assert (code, out) == (2, "")
    assert err.startswith("error[SS-1102]: ")
    assert "\nhint: " in err


def test_all_faults_are_reported_at_once(command, tmp_path):
    text = policy_text(FROZEN).replace("epsilon = 8.0", "epsilon = -1.0\nextra = 1").replace('unit = "sequence"\n', "")
    path = tmp_path / "p.toml"
    path.write_text(text.replace("min_clients = 3", "min_clients = 1"))
    code, out, _ = command("policy", "check", path, "--output", "json")
    errors = json.loads(out)["errors"]
    assert code == 2
    for key in ("privacy.epsilon", "privacy.extra", "privacy.unit", "aggregation.min_clients"):
        assert sum(line.startswith(f"{key}:") for line in errors) == 1, key


def test_files_that_are_no_policies(command, tmp_path):
    (tmp_path / "broken.toml").write_text("[privacy\n")
    (tmp_path / "huge.toml").write_text("#" * (2 << 20))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    for name, code in (("absent", "SS-1100"), ("broken", "SS-1101"), ("huge", "SS-1100"), ("bytes", "SS-1100")):
        exit_code, out, err = command("policy", "check", tmp_path / f"{name}.toml")
        assert (exit_code, out) == (2, "")
        assert err.startswith(f"error[{code}]: ")
        assert "Traceback" not in err
