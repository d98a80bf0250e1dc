"""A party's log outlives its certificates, and the authority that issued them."""

from __future__ import annotations

import pytest

from securesplit.errors import CheckFailed
from securesplit.logged import open_journal, signer_of
from securesplit.pki.authority import Authority
from securesplit.pki.renew import renew_all
from securesplit.pki.rotate import begin_rotation, finish_rotation
from securesplit.pki.store import KeyFolder


def test_a_log_goes_on_after_its_authority_was_exchanged(tmp_path):
    keys = tmp_path / "keys"
    authority = Authority.create(keys)
    authority.issue("gpu", "server")
    journal = open_journal(KeyFolder.open(keys / "gpu", "server"))
    begin_rotation(authority)
    renew_all(Authority.open(keys))
    journal.rekey(signer_of(KeyFolder.open(keys / "gpu", "server")))
    journal.close()
    open_journal(KeyFolder.open(keys / "gpu", "server")).close()
    finish_rotation(Authority.open(keys))
    open_journal(KeyFolder.open(keys / "gpu", "server")).close()


def test_a_log_of_another_key_under_an_authority_that_is_not_known_is_refused(tmp_path):
    for name in ("ours", "theirs"):
        Authority.create(tmp_path / name).issue("gpu", "server")
    open_journal(KeyFolder.open(tmp_path / "theirs" / "gpu", "server")).close()
    (tmp_path / "theirs" / "gpu" / "audit").rename(tmp_path / "ours" / "gpu" / "audit")
    with pytest.raises(CheckFailed) as caught:
        open_journal(KeyFolder.open(tmp_path / "ours" / "gpu", "server"))
    assert caught.value.code == "SS-1582"
