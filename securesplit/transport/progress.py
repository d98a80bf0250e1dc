"""Whether a peer moves. Only bytes count: a message may take an hour over a thin line, and no peer may take it standing still.

No clock and no socket: the shell says what has moved, and when it looks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from websockets.asyncio.server import ServerConnection

from securesplit.pki.identity import Identity
from securesplit.protocol.session import Party
from securesplit.transport.accepted import ACCEPTED, Accepted
from securesplit.transport.limits import Progress

__all__ = ["Pace", "Wire"]


@dataclass(slots=True)
class Pace:
    """One direction of one connection, looked at now and then.

    Args:
        limits: how much has to move in which time.
        begin: the time of the first look.
    """

    limits: Progress
    begin: float
    _at: float = field(init=False)
    _count: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._at = self.begin

    def stalled(self, now: float, count: int, *, due: bool, least: int) -> bool:
        """Whether fewer than ``least`` bytes moved in a whole window in which some were due all the time.

        Args:
            now: monotonic, in seconds.
            count: bytes that ever moved in this direction.
            due: whether bytes are due at this moment; when none are, a new window begins.
            least: bytes that make a window good.
        """
        if not due or count - self._count >= least:
            self._at, self._count = now, count
            return False
        return now - self._at > self.limits.seconds


class Wire(ServerConnection):
    """A websocket that counts what arrives.

    Attributes:
        visitor: the accepted connection below.
        arrived: bytes after TLS.
        heard: when the last of them came, by the loop's clock.
        owner: whose it is, once that is proven.
    """

    owner: tuple[Identity, Party] | None = None
    visitor: Accepted | None
    arrived: int
    heard: float

    def connection_made(self, transport: object) -> None:
        """TLS is done."""
        self.visitor = ACCEPTED.get()
        if self.visitor is not None:
            self.visitor.secured = True
        self.arrived, self.heard = 0, self.loop.time()
        super().connection_made(transport)  # type: ignore[arg-type]  # the library asks for its base class

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        self.arrived += len(data)
        self.heard = self.loop.time()
        super().data_received(data)

    @property
    def address(self) -> str:
        """Numeric address and port of the peer."""
        return self.visitor.address if self.visitor is not None else ""

    @property
    def half(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self.protocol.reader.buffer)

    @property
    def listening(self) -> bool:
        """Whether this side reads; while it does not, a peer cannot be blamed for silence."""
        reading = getattr(self.transport, "is_reading", None)
        return bool(reading()) if reading is not None else True

    @property
    def untaken(self) -> int:
        """Bytes that wait for the peer to take them."""
        return int(self.transport.get_write_buffer_size())
