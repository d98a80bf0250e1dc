"""`securesplit policy`: exit codes, one JSON object, and all faults of a file at once."""

from __future__ import annotations

import json
import re
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
    assert found.keys() == {"valid", "errors", "faults", "warnings", "findings", "digest"}
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


def test_a_policy_with_five_faults_reports_all_five_with_table_key_and_line(command, tmp_path):
    text = policy_text(FROZEN)
    for old, new in (
        ("epsilon = 8.0", "epsilon = -1.0"), ("min_clients = 3", 'min_clients = "3"'), ("blind = true", "blnd = true"),
        ("clip = 4.0", "clip = 0.0"),
    ):  # fmt: skip
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = tmp_path / "p.toml"
    path.write_text(text)
    code, out, _ = command("policy", "check", path, "--output", "json")
    found = json.loads(out)
    assert code == 2
    assert {(f["table"], f["key"]) for f in found["faults"]} == {
        ("privacy", "epsilon"), ("privacy.activations", "clip"), ("aggregation", "min_clients"), ("aggregation", "blind"),
        ("aggregation", "blnd"),
    }  # fmt: skip
    assert len(found["errors"]) == 5
    lines = text.splitlines()
    for fault in found["faults"]:
        assert fault["file"] == str(path)
        named = lines[fault["line"] - 1]
        assert named.startswith(fault["key"]) or named == f"[{fault['table']}]"
    _, _, err = command("policy", "check", path)
    assert err.count("\n  - line ") == 5


def test_findings_fail_only_when_asked_to(command):
    code, out, _ = command("policy", "check", SHIPPED / "lab.toml", "--output", "json")
    assert code == 0
    assert [f["severity"] for f in json.loads(out)["findings"]].count("danger") == 1
    for policy, severity, wanted in (("lab", "danger", 1), ("strict", "warning", 0), ("strict", "note", 1)):
        code, _, err = command("policy", "check", SHIPPED / f"{policy}.toml", "--fail-on", severity)
        assert code == wanted
        assert ("SS-1590" in err) == bool(wanted)
    code, out, _ = command("policy", "check", SHIPPED / "balanced.toml", "--records", 10**6, "--output", "json")
    assert any(w.startswith("privacy.delta: ") for w in json.loads(out)["warnings"])


def test_diff_names_each_change_and_its_effect(command, tmp_path):
    code, out, err = command("policy", "diff", SHIPPED / "strict.toml", SHIPPED / "balanced.toml", "--output", "json")
    found = json.loads(out)
    assert (code, err, found["effect"]) == (0, "", "loosens")
    effects = {change["path"]: change["effect"] for change in found["changes"]}
    assert effects == {
        "name": "neutral", "purpose": "neutral", "cost": "neutral", "privacy.epsilon": "loosens", "privacy.delta": "loosens",
        "privacy.generation": "loosens", "privacy.activations.share": "neutral",
    }  # fmt: skip
    assert found["budget"]["mu"][0] < found["budget"]["mu"][1]
    smaller = {"delta": 1e-6, "unit": "sequence", "relation": "replace-one"}
    assert found["budget"]["meaning"] == [smaller, smaller], "both are compared at the smaller delta"
    assert found["before"]["digest"] == load_policy(SHIPPED / "strict.toml").digest
    code, _, err = command("policy", "diff", SHIPPED / "strict.toml", SHIPPED / "balanced.toml", "--forbid", "loosens")
    assert code == 1
    assert err.startswith("error[SS-1591]: 3 change(s)")
    code, out, _ = command("policy", "diff", SHIPPED / "strict.toml", SHIPPED / "strict.toml")
    assert (code, "neutral, 0 change(s)" in out) == (0, True)
    claim = "at delta 1e-06, unit sequence, replace-one"
    assert re.search(rf"epsilon 2 -> 2 {claim}$", out, re.MULTILINE)
    (tmp_path / "user.toml").write_text(
        (SHIPPED / "strict.toml").read_text().replace('unit = "sequence"', 'unit = "user"', 1)
    )
    _, out, _ = command("policy", "diff", SHIPPED / "strict.toml", tmp_path / "user.toml")
    assert f"{claim} -> {claim.replace('sequence', 'user')}" in out
    assert "they are not one quantity" in out
    assert command("policy", "diff", SHIPPED / "lab.toml", SHIPPED / "lab.toml")[0] == 0


def test_negotiate_writes_the_strictest_and_says_whether_a_client_would_join(command, tmp_path):
    out_file = tmp_path / "agreed.toml"
    code, out, _ = command(
        "policy", "negotiate", SHIPPED / "balanced.toml", SHIPPED / "strict.toml", "--out", out_file, "--output", "json"
    )
    found = json.loads(out)
    assert (code, found["would_join"]) == (0, True)
    assert load_policy(out_file).digest == found["digest"] == load_policy(SHIPPED / "strict.toml").digest
    assert not [c for c in (*found["from_own"], *found["from_other"]) if c["effect"] == "loosens"]
    code, out, _ = command("policy", "negotiate", SHIPPED / "strict.toml", SHIPPED / "lab.toml", "--output", "json")
    assert (code, json.loads(out)["would_join"]) == (0, False)
    other = tmp_path / "user.toml"
    other.write_text((SHIPPED / "strict.toml").read_text().replace('unit = "sequence"', 'unit = "user"'))
    code, out, err = command("policy", "negotiate", SHIPPED / "strict.toml", other)
    assert (code, out) == (3, "")
    assert err.startswith("error[SS-2061]: ")
    assert "\n  - privacy.unit: " in err


def test_explain_tells_the_rule_and_both_sides(command, tmp_path):
    job = SHIPPED.parent / "examples" / "job.toml"
    text = job.read_text()
    bad = tmp_path / "job.toml"
    bad.write_text(
        text.replace("front = 2", "front = 1")
        .replace("blind = true", "blind = false")
        .replace("batch = 4", "batch = 99")
    )
    code, out, _ = command(
        "policy",
        "explain",
        SHIPPED / "strict.toml",
        "--job",
        bad,
        "--offer",
        SHIPPED / "balanced.toml",
        "--output",
        "json",
    )
    found = json.loads(out)
    assert (code, found["admitted"], found["agreed"]) == (3, False, None)
    told = {(r["source"], r["rule"]): (r["policy"], r["other"]) for r in found["refusals"]}
    assert told["job", "limits.min_front"] == (2, 1)
    assert told["job", "limits.max_sequences"] == (64, 99)
    assert told["job", "aggregation.blind"] == (True, False)
    assert told["offer", "privacy.epsilon"] == (2.0, 8.0)
    assert len(told) == 6
    code, out, _ = command("policy", "explain", SHIPPED / "strict.toml", "--job", bad)
    assert code == 3
    assert "[job] limits.min_front: " in out
    code, out, _ = command(
        "policy",
        "explain",
        SHIPPED / "balanced.toml",
        "--job",
        job,
        "--offer",
        SHIPPED / "strict.toml",
        "--output",
        "json",
    )
    assert (code, json.loads(out)["agreed"]) == (0, load_policy(SHIPPED / "strict.toml").digest)
    code, out, _ = command("policy", "explain", SHIPPED / "strict.toml", "--output", "json")
    assert code == 0
    assert {"limits.min_front", "leakage.proof", "aggregation.majority"} <= {
        r["rule"] for r in json.loads(out)["rules"]
    }
    assert command("policy", "explain", SHIPPED / "strict.toml", "--model-digest", "0" * 64)[0] == 2


def test_new_writes_a_policy_that_check_accepts(command, tmp_path):
    path = tmp_path / "ward.toml"
    code, out, err = command(
        "policy", "new", path, "--use", "both", "--data", "special", "--records", 40_000, "--output", "json"
    )
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["name"], found["epsilon"], found["delta"]) == ("ward", 2.0, 1e-6)
    assert (found["unit"], found["relation"]) == ("sequence", "replace-one")
    assert "epsilon 2 at delta 1e-06, unit sequence, replace-one:" in load_policy(path).cost
    code, _, _ = command("policy", "check", path, "--records", 40_000, "--fail-on", "warning")
    assert code == 0
    assert command("policy", "new", path, "--use", "both", "--data", "special")[0] == 2, "it exists"
    code, _, err = command("policy", "new", tmp_path / "other.toml")
    assert code == 2
    assert err.count("\n  - --") == 2, "nobody is asked where nobody sits"
    code, _, err = command("policy", "new", tmp_path / "Odd Name.toml", "--use", "train", "--data", "public")
    assert (code, "name: " in err) == (2, True)
    assert not (tmp_path / "Odd Name.toml").exists()


def test_new_asks_at_a_terminal(command, tmp_path, monkeypatch):
    answers = iter(["fly", "train", "personal"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.prompt", lambda *_args, **_kwargs: next(answers))
    code, out, err = command("policy", "new", tmp_path / "asked.toml")
    assert code == 0
    assert "epsilon 4" in out
    assert "one of train" in err


def test_schema_prints_the_published_page(command):
    code, out, _ = command("policy", "schema")
    assert (code, out) == (0, (SHIPPED.parent / "docs" / "policy.schema.json").read_text())
