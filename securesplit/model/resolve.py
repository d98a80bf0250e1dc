"""From what a user names - an alias, a directory, a hub id - to a model directory with the wanted cut."""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path

from securesplit.errors import ConnectionFailed, InputError
from securesplit.model.manifest import MANIFEST, read_manifest
from securesplit.model.plan import ROLES, CutPlan
from securesplit.model.pull import ALIASES, Progress, pull_alias, quiet_library

__all__ = ["cached_model", "resolve_model"]

_HUB = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}$")


def _silent(_phase: str, _fraction: float) -> None:
    """Progress that nobody watches."""


def resolve_model(name: str, cache: Path, plan: CutPlan | None = None, *, progress: Progress = _silent) -> Path:
    """Find or make the model directory for a name and a cut.

    Args:
        name: an alias (``smollm2-135m``), a model directory of ours, a directory as ``save_pretrained`` writes it
            (safetensors only, code is never run), or a hub id ``owner/name``.
        cache: where directories are made; each lies at ``cache / key / cut-FRONT-BACK``.
        plan: the cut; None means 2 and 2, or whatever cut a model directory of ours has.
        progress: told of each phase.

    Returns:
        A directory that ``load_front``, ``load_middle`` and ``load_back`` read.

    Raises:
        InputError: SS-1400 (cut), SS-1401 and SS-1402 (family), SS-1406 (nothing usable under this name).
        ConnectionFailed: SS-3400 when a download fails.
        CheckFailed: SS-1540 and SS-1541 when a file is not what it should be.
    """
    path = Path(name).expanduser()
    if (path / MANIFEST).is_file():
        return _own_directory(path, Path(cache), plan, progress)
    plan = plan or CutPlan()
    home = _home(name, Path(cache))
    target = home / _cut(plan)
    if (target / MANIFEST).is_file():
        return target
    complete = _complete_sibling(home)
    alias = next((alias for alias in ALIASES if alias.name == name), None)
    if complete is not None:
        _recut(complete, plan, target, progress)
    elif alias is not None:
        pull_alias(alias, plan, target, progress)
    else:
        _import_pretrained(name, plan, target, progress)
    return target


def cached_model(name: str, cache: Path, plan: CutPlan | None = None) -> Path:
    """The model directory for a name, if it is there already; nothing is fetched or written.

    Args:
        name, cache: as in :func:`resolve_model`.
        plan: the cut; None means whatever cut is there, 2 and 2 first.

    Raises:
        InputError: SS-1406 for a name that cannot be a model, SS-1407 when the model is not in the cache.
    """
    path = Path(name).expanduser()
    if (path / MANIFEST).is_file() and plan in {None, read_manifest(path).plan}:
        return path
    home = _home(name, Path(cache))
    wanted = [home / _cut(plan or CutPlan()), *(sorted(home.glob("cut-*-*")) if plan is None else [])]
    found = next((candidate for candidate in wanted if (candidate / MANIFEST).is_file()), None)
    if found is None:
        raise InputError(
            "SS-1407", f"{name} is not in {cache} with this cut", hint=f"Run 'securesplit model pull {name}' first."
        )
    return found


def _cut(plan: CutPlan) -> str:
    return f"cut-{plan.front}-{plan.back}"


def _home(name: str, cache: Path) -> Path:
    """Where the cuts of one model lie."""
    if any(alias.name == name for alias in ALIASES):
        return cache / name
    path = Path(name).expanduser()
    if (path / MANIFEST).is_file():
        return cache / f"model-{read_manifest(path).digest[:16]}"
    if path.is_dir():
        return cache / f"local-{_fingerprint(path)}"
    if _HUB.match(name):
        return cache / ("hub-" + name.replace("/", "--"))
    known = ", ".join(alias.name for alias in ALIASES)
    raise InputError(
        "SS-1406",
        f"no model is known as {name!r}",
        hint=f"Give an alias ({known}), a directory or a hub id owner/name.",
    )


def _own_directory(path: Path, cache: Path, plan: CutPlan | None, progress: Progress) -> Path:
    """A directory of ours is used as it is, or cut elsewhere into the cache."""
    if plan is None or plan == read_manifest(path).plan:
        return path
    target = _home(str(path), cache) / _cut(plan)
    if not (target / MANIFEST).is_file():
        _recut(path, plan, target, progress)
    return target


def _recut(source: Path, plan: CutPlan, target: Path, progress: Progress) -> None:
    from securesplit.model.writer import resplit

    resplit(source, plan, target, progress=lambda done: progress("write", done))


def _complete_sibling(home: Path) -> Path | None:
    """A directory of the same model, with another cut, that holds all three files."""
    for candidate in sorted(home.glob("cut-*-*")):
        if (candidate / MANIFEST).is_file() and all((candidate / f"{role}.safetensors").is_file() for role in ROLES):
            return candidate
    return None


def _fingerprint(path: Path) -> str:
    """A short name for a directory's place and content, by its files' names, sizes and times."""
    files = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in path.iterdir() if p.is_file())
    return hashlib.sha256(repr((str(path.resolve()), files)).encode()).hexdigest()[:16]


def _import_pretrained(name: str, plan: CutPlan, target: Path, progress: Progress) -> None:
    """Load a whole model with the library, from safetensors alone, and write it in parts."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from securesplit.model.architectures import architecture_of
    from securesplit.model.writer import write_model

    path = Path(name).expanduser()
    local = path.is_dir()
    source = str(path) if local else name
    if local and not any(path.glob("*.safetensors")):
        raise InputError(
            "SS-1406",
            f"{path} holds no safetensors file",
            hint="Only safetensors are read; pickled weights can run code.",
        )
    progress("load", 0.0)
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        architecture_of(config)
        plan.spans(config.num_hidden_layers)
        with quiet_library():
            model = AutoModelForCausalLM.from_pretrained(
                source, local_files_only=local, trust_remote_code=False, use_safetensors=True, dtype="auto"
            )
        progress("load", 0.8)
    except (OSError, ValueError, KeyError) as error:
        if local:
            raise InputError(
                "SS-1406",
                f"{path} cannot be loaded: {type(error).__name__}",
                hint="It needs config.json and safetensors of one model.",
            ) from error
        raise ConnectionFailed(
            "SS-3400",
            f"{name} could not be fetched: {type(error).__name__}",
            hint="Check the name and the network, or give a local directory.",
        ) from error
    tokenizer = None
    # Without tokenizer files the library would make up an empty tokenizer. A model can be trained on token ids alone.
    if not local or any(path.glob("tokenizer*")) or any(path.glob("vocab*")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    progress("load", 1.0)
    write_model(model, plan, target, tokenizer=tokenizer, progress=lambda done: progress("write", done))
