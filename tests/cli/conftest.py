"""Fixtures for tests of the command line."""

from __future__ import annotations

import sys

import pytest

from securesplit.cli import main as command_line
from tests.e2e.house import House, build_house


@pytest.fixture
def house(tmp_path) -> House:
    """A fresh authority with a server and three clients, and a tiny model."""
    return build_house(tmp_path / "house")


@pytest.fixture
def command(monkeypatch, capsys):
    """The command line in this process: exit code, what was printed, what went to stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["securesplit", *map(str, argv)])
        code: object = 0
        try:
            command_line.main()
        except SystemExit as ended:
            code = ended.code
        out = capsys.readouterr()
        return int(code or 0), out.out, out.err

    return call
