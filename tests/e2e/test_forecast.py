"""What `privacy plan` promises and what three whole runs over TLS, with real secure sums, then have in their ledgers."""

from __future__ import annotations

import json

import pytest

from securesplit.client.forecast import forecast
from securesplit.privacy.ledger import Ledger
from securesplit.protocol.job import Job
from tests.e2e.house import CLIENTS, ROUND, build_house, policy_of
from tests.e2e.test_modes import train_all

STEP = ROUND.replace('"round"', '"step"').replace("= 3\n", "= 60\n").replace("= 2\n", "= 40\n")


@pytest.mark.parametrize("every", [1, 3])
def test_whole_runs_cost_what_was_forecast_measurements_inside_rounds_included(tmp_path, monkeypatch, every):
    house = build_house(tmp_path)
    raw = house.job(rounds=2, epochs=2).model_dump(mode="json", exclude_none=True)
    raw["schedule"]["evaluate_every"] = every
    job = Job.model_validate(raw)
    seen = train_all(house, job, STEP, monkeypatch)
    assert seen.errors == {}
    for name in CLIENTS:
        batches = json.loads((house.root / name / "about.json").read_bytes())["data"]["batches"]
        ahead = forecast(policy_of(STEP), job, batches=batches)
        ledger = Ledger(house.keys / name / "ledger")
        records = {entry.record for entry in ledger.entries()}
        found = {ledger.spent_units(record) for record in records}
        ledger.close()
        assert (ahead.fits, ahead.exact) == (True, True)
        assert found == {ahead.units, ahead.units_held_out}
        assert seen.records[name].epsilon == max(ahead.epsilon, ahead.epsilon_held_out)
        assert len(seen.records[name].measured) == 2 * 2 * batches // every
