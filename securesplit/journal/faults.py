"""How an audit log is refused. Each is a check whose answer is no, with the place and the reason."""

from __future__ import annotations

from securesplit.errors import CheckFailed, InputError

__all__ = ["altered", "cut", "disagree", "held", "missing", "unfinished", "unsigned", "unwritable"]

_KEEP = "Keep these files as they are, they are evidence; find out who could write them, and begin a new log elsewhere."


def altered(place: str, why: str) -> CheckFailed:
    """A row was changed, removed, moved or put in."""
    return CheckFailed("SS-1580", f"the audit log was altered: {place}: {why}", hint=_KEEP)


def cut(what: str) -> CheckFailed:
    """The log ends before what was signed."""
    return CheckFailed("SS-1581", f"the audit log was cut off or put back: {what}", hint=_KEEP)


def unsigned(what: str) -> CheckFailed:
    """A signature is not the party's, or there is none."""
    return CheckFailed("SS-1582", f"the audit log is not sealed by its party: {what}", hint=_KEEP)


def disagree(what: str) -> CheckFailed:
    """Two ends' logs contradict each other."""
    return CheckFailed(
        "SS-1583",
        f"the two logs do not agree: {what}",
        hint="One of the two was rewritten; ask for older copies of both.",
    )


def unfinished(what: str) -> CheckFailed:
    """The log ends as a process leaves it that was killed."""
    return CheckFailed(
        "SS-1584",
        f"the audit log's end is not sealed: {what}",
        hint="A process died while it wrote, or somebody added to the end. The next start of the party seals it off with a row that says so.",
    )


def unwritable(what: str) -> CheckFailed:
    """The disk does not take a row, so nothing may go on."""
    return CheckFailed(
        "SS-1585",
        f"the audit log cannot be written ({what}), so nothing is served or sent",
        hint="Make room on the disk or mend it; unlogged work is refused.",
    )


def held(path: str) -> InputError:
    """Another process writes this log."""
    return InputError(
        "SS-1586", f"another process writes the audit log {path}", hint="One process per party; stop the other one."
    )


def missing(path: str, why: str) -> InputError:
    """There is no log."""
    return InputError(
        "SS-1587", f"{path} holds no audit log that can be read: {why}", hint="Name a folder such as keys/gpu/audit."
    )
