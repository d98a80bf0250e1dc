"""How much each client has used in this run of the server, over all of its connections, and when that is too much.

Nothing is kept on disk: a server that is started anew counts from zero. The privacy budget is another thing altogether; it
is the client's, and its ledger never forgets (securesplit/privacy/ledger.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from securesplit.errors import PolicyDenied
from securesplit.protocol.messages import Forward, Message
from securesplit.transport.limits import Limits

__all__ = ["Exceeded", "Quotas", "Used"]


Kind = Literal["bytes", "steps", "tokens"]


class Exceeded(PolicyDenied):
    """SS-2040: a client has more than it may.

    Attributes:
        quota: of what.
        limit: how much it may.
    """

    def __init__(self, quota: Kind, limit: int) -> None:
        super().__init__(
            "SS-2040",
            f"the quota of {limit} {quota} is used up",
            hint="Ask the server's operator for more, or wait for the server's next run.",
        )
        self.quota: Kind = quota
        self.limit = limit


@dataclass(slots=True)
class Used:
    """What one client has used.

    Attributes:
        bytes: of its messages.
        steps: its ``Forward`` messages.
        tokens: rows in them.
    """

    bytes: int = 0
    steps: int = 0
    tokens: int = 0


class Quotas:
    """Counts by client name.

    Args:
        limits: what each may use.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._used: dict[str, Used] = {}

    def used(self, name: str) -> Used:
        """What a client has used so far."""
        return self._used.setdefault(name, Used())

    def charge(self, name: str, size: int, message: Message | None = None) -> None:
        """Count a message, first its bytes and then, once it is parsed, what it asks for.

        Raises:
            Exceeded: SS-2040 when the client has more than it may. What is refused is counted as well.
        """
        used = self.used(name)
        used.bytes += size
        if isinstance(message, Forward):
            used.steps += 1
            used.tokens += sum(message.lengths)
        most = self._limits.of(name)
        rows: tuple[tuple[Kind, int, int | None], ...] = (
            ("bytes", used.bytes, most.bytes),
            ("steps", used.steps, most.steps),
            ("tokens", used.tokens, most.tokens),
        )
        for what, count, limit in rows:
            if limit is not None and count > limit:
                raise Exceeded(what, limit)
