"""The registry of codes, the source that raises them, and the page that documents them say the same.

The oracle is the source itself, read as text and as a syntax tree; nothing here asks the registry what it should hold.
"""

from __future__ import annotations

import ast
import re
import runpy
from collections import defaultdict
from pathlib import Path

import pytest

from securesplit import errors
from securesplit.codes import Explained, explain_code, explained_codes
from securesplit.errors import InputError, SecureSplitError

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"SS-[0-9]{4}")
# cli/main.py shows how an error is printed by way of a code that does not exist.
SAMPLES = {"SS-1234"}
# The same fault, told by both ends: a client denies the job (3), a server that denies its own tells its peer (5).
TWO_ENDS = {"SS-2001"}
EXITS = {
    name: kind.exit_code
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, SecureSplitError)
}
SOURCES = sorted(
    path
    for folder in ("securesplit", "attacks", "scripts")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix not in {".pyc", ".toml"} and "__pycache__" not in path.parts
)


def codes_in(path: Path) -> set[str]:
    return set(CODE.findall(path.read_text(encoding="utf-8")))


def raised() -> dict[str, set[str]]:
    """By code, the names of the error classes that are called with it."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in SOURCES:
        if path.suffix != ".py" and "python" not in path.read_text(encoding="utf-8").split("\n", 1)[0]:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                code, name = node.args[0].value, ast.unparse(node.func).rsplit(".", 1)[-1]
                if isinstance(code, str) and CODE.fullmatch(code) and name in EXITS:
                    found[code].add(name)
    return found


def test_every_code_of_the_source_is_in_the_registry_and_the_reverse():
    # The example in the page's head is a code like any other; the registry's own files hold no code beside it.
    used = set().union(*(codes_in(path) for path in SOURCES)) - SAMPLES
    registered = {entry.code for entry in explained_codes()}
    assert used - registered == set(), "explain these in securesplit/codes.toml"
    assert registered - used == set(), "nothing raises these any more"


def test_every_code_is_raised_somewhere_or_stands_in_a_table():
    # A docstring alone does not count: some string of the code itself must hold each of them.
    told = set()
    for path in SOURCES:
        if path.suffix != ".py" and path.name not in {"provision"}:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                told |= set(CODE.findall(node.value))
    assert {entry.code for entry in explained_codes()} - told == set()


def test_exit_statuses_are_those_of_the_classes_that_raise_them():
    found = raised()
    assert len(found) > 100, "the search for raise sites sees them"
    for entry in explained_codes():
        exits = {EXITS[name] for name in found.get(entry.code, ())}
        if entry.code in TWO_ENDS:
            assert entry.exit in exits
        elif exits:
            assert exits == {entry.exit}, entry.code


@pytest.mark.parametrize("entry", explained_codes(), ids=lambda e: e.code)
def test_an_entry_says_something(entry: Explained):
    assert CODE.fullmatch(entry.code)
    assert entry.exit in {1, 2, 3, 4, 5, 6, 7}
    for sentence in (entry.meaning, entry.action):
        assert 15 <= len(sentence) <= 220
        assert sentence == sentence.strip()
        assert sentence.endswith(".")
        assert "|" not in sentence, "it would break the page's table"


def test_the_page_is_what_the_script_prints_and_lists_exactly_the_registry():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert page == runpy.run_path(str(ROOT / "scripts" / "write-error-docs"))["page"](), "run scripts/write-error-docs"
    rows = re.findall(r"^\| (SS-[0-9]{4}) \|", page, re.MULTILINE)
    assert rows == [entry.code for entry in explained_codes()]


def test_a_code_is_explained_and_its_spelling_forgiven():
    found = explain_code("SS-5001")
    assert (found.code, found.exit) == ("SS-5001", 6)
    assert explain_code(" ss-5001 ") == found


@pytest.mark.parametrize("code", ["", "SS-0000", "5001", "SS-50011", "nonsense " * 1000])
def test_an_unknown_code_is_bad_input_and_not_echoed_at_length(code: str):
    with pytest.raises(InputError) as caught:
        explain_code(code)
    assert (caught.value.code, caught.value.exit_code) == ("SS-1150", 2)
    assert len(caught.value.what) < 80
    assert caught.value.hint


def test_every_code_that_a_page_names_exists():
    registered = {entry.code for entry in explained_codes()} | SAMPLES
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "policies" / "README.md"]:
        assert codes_in(page) <= registered, page.name
