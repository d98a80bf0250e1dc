"""Time is up when it is up, whatever comes and however fast."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from securesplit.transport import loopback
from securesplit.transport.http import Head, Late, Wire
from securesplit.transport.loopback import Bounds, Exchange


class Dripping:
    """A socket that always has a little at hand, and takes a tenth of a second to give it."""

    def __init__(self, clock: SimpleNamespace) -> None:
        self._clock, self.given = clock, 0

    def settimeout(self, seconds: float) -> None:
        assert seconds > 0

    def recv(self, _size: int) -> bytes:
        self._clock.now += 0.1
        self.given += 1
        return b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" if self.given == 1 else b"1\r\nx\r\n"


def test_bytes_that_are_always_at_hand_are_late_like_silence(monkeypatch):
    clock = SimpleNamespace(now=5.0)
    monkeypatch.setattr(loopback, "time", SimpleNamespace(monotonic=lambda: clock.now))
    peer = Dripping(clock)

    def anybody(_head: Head) -> None:
        """Everybody may go on."""

    with pytest.raises(Late, match="SS-1271"):
        Exchange(peer, Wire(anybody), Bounds(arriving=2.0)).arrive()
    assert peer.given <= 21
