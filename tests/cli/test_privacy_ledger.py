"""`securesplit privacy ledger`, `report` and `adopt`: a site's account, and the ledgers that are refused."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from pathlib import Path

import pytest

from securesplit.policy.load import parse_policy
from securesplit.privacy.calibrate import epsilon_for, epsilon_rdp_for
from securesplit.privacy.gate import Gate
from securesplit.privacy.ledger import Ledger
from securesplit.privacy.plan import plan_for
from tests.e2e.house import FROZEN, policy_text

SHIPPED = Path(__file__).parents[2] / "policies"


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    """A machine of its own for each test: ledgers are anchored under the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def said(command, *argv):
    """The one JSON object of a command."""
    found, out, err = command("privacy", *argv, "--output", "json")
    assert (found, err) == (0, ""), err
    return json.loads(out)


@pytest.fixture
def site(tmp_path):
    """A site that has released two records and one generated token: its folder and policy file."""
    import torch

    (tmp_path / "p.toml").write_text(policy_text(FROZEN))
    policy = parse_policy(policy_text(FROZEN))
    ledger = Ledger(tmp_path / "site" / "ledger")
    gate = Gate(policy, ledger)
    gate.release(torch.ones(2, 4, 8), at="cut", records=("a", "b"))
    gate.release(torch.ones(1, 1, 8), at="decode")
    ledger.close()
    return tmp_path / "site" / "ledger", tmp_path / "p.toml", plan_for(policy.privacy)


def test_the_ledgers_account(command, site):
    folder, _, plan = site
    found = said(command, "ledger", "--ledger", folder)
    assert found.keys() >= {"mu", "epsilon", "delta", "unit", "relation", "head", "channels"}
    assert (found["relation"], found["delta"]) == ("replace-one", 1e-5)
    assert len(found["head"]) == 64
    assert found["mu"] == pytest.approx(math.hypot(plan.cut.mu, plan.decode.mu))
    assert {c["channel"]: c["releases"] for c in found["channels"]} == {"cut": 2, "decode": 1}
    # The larger of what the two accountants say; both are held against others in tests/privacy/test_calibrate.py.
    assert found["epsilon"] == max(f(found["mu"], 1e-5) for f in (epsilon_for, epsilon_rdp_for))
    looser = said(command, "ledger", "--ledger", folder, "--delta", "1e-3")
    assert looser["epsilon"] < found["epsilon"]
    code, out, _ = command("privacy", "ledger", "--ledger", folder)
    assert code == 0
    assert "replace-one" in out


def test_the_report_as_json_and_as_a_page(command, site, tmp_path):
    folder, policy, plan = site
    page = tmp_path / "privacy.html"
    found = said(command, "report", "--ledger", folder, "--policy", policy, "--out", page)
    assert found.keys() >= {
        "policy", "policy_digest", "unit", "relation", "delta", "regime", "mu", "eps_server", "eps_peer", "budget_epsilon",
        "left", "bits", "channels", "ceilings", "adopted", "entries", "head",
    }  # fmt: skip
    assert (found["unit"], found["relation"], found["entries"], found["adopted"]) == ("sequence", "replace-one", 3, 0)
    assert found["mu"] == pytest.approx(math.hypot(plan.cut.mu, plan.decode.mu))
    assert found["eps_peer"] is None
    assert {c["channel"]: (c["releases"], c["everyone"]) for c in found["channels"]} == {
        "cut": (2, 0),
        "decode": (1, 1),
    }
    source = page.read_text(encoding="utf-8")
    assert source.startswith("<!doctype html>")
    assert found["head"] in source
    code, out, err = command("privacy", "report", "--ledger", folder, "--policy", policy)
    assert (code, err) == (0, "")
    claim = f"at delta {found['delta']:g}, unit {found['unit']}, {found['relation']}"
    assert out.count(claim) == out.count("epsilon ") + 1, "one for eps_server"
    assert source.count("ε = ") <= source.count("(unit: one ")
    assert "written" not in out


def test_a_report_that_cannot_be_written_or_read(command, site, tmp_path):
    folder, policy, _ = site
    code, out, err = command(
        "privacy", "report", "--ledger", folder, "--policy", policy, "--out", tmp_path / "no" / "x"
    )
    assert (code, out, err.split(":")[0]) == (2, "", "error[SS-1002]")
    code, _, err = command("privacy", "report", "--ledger", folder, "--policy", SHIPPED / "lab.toml")
    assert (code, err.split(":")[0]) == (2, "error[SS-1532]")
    code, _, err = command("privacy", "report", "--ledger", tmp_path / "nowhere", "--policy", policy)
    assert (code, err.split(":")[0]) == (2, "error[SS-1532]")


def test_an_absent_ledger_is_not_made(command, tmp_path):
    (tmp_path / "empty").mkdir()
    for place in ("nowhere", "empty"):
        code, _, err = command("privacy", "ledger", "--ledger", tmp_path / place)
        assert (code, err.split(":")[0]) == (2, "error[SS-1532]"), place
    assert not (tmp_path / "nowhere").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def refused(command, folder, code):
    for argv in (("ledger",), ("ledger", "--output", "json")):
        found, out, err = command("privacy", *argv, "--ledger", folder)
        assert (found, out) == (3, "")
        assert err.startswith(f"error[{code}]: ")
        assert "\nhint: " in err


@pytest.mark.parametrize("whole", [True, False], ids=["its folder", "its file"])
def test_a_deleted_ledger_is_refused_with_a_hint_and_not_begun_anew(command, site, whole):
    folder, _, _ = site
    if whole:
        shutil.rmtree(folder)
    else:
        (folder / "ledger.sqlite").unlink()
    refused(command, folder, "SS-2020")
    assert not (folder / "ledger.sqlite").exists()


def test_a_changed_ledger_is_refused_with_a_hint(command, site):
    folder, _, _ = site
    with sqlite3.connect(folder / "ledger.sqlite") as raw:
        raw.execute("UPDATE entries SET units = 1")
    raw.close()
    refused(command, folder, "SS-2024")


def test_a_copied_ledger_is_refused_until_it_is_adopted(command, site, tmp_path):
    folder, policy, _ = site
    moved = tmp_path / "moved" / "ledger"
    shutil.copytree(folder, moved)
    shutil.rmtree(folder)
    refused(command, moved, "SS-2022")
    # Adoption needs the word of a person, and says so.
    code, out, err = command("privacy", "adopt", "--ledger", moved)
    assert (code, out, err.split(":")[0]) == (3, "", "error[SS-2015]")
    assert "--every-other-copy-is-destroyed" in err
    refused(command, moved, "SS-2022")
    found = said(command, "adopt", "--ledger", moved, "--every-other-copy-is-destroyed")
    assert found.keys() == {"head", "mu"}
    account = said(command, "ledger", "--ledger", moved)
    assert (account["head"], account["mu"]) == (found["head"], found["mu"])
    assert {c["channel"] for c in account["channels"]} == {"cut", "decode"}
    assert said(command, "report", "--ledger", moved, "--policy", policy)["adopted"] == 1


def test_there_is_nothing_to_adopt_where_no_ledger_is(command, tmp_path):
    code, out, err = command("privacy", "adopt", "--ledger", tmp_path / "none", "--every-other-copy-is-destroyed")
    assert (code, out, err.split(":")[0]) == (2, "", "error[SS-1532]")
