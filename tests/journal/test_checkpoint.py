"""What an end takes for the other end's head, and what it refuses at once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from securesplit.errors import RemoteProtocolError
from securesplit.journal.checkpoint import NO_LOG, Checkpoints, Peer
from securesplit.journal.seal import Head, statement
from tests.journal.logs import ALICE, BOB, certificate_of, lines_of, opened, signer_for, verify_by

LOG = bytes(range(16))


def head(rows: int, digest: bytes, party: str = ALICE) -> Head:
    return Head(LOG, rows, digest, signer_for(party).sign(statement(LOG, rows, digest, "shown")))


def peer(party: str = ALICE) -> Peer:
    return Peer("5" * 32, party, certificate_of(party))


def refused(checkpoints: Checkpoints, shown: Head) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        checkpoints.witness(peer(), 1, shown)
    return caught.value.code


def test_a_log_grows_and_keeps_what_it_had(tmp_path: Path) -> None:
    with opened(tmp_path / "audit") as journal:
        checkpoints = Checkpoints(journal, verify_by)
        checkpoints.witness(peer(), 0, head(5, b"a" * 32))
        checkpoints.witness(peer(), 1, head(5, b"a" * 32))
        for shown in (head(4, b"a" * 32), head(5, b"b" * 32), NO_LOG):
            assert refused(checkpoints, shown) == "SS-4033"
        checkpoints.witness(
            peer(BOB), 0, head(2, b"c" * 32, BOB)
        )  # What another party says of that name is its own affair.
        checkpoints.witness(peer(), 2, head(6, b"b" * 32))
    assert sum(b'"kind":"peer-head"' in line for line in lines_of(tmp_path / "audit")) == 4


def test_a_signature_for_another_place_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "audit") as journal:
        sign = signer_for(ALICE).sign
        taken = Head(LOG, 3, bytes(32), sign(statement(LOG, 3, bytes(32))))
        assert refused(Checkpoints(journal, verify_by), taken) == "SS-4033"


def test_an_end_without_a_log_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path / "audit") as journal, caplog.at_level(logging.WARNING):
        checkpoints = Checkpoints(journal, verify_by)
        for number in range(3):
            checkpoints.witness(peer(), number, NO_LOG)
    assert [record.getMessage() for record in caplog.records] == [
        f"{ALICE} shows no audit log: nothing that it does is witnessed here"
    ]
