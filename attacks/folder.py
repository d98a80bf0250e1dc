"""A report's folder: report.json, report.md and report.html; a sweep's: report.md and report.html. All files or none."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from attacks.markdown import markdown, sweep_markdown
from attacks.page import page, sweep_page
from attacks.report import Report
from attacks.sweep import Sweep
from securesplit.errors import InputError

__all__ = ["write_folder", "write_sweep_folder"]


def write_folder(report: Report, out: Path, *, texts: bool) -> None:
    """Write a report into a new folder.

    Args:
        report: of a run.
        out: must not exist.
        texts: whether true and recovered texts go into the pages. They are private; report.json never has them.

    Raises:
        InputError: SS-1712 when the folder exists or cannot be written.
    """
    shown = report if texts else report.model_copy(update={"examples": ()})
    _write(
        out, (("report.json", report.to_json() + "\n"), ("report.md", markdown(shown)), ("report.html", page(shown)))
    )


def write_sweep_folder(sweep: Sweep, out: Path) -> None:
    """Write a sweep's pages into a new folder; as :func:`write_folder`."""
    _write(out, (("report.md", sweep_markdown(sweep)), ("report.html", sweep_page(sweep))))


def _write(out: Path, files: tuple[tuple[str, str], ...]) -> None:
    """The folder appears whole or not at all, and can be read by its owner alone, because pages may hold texts."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=".making-", dir=out.parent))
        try:
            for name, text in files:
                (making / name).write_text(text, encoding="utf-8")
            if out.exists():
                raise FileExistsError
            making.rename(out)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
    except OSError as error:
        raise InputError(
            "SS-1712", f"cannot write {out}: {type(error).__name__}", hint="Name a directory that does not exist yet."
        ) from None
