"""Checkpoints of a session: running digests of what was sent and heard, and whose turn it is to seal.

Both ends of a session put the same two digests into their audit logs at a checkpoint, beside the other end's signed head.
Within TLS they can differ only by a fault of one end, or by somebody who ends TLS between the two and has a key of each.
"""

from __future__ import annotations

import hashlib

from securesplit.errors import RemoteProtocolError
from securesplit.protocol.messages import Seal
from securesplit.protocol.states import Role

__all__ = ["Seals"]


class Seals:
    """One end's view.

    Args:
        role: of this end. The client asks with 0, 1, 2, ..., and the server answers each before the next is asked for.
    """

    def __init__(self, role: Role) -> None:
        self._asks = role == "client"
        self._sent, self._heard = hashlib.sha256(), hashlib.sha256()
        self._last = -1
        self._open = False

    def sent(self, data: bytes) -> None:
        """A whole message has been queued."""
        self._sent.update(len(data).to_bytes(8, "little"))
        self._sent.update(data)

    def heard(self, data: bytes) -> None:
        """A whole message of the peer's was accepted."""
        self._heard.update(len(data).to_bytes(8, "little"))
        self._heard.update(data)

    def make(self, *, log: bytes, rows: int, head: bytes, signature: bytes) -> Seal:
        """This end's next seal; see :class:`Seal` for the arguments."""
        number = self._last + 1 if self._asks else max(self._last, 0)
        return Seal(number=number, stream=self._sent.digest(), log=log, rows=rows, head=head, signature=signature)

    def note(self, message: Seal) -> None:
        """A seal of either end has passed: the first of a number asks, the second answers."""
        self._open = message.number != self._last
        self._last = message.number

    def check(self, message: Seal) -> None:
        """Look at a seal of the peer's before it is taken.

        Raises:
            RemoteProtocolError: SS-4032 out of turn, SS-4031 when the peer sent other messages than arrived here.
        """
        if self._open != self._asks or message.number != (self._last if self._asks else self._last + 1):
            raise RemoteProtocolError(
                "SS-4032", "a checkpoint came out of turn", hint="Run the same release on both ends."
            )
        if message.stream != self._heard.digest():
            raise RemoteProtocolError(
                "SS-4031",
                "the two ends did not see the same messages in this session",
                hint="Compare both audit logs: securesplit audit verify LOG --with OTHER.",
            )
