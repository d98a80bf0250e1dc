"""The report's shape: the keys that scripts rely on, and values that cannot be built."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from securesplit.report.record import Privacy, Protected, Report, Train, write_report

SECRET = "Wilhelmina"


def test_the_contract_keys_are_reachable(report, tmp_path):
    write_report(report, tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["train"]["initial_loss"] == 6.91
    assert found["train"]["final_loss"] == 5.33
    assert {k: found["privacy"][k] for k in ("epsilon", "delta", "unit", "relation", "mu")} == {
        "epsilon": 7.43,
        "delta": 1e-5,
        "unit": "sequence",
        "relation": "replace-one",
        "mu": 1.58,
    }
    assert found["aggregation"]["rounds"] == 2
    assert found["aggregation"]["exact"] is True
    assert found["leakage"]["unprotected"]["token_recovery"] == 0.997
    assert found["leakage"]["protected"]["token_recovery"] == 0.061
    assert found["leakage"]["protected"]["prior"] == 0.052
    assert found["leakage"]["protected"]["ceiling"] == 0.49
    assert found["tls"]["version"] == "TLSv1.3"
    assert found["seconds"] == 243.7


def test_a_written_report_is_the_same_report(report, tmp_path):
    write_report(report, tmp_path / "report.json")
    assert Report.model_validate_json((tmp_path / "report.json").read_bytes()) == report


def test_the_ends_of_training_are_those_of_the_protected_run():
    train = Train.of(unprotected=(3.0, 1.0), protected=(5.0, 4.5, 4.0), client_only=(6.0,))
    assert (train.initial_loss, train.final_loss) == (5.0, 4.0)


def changed(report: Report, path: str, value: object) -> dict[str, object]:
    whole = report.model_dump(mode="json")
    *folders, last = path.split(".")
    place = whole
    for folder in folders:
        place = place[folder]
    place[last] = value
    return whole


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("extra", 1),
        ("privacy.sigma", 1.0),
        ("privacy.epsilon", -1.0),
        ("privacy.epsilon", float("nan")),
        ("privacy.epsilon", None),
        ("privacy.delta", None),
        ("privacy.delta", 1.0),
        ("privacy.budget", None),
        ("leakage.protected.token_recovery", 1.1),
        ("leakage.protected.ci95", [0.5, 0.4]),
        ("leakage.unprotected.ceiling", 1.0),
        ("train.protected", []),
        ("train.final_loss", float("inf")),
        ("policy.digest", "short"),
        ("policy.unsafe", True),
        ("clients", 0),
        ("seconds", "243"),
    ],
)
def test_an_impossible_report_cannot_be_built(report, path, value):
    with pytest.raises(ValidationError):
        Report.model_validate(changed(report, path, value))


@pytest.mark.parametrize("left_out", ["examples", "generated", "neither"])
def test_private_text_stands_in_no_report_unless_asked_for(report, left_out):
    whole = changed(report, "data.synthetic", value=False)
    whole["examples"] = [] if left_out == "examples" else [{"run": "protected", "truth": SECRET, "recovered": SECRET}]
    whole["generated"] = None if left_out == "generated" else {"prompt": SECRET, "text": SECRET}
    with pytest.raises(ValidationError) as caught:
        Report.model_validate(whole)
    assert SECRET not in str(caught.value)
    whole["data"]["shown"] = True
    assert Report.model_validate(whole).data.shown


def test_private_runs_without_text_are_fine(report):
    whole = changed(report, "data.synthetic", value=False)
    assert Report.model_validate({**whole, "examples": [], "generated": None}).generated is None


def test_an_unsafe_run_has_no_figures_of_privacy(report):
    nothing = Privacy(epsilon=None, delta=None, unit="sequence", relation="replace-one", mu=None, budget=None)
    whole = changed(report, "policy.unsafe", value=True)
    whole["privacy"] = nothing.model_dump(mode="json")
    whole["leakage"]["protected"]["ceiling"] = None
    assert Report.model_validate(whole).privacy == nothing


def test_reports_do_not_change(report):
    with pytest.raises(ValidationError):
        report.seconds = 1.0
    with pytest.raises(ValidationError):
        Protected(token_recovery=0.1, ci95=(0.0, 0.2), prior=0.1, tokens=1)  # A ceiling is stated, if only as None.
