"""Whatever is done to a log's files is found, and what each means of finding cannot see is written down as a test too."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from securesplit.errors import CheckFailed, InputError, SecureSplitError
from securesplit.journal.events import Checkpoint, PeerHead, Refused
from securesplit.journal.row import encode_row, genesis
from securesplit.journal.seal import Head, HeadFile, statement
from securesplit.journal.verify import agree, verify
from tests.journal.logs import (
    ALICE,
    BOB,
    SERVER,
    TRUST,
    certificate_of,
    chain_of,
    filled,
    opened,
    signer_for,
)

ALTERED = {"SS-1580", "SS-1581", "SS-1582"}


def refused(path: Path) -> SecureSplitError:
    with pytest.raises(CheckFailed) as caught:
        verify(path, TRUST)
    return caught.value


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A log of three files and 50 rows or so."""
    path = filled(tmp_path_factory.mktemp("whole") / "audit", 40, file_bytes=5000, every=16)
    assert len(list(path.glob("*.jsonl"))) == 3
    assert verify(path, TRUST).rows == len(chain_of(path))
    return path


@cache
def as_it_was(path: Path) -> object:
    return verify(path, TRUST)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "audit"))


# ---- the five that the issue names, with the line and the reason -----------------------------------------------------


def test_one_byte_changed(copy):
    file = copy / "000002.jsonl"
    data = bytearray(file.read_bytes())
    place = data.index(b"SS-3205")
    data[place + 6] ^= 1
    file.write_bytes(data)
    line = data[:place].count(b"\n") + 1
    error = refused(copy)
    assert error.code == "SS-1580"
    assert f"000002.jsonl line {line}: its hash does not follow" in error.what


def test_a_line_removed(copy):
    file = copy / "000002.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    del lines[4]
    file.write_bytes(b"".join(lines))
    error = refused(copy)
    assert error.code == "SS-1580"
    assert "000002.jsonl line 5: it says that it is row" in error.what


def test_two_lines_swapped(copy):
    file = copy / "000001.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[5], lines[6] = lines[6], lines[5]
    file.write_bytes(b"".join(lines))
    error = refused(copy)
    assert (error.code, "000001.jsonl line 6" in error.what) == ("SS-1580", True)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_tail_cut(copy, count):
    file = copy / "000003.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-count]))
    assert refused(copy).code == "SS-1581"


def test_the_tail_cut_inside_a_line(copy):
    file = copy / "000003.jsonl"
    file.write_bytes(file.read_bytes()[:-10])
    assert refused(copy).code == "SS-1581"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_whole_file_replaced(copy, tmp_path, number):
    other = filled(tmp_path / "another", 40, file_bytes=5000, every=16)
    name = f"{number:06d}.jsonl"
    shutil.copy(other / name, copy / name)
    assert refused(copy).code in ALTERED


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_whole_file_removed(copy, number):
    (copy / f"{number:06d}.jsonl").unlink()
    assert refused(copy).code == ("SS-1581" if number == 3 else "SS-1580")


def test_all_files_replaced_by_another_log_of_the_same_party(copy, tmp_path):
    other = filled(tmp_path / "another", 40, file_bytes=5000, every=16)
    for file in other.glob("*.jsonl"):
        shutil.copy(file, copy / file.name)
    assert refused(copy).code in ALTERED


def test_the_head_removed_or_another_logs(copy, tmp_path):
    (copy / "head").unlink()
    assert refused(copy).code == "SS-1582"
    shutil.copy(filled(tmp_path / "another", 40) / "head", copy / "head")
    assert refused(copy).code in ALTERED


def test_no_log_at_all(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError) as caught:
            verify(path, TRUST)
        assert caught.value.code == "SS-1587"


# ---- any change whatever ---------------------------------------------------------------------------------------------

Change = Callable[[list[bytes]], list[bytes] | None]


def _byte(lines: list[bytes], at: int, by: int) -> list[bytes]:
    data = bytearray(b"".join(lines))
    data[at % len(data)] ^= by
    return bytes(data).splitlines(keepends=True)


def _swap(lines: list[bytes], a: int, b: int) -> list[bytes]:
    out = list(lines)
    a, b = a % len(out), b % len(out)
    out[a], out[b] = out[b], out[a]
    return out


NUMBER = st.integers(0, 1 << 20)
CHANGES = st.one_of(
    st.tuples(st.just(_byte), NUMBER, st.integers(1, 255)),
    st.tuples(st.just(_swap), NUMBER, NUMBER),
    st.tuples(st.just(lambda lines, a, n: lines[: a % len(lines)] + lines[a % len(lines) + n :]), NUMBER, st.integers(1, 9)),
    st.tuples(st.just(lambda lines, a, _: lines[: a % len(lines)]), NUMBER, st.just(0)),
    st.tuples(st.just(lambda lines, a, b: [*lines[: a % len(lines)], lines[b % len(lines)], *lines[a % len(lines) :]]), NUMBER, NUMBER),
    st.tuples(st.just(lambda lines, a, _: [*lines[: a % len(lines)], b"\n", *lines[a % len(lines) :]]), NUMBER, st.just(0)),
)  # fmt: skip


@given(change=CHANGES, number=st.integers(1, 3))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_a_file_is_found(whole, tmp_path_factory, change, number):
    how, a, b = change
    name = f"{number:06d}.jsonl"
    before = (whole / name).read_bytes()
    after = b"".join(how(before.splitlines(keepends=True), a, b))
    if after == before:
        return
    path = tmp_path_factory.getbasetemp() / "changed"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    (path / name).write_bytes(after)
    with pytest.raises(CheckFailed) as caught:
        verify(path, TRUST)
    assert caught.value.code in ALTERED | {"SS-1584"}


@given(at=NUMBER, by=st.integers(1, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_change_of_the_head_file_excuses_nothing(whole, tmp_path_factory, at, by):
    """It may destroy one of the three places, which is no change of the log; the log is never said to be longer or shorter."""
    path = tmp_path_factory.getbasetemp() / "head-changed"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    data = bytearray((path / "head").read_bytes())
    data[at % len(data)] ^= by
    (path / "head").write_bytes(data)
    try:
        found = verify(path, TRUST)
    except CheckFailed as error:
        code = error.code
    else:
        assert replace(found, path=whole) == as_it_was(whole)
        return
    assert code in ALTERED | {"SS-1584"}


# ---- attackers who know the format -----------------------------------------------------------------------------------


def rewritten(path: Path, rows: list[tuple[int, object]], log: bytes) -> list[bytes]:
    """All hashes recomputed: what anybody can do who may write the files."""
    previous, out = genesis(log), []
    for index, (at, event) in enumerate(rows):
        line, previous = encode_row(previous, index, at, event)
        out.append(line)
    (path / "000001.jsonl").write_bytes(b"".join(out))
    return out


def parsed(path: Path) -> tuple[list[tuple[int, object]], bytes]:
    from securesplit.journal.scan import Line, scan

    rows = [found.row for found in scan(path) if isinstance(found, Line)]
    return [(row.at, row.event) for row in rows], bytes.fromhex(rows[0].event.log)


def test_who_recomputes_every_hash_and_cannot_sign_is_found_by_the_heads(tmp_path):
    path = filled(tmp_path / "audit", 30, every=8)
    rows, log = parsed(path)
    at, event = rows[4]
    rows[4] = (at, event.model_copy(update={"code": "SS-3203"}))
    rewritten(path, rows, log)
    assert refused(path).code in {"SS-1582", "SS-1580"}
    # Even without heads inside, and with a head file of its own that it cannot sign.
    rows = [(at, event) for at, event in rows if event.kind != "head"]
    lines = rewritten(path, rows, log)
    last = bytes.fromhex(json.loads(lines[-1])["hash"])
    heads = HeadFile(path / "head")
    for _ in range(2):
        heads.sync(Head(log, len(lines), last, bytes(32)))
    heads.note(Head(log, len(lines), last, bytes(32)))
    heads.close()
    assert refused(path).code == "SS-1582"


def test_who_signs_with_a_key_of_its_own_is_found_by_the_certificate(tmp_path):
    path = filled(tmp_path / "audit", 5, party=BOB)
    assert verify(path, TRUST).party == BOB  # It is a log; but not of the party that was asked for:
    rows, log = parsed(path)
    at, event = rows[0]
    rows[0] = (at, event.model_copy(update={"party": SERVER}))
    rewritten(path, rows, log)
    assert refused(path).code == "SS-1582"


def test_who_has_the_key_rewrites_both_files_and_only_the_other_end_knows(tmp_path):
    server, alice = tmp_path / "server", tmp_path / "alice"
    filled(server, 10)
    with opened(server) as journal, opened(alice, ALICE) as other:
        head = journal.head()
        other.append(seen(head))
    rows, log = parsed(server)
    at, event = rows[4]
    assert isinstance(event, Refused)
    rows[4] = (at, event.model_copy(update={"code": "SS-3203"}))
    sign, previous, forged = signer_for(SERVER).sign, genesis(log), []
    for index, (moment, what) in enumerate(rows):
        if what.kind == "head":
            signature = sign(statement(log, index, previous)).hex()
            forged.append((moment, what.model_copy(update={"signature": signature})))
        else:
            forged.append((moment, what))
        _, previous = encode_row(previous, index, moment, forged[-1][1])
    rewritten(server, forged, log)
    heads = HeadFile(server / "head")
    for put in (heads.sync, heads.sync, heads.note):
        put(Head(log, len(forged), previous, sign(statement(log, len(forged), previous))))
    heads.close()
    mine, theirs = verify(server, TRUST), verify(alice, TRUST)  # By itself it looks whole.
    with pytest.raises(CheckFailed, match="has seen another row") as caught:
        agree([mine, theirs])
    assert caught.value.code == "SS-1583"


# ---- two ends --------------------------------------------------------------------------------------------------------


def seen(head: Head, number: int = 0, party: str = SERVER) -> PeerHead:
    return PeerHead(
        session="5" * 32, number=number, peer=party, log=head.log.hex(), rows=head.rows, head=head.hash.hex(),
        signature=head.signature.hex(), certificate=base64.b64encode(certificate_of(party)).decode(),
    )  # fmt: skip


@pytest.fixture
def ends(tmp_path) -> tuple[Path, Path]:
    """A server's and a client's log after a session with two checkpoints, and what came later."""
    server, alice = tmp_path / "server", tmp_path / "alice"
    with opened(server) as a, opened(alice, ALICE) as b:
        for number in range(2):
            for journal, other, party in ((a, b, ALICE), (b, a, SERVER)):
                journal.append(Checkpoint(session="5" * 32, number=number, up=f"{number}" * 64, down="f" * 64))
                journal.append(seen(other.head(), number, party))
        for _ in range(4):
            a.append(Refused(stage="tls", code="SS-3205", address="10.0.0.7:51842"))
    filled(server, 5)
    return server, alice


def compare(a: Path, b: Path) -> int:
    return agree([verify(a, TRUST), verify(b, TRUST)])


def test_two_ends_agree(ends):
    server, alice = ends
    assert compare(server, alice) == compare(alice, server) == 6  # Two heads each way, two checkpoints.


def test_an_older_copy_of_a_whole_log_is_found_by_the_other_end_alone(ends, tmp_path):
    server, alice = ends
    older = tmp_path / "older"
    filled(older / "x", 3)
    # The folder as it was before the session: log and head together, every signature good.
    with opened(tmp_path / "s2") as a:
        a.append(Refused(stage="tls", code="SS-3205", address="10.0.0.7:1"))
    shutil.copytree(tmp_path / "s2", tmp_path / "image")
    with opened(tmp_path / "s2") as a, opened(tmp_path / "b2", ALICE) as b:
        a.append(Refused(stage="tls", code="SS-3205", address="10.0.0.7:2"))
        b.append(seen(a.head()))
    verify(tmp_path / "image", TRUST)
    assert compare(tmp_path / "s2", tmp_path / "b2") == 1
    with pytest.raises(CheckFailed, match="cut off") as caught:
        compare(tmp_path / "image", tmp_path / "b2")
    assert caught.value.code == "SS-1583"
    with pytest.raises(CheckFailed, match="another log"):
        compare(older / "x", tmp_path / "b2")
    assert server != alice


def test_ends_that_saw_different_messages_do_not_agree(ends, tmp_path):
    _, alice = ends
    with opened(tmp_path / "liar") as journal:
        journal.append(Checkpoint(session="5" * 32, number=1, up="9" * 64, down="f" * 64))
    a, b = verify(tmp_path / "liar", TRUST), verify(alice, TRUST)
    with pytest.raises(CheckFailed, match="different messages"):
        agree([a, replace(b, witnessed=tuple(w for w in b.witnessed if isinstance(w.event, Checkpoint)))])


def test_a_head_of_another_end_is_checked_too(tmp_path):
    server, alice = filled(tmp_path / "server", 3), tmp_path / "alice"
    with opened(server) as a, opened(alice, ALICE) as b:
        head = a.head()
        b.append(seen(Head(head.log, head.rows + 1, head.hash, head.signature)))
    assert refused(alice).code == "SS-1582"


def test_a_log_is_verified_while_it_grows(tmp_path):
    path, stop = tmp_path / "audit", threading.Event()
    journal = opened(path, file_bytes=20_000)

    def write() -> None:
        while not stop.is_set():
            journal.append(Refused(stage="tls", code="SS-3205", address="10.0.0.7:51842"), durable=False)
            stop.wait(0.001)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(8):
            verify(path, TRUST)
    finally:
        stop.set()
        thread.join()
        journal.close()
    verify(path, TRUST)
