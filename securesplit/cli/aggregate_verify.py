"""``securesplit aggregate verify``: do the records of secure sums hold? Offline, for an auditor who trusts none of the parties."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securesplit.cli.output import Output

if TYPE_CHECKING:
    from rich.table import Table

    from securesplit.aggregate.config import Floors
    from securesplit.aggregate.findings import Check, Report
    from securesplit.aggregate.record import RoundRecord
    from securesplit.pki.past import PastAuthority


def verify(
    records: Annotated[
        list[Path], typer.Argument(metavar="RECORD...", help="Records of rounds; those of one are compared.")
    ],
    *,
    ca: Annotated[Path, typer.Option("--ca", help="The consortium's authority, such as keys/ca/cert.pem.")],
    crl: Annotated[
        Path | None, typer.Option("--crl", help="Its newest revocation list; crl.pem beside --ca when absent.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option("--policy", help="A client's policy whose rules for sums the rounds must keep.")
    ] = None,
    roster: Annotated[
        list[str] | None,
        typer.Option(
            "--roster", metavar="NAME", help="A client of the consortium's roster. May be repeated, for all of them."
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="When the rounds were, if you know it from elsewhere (ISO 8601). Later revocations then do not count; without it, every revocation does.",
        ),
    ] = None,
    output: Output = "text",
) -> None:
    """Check signatures and sets of recorded rounds, and that the records of one round agree. Exit 1 when one fails."""
    from securesplit.aggregate.compare import compare
    from securesplit.errors import CheckFailed
    from securesplit.pki.past import PastAuthority

    now = datetime.now(UTC)
    known = None if at is None else _moment(at)
    read = _read(records)
    authority = PastAuthority.parse(_bytes(ca), _bytes(crl or ca.with_name("crl.pem")))
    authority.require_newest(at=known or now, vouched=known is not None, now=now)
    floors, pinned = (None, None) if policy is None else _floors(policy)
    roster = roster or (None if pinned is None else list(pinned))
    reports = [
        _verified(record, read, authority, known=known, now=now, roster=roster, floors=floors) for record in read
    ]
    compared = compare([(path.name, report) for path, report in zip(records, reports, strict=True)])
    typer.echo(json.dumps(_as_json(records, compared))) if output == "json" else _print(records, compared)
    if failed := [path for path, report in zip(records, compared, strict=True) if not report.valid]:
        what = f"{len(failed)} of {len(records)} records do not hold: {', '.join(map(str, failed[:3]))}"
        hint = "The failed checks say what is wrong. Do not rely on these rounds until their makers have explained it."
        raise CheckFailed("SS-1623", what, hint=hint)


def _moment(text: str) -> datetime:
    from securesplit.errors import InputError

    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(
            "SS-1622", f"{text[:40]!r} is no time", hint="Write it like 2026-03-31T12:00:00Z; without a zone it is UTC."
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _bytes(path: Path) -> bytes:
    from securesplit.errors import InputError

    try:
        return path.read_bytes()
    except OSError as error:
        what = f"{path} cannot be read ({type(error).__name__})"
        raise InputError("SS-1621", what, hint="Name both files of the authority: --ca CERT --crl LIST.") from None


def _read(paths: Sequence[Path]) -> list[RoundRecord]:
    """All records; every file that is none is named at once."""
    from securesplit.aggregate.record import read_record
    from securesplit.errors import InputError

    found, faults = [], []
    for path in paths:
        try:
            found.append(read_record(path))
        except InputError as error:
            faults.append(error)
    if faults:
        details = tuple(error.what for error in faults) if len(faults) > 1 else ()
        raise InputError(faults[0].code, faults[0].what, hint=faults[0].hint, details=details)
    return found


def _floors(path: Path) -> tuple[Floors, tuple[str, ...] | None]:
    from securesplit.admit import floors_of
    from securesplit.policy.load import load_policy
    from securesplit.policy.schema import Gaussian

    policy = load_policy(path)
    updates = policy.privacy.updates if isinstance(policy.privacy, Gaussian) else None
    return floors_of(policy, honest=1 if updates is None else updates.honest or 1), policy.aggregation.roster


def _verified(
    record: RoundRecord,
    together: Sequence[RoundRecord],
    authority: PastAuthority,
    *,
    known: datetime | None,
    now: datetime,
    roster: Sequence[str] | None,
    floors: Floors | None,
) -> Report:
    from securesplit.aggregate.verify import verify_round

    moment = known or datetime.fromtimestamp(record.made, UTC)
    signed = partial(authority.verify_signed, at=moment, vouched=known is not None)
    return verify_round(
        record,
        partial(signed, role="client"),
        verify_server=partial(signed, role="server"),
        now=int(now.timestamp()),
        pinned_roster=roster,
        floors=floors,
        alikes=[other.alike for other in together if other.alike and other.config == record.config],
    )


def _as_json(paths: Sequence[Path], reports: Sequence[Report]) -> dict[str, object]:
    return {
        "valid": all(report.valid for report in reports),
        "rounds": [_round(path, report) for path, report in zip(paths, reports, strict=True)],
    }


def _round(path: Path, report: Report) -> dict[str, object]:
    config, record = report.config, report.record
    return {
        "file": str(path),
        "valid": report.valid,
        "made_by": record.maker,
        "made": datetime.fromtimestamp(record.made, UTC).isoformat().replace("+00:00", "Z"),
        "round": config.round if config else None,
        "session": config.session_id.hex() if config else None,
        "roster": list(config.roster) if config else None,
        "clients": list(report.clients),
        "members": list(record.members),
        "survivors": list(record.survivors),
        "signers": list(report.signers),
        "threshold": config.threshold if config else None,
        "blind": config.blind if config else None,
        "sum": record.sum_digest.hex() or None,
        "aborted": record.aborted or None,
        "checks": [{"name": c.name, "ok": c.ok, "warning": c.warning, "detail": c.detail} for c in report.checks],
    }


def _print(paths: Sequence[Path], reports: Sequence[Report]) -> None:
    """One record: all its checks. Several: a line for each, then what is not plainly good."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if len(reports) > 1:
        console.print(_overview(paths, reports))
    looked_at: set[Check] = set()
    for path, report in zip(paths, reports, strict=True):
        checks = [c for c in report.checks if len(reports) == 1 or not c.ok or (c.warning and c not in looked_at)]
        looked_at.update(checks)
        if checks:
            console.print(Text(_title(path, report), style="bold"))
            console.print(_checks(checks))
    held = sum(report.valid for report in reports)
    verdict = "every record holds" if held == len(reports) else f"{held} of {len(reports)} records hold"
    console.print(Text(verdict, style="bold green" if held == len(reports) else "bold red"))


def _title(path: Path, report: Report) -> str:
    from securesplit.aggregate.findings import printable

    about = (
        "" if report.config is None else f", round {report.config.round}, session {report.config.session_id.hex()[:8]}"
    )
    return f"{path}: made by {printable(report.record.maker)}{about}"


def _overview(paths: Sequence[Path], reports: Sequence[Report]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from securesplit.aggregate.findings import printable

    table = Table(
        "record", "made by", "round", "U1", "U2", "U3", "signed", "sum", "", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for path, report in zip(paths, reports, strict=True):
        config, record = report.config, report.record
        word = Text("holds", style="green") if report.valid else Text("FAILED", style="bold red")
        table.add_row(
            Text(path.name, overflow="fold"),
            Text(printable(record.maker)),
            str(config.round) if config else "?",
            str(len(report.clients)),
            str(len(record.members)),
            str(len(record.survivors)),
            f"{len(report.signers)} of {config.threshold}" if config else "?",
            record.aborted or record.sum_digest.hex()[:8] or "hidden",
            word,
        )
    return table


def _checks(checks: Sequence[Check]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for check in checks:
        word, style = ("look", "yellow") if check.warning else ("ok", "green") if check.ok else ("FAILED", "bold red")
        table.add_row(Text("  " + word, style=style), Text(check.name), Text(check.detail))
    return table
