"""``securesplit doctor``: is this machine ready, and where does a connection end? Exit status 1 when a check fails."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securesplit.cli.output import Output, show
from securesplit.cli.passphrase import KeyPassFd, KeyPassFile, existing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from securesplit.transport.checkup import Check

_SIGNS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


def doctor(
    keys: Annotated[Path | None, typer.Option("--keys", help="A party's key folder, such as keys/alice.")] = None,
    connect: Annotated[
        str | None, typer.Option("--connect", metavar="URL", help="Walk to a server step by step; needs --keys.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds for each step of --connect.")] = 10.0,
    key_pass_file: KeyPassFile = None,
    key_pass_fd: KeyPassFd = None,
    output: Output = "text",
) -> None:
    """Check versions, TLS, keys, certificates, clock, ledger and disk; with --connect, a server, too."""
    from securesplit.errors import InputError

    if connect is not None and keys is None:
        raise InputError(
            "SS-1001", "--connect needs --keys", hint="Name the client's folder, such as --keys keys/alice."
        )
    found = list(_checks(keys, connect, timeout, existing("the party's key", key_pass_file, key_pass_fd)))
    bad = sum(check.status == "fail" for check in found)
    width = max(len(check.name) for check in found)
    lines = []
    for check in found:
        code = f" [{check.code}]" if check.code else ""
        lines.append(f"{_SIGNS[check.status]}  {check.name:<{width}}  {check.what}{code}")
        if check.hint:
            lines.append(f"      {'':<{width}}  -> {check.hint}")
    rows = [{"name": c.name, "status": c.status, "what": c.what, "hint": c.hint, "code": c.code or None} for c in found]
    show(output, "\n".join(lines), {"ok": not bad, "failed": bad, "checks": rows})
    if bad:
        raise typer.Exit(1)


def _checks(
    keys: Path | None, connect: str | None, timeout: float, passphrase: Callable[[], bytes] | None
) -> Iterator[Check]:
    from datetime import UTC, datetime

    from securesplit.errors import ConnectionFailed, SecureSplitError
    from securesplit.pki.store import KeyFolder
    from securesplit.transport.checkup import Check, check_keys, check_machine, check_place, failed, role_of

    yield from check_machine()
    if keys is None:
        yield from check_place(Path.cwd())
        return
    role = "client" if connect is not None else role_of(keys)
    yield from check_keys(keys, role, datetime.now(UTC), passphrase)
    yield from check_place(keys)
    book = keys / "ledger"
    if (book / "ledger.sqlite").is_file():
        from securesplit.privacy.ledger import Ledger

        ledger = None
        try:
            ledger = Ledger(book)
            ledger.verify()
            yield Check("ledger", "ok", f"whole and anchored; mu {ledger.mu():.3g} spent by the worst record")
        except SecureSplitError as error:
            yield failed("ledger", error)
        finally:
            if ledger is not None:
                ledger.close()
    elif role == "client":
        yield Check("ledger", "ok", "none yet; the first release makes one")
    if connect is not None:
        from securesplit.transport.walk import walk

        try:
            folder = KeyFolder.open(keys, "client", passphrase=passphrase)
        except ConnectionFailed:
            return  # Told above.
        yield from walk(connect, folder, timeout=timeout)
