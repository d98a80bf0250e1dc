"""Fixtures for tests of client, server and transport together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo

import pytest

from tests.e2e.house import House, build_house


@pytest.fixture
def house(tmp_path) -> House:
    """A fresh authority with a server and three clients, and a tiny model."""
    return build_house(tmp_path / "house")


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[timedelta], None]:
    """Move the clock of the whole package on; OpenSSL keeps the machine's own."""

    def moved(by: timedelta) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> datetime:
                return datetime.now(tz) + by

        for name, module in list(sys.modules.items()):
            if name.startswith("securesplit.") and vars(module).get("datetime") is datetime:
                monkeypatch.setattr(module, "datetime", Clock)

    return moved
