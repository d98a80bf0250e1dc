"""Limits for every test process, and the table of split-equals-whole by architecture at the end of a run."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

# Set before anything imports torch: helpers and CI share two cores, and one thread makes sums repeatable.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(_name, _value)


def _move_home() -> None:
    """Give the tests and all that they start a home of their own, because ledgers are anchored there.

    The cache stays the real one: models and data in it are read, and no test writes there.
    """
    if "SECURESPLIT_TESTS_HOME" in os.environ:  # A worker of pytest-xdist, or a run that a test started.
        return
    home, real = Path(tempfile.mkdtemp(prefix="securesplit-tests-home-")), Path.home()
    if (real / ".cache").is_dir():
        (home / ".cache").symlink_to(real / ".cache")
    os.environ["HOME"] = os.environ["SECURESPLIT_TESTS_HOME"] = str(home)
    atexit.register(shutil.rmtree, home, ignore_errors=True)


_move_home()

_COLUMNS = ("logits", "loss", "gradients", "LoRA gradients", "decoding", "export")


@pytest.fixture
def equality(record_property):
    """Record one cell of the table: ``equality(architecture, column, largest absolute difference)``."""

    def record(architecture: str, column: str, difference: float) -> None:
        assert column in _COLUMNS
        record_property("equality", [architecture, column, difference])

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables of a run; user properties survive pytest-xdist."""
    _print_equality(terminalreporter)
    _print_mutants(terminalreporter)
    _print_hostile(terminalreporter)


def _print_mutants(terminalreporter: pytest.TerminalReporter) -> None:
    """Which check of the audit caught which fault, with its numbers (tests/audit/test_mutants.py)."""
    rows = [
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for name, value in report.user_properties
        if name == "mutant" and report.when == "call"
    ]
    if not rows:
        return
    terminalreporter.section("privacy audit: what each fault in the product turns red")
    for mutant, check, red, numbers in sorted(rows):
        terminalreporter.write_line(f"{mutant:44} {'RED' if red else 'ok':4} {check:28} {numbers}")


def _print_hostile(terminalreporter: pytest.TerminalReporter) -> None:
    """What ended each attack on a secure sum, in how many rounds (tests/aggregate/hostile)."""
    rounds: dict[str, int] = defaultdict(int)
    modes: dict[str, set[str]] = defaultdict(set)
    ends: dict[str, set[str]] = defaultdict(set)
    for outcome in ("passed", "failed", "xfailed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties:
                if name == "hostile" and report.when == "call":
                    attack, mode, count, ended = value
                    rounds[attack] += count
                    modes[attack].add(mode)
                    ends[attack].update(ended)
    if not rounds:
        return
    terminalreporter.section("secure sums: what ended each attack; no update and no second sum was opened")
    terminalreporter.write_line(f"{'attack':70} {'rounds':>6}  {'ended by':52} modes")
    for attack, count in rounds.items():
        found = " ".join(sorted(end.removeprefix("SS-") for end in ends[attack]))
        terminalreporter.write_line(f"{attack:70} {count:6}  {found:52} {', '.join(sorted(modes[attack]))}")


def _print_equality(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the largest difference seen, over all cuts, masks and tensors."""
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
