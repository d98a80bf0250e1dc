"""One client behind many requests: one after another, a few that wait, and a new session where the last one broke.

A :class:`securesplit.client.client.Client` is one conversation with the server at a time. Who waits too long, or finds too many
waiting, is told so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from securesplit.errors import BudgetExhausted, ConnectionFailed, InputError, SecureSplitError

if TYPE_CHECKING:
    from securesplit.client.client import Client

__all__ = ["Desk", "Gave"]

_GLANCE = 0.1
_DECLINED = frozenset({"SS-4040", "SS-4041"})
"""The server declines one request and keeps the session."""
_LAST_ORDERS = 5.0


class Gave(Exception):
    """The program that had asked closed its connection; nothing is owed to it."""


class Desk:
    """Hands out one client to one request at a time.

    Args:
        opened: opens a session with the server; used again when one broke.
        waiting: requests that may wait.
        patience: seconds that one waits.
    """

    def __init__(
        self, opened: Callable[[], AbstractContextManager[Client]], *, waiting: int = 16, patience: float = 120.0
    ) -> None:
        self._opened = opened
        self._patience = patience
        self._turn = threading.Lock()
        self._places = threading.BoundedSemaphore(waiting + 1)
        self._held: ExitStack | None = None
        self._client: Client | None = None

    @contextmanager
    def seat(self, gone: Callable[[], bool]) -> Iterator[None]:
        """Wait for one's turn, and have it.

        Args:
            gone: whether the one who waits has left.

        Raises:
            InputError: SS-1277 when too many wait, or it takes too long. Gave: when the one who waits has left.
        """
        if not self._places.acquire(blocking=False):
            raise _busy()
        try:
            self._await(gone)
            try:
                yield
            finally:
                self._turn.release()
        finally:
            self._places.release()

    def client(self) -> Client:
        """The client, with an open session; only within :meth:`seat`, or before anybody sits.

        Raises:
            ConnectionFailed, and whatever else opening a session raises.
        """
        if self._client is None:
            with ExitStack() as opening:
                self._client = opening.enter_context(self._opened())
                self._held = opening.pop_all()
        return self._client

    def failed(self, error: SecureSplitError) -> bool:
        """Take note that a request failed; True when its session may be broken, so that the next one opens another."""
        if isinstance(error, InputError | BudgetExhausted) or error.code in _DECLINED:
            return False
        self.close()
        return True

    def end(self) -> None:
        """Say goodbye to the server once nobody sits here any more, or at the latest after a moment."""
        free = self._turn.acquire(timeout=_LAST_ORDERS)
        self.close()
        if free:
            self._turn.release()

    def close(self) -> None:
        """Leave the session with the server."""
        held, self._held, self._client = self._held, None, None
        if held is not None:
            with suppress(SecureSplitError):  # It may be broken; that is why it is closed.
                held.close()

    def _await(self, gone: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._patience
        while not self._turn.acquire(timeout=_GLANCE):
            if gone():
                raise Gave
            if time.monotonic() > deadline:
                raise _busy()


def lost(error: SecureSplitError) -> bool:
    """Whether another session could do better: the connection ended, and nobody was refused."""
    return isinstance(error, ConnectionFailed) and error.code in {"SS-3020", "SS-3021"}


def _busy() -> InputError:
    return InputError(
        "SS-1277", "the endpoint answers one request at a time, and too many are waiting", hint="Ask again in a while."
    )
