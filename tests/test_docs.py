"""README and the pages tell the truth about what can be checked: commands parse, links lead somewhere, files are listed.

Each ``securesplit ...`` line of a code block is parsed by the command line's own parser, which refuses unknown commands
and options, and is not run.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
from pathlib import Path

import pytest
import typer
import typer.main

from securesplit.aggregate import wire
from securesplit.cli.main import app
from securesplit.policy.load import load_policy
from securesplit.protocol.job import load_job
from securesplit.protocol.messages import MESSAGES
from securesplit.protocol.states import State

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("policies/*.md"), *ROOT.glob("keys/*.md")]
)
COMMAND = typer.main.get_command(app)
# typer brings its own click; the base of all complaints about a command line is found through its public name.
UsageError = typer.BadParameter.__mro__[1]


def code_lines(page: str) -> list[list[str]]:
    """The lines of all fenced blocks as words; continued lines are joined, comments are dropped."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := _words(line))]


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # A drawing, not a command.
        return []


def parse(words: list[str]) -> tuple[str, ...]:
    """Walk down the command's tree and parse what is left: unknown options, missing ones and bad values raise."""
    command, path, rest = COMMAND, (), words[1:]
    while hasattr(command, "commands"):
        if not rest or rest[0] not in command.commands:
            raise KeyError(" ".join(words))
        command, path, rest = command.commands[rest[0]], (*path, rest[0]), rest[1:]
    command.make_context(path[-1], list(rest))
    return path


COMMANDS = [
    pytest.param(words, id=f"{page.name}: {' '.join(words[1:4])}")
    for page in PAGES
    for words in code_lines(page.read_text(encoding="utf-8"))
    if words[0] == "securesplit"
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_a_page_parses(words):
    parse(words)


def test_the_commands_of_a_real_setup_are_all_there():
    told = {parse(words) for words in code_lines(README) if words[0] == "securesplit"}
    assert told >= {
        ("certs", "init-ca"), ("certs", "issue"), ("certs", "revoke"), ("policy", "check"), ("model", "pull"), ("serve",), ("train",),
        ("generate",), ("attack", "run"), ("privacy", "ledger"), ("aggregate", "simulate"), ("explain",),
    }  # fmt: skip


@pytest.mark.parametrize(
    "line", ["securesplit fly", "securesplit certs fly", "securesplit serve --fly", "securesplit train"]
)
def test_the_parser_refuses_what_does_not_exist(line):
    # Without this the tests above would pass on anything.
    with pytest.raises((UsageError, KeyError)):
        parse(line.split())


def test_inline_commands_exist_too():
    for page in PAGES:
        for text in re.findall(r"`securesplit ([^`]+)`", page.read_text(encoding="utf-8")):
            words = [w for w in text.split() if re.fullmatch(r"[a-z][a-z-]*", w)]
            command = COMMAND
            for word in words:
                if not hasattr(command, "commands"):
                    break
                assert word in command.commands, f"{page.name}: securesplit {text}"
                command = command.commands[word]


def test_the_two_commands_and_all_scripts_that_pages_name_can_be_started():
    named = {s for page in PAGES for s in re.findall(r"\bscripts/[a-z-]+(?![a-z.-])", page.read_text(encoding="utf-8"))}
    assert {"scripts/demo", "scripts/test", "scripts/provision"} <= named
    for script in named:
        assert os.access(ROOT / script, os.X_OK), script


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else (page.parent / name)
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles}, target


def test_policies_and_jobs_that_commands_name_load():
    seen = set()
    for words in code_lines(README):
        for option, value in itertools.pairwise(words):
            if option == "--policy" or value.startswith("policies/"):
                load_policy(ROOT / value)
                seen.add(value)
            if option == "--job":
                load_job(ROOT / value)
                seen.add(value)
    assert seen >= {"policies/balanced.toml", "policies/lab.toml", "examples/job.toml"}


def test_the_setup_fits_the_job_it_serves():
    job = load_job(ROOT / "examples" / "job.toml")
    lines = code_lines(README)
    issued = {w[3] for w in lines if w[:3] == ["securesplit", "certs", "issue"] and "client" in w}
    assert issued == set(job.sums.roster)
    pulled = next(w for w in lines if w[:3] == ["securesplit", "model", "pull"])
    assert pulled[3] == job.model
    assert (job.cut.front, job.cut.back) == tuple(int(pulled[pulled.index(o) + 1]) for o in ("--front", "--back"))


def test_the_flow_lists_every_module_once_and_nothing_that_is_not_there():
    flow = README.split("## The flow, file by file", 1)[1].split("\n## ", 1)[0]
    listed = re.findall(r"^\| `([^`]+)` \|", flow, re.MULTILINE)
    assert listed[0] == "securesplit/client/step.py"
    assert len(listed) == len(set(listed))
    assert [name for name in listed if not (ROOT / name).exists()] == []
    modules = [
        str(path.relative_to(ROOT))
        for folder in ("securesplit", "attacks")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in {"__init__.py", "__main__.py"}
    ]
    missing = [
        m for m in modules if m not in listed and not any(name.endswith("/") and m.startswith(name) for name in listed)
    ]
    assert missing == [], "add a line to README's flow"


def test_readme_has_its_parts_in_order_and_names_every_channel():
    titles = re.findall(r"^## (.*)$", README, re.MULTILINE)
    wanted = [
        "Two commands", "What the demo shows", "The flow, file by file", "A real setup", "Who sees what",
        "What it does not protect", "Licence",
    ]  # fmt: skip
    assert [title for title in titles if title in wanted] == wanted
    for page in (README, (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")):
        assert re.findall(r"^\| (O[1-8]) \|", page, re.MULTILINE) == [f"O{n}" for n in range(1, 9)]


def test_every_message_and_field_is_specified():
    for kind, message in MESSAGES.items():
        row = re.search(rf"^\| {kind} \| `{message.__name__}` \|.*$", PROTOCOL, re.MULTILINE)
        assert row is not None, message.__name__
        for name in message.model_fields:
            assert f"`{name}`" in row.group(), f"{message.__name__}.{name}"


def test_every_state_and_every_body_of_a_secure_sum_is_specified():
    for state in State:
        assert re.search(rf"^\| {state.name} \|", PROTOCOL, re.MULTILINE)
    for name in wire.__all__:
        kind = getattr(wire, name)
        if isinstance(kind, type) and issubclass(kind, wire.Body) and kind is not wire.Body:
            assert f"`{name}`" in PROTOCOL
            for field in set(kind.model_fields) - {"cfg", "session", "round", "signature"}:
                assert f"`{field}`" in PROTOCOL, f"{name}.{field}"
