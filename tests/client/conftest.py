"""Fixtures for tests of client, server and transport together."""

from __future__ import annotations

import pytest

from tests.e2e.house import House, build_house


@pytest.fixture
def house(tmp_path) -> House:
    """A fresh authority with a server and three clients, and a tiny model."""
    return build_house(tmp_path / "house")
