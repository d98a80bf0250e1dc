"""Whom a secure sum waits for, told to those who wait: once, and again when it changes."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from securesplit.protocol.messages import RoundStatus

__all__ = ["News"]


class News:
    """What each client was told last."""

    def __init__(self) -> None:
        self._told: dict[str, RoundStatus] = {}

    def forget(self, name: str) -> None:
        """A client is here anew, or gone; it knows nothing."""
        self._told.pop(name, None)

    def of(self, waits: dict[str, int], missing: AbstractSet[str]) -> list[tuple[str, RoundStatus]]:
        """What to tell now, to whom.

        Args:
            waits: the round that each client waits for.
            missing: whom they wait for.
        """
        names = tuple(sorted(missing))
        due = {name: RoundStatus(round=number, closed=False, missing=names) for name, number in waits.items()}
        fresh = [(name, status) for name, status in sorted(due.items()) if names and self._told.get(name) != status]
        self._told = due
        return fresh
