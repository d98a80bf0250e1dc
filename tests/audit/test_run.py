"""The whole audit on kinds of policies, its one verdict, and the command's contract."""

from __future__ import annotations

import json
import math
import sys

import pytest

from securesplit.audit import run
from securesplit.audit.builtin import builtin_policy
from securesplit.audit.run import Effort, run_audit
from securesplit.cli.main import main
from securesplit.errors import InputError
from securesplit.policy.load import load_policy
from securesplit.privacy import mechanism
from tests.audit.conftest import labelled_policy

TINY = Effort(trials=400, messages=2, jobs=12, canaries=300)


@pytest.fixture
def quick(monkeypatch, fixed_noise):
    monkeypatch.setitem(run.EFFORTS, "smoke", TINY)


def with_privacy(**changes):
    policy = builtin_policy()
    return policy.model_copy(update={"privacy": policy.privacy.model_copy(update=changes)})


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(with_privacy(unit="token", epsilon=100.0), id="token"),
        pytest.param(with_privacy(unit="user", regime="step"), id="user, step"),
        pytest.param(labelled_policy(classes=10), id="labels"),
        pytest.param(with_privacy(regime="frozen", gradients=None), id="frozen with noised updates"),
        pytest.param(load_policy("policies/balanced.toml"), id="balanced"),
    ],
)
def test_every_kind_of_private_policy_is_green(quick, policy):
    report = run_audit(policy, profile="smoke")
    assert report.red == ()
    assert {v.channel for v in report.channels} >= {"cut", "decode"}
    assert report.completeness.blocks > 0
    assert report.joint.mu_path <= report.joint.claimed_mu * (1 + 1e-6)
    whole = json.loads(json.dumps(report.as_json()))
    assert set(whole) >= {"channels", "distribution", "completeness", "joint", "one_run", "ok", "seconds"}
    assert (whole["one_run"]["unit"], whole["one_run"]["relation"]) == (policy.privacy.unit, "replace-one")
    assert all(c["mu_lower"] <= c["claimed_mu"] for c in whole["channels"])


@pytest.mark.parametrize(
    ("codec", "policy"),
    [
        pytest.param("bf16", builtin_policy(), id="bf16", marks=pytest.mark.slow),
        pytest.param("int8", builtin_policy(), id="int8"),
        pytest.param("int8", labelled_policy(classes=10), id="int8, labels"),
        pytest.param("int8", with_privacy(unit="token", epsilon=100.0), id="int8, token", marks=pytest.mark.slow),
    ],
)
def test_every_codec_is_green_and_says_that_the_lattice_was_not_seen(quick, codec, policy):
    report = run_audit(policy, profile="smoke", codec=codec)
    assert report.red == ()
    assert report.as_json()["codec"] == codec
    lattice = {v.channel: v.off_lattice for v in report.distribution}
    assert lattice.pop("update") == 0  # Updates have no codec.
    assert lattice
    assert set(lattice.values()) == {None}


def test_a_policy_without_protection_has_nothing_to_audit():
    with pytest.raises(InputError) as caught:
        run_audit(load_policy("policies/lab.toml"))
    assert caught.value.code == "SS-1551"


@pytest.fixture
def said(capsys, monkeypatch):
    """Run the command as a user does: exit code, stdout, stderr."""

    def run_it(*options):
        argv = ["securesplit", "privacy", "audit", "--profile", "smoke", "--progress", "none", *options]
        monkeypatch.setattr(sys, "argv", argv)
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run_it


def test_the_command_says_one_object_and_ends_with_0(quick, said):
    code, out, _ = said("--output", "json")
    value = json.loads(out)
    assert (code, value["ok"], value["red"]) == (0, True, [])
    for channel in value["channels"]:
        assert channel["ok"]
        assert math.isfinite(channel["mu_lower"])


@pytest.mark.parametrize("codec", ["f32", "int8"])
def test_a_broken_build_ends_with_1_and_says_what_is_red(quick, said, monkeypatch, codec):
    real = mechanism.discrete_gaussian_like
    monkeypatch.setattr(mechanism, "discrete_gaussian_like", lambda like: real(like) // 2)
    code, out, err = said("--codec", codec)
    assert ("Audit f32 too." in out) == (codec != "f32")
    assert code == 1
    assert "RED" in out
    assert "error[SS-1550]" in err
    assert "cut: distribution" in err
