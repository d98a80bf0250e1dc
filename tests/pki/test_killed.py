"""Killed at any write: what is on disk afterwards works, or is as if nothing had begun, and the command run again finishes.

Every file of this package is put in place by ``Path.replace`` or ``Path.rename``. The test lets the n-th of them be the last thing that
the process did, for every n: before it happens, and just after.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from securesplit.errors import ConnectionFailed
from securesplit.pki.authority import Authority
from securesplit.pki.bring import bring_in, confirmed_by
from securesplit.pki.founding import Plan
from securesplit.pki.grant import read_parcel
from securesplit.pki.identity import Identity
from securesplit.pki.profile import Hosts, Scope
from securesplit.pki.renew import renew, renew_all
from securesplit.pki.request import approve, authority_words, make_request, read_request
from securesplit.pki.rotate import begin_rotation, finish_rotation
from securesplit.pki.store import KeyFolder

DEEP = Plan(Scope("securesplit.local"), intermediate=True)


@pytest.fixture(autouse=True)
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies loses nothing that it gave to the kernel; fsync is for machines that die."""
    monkeypatch.setattr("os.fsync", lambda _: None)


class Killed(BaseException):
    """No handler of the product may catch it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, *, after: bool) -> Callable[[], int]:
    """Die at the ``step``-th replacement or renaming; returns how many there were."""
    count = 0

    def guard(original: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def act(self: Path, target: Path) -> Path:
            nonlocal count
            count += 1
            if count == step and not after:
                raise Killed
            done = original(self, target)
            if count == step:
                raise Killed
            return done

        return act

    monkeypatch.setattr(Path, "replace", guard(Path.replace))
    monkeypatch.setattr(Path, "rename", guard(Path.rename))
    return lambda: count


def house(keys: Path) -> None:
    authority = Authority.create(keys)
    authority.issue("gpu", "server")
    authority.issue("alice", "client")


def works(keys: Path, name: str) -> bool:
    """A party's folder is whole: the key signs for the certificate, and the other side accepts it."""
    if not (keys / name / "cert.pem").exists():
        return False
    role = "server" if name == "gpu" else "client"
    folder = KeyFolder.open(keys / name, role)  # type: ignore[arg-type]
    folder.sign(b"data")
    return True


def act_renew(keys: Path) -> None:
    renew(Authority.open(keys), "alice", force=True)


def act_new_key(keys: Path) -> None:
    renew(Authority.open(keys), "alice", force=True, new_key="p256")


def act_issue(keys: Path) -> None:
    authority = Authority.open(keys)
    if not works(keys, "bob"):
        authority.issue("bob", "client")


def act_reissue(keys: Path) -> None:
    authority = Authority.open(keys)
    authority.revoke("alice")
    authority.issue("alice", "client")


def act_rotate(keys: Path) -> None:
    authority = Authority.open(keys)
    if not list((keys / "ca").glob("retired/*/key.pem")):
        begin_rotation(authority)
        authority = Authority.open(keys)
    authority.write_crl()


def act_whole_rotation(keys: Path) -> None:
    act_rotate(keys)
    renew_all(Authority.open(keys))
    finish_rotation(Authority.open(keys))


# Just before a step and just after the one before it are the same, but for files that lie aside.
@pytest.mark.parametrize("after", [pytest.param(False, marks=pytest.mark.slow), True], ids=["before", "after"])
@pytest.mark.parametrize(
    "act",
    [act_renew, act_new_key, act_issue, act_rotate, pytest.param(act_whole_rotation, marks=pytest.mark.slow)],
    ids=lambda act: act.__name__,
)
def test_killed_at_any_step(tmp_path: Path, act: Callable[[Path], None], after: bool) -> None:
    whole = tmp_path / "whole"
    house(whole)
    step = 0
    while True:
        step += 1
        keys = shutil.copytree(whole, tmp_path / f"keys-{step}")
        with pytest.MonkeyPatch.context() as patch:
            steps = kill_at(patch, step, after=after)
            with suppress(Killed):
                act(keys)
                break
        # As a server and a client that start now meet it: whoever was there still is, and they accept each other.
        assert works(keys, "gpu"), step
        assert works(keys, "alice"), step
        gpu, alice = KeyFolder.open(keys / "gpu", "server"), KeyFolder.open(keys / "alice", "client")
        assert gpu.verify_peer(alice.cert_der, "client").name == "alice"
        assert alice.verify_peer(gpu.cert_der, "server").name == "gpu"
        act(keys)
        for name in ("gpu", "alice"):
            assert works(keys, name), step
        gpu, alice = KeyFolder.open(keys / "gpu", "server"), KeyFolder.open(keys / "alice", "client")
        assert gpu.verify_peer(alice.cert_der, "client").name == "alice"
        assert alice.verify_peer(gpu.cert_der, "server").name == "gpu"
        shutil.rmtree(keys)
    assert steps() >= 4


def test_a_revoked_party_killed_back_in_is_in_or_out_and_then_in(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    house(whole)
    for step in range(1, 12):
        keys = shutil.copytree(whole, tmp_path / f"keys-{step}")
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, step, after=True)
            with suppress(Killed):
                act_reissue(keys)
        with suppress(ConnectionFailed):  # Revoked until it is in again; nothing else, which the next line shows.
            works(keys, "alice")
        act_reissue(keys)
        assert works(keys, "alice")


@pytest.mark.parametrize("after", [pytest.param(False, marks=pytest.mark.slow), True], ids=["before", "after"])
@pytest.mark.parametrize("plan", [None, DEEP], ids=["root", "intermediate"])
def test_a_founding_that_was_killed_left_no_authority_or_a_whole_one(
    tmp_path: Path, plan: Plan | None, after: bool
) -> None:
    for step in range(1, 20):
        keys = tmp_path / f"keys-{step}"
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, step, after=after)
            with suppress(Killed):
                Authority.create(keys, plan=plan)
                return
        authority = Authority.open(keys) if (keys / "ca").exists() else Authority.create(keys, plan=plan)
        authority.issue("alice", "client")
        assert works(keys, "alice")
    pytest.fail("it never came to an end")


@pytest.mark.parametrize("after", [pytest.param(False, marks=pytest.mark.slow), True], ids=["before", "after"])
def test_a_request_and_its_answer_killed_at_any_step(
    authority: Authority, keys: Path, tmp_path: Path, after: bool
) -> None:
    confirm = confirmed_by(authority_words(authority.certificate))

    def act(site: Path) -> None:
        if not (site / "cert.pem").exists() or (site / "request.csr").exists():
            made = make_request(site, Identity("securesplit.local", "client", "dora"), Hosts())
            answer = approve(authority, read_request(made.path), made.words, again=True)
            (tmp_path / "answer.pem").write_bytes(answer.parcel())
        bring_in(site, read_parcel([tmp_path / "answer.pem"]), confirm, datetime.now(UTC))

    for step in range(1, 20):
        site = tmp_path / f"site-{step}" / "dora"
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, step, after=after)
            with suppress(Killed):
                act(site)
                return
        act(site)
        assert KeyFolder.open(site, "client").identity.name == "dora"
    pytest.fail("it never came to an end")
