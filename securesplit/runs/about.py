"""What a run was started with, written before its first step: ``about.json`` in the run's folder, for this site alone.

Texts are named by a keyed digest only (securesplit/runs/fingerprint.py). Seeds are the public ones; noise comes from the
operating system, is drawn once, and has no seed that could be written down.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from securesplit.pki.files import write_atomically

__all__ = ["ABOUT", "About", "DataNote", "Option", "Seeds", "Versions", "versions", "write_about"]

ABOUT = "about.json"
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
_ROOT = Path(__file__).resolve().parents[2]

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class Versions(BaseModel):
    """What computed; None for what is not installed, and for a commit where the program is not a checkout."""

    model_config = _STRICT
    securesplit: str | None
    python: str
    torch: str | None
    transformers: str | None
    peft: str | None
    numpy: str | None
    commit: str | None


class Seeds(BaseModel):
    """Public seeds: of the adapters' start, and of the order of batches."""

    model_config = _STRICT
    adapters: int
    batches: int


class DataNote(BaseModel):
    """The texts, without a word of them.

    Attributes:
        digest: keyed by the site; see securesplit/runs/fingerprint.py.
        records, held_out: how many are learnt, and how many evaluated.
        batches: of one pass.
    """

    model_config = _STRICT
    digest: Digest
    records: Count
    held_out: Count
    batches: Count


class Option(BaseModel):
    """One option of the command, by its name."""

    model_config = _STRICT
    name: Annotated[str, Field(min_length=1, max_length=100)]
    value: str | int | float | bool | None


class About(BaseModel):
    """The beginning of a run.

    Attributes:
        started: with its time zone.
        client: this site's name.
        job, policy: as JSON, in their canonical form, so that a difference can be told when the files are gone.
        job_digest, policy_digest: SHA-256 of these.
        model: digest of the model's manifest.
        regime: what the policy lets learn.
    """

    model_config = _STRICT
    format: Literal[1] = 1
    started: AwareDatetime
    client: str
    job: str
    job_digest: Digest
    job_name: str
    policy: str
    policy_digest: Digest
    policy_name: str
    model: Digest
    regime: str
    options: tuple[Option, ...]
    seeds: Seeds
    versions: Versions
    data: DataNote
    tls: str


def versions() -> Versions:
    """Of this process. Nothing heavy is imported."""
    return Versions(
        securesplit=_installed("securesplit"), python=platform.python_version(), torch=_installed("torch"),
        transformers=_installed("transformers"), peft=_installed("peft"), numpy=_installed("numpy"), commit=_commit(_ROOT),
    )  # fmt: skip


def write_about(folder: Path, about: About) -> None:
    """Write it whole or not at all, readable by its owner alone.

    Raises:
        InputError: SS-1804 when the folder cannot be written.
    """
    write_atomically(folder / ABOUT, about.model_dump_json(indent=1).encode(), mode=0o600)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    """The commit of a checkout, with ``+`` where files differ from it; None for an installed program."""
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            [git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
        clean = subprocess.run(
            [git, "-C", str(root), "diff", "--quiet", "HEAD"], capture_output=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("" if clean.returncode == 0 else "+")
