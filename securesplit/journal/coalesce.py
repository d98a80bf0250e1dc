"""A flood of refusals becomes few rows: the first of a kind at once, the rest of a second as one row with their number.

Without it, who knocks ten thousand times a second would fill the disk, and a full disk stops the server. Nothing is left
out: the counts of all rows add up to the number of refusals. Sans-I/O: the time is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from securesplit.journal.events import Refused

__all__ = ["Coalescer"]

_SECOND = 1.0
_MOST = 1024
_Kind = tuple[str, str, str, str]


@dataclass(slots=True)
class Coalescer:
    """Counts refusals by host, stage, code and verified identity.

    Beyond 1024 kinds within a second, further ones are counted together under no address.
    """

    _since: dict[_Kind, float] = field(default_factory=dict)
    _counts: dict[_Kind, tuple[Refused, int]] = field(default_factory=dict)

    def offer(self, event: Refused, now: float) -> tuple[Refused, ...]:
        """A refusal happened.

        Args:
            event: about it.
            now: a monotonic clock, in seconds.

        Returns:
            What to write now.
        """
        out = self.due(now)
        kind = _kind(event)
        if kind not in self._since:
            if len(self._since) >= _MOST:
                event = event.model_copy(update={"address": "", "peer": "", "connection": 0})
                kind = _kind(event)
            if kind not in self._since:
                self._since[kind] = now
                return (*out, event)
        before = self._counts.get(kind)
        # The row stands for many: the port and the connection of one of them would say nothing.
        alike = event.model_copy(update={"address": _host(event.address), "connection": 0})
        self._counts[kind] = (alike, event.count + (before[1] if before else 0))
        return out

    def due(self, now: float, *, all_of_them: bool = False) -> tuple[Refused, ...]:
        """What was counted and is a second old. Call it a few times a second, and at the end with ``all_of_them``."""
        out = []
        # Kinds stand in the order of their times, so that a look costs what it gives.
        while self._since:
            kind, since = next(iter(self._since.items()))
            if not all_of_them and now - since < _SECOND:
                break
            del self._since[kind]
            if kind in self._counts:
                event, count = self._counts.pop(kind)
                out.append(event.model_copy(update={"count": count}))
                if not all_of_them:
                    self._since[kind] = now  # The flood may go on: its next second is counted from here.
        return tuple(out)


def _host(address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"{host}:0" if port else address


def _kind(event: Refused) -> _Kind:
    return (_host(event.address), event.stage, event.code, event.peer)
