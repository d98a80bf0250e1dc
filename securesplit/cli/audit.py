"""``securesplit audit``: look into a party's audit log, and check that it is what the party wrote."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securesplit.cli.output import Output, show

if TYPE_CHECKING:
    from securesplit.errors import SecureSplitError
    from securesplit.journal.verify import Trust, Verified

app = typer.Typer(
    help="The audit log: who was let in, refused, served, and what was released.",
    no_args_is_help=True,
    add_completion=False,
)

Log = Annotated[Path, typer.Argument(metavar="PATH", help="A log, such as keys/gpu/audit, or the key folder above it.")]


@app.command()
def tail(
    path: Log,
    count: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many rows.")] = 20,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with rows as they are added.")] = False,
    output: Output = "text",
) -> None:
    """Print the last rows, oldest first. Nothing is verified; --output json gives the rows with all their fields.

    With --follow every row is printed by itself, as a line; in JSON too.
    """
    import json

    from securesplit.journal.tail import described, last_lines
    from securesplit.journal.tail import follow as following

    folder = _log_in(path)
    seen = last_lines(folder, count)
    if not follow:
        rows = [json.loads(line) for line in seen.lines] if output == "json" else []
        show(output, "\n".join(described(line) for line in seen.lines), {"rows": rows})
        return
    for line in seen.lines:
        _line(line, output, described)
    for line in following(folder, seen, _waited):
        _line(line, output, described)


@app.command()
def verify(
    path: Log,
    key: Annotated[
        list[Path] | None,
        typer.Option("--key", help="Trust this certificate or public key (PEM), or a party's folder; repeatable."),
    ] = None,
    ca: Annotated[
        list[Path] | None,
        typer.Option(
            "--ca",
            help="Trust this authority; ca.pem beside the log's folder when absent; repeatable, for one that was exchanged.",
        ),
    ] = None,
    crl: Annotated[
        list[Path] | None,
        typer.Option(
            "--crl", help="Its revocation list, in the order of --ca; crl.pem beside the authority's file when absent."
        ),
    ] = None,
    other: Annotated[
        list[Path] | None,
        typer.Option(
            "--with", metavar="OTHER", help="The other end's log, or its key folder: compare the two; repeatable."
        ),
    ] = None,
    output: Output = "text",
) -> None:
    """Check a log: every row, every signature, its end, and what two ends say about each other. Exit 1 when it is not whole."""
    from securesplit.errors import CheckFailed
    from securesplit.journal.verify import agree
    from securesplit.journal.verify import verify as check

    folders = [_log_in(path), *_logs_in(other or [], beside=path)]
    try:
        found: list[Verified] = []
        for folder in dict.fromkeys(folders):
            found.append(check(folder, _trust(folder, key or [], ca or [], crl or [])))
            _require_party(folder, key or [], found[-1])
        compared = agree(found) if other else None
    except CheckFailed as error:
        if output == "text":
            raise
        show(output, "", _refused(error))
        sys.exit(error.exit_code)
    show(output, _told(found, compared), _found(found[0], compared))


def _told(logs: list[Verified], compared: int | None) -> str:
    lines = []
    for found in logs:
        lines += [
            f"{found.path}: whole; the log of {found.party}",
            f"  {found.rows} rows in {found.files} file(s), {found.heads} signed heads inside, last row {found.last[:16]}",
        ]
        if found.torn:
            lines.append(f"  {found.torn} row(s) tell of a process that died or a machine that lost its power")
    if compared is not None:
        lines.append(f"they agree: {compared} statement(s) compared")
        if not compared:
            lines.append("warning: these logs say nothing about each other, so nothing could be compared")
    return "\n".join(lines)


def _found(found: Verified, compared: int | None) -> dict[str, object]:
    return {
        "valid": True, "log": found.log, "party": found.party, "rows": found.rows, "files": found.files, "heads": found.heads,
        "last": found.last, "torn": found.torn, "compared": compared,
    }  # fmt: skip


def _refused(error: SecureSplitError) -> dict[str, object]:
    return {"valid": False, "code": error.code, "what": error.what, "hint": error.hint}


def _log_in(path: Path) -> Path:
    """The log's folder: what was named, the folder of a file that was named, or ``audit`` in a party's folder."""
    if path.is_file():
        return path.parent
    return path / "audit" if (path / "audit").is_dir() else path


def _logs_in(others: list[Path], *, beside: Path) -> list[Path]:
    """Logs to compare with: of a key folder all, because each process of a client has one; also those beside the first."""
    found = []
    for place in [*others, beside] if others else []:
        several = sorted(log for log in place.glob("audit*") if log.is_dir()) if place.is_dir() else []
        found += several or [_log_in(place)]
    return found


def _trust(folder: Path, keys: list[Path], cas: list[Path], crls: list[Path]) -> Trust:
    """Whose signatures count: named keys, what authorities issued, and the very key that lies beside a log."""
    from securesplit.errors import InputError
    from securesplit.journal.verify import Trust
    from securesplit.logged import known_to, pinned
    from securesplit.pki.certificate import verify_signature

    beside, own = folder.parent / "ca.pem", folder.parent / "cert.pem"
    named = [_file(key) for key in keys]
    if not named and own.is_file():
        named = [
            own.read_bytes()
        ]  # A renewal keeps the key, and outlives the authority that issued the old certificate.
    chosen = cas or ([beside] if beside.is_file() else [])
    if not chosen and not keys:
        raise InputError(
            "SS-1588",
            "nothing says whose signatures to trust",
            hint="Name the authority with --ca (and --crl), or the party's certificate with --key.",
        )
    lists = [*crls, *(place.parent / "crl.pem" for place in chosen[len(crls) :])]
    owner: Callable[[bytes, int], str] | None = None
    for place, crl in zip(chosen, lists, strict=False):
        owner = known_to(place.read_bytes(), crl.read_bytes(), otherwise=owner)
    return Trust(pinned(named, owner), verify_signature)


def _require_party(folder: Path, keys: list[Path], found: Verified) -> None:
    """A good log of somebody else, put in the place of this one, is not this one."""
    from securesplit.logged import parties

    beside = folder.parent / "cert.pem"
    named = [_file(key) for key in keys] or ([beside.read_bytes()] if beside.is_file() else [])
    expected = parties(named)
    if expected and found.party not in expected:
        from securesplit.journal.faults import unsigned

        raise unsigned(f"{folder} holds the log of {found.party}, not of {' or '.join(sorted(expected))}")


def _file(key: Path) -> bytes:
    return (key / "cert.pem" if key.is_dir() else key).read_bytes()


def _line(line: str, output: str, described: Callable[[str], str]) -> None:
    sys.stdout.write((line if output == "json" else described(line)) + "\n")
    sys.stdout.flush()


def _waited() -> bool:
    time.sleep(0.2)
    return True
