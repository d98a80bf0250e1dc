"""What scripts/fuzz has found, each with the smallest input that shows it."""

from __future__ import annotations

import gc
import struct
import tracemalloc

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from securesplit.errors import InputError, RemoteProtocolError
from securesplit.pki.request import read_request
from securesplit.protocol import messages as m
from securesplit.protocol.codec import decode, encode
from tests.fuzz.targets import CAPS, TARGETS


def test_a_request_of_another_version(tmp_path):
    """cryptography raises an error of its own there, which is neither a ValueError nor a TypeError."""
    (pem,) = [seed[1:] for seed in TARGETS["certificate"].seeds() if seed[:1] == b"\3"]
    der = x509.load_pem_x509_csr(pem).public_bytes(serialization.Encoding.DER)
    assert der.count(b"\x02\x01\x00") == 1
    (tmp_path / "request.der").write_bytes(der.replace(b"\x02\x01\x00", b"\x02\x01\x01"))
    with pytest.raises(InputError) as caught:
        read_request(tmp_path / "request.der")
    assert caught.value.code == "SS-1817"


def test_refused_rows_leave_no_memory_behind():
    """5.8 KiB and the message itself were kept for every frame of int8 rows that no encoder writes.

    The error lay in a local name of the frame that pydantic's error led back to, through an object that Python's collector
    cannot look into: a client could fill the server's memory, one refused message after another.
    """
    hidden = m.Blob(dtype="int8", shape=(300, 3), data=struct.pack("<f3b", 0.5, 127, -3, 0) * 300)
    good = encode(m.Forward(step=5, lengths=(300,), learn=True, hidden=hidden))
    bad = good[:-7] + struct.pack("<f3b", 0.5, 12, -3, 0)

    def refused() -> None:
        with pytest.raises(RemoteProtocolError) as caught:
            decode(bad, CAPS)
        assert caught.value.code == "SS-4005"

    refused()
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(200):
            refused()
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 50_000
