"""The house's rows hold: who may import whom, what stays free of torch, and which names no file may have.

Read from the source with ``ast``, so that an import inside a function counts as much as one at the top.
"""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = (  # From the ground up. A module imports from rows below and from its own package, never sideways.
    {"errors"},
    {"policy", "codes", "measures"},
    {"aggregate", "pki", "protocol", "privacy", "model", "data", "journal"},
    {"suited", "transport"},
    {"admit", "agree", "kept", "learning", "logged", "runs"},
    {"client", "server", "report"},
    {"audit"},
    {"cli"},
    {"attacks", "scripts", "examples", "__main__"},
)
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}
# The commands `attack` and `demo` hand a recorded transcript to the attacks, which stand above them.
UPWARD = {("cli", "attacks")}
# A curious server has a transcript, the policy, public weights and the maths; no code of a client, no keys.
SEEN_BY_ATTACKS = {"errors", "policy", "protocol", "privacy", "model", "data"}
TORCH_FREE = {"errors", "policy", "measures", "protocol", "pki", "aggregate", "journal", "runs"}
HEAVY = {"torch", "transformers", "peft", "opacus"}
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
GRAB_BAGS = {"utils", "util", "common", "helpers", "helper", "misc"}

FILES = sorted(path for folder in ("securesplit", "attacks") for path in (ROOT / folder).rglob("*.py"))


def owner(parts: tuple[str, ...]) -> str | None:
    """The layer of a dotted name: the part after ``securesplit``, or ``attacks``; None outside the house."""
    if parts[0] in {"attacks", "scripts", "examples"}:
        return parts[0]
    return (parts[1] if len(parts) > 1 else "securesplit") if parts[0] == "securesplit" else None


def is_module(name: str) -> bool:
    """Whether a dotted name is a file or folder of the house, and not a name inside one."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(tree: ast.AST) -> set[tuple[str, ...]]:
    """Every imported module, as a dotted name; ``from a import b`` gives a.b where that is a module, else a."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names.update(
                whole if is_module(whole := f"{node.module}.{alias.name}") else str(node.module)
                for alias in node.names
                if not alias.name.startswith("__")  # The root's __version__ costs nothing.
            )
            # Of foreign packages the imported name may be the module that counts, as in `from safetensors import torch`.
            names.update(f"{node.module}.{alias.name}" for alias in node.names if str(node.module) == "safetensors")
    return {tuple(name.split(".")) for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_keeps_the_rules_of_the_house(path):
    home = path.relative_to(ROOT).with_suffix("").parts
    me = owner(home[:-1] if home[-1] == "__init__" else home)  # `securesplit/__main__.py` has a row of its own.
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = imports(tree)

    assert home[-1] not in GRAB_BAGS, "a file is named after its one concept"
    assert not {parts[0] for parts in found} & FORBIDDEN, "no serialiser that runs code"
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) == "torch.load"], (
        "torch.load unpickles"
    )
    if me in TORCH_FREE:
        assert not [parts for parts in found if set(parts) & HEAVY], f"{me} is free of torch"

    if me == "securesplit":
        return  # The root's lazy names may point anywhere; its start-up is tested below.
    assert me in LEVEL, f"{me} has no row; see docs and architecture"
    for parts in found:
        other = owner(parts)
        if other is None:
            continue
        assert not (ROOT.joinpath(*parts) / "__init__.py").is_file(), (
            f"import a file of {'.'.join(parts)}, not the package"
        )
        if other != me and (me, other) not in UPWARD:
            assert LEVEL[other] < LEVEL[me], f"{me} must not import {other}: it stands beside or above"
    if me == "attacks":
        assert {owner(parts) for parts in found} <= SEEN_BY_ATTACKS | {"attacks", None}


def test_the_rules_see_what_they_forbid():
    source = """
def inside():
    from securesplit.policy import load
    from securesplit.policy.schema import Policy
    from securesplit import Gate, errors, __version__
    from safetensors import torch
    import torch.nn as nn
"""
    found = imports(ast.parse(source))
    assert found == {
        ("securesplit", "policy", "load"),
        ("securesplit", "policy", "schema"),
        ("securesplit",),  # For Gate, a lazy name of the root; forbidden inside.
        ("securesplit", "errors"),
        ("safetensors",),
        ("safetensors", "torch"),
        ("torch", "nn"),
    }
    assert [owner(parts) for parts in sorted(found)] == [None, None, "securesplit", "errors", "policy", "policy", None]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)


@pytest.mark.parametrize("package", sorted(TORCH_FREE))
def test_importing_every_file_of_a_light_package_loads_no_torch(package):
    files = [
        p for p in FILES if p.relative_to(ROOT).parts[1].removesuffix(".py") == package and p.name != "__init__.py"
    ]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files]
    code = f"import sys, importlib\nfor n in {names!r}: importlib.import_module(n)\nprint('torch' in sys.modules)"
    assert run(code).stdout.strip() == "False"


CLI = ROOT / "securesplit" / "cli" / "main.py"


@pytest.mark.skipif(not CLI.is_file(), reason="the command line is not written yet")
class TestStartUp:
    CODE = (
        "import sys; sys.argv = ['securesplit', '--help']\n"
        "from securesplit.cli.main import main\n"
        "try:\n    code = main()\nexcept SystemExit as stop:\n    code = stop.code\n"
        "heavy = sorted({'torch', 'transformers', 'peft', 'matplotlib', 'faker', 'numpy'} & set(sys.modules))\n"
        "print(code or 0, *heavy, file=sys.stderr)"
    )

    def test_help_loads_nothing_heavy(self):
        assert run(self.CODE).stderr.split() == ["0"]

    def test_help_takes_less_than_half_a_second(self):
        # Processor time, because the wall clock of a busy machine measures the other tests; and the best of three.
        spent = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            run(self.CODE)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert min(spent) < 0.5
