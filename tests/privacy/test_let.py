"""What left, added up by channel: the same bytes once."""

from __future__ import annotations

import hashlib

from securesplit.privacy.let import Sent, Tally, told


def test_bytes_count_once_by_channel_however_often_they_leave():
    tally = Tally()
    assert tally.channels() == ()
    first = told("cut", [b"abcd", b"efgh"], 2, [5, 6])
    assert (first.size, first.payload) == (8, hashlib.sha256(b"abcdefgh").hexdigest())
    for let in (first, told("gradient", [b"xy"], 1), first, told("cut", [b"1234"], 1), first):
        tally.add(let)
    assert tally.channels() == (Sent("cut", 3, 12), Sent("gradient", 1, 2))
