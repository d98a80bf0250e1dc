"""`securesplit privacy calibrate` and `plan`: the keys that callers rely on, held against numerical integration and the table of known answers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import mpmath
import pytest

from tests.e2e.house import FROZEN, ROUND, SILENT, job_text, policy_text

KNOWN = Path(__file__).parents[3] / "shared" / "kat" / "dp_kat.json"
SHIPPED = Path(__file__).parents[2] / "policies"
EXAMPLE = Path(__file__).parents[2] / "examples" / "job.toml"
needs_table = pytest.mark.skipif(
    not KNOWN.is_file(), reason="the full table of known answers lies beside the repository only"
)


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


def renyi_epsilon(mu: float, delta: float) -> float:
    """The epsilon of a Gaussian's Renyi curve, by trying orders (Canonne, Kamath, Steinke 2020, proposition 12)."""
    with mpmath.workdps(30):
        best = 1 + mpmath.sqrt(2 * mpmath.log(1 / mpmath.mpf(delta))) / mu
        orders = (1 + (best - 1) * mpmath.mpf(i) / 400 for i in range(60, 1200))
        return float(
            min(a * mu**2 / 2 + mpmath.log((a - 1) / a) - (mpmath.log(delta) + mpmath.log(a)) / (a - 1) for a in orders)
        )


def said(command, *argv, code=0):
    """The one JSON object of a command."""
    found, out, err = command("privacy", *argv, "--output", "json")
    assert (found, err) == (code, ""), err
    return json.loads(out)


def calibrated(command, epsilon, delta, releases=1, unit="sequence", *more):
    return said(
        command, "calibrate", "--epsilon", epsilon, "--delta", delta, "--unit", unit, "--releases", releases, *more
    )


# ---- calibrate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "delta", "releases"), [(8.0, 1e-5, 1), (1.0, 1e-6, 7), (0.3, 1e-4, 100)])
def test_calibrate(command, epsilon, delta, releases):
    found = calibrated(command, epsilon, delta, releases)
    assert found.keys() >= {"mu", "sigma_over_clip", "noise_multiplier", "sensitivity_over_clip", "epsilon", "delta"}
    assert (found["sensitivity_over_clip"], found["epsilon"], found["delta"]) == (2.0, epsilon, delta)
    assert (found["unit"], found["relation"], found["releases"]) == ("sequence", "replace-one", releases)
    # All releases together have mu; one has sensitivity 2 C, so its noise is sqrt(k) 2 C / mu.
    assert found["sigma_over_clip"] == pytest.approx(2 * math.sqrt(releases) / found["mu"], rel=1e-9)
    assert found["noise_multiplier"] == found["sigma_over_clip"] / found["sensitivity_over_clip"]
    spent = delta_of(epsilon, found["mu"])
    assert 0.999 * delta < spent <= delta * (1 + 1e-6)
    # What a policy gets on the lattice: a little more noise, by the Renyi accountant.
    assert found["enforced_mu"] < found["mu"]
    assert found["enforced_sigma_over_clip"] == pytest.approx(2 * math.sqrt(releases) / found["enforced_mu"], rel=1e-9)
    assert renyi_epsilon(found["enforced_mu"], delta) == pytest.approx(epsilon, rel=1e-4)


@pytest.mark.parametrize(("epsilon", "expected"), [(8, "0.600229"), (1, "3.73063")])
def test_the_two_figures_that_everybody_knows(command, epsilon, expected):
    assert f"{calibrated(command, epsilon, '1e-5')['noise_multiplier']:.6g}" == expected


@needs_table
def test_calibrate_equals_the_known_answers_over_the_grid(command):
    table = json.loads(KNOWN.read_text(encoding="utf-8"))
    for row in table["A_analytic_gaussian_sigma"]:
        if row["sensitivity"] != 2:  # The other half of the table says the same, halved.
            continue
        found = calibrated(command, row["eps"], row["delta"])
        assert math.isclose(found["sigma_over_clip"], float(row["sigma"]), rel_tol=1e-9), row
        assert math.isclose(found["mu"], float(row["mu"]), rel_tol=1e-9), row
    for row in table["E_noise_multiplier_for_budget"]:
        found = calibrated(command, row["eps"], row["delta"], row["k"])
        assert math.isclose(found["noise_multiplier"], float(row["z_exact"]), rel_tol=1e-9), row
    for row in table["H_noise_geometry"]:
        found = calibrated(command, row["eps"], "1e-5")
        assert math.isclose(found["sigma_over_clip"], float(row["sigma_over_C_replace"]), rel_tol=1e-9), row


@pytest.mark.parametrize(("name", "generates"), [("balanced", True), ("strict", False)])
def test_a_plan_says_what_its_row_peers_is(command, name: str, generates: bool):
    code, out, _ = command("privacy", "plan", "--policy", SHIPPED / f"{name}.toml", "--job", EXAMPLE)
    assert code == 0
    rows = [line for line in out.split("\n") if line.startswith("peers")]
    assert len(rows) == (2 if generates else 0), "the row, and what it is"


def test_the_sensitivity_of_each_unit(command):
    plain = calibrated(command, 4, "1e-5")
    for unit in ("user", "token"):
        found = calibrated(command, 4, "1e-5", 1, unit)
        assert (found["unit"], found["sensitivity_over_clip"]) == (unit, 2.0)
        assert found["sigma_over_clip"] == plain["sigma_over_clip"]
    # A has attention: one token moves up to 64 rows that are clipped one by one.
    found = calibrated(command, 4, "1e-5", 1, "token", "--rows", 64)
    assert found["sensitivity_over_clip"] == 16.0
    assert found["sigma_over_clip"] == pytest.approx(8 * plain["sigma_over_clip"])
    assert found["noise_multiplier"] == pytest.approx(plain["noise_multiplier"])
    assert found["enforced_sigma_over_clip"] == pytest.approx(8 * plain["enforced_sigma_over_clip"])


def test_calibrate_refuses_what_makes_no_sense(command):
    for epsilon, delta, releases in (("-1", "1e-5", "1"), ("1", "2", "1"), ("1", "1e-5", "0"), ("nan", "1e-5", "1")):
        code, out, err = command(
            "privacy", "calibrate", "--epsilon", epsilon, "--delta", delta, "--unit", "sequence", "--releases", releases
        )
        assert (code, out) == (2, ""), (epsilon, delta, releases)
        assert err.startswith("error[SS-1531]: ")
    for rows, unit in ((0, "token"), (-3, "token"), (2, "sequence"), (2, "user")):
        code, _, err = command(
            "privacy", "calibrate", "--epsilon", 1, "--delta", "1e-5", "--unit", unit, "--rows", rows
        )
        assert (code, err.split(":")[0]) == (2, "error[SS-1531]")
    for wrong in (("--unit", "word"), ("--unit", "sequence", "--relation", "add-remove"), ()):
        assert command("privacy", "calibrate", "--epsilon", "1", "--delta", "1e-5", *wrong)[0] == 2


# ---- plan ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(command, tmp_path):
    """``planned(privacy table, code=..., more=..., **job)``: the JSON of `privacy plan`."""

    def plan(privacy, *more, code=0, text=False, policy_options=None, **job):
        (tmp_path / "p.toml").write_text(policy_text(privacy, **(policy_options or {})))
        (tmp_path / "j.toml").write_text(job_text(Path("model"), **job))
        arguments = ("plan", "--policy", tmp_path / "p.toml", "--job", tmp_path / "j.toml", *more)
        if not text:
            return said(command, *arguments, code=code)
        found, out, err = command("privacy", *arguments)
        assert (found, err) == (code, "")
        return out

    return plan


def test_plan_says_what_a_job_costs_and_that_it_fits(planned):
    found = planned(ROUND, rounds=2, epochs=1)
    assert found.keys() >= {
        "unsafe", "regime", "unit", "relation", "delta", "fits", "mu", "eps_server", "eps_peer", "budget", "channels",
        "held_out_releases", "max_rounds", "max_epochs", "tokens", "useless", "verdict",
    }  # fmt: skip
    assert (found["regime"], found["unit"], found["relation"], found["fits"]) == (
        "round",
        "sequence",
        "replace-one",
        True,
    )
    channels = {c["channel"]: c for c in found["channels"]}
    assert {n: (c["needed"], c["allowed"]) for n, c in channels.items()} == {
        "cut": (2, 3),
        "gradient": (2, 2),
        "update": (2, 2),
    }
    assert found["mu"] == pytest.approx(math.sqrt(sum(c["mu"] ** 2 for c in found["channels"])))
    assert found["eps_server"] == pytest.approx(renyi_epsilon(found["mu"], 1e-5), rel=1e-3)
    assert found["eps_peer"] == found["eps_server"] < found["budget"]
    assert (found["max_rounds"], found["max_epochs"], found["held_out_releases"], found["tokens"]) == (2, 1, 3, 0)
    text = planned(ROUND, text=True, rounds=2, epochs=1)
    for word in ("unit sequence, replace-one, regime round", "rounds at most 2", "verdict: "):
        assert word in text


def test_plan_refuses_with_exit_6_what_the_budget_would(planned):
    found = planned(ROUND, code=6, rounds=3, epochs=1)
    assert not found["fits"]
    assert {c["channel"]: c["fits"] for c in found["channels"]} == {"cut": True, "gradient": False, "update": False}
    assert found["verdict"].startswith("verdict: the policy refuses this job")
    text = planned(ROUND, code=6, text=True, rounds=3, epochs=1)
    assert text.count("the policy refuses this") == 3


def test_plan_says_plainly_that_epsilon_8_is_useless(planned, command):
    found = planned(SILENT, rounds=2, epochs=3)
    assert found["useless"]
    assert "information-theoretically useless" in found["verdict"]
    assert "--alone" in found["verdict"]
    assert found["channels"][0]["bits"] < 0.5
    assert found["eps_peer"] is None
    assert (found["max_rounds"], found["max_epochs"]) == (None, None)
    text = planned(SILENT, text=True)
    assert "rounds any number, epochs any number" in text
    claim = "at delta 1e-05, unit sequence, replace-one"
    assert re.search(rf"eps_server [0-9.]+ of [0-9.]+ {claim} for one training record", text)
    assert re.search(rf"eps_peer: [0-9.]+ {claim}", planned(ROUND, text=True, rounds=2, epochs=1))
    for name in ("strict", "balanced"):
        shipped = said(command, "plan", "--policy", SHIPPED / f"{name}.toml", "--job", EXAMPLE)
        assert (shipped["useless"], shipped["fits"]) == (True, True)
    loud = planned(ROUND, rounds=2, epochs=1)
    assert not loud["useless"]
    assert "useless" not in loud["verdict"]
    assert "--alone" in loud["verdict"]


def test_plan_counts_a_users_records(planned):
    users = ROUND.replace('unit = "sequence"', 'unit = "user"')
    one = planned(users, rounds=1, epochs=1)
    assert one["fits"]
    two = planned(users, "--records-per-user", 2, code=6, rounds=1, epochs=1)
    assert {c["channel"]: (c["needed"], c["fits"]) for c in two["channels"]} == {
        "cut": (2, True),
        "gradient": (2, True),
        "update": (1, True),
    }
    assert two["held_out_releases"] == 4, "and only three are allowed"
    assert planned(ROUND, "--records-per-user", 2, rounds=1, epochs=1)["fits"], "another unit does not ask"


def test_plan_counts_what_is_measured_inside_rounds_or_says_what_it_cannot_know(planned, tmp_path, command):
    step = ROUND.replace('"round"', '"step"').replace("= 3\n", "= 9\n").replace("= 2\n", "= 8\n")
    plain = planned(step, rounds=2, epochs=1)
    assert (plain["held_out_releases"], plain["exact"], plain["max_batches"]) == (3, True, None)
    job = (tmp_path / "j.toml").read_text()
    (tmp_path / "j.toml").write_text(job.replace("[schedule]", "[schedule]\nevaluate_every = 2"))
    arguments = ("plan", "--policy", tmp_path / "p.toml", "--job", tmp_path / "j.toml")
    unknown = said(command, *arguments)
    assert (unknown["fits"], unknown["exact"], unknown["max_batches"], unknown["held_out_releases"]) == (
        True,
        False,
        6,
        4,
    )
    known = said(command, *arguments, "--batches", 6)
    assert (known["fits"], known["exact"], known["max_batches"], known["held_out_releases"]) == (True, True, None, 9)
    assert known["eps_held_out"] > plain["eps_held_out"]
    assert (known["eps_server"], known["max_rounds"]) == (plain["eps_server"], 2)
    assert said(command, *arguments, "--batches", 7, code=6)["held_out_releases"] == 10
    claim = re.escape("at delta 1e-05, unit sequence, replace-one")
    _, text, _ = command("privacy", *arguments)
    assert re.search(rf"at least 4 release\(s\) each, eps_server at least [0-9.]+ {claim}", text)
    assert "at most 6; --batches N" in text
    _, text, _ = command("privacy", *arguments, "--batches", 6)
    assert re.search(rf"records: 9 release\(s\) each, eps_server [0-9.]+ {claim}", text)
    assert "\nexact for a client" in text


def test_plan_under_a_policy_without_protection(planned):
    assert planned('mechanism = "UnsafeNoPrivacy"') == {"unsafe": True}


def test_plan_of_files_that_are_none(command, tmp_path):
    (tmp_path / "p.toml").write_text(policy_text(FROZEN))
    code, out, err = command("privacy", "plan", "--policy", tmp_path / "p.toml", "--job", tmp_path / "absent.toml")
    assert (code, out, err.split(":")[0]) == (2, "", "error[SS-1110]")
