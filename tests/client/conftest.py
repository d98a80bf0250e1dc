"""Fixtures for tests of client, server and transport together."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from securesplit.privacy.ledger import Ledger
from tests.e2e.house import House, build_house


@pytest.fixture
def house(tmp_path) -> House:
    """A fresh authority with a server and three clients, and a tiny model."""
    return build_house(tmp_path / "house")


@pytest.fixture
def open_ledger(tmp_path) -> Iterator[Callable[[], Ledger]]:
    """Opens the site's ledger, as often as a test restarts its client."""
    opened: list[Ledger] = []

    def open_it() -> Ledger:
        opened.append(Ledger(tmp_path / "ledger"))
        return opened[-1]

    yield open_it
    for ledger in opened:
        ledger.close()
