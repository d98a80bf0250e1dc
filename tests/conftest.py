"""Limits for every test process, and the table of split-equals-whole by architecture at the end of a run."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest

# Set before anything imports torch: helpers and CI share two cores, and one thread makes sums repeatable.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(_name, _value)

_COLUMNS = ("logits", "loss", "gradients", "LoRA gradients", "decoding", "export")


@pytest.fixture
def equality(record_property):
    """Record one cell of the table: ``equality(architecture, column, largest absolute difference)``."""

    def record(architecture: str, column: str, difference: float) -> None:
        assert column in _COLUMNS
        record_property("equality", [architecture, column, difference])

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the largest difference seen, over all cuts, masks and tensors; user properties survive pytest-xdist."""
    worst: dict[str, dict[str, float]] = defaultdict(dict)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties:
                if name == "equality" and report.when == "call":
                    architecture, column, difference = value
                    worst[architecture][column] = max(worst[architecture].get(column, 0.0), difference)
    if not worst:
        return
    terminalreporter.section("the split equals the whole: largest absolute difference, float32")
    terminalreporter.write_line(f"{'architecture':16}" + "".join(f"{column:>16}" for column in _COLUMNS))
    for architecture, row in worst.items():
        cells = (f"{row[column]:.1e}" if row.get(column) else str(row.get(column, "-")) for column in _COLUMNS)
        terminalreporter.write_line(f"{architecture:16}" + "".join(f"{cell:>16}" for cell in cells))
