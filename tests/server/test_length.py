"""The way from a job to a server that listens stays readable: no function of it is longer than a screen."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

_MOST = 60


@pytest.mark.parametrize("name", ["serve", "build", "loading"])
def test_no_function_on_the_way_to_a_server_is_longer_than_sixty_lines(name):
    found = importlib.util.find_spec(f"securesplit.server.{name}")
    assert found is not None
    assert found.origin is not None
    tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {f.name: n for f in functions if (n := (f.end_lineno or 0) - f.lineno + 1) > _MOST}
    assert functions
    assert long == {}
