"""The server keeps a client's sealed head: an image of the whole machine, put back, is refused all the same."""

from __future__ import annotations

import shutil

import pytest

from securesplit.audit.builtin import builtin_policy
from securesplit.audit.tiny import TinySite
from securesplit.errors import PolicyDenied
from securesplit.server.anchors import KeptAnchors


def test_blobs_survive_a_restart_and_stay_apart(tmp_path):
    kept = KeptAnchors(tmp_path / "kept")
    kept.keep(b"alice's certificate", b"one")
    kept.keep(b"alice's certificate", b"two")
    kept.keep(b"bob's certificate", b"three")
    again = KeptAnchors(tmp_path / "kept")
    assert (again.of(b"alice's certificate"), again.of(b"bob's certificate"), again.of(b"carol's")) == (
        b"two", b"three", b"",
    )  # fmt: skip
    assert sorted(p.stat().st_mode & 0o777 for p in (tmp_path / "kept").iterdir()) == [0o600, 0o600]
    assert KeptAnchors().of(b"anybody") == b""


def test_a_machine_that_was_set_back_is_refused_by_what_the_server_kept(tmp_path):
    site = TinySite(builtin_policy(), tmp_path / "site")
    site.client.loss(site.training[0])
    site.client.keep_anchor()
    site.ledger.close()
    image = tmp_path / "image"
    image.mkdir()
    for name in ("ledger", "anchors"):  # Both, as an image of the machine would have them.
        shutil.copytree(site.cohort.folder / name, image / name)
    site.restart()
    site.client.loss(site.training[1])
    site.client.keep_anchor()
    site.ledger.close()

    for name in ("ledger", "anchors"):
        for file in (image / name).rglob("*"):
            if file.is_file():  # Written in place: same inodes, older content, so that the local anchor sees nothing.
                (site.cohort.folder / name / file.relative_to(image / name)).write_bytes(file.read_bytes())
    sent = len(site.cohort.tap.sent)
    with pytest.raises(PolicyDenied) as caught:
        site.restart()
    assert caught.value.code == "SS-2021"
    assert len(site.cohort.tap.sent) == sent + 2  # Hello and Confirm; nothing private.
