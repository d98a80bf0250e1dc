"""Both ends' audit logs of real sessions: every release and every refusal is in them, and they agree."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from securesplit.client.dial import dial
from securesplit.client.link import Link
from securesplit.client.run import open_client
from securesplit.errors import CheckFailed, ConnectionFailed, PolicyDenied, RemoteProtocolError
from securesplit.journal.checkpoint import Checkpoints
from securesplit.journal.verify import Trust, Verified, agree, verify
from securesplit.logged import known_to, open_journal, signer_of
from securesplit.pki.certificate import verify_signature
from securesplit.privacy.chain import ADOPTED
from securesplit.protocol.messages import Backward, Forward, Seal
from securesplit.transport.record import Record
from tests.e2e.house import FROZEN, House, Loopback, batches_of, build_house, policy_of, policy_text, sentences

LAB = policy_of()
PRIVATE = policy_of(FROZEN)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> House:
    return build_house(tmp_path_factory.mktemp("logs") / "house")


@pytest.fixture
def house(template, tmp_path) -> House:
    shutil.copytree(template.keys, tmp_path / "keys")
    return House(tmp_path, tmp_path / "keys", template.model)


def rows(folder: Path, *kinds: str) -> list[dict[str, object]]:
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [row for row in map(json.loads, lines) if not kinds or row["kind"] in kinds]


@contextmanager
def serving(house: House, policy=LAB, *, blind: bool = False) -> Iterator[Loopback]:
    with open_journal(house.folder("gpu")) as journal:
        record = Record(journal, signer_of)
        checkpoints = Checkpoints(journal, verify_signature)
        core = house.core(house.job(blind=blind), policy, note=record.require, checkpoints=checkpoints)
        loop = Loopback(core, house.keys)
        loop.shell._record = record
        with loop:
            yield loop


def whole(house: House, name: str, log: str = "audit") -> Verified:
    folder = house.folder(name)
    return verify(folder.path / log, Trust(known_to(folder.ca_pem, folder.crl_pem), verify_signature))


def compared(house: House, name: str = "alice") -> int:
    return agree([whole(house, "gpu"), whole(house, name)])


def test_two_sessions_leave_logs_that_agree(house):
    with serving(house) as loop:
        for _ in range(2):
            with dial(loop.url, keys=house.keys / "alice", policy=LAB, patience=20) as link:
                client = house.client(link, LAB)
                client.train("B")
                for batch in batches_of(client, sentences(4, seed=1), size=2):
                    client.step(batch)
    # Two sessions with a checkpoint at each end: eight heads, four checkpoints.
    assert compared(house) == 12
    server, alice = house.keys / "gpu/audit", house.keys / "alice/audit"
    assert len(rows(server, "accepted", "opened", "closed")) == 6
    assert [row["kind"] for row in rows(alice, "loaded", "opened", "closed")] == 2 * ["loaded", "opened", "closed"]
    mine = {(r["session"], r["number"], r["up"], r["down"]) for r in rows(alice, "checkpoint")}
    theirs = {(r["session"], r["number"], r["up"], r["down"]) for r in rows(server, "checkpoint")}
    assert mine == theirs
    assert len({r["session"] for r in rows(alice, "opened")}) == 2


def test_everything_that_leaves_through_the_gate_is_written_down_before(house):
    """Unprotected: two releases a learning step, each with the digest of exactly the bytes that were sent."""
    import hashlib

    with serving(house) as loop, dial(loop.url, keys=house.keys / "alice", policy=LAB, patience=20) as link:
        sent: list[bytes] = []
        tell = link.tell

        def seen(message) -> None:
            if isinstance(message, Forward | Backward):
                data = message.hidden.data if isinstance(message, Forward) else message.gradient.data
                digest = hashlib.sha256(data).hexdigest()
                assert rows(house.keys / "alice/audit", "released")[-1]["payload"] == digest  # It stands there already.
                sent.append(data)
            tell(message)

        link.tell = seen  # type: ignore[method-assign]
        client = house.client(link, LAB)
        client.train("B")
        for batch in batches_of(client, sentences(4, seed=1), size=2):
            client.step(batch)
    found = rows(house.keys / "alice/audit", "released")
    assert [r["payload"] for r in found] == [hashlib.sha256(data).hexdigest() for data in sent]
    assert [r["channel"] for r in found] == ["cut", "gradient"] * (len(found) // 2) != []
    assert {(r["noised"], r["charged"], r["units"]) for r in found} == {(False, 0, 0)}


def test_the_log_and_the_ledger_count_the_same(house):
    (house.root / "policy.toml").write_text(policy_text(FROZEN))
    with serving(house, PRIVATE, blind=True) as loop:
        for _ in range(2):  # The second run resends what the first one paid for.
            with open_client(PRIVATE, house.keys / "bob", loop.url, model=str(house.model)) as client:
                for batch in batches_of(client, sentences(4, seed=1), size=2):
                    client.loss(batch)
                assert client.ledger is not None
                entries = [e for e in client.ledger.entries() if e.channel != ADOPTED]
    found = rows(house.keys / "bob/audit", "released")
    half = len(found) // 2
    assert all(r["charged"] == r["sequences"] > 0 for r in found[:half])
    assert [(r["charged"], r["payload"]) for r in found[half:]] == [(0, r["payload"]) for r in found[:half]]
    assert sum(int(str(r["units"])) for r in found) == sum(e.units for e in entries) > 0
    assert all(r["noised"] for r in found)
    assert compared(house, "bob") == 12


def test_what_the_gate_refuses_is_in_the_log_too(house):
    with (  # noqa: PT012 (what a run does)
        serving(house, PRIVATE, blind=True) as loop,
        pytest.raises(PolicyDenied),
        open_client(PRIVATE, house.keys / "carol", loop.url, model=str(house.model)) as client,
    ):
        batch = batches_of(client, sentences(4, seed=1), size=2)[0]
        client.gate.release(client.front(batch.tokens), at="gradient")
    (refused,) = rows(house.keys / "carol/audit", "refused")
    assert (refused["code"], refused["stage"]) == ("SS-2010", "policy")
    assert rows(house.keys / "carol/audit")[-1]["kind"] == "ended"
    assert rows(house.keys / "carol/audit", "released") == []


def test_who_cannot_connect_has_that_in_the_log(house):
    with pytest.raises(ConnectionFailed) as caught:
        dial("wss://127.0.0.1:1", keys=house.keys / "alice", policy=LAB, opening=2)
    (refused,) = rows(house.keys / "alice/audit", "refused")
    assert refused["code"] == caught.value.code
    whole(house, "alice")


def test_a_second_process_of_a_client_has_a_log_of_its_own(house):
    with (
        serving(house) as loop,
        dial(loop.url, keys=house.keys / "alice", policy=LAB) as one,
        dial(loop.url, keys=house.keys / "alice", policy=LAB),
    ):
        one.checkpoint()
    first, second = whole(house, "alice"), whole(house, "alice", "audit.2")
    assert first.log != second.log
    server = whole(house, "gpu")
    with pytest.raises(CheckFailed, match="another log"):  # The server has seen both; one alone is not all.
        agree([server, first])
    code = subprocess.run(
        [sys.executable, "-m", "securesplit", "audit", "verify", house.keys / "gpu", "--with", house.keys / "alice",
         "--output", "json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert code.returncode == 0, code.stderr
    assert json.loads(code.stdout)["compared"] == 5 * 2 + 5


def test_a_disk_that_takes_no_row_lets_nothing_leave(house, monkeypatch):
    with serving(house) as loop, dial(loop.url, keys=house.keys / "alice", policy=LAB, patience=20) as link:
        client = house.client(link, LAB)
        client.train("B")
        batch = batches_of(client, sentences(4, seed=1), size=2)[0]
        client.step(batch)
        before, step = len(rows(house.keys / "gpu/audit", "served")), link.step
        from securesplit.journal.disk import Files

        real = Files.write

        def full(files: Files, line: bytes) -> None:
            if b"alice" not in str(files._path).encode():
                return real(files, line)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Files, "write", full)
        with pytest.raises(CheckFailed) as caught:
            client.step(batch)
        assert caught.value.code == "SS-1585"
        assert link.step == step
        assert len(rows(house.keys / "gpu/audit", "served")) == before
        monkeypatch.undo()


def test_a_server_that_rewrites_its_log_is_found_by_its_clients(house):
    """It holds its own key: every row is rewritten, rehashed and signed anew. Its own files look whole."""
    with serving(house) as loop, dial(loop.url, keys=house.keys / "alice", policy=LAB) as link:
        link.checkpoint()
    assert compared(house) > 0
    shutil.rmtree(house.keys / "gpu/audit")
    with serving(house):
        pass  # A fresh log, as if alice had never been there.
    whole(house, "gpu")
    with pytest.raises(CheckFailed) as caught:
        compared(house)
    assert caught.value.code == "SS-1583"


def test_an_end_that_saw_other_messages_is_noticed_at_the_next_checkpoint(house):
    with serving(house) as loop, dial(loop.url, keys=house.keys / "alice", policy=LAB, patience=20) as link:
        link._session._seals.sent(b"a message that never arrived")
        with pytest.raises(RemoteProtocolError) as caught:
            link.checkpoint()
    assert caught.value.code == "SS-4031"
    assert "SS-4031" in {row["code"] for row in rows(house.keys / "gpu/audit", "refused")}
    assert "SS-4031" in {row["code"] for row in rows(house.keys / "alice/audit", "refused")}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"signature": bytes(70)}, "SS-4033"),
        ({"rows": 1 << 40}, "SS-4033"),
        ({"number": 7}, "SS-4032"),
        ({"stream": bytes(32)}, "SS-4031"),
    ],
)
def test_a_seal_that_is_not_good_ends_that_session_and_no_other(house, change, code):
    with serving(house) as loop, dial(loop.url, keys=house.keys / "bob", policy=LAB) as other:
        with dial(loop.url, keys=house.keys / "alice", policy=LAB, patience=20) as link:
            seal = Link._seal

            def bad(self: Link, head) -> Seal:
                real = self._session._seals.make

                def made(**fields) -> Seal:
                    return real(**fields).model_copy(update=change)

                self._session._seals.make = made  # type: ignore[method-assign]
                return seal(self, head)

            link._seal = bad.__get__(link)  # type: ignore[method-assign]
            with pytest.raises(RemoteProtocolError) as caught:
                link.checkpoint()
        assert caught.value.code == code
        other.checkpoint()
    assert {row["code"] for row in rows(house.keys / "gpu/audit", "refused")} == {code}


def test_nothing_of_the_text_is_in_any_log(house):
    with serving(house) as loop, dial(loop.url, keys=house.keys / "alice", policy=LAB, patience=20) as link:
        client = house.client(link, LAB)
        texts = sentences(4, seed=1)
        client.evaluate(batches_of(client, texts, size=2))
    words = {word for text in texts for word in text.split() if len(word) > 3}
    for folder in ("gpu", "alice"):
        log = "".join(f.read_text() for f in (house.keys / folder / "audit").glob("*.jsonl"))
        assert not [word for word in words if word in log]


def test_a_server_whose_disk_is_full_serves_nobody_until_there_is_room(house, monkeypatch):
    from securesplit.journal.disk import Files

    real = Files.write

    def full(files: Files, line: bytes) -> None:
        if "gpu" in files._path.parts:
            raise OSError(28, "No space left on device")
        real(files, line)

    with serving(house) as loop:
        with dial(loop.url, keys=house.keys / "alice", policy=LAB, patience=20) as link:
            client = house.client(link, LAB)
            client.train("B")
            batch = batches_of(client, sentences(4, seed=1), size=2)[0]
            client.step(batch)
            monkeypatch.setattr(Files, "write", full)
            with pytest.raises((RemoteProtocolError, ConnectionFailed)) as caught:
                client.step(batch)
        assert "SS-1585" in str(caught.value)
        with pytest.raises((RemoteProtocolError, ConnectionFailed)) as caught:
            dial(loop.url, keys=house.keys / "bob", policy=LAB, patience=20)
        assert "SS-1585" in str(caught.value)
        monkeypatch.undo()
        time.sleep(1.0)  # The clock tries the disk again a few times a second.
        with dial(loop.url, keys=house.keys / "carol", policy=LAB, patience=20) as link:
            client = house.client(link, LAB)
            client.train("B")
            assert client.step(batch) > 0
    whole(house, "gpu")
