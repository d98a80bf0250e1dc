"""What was spent is on disk before anything leaves; it outlives crashes, and a change of it is found."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from securesplit.errors import BudgetExhausted, CheckFailed, InputError, PolicyDenied
from securesplit.privacy.ledger import Charge, Ledger

CHARGE = Charge(record="r", channel="cut", units=10, clip=1.0, sigma=2.0, policy="p")


@pytest.fixture
def ledger(tmp_path):
    opened = Ledger(tmp_path / "ledger")
    yield opened
    opened.close()


def pay(ledger, *charges, budget=100, cap=1000):
    ledger.charge(charges, budget=budget, caps=[cap] * len(charges))


def raw(ledger_dir, *statements):
    """What somebody with an SQL shell would do."""
    db = sqlite3.connect(ledger_dir / "ledger.sqlite")
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


def test_what_was_spent_outlives_the_process(tmp_path):
    first = Ledger(tmp_path)
    pay(first, replace(CHARGE, record=first.key(b"a text"), units=70))
    head = first.head()
    first.close()
    again = Ledger(tmp_path)
    assert (again.head(), again.spent_units()) == (head, 70)
    with pytest.raises(BudgetExhausted):
        pay(again, replace(CHARGE, record=again.key(b"a text"), units=31))
    again.close()


def test_files_are_private_and_names_of_records_say_nothing(tmp_path):
    one, other = Ledger(tmp_path / "one"), Ledger(tmp_path / "other")
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "one" / "site.key").stat().st_mode) == 0o600
    assert sorted(p.name for p in (tmp_path / "one").iterdir() if p.name.startswith(".")) == []  # no draft is left
    assert one.key(b"text") == one.key(b"text") != one.key(b"texs")
    assert one.key(b"text") != other.key(b"text")
    assert len(one.key(b"")) == 64
    one.close()
    other.close()


COLUMNS = {
    "seq": "seq + 100", "prev": "'" + "1" * 64 + "'", "hash": "'" + "1" * 64 + "'", "record": "'x'", "channel": "'decode'",
    "units": "units - 1", "clip": "clip * 2", "sigma": "sigma + 0.5", "step": "step + 1", "version": "version || 'x'",
    "payload": "'" + "2" * 64 + "'", "policy": "'q'", "unit": "'user'", "time": "time + 1",
}  # fmt: skip


@pytest.mark.parametrize("row", [1, 2, 3])
@pytest.mark.parametrize("column", sorted(COLUMNS))
def test_a_change_of_any_column_of_any_entry_is_found(tmp_path, column, row):
    ledger = Ledger(tmp_path)
    pay(ledger, CHARGE, replace(CHARGE, record="s"), replace(CHARGE, channel="gradient", version="v", payload=b"bytes"))
    ledger.close()
    raw(tmp_path, f"UPDATE entries SET {column} = {COLUMNS[column]} WHERE seq = {row}")
    with pytest.raises(PolicyDenied) as caught:
        Ledger(tmp_path)
    assert (caught.value.code, caught.value.exit_code) == ("SS-2024", 3)
    assert caught.value.hint


def test_the_columns_above_are_all_there_are(ledger):
    found = [row[1] for row in ledger._custody.db.execute("PRAGMA table_info(entries)")]
    assert sorted(found) == sorted(COLUMNS)


def test_an_entry_is_hashed_as_the_documentation_says(tmp_path):
    ledger = Ledger(tmp_path)
    pay(ledger, replace(CHARGE, step=0.25, version="v", payload=b"left"), CHARGE)
    info = b"securesplit site key v1: chain"
    extracted = hmac.digest(bytes(32), (tmp_path / "site.key").read_bytes(), "sha256")  # RFC 5869, no salt
    key = hmac.digest(extracted, info + b"\x01", "sha256")
    for e in ledger.entries():
        said = json.dumps(
            [
                e.seq,
                e.prev,
                e.record,
                e.channel,
                e.units,
                e.clip,
                e.sigma,
                e.step,
                e.version,
                e.payload,
                e.policy,
                e.unit,
                e.time,
            ],
            separators=(",", ":"),
        )
        assert hmac.digest(key, said.encode(), "sha256").hex() == e.hash
    assert [e.payload for e in ledger.entries()] == [hashlib.sha256(b).hexdigest() for b in (b"left", b"")]
    ledger.close()


def test_a_file_with_torn_pages_is_not_read_as_empty(tmp_path):
    ledger = Ledger(tmp_path)
    for number in range(40):
        pay(ledger, *[replace(CHARGE, record=f"{number}-{i}") for i in range(20)])
    ledger.close()
    path = tmp_path / "ledger.sqlite"
    data = bytearray(path.read_bytes())
    data[8192:-4096] = os.urandom(len(data) - 8192 - 4096)
    path.write_bytes(bytes(data))
    with pytest.raises(PolicyDenied) as caught:
        Ledger(tmp_path)
    assert caught.value.code == "SS-2024"


def test_what_is_no_directory_is_refused(tmp_path):
    (tmp_path / "ledger").write_text("not a directory")
    with pytest.raises(InputError) as caught:
        Ledger(tmp_path / "ledger")
    assert caught.value.code == "SS-1520"


def test_a_full_disk_stops_the_charge_and_leaves_the_ledger_usable(ledger):
    pages = ledger._custody.db.execute("PRAGMA page_count").fetchone()[0]
    ledger._custody.db.execute(f"PRAGMA max_page_count = {pages}")
    many = [replace(CHARGE, record=f"{number:064d}") for number in range(2000)]
    with pytest.raises(CheckFailed) as caught:
        pay(ledger, *many)
    assert caught.value.code == "SS-1522"
    assert caught.value.exit_code == 1
    with pytest.raises(CheckFailed) as caught:
        pay(ledger, replace(CHARGE, version="v", payload=bytes(100_000)))
    assert caught.value.code == "SS-1522"
    ledger.verify()
    ledger._custody.db.execute(f"PRAGMA max_page_count = {pages + 100}")
    pay(ledger, replace(CHARGE, record="room again"))


def test_a_read_only_file_stops_the_charge(ledger):
    ledger._custody.db.execute("PRAGMA query_only = ON")
    with pytest.raises(CheckFailed) as caught:
        pay(ledger, CHARGE)
    assert caught.value.code == "SS-1522"
    ledger._custody.db.execute("PRAGMA query_only = OFF")
    assert ledger.spent_units() == 0


def test_a_commit_that_fails_charges_nothing_and_blocks_nothing(ledger, monkeypatch):
    real = ledger._custody.db

    class Failing:
        in_transaction = property(lambda _: real.in_transaction)

        def execute(self, statement, *arguments):
            if statement == "COMMIT":
                raise sqlite3.OperationalError("disk I/O error")
            return real.execute(statement, *arguments)

    monkeypatch.setattr(ledger._custody, "_db", Failing())
    with pytest.raises(CheckFailed) as caught:
        pay(ledger, CHARGE)
    assert caught.value.code == "SS-1522"
    monkeypatch.undo()
    assert ledger.spent_units() == 0
    pay(ledger, CHARGE)
    assert ledger.spent_units() == 10


def remembered(payload=b"first", **changes):
    return replace(CHARGE, version="v", payload=payload, **changes)


def test_what_left_first_is_what_leaves_ever_after_and_is_paid_once(ledger, tmp_path):
    assert ledger.recall("r", "cut", "v") is None
    assert ledger.charge([remembered()], budget=100, caps=[1]) == (b"first",)
    assert ledger.charge([remembered(b"second")], budget=100, caps=[1]) == (b"first",)  # over the cap, were it charged
    assert ledger.recall("r", "cut", "v") == b"first"
    for other in (("s", "cut", "v"), ("r", "decode", "v"), ("r", "cut", "w")):
        assert ledger.recall(*other) is None
    assert ledger.versions("r", "cut") == ("v",)
    assert ledger.spent_units() == 10
    again = Ledger(tmp_path / "ledger")
    assert again.recall("r", "cut", "v") == b"first"
    again.close()


def test_a_group_mixes_what_is_new_and_what_is_not(ledger):
    ledger.charge([remembered()], budget=100, caps=[1])
    group = [
        remembered(b"x"),
        remembered(b"t", record="t"),
        remembered(b"u", record="t"),
        replace(CHARGE, record="z", payload=b"once"),
    ]
    assert ledger.charge(group, budget=100, caps=[1] * 4) == (b"first", b"t", b"t", b"once")
    assert [(e.record, e.version) for e in ledger.entries()] == [("r", "v"), ("t", "v"), ("z", "")]
    assert ledger.recall("z", "cut", "") is None


def test_a_reserve_without_bytes_is_remembered_too(ledger):
    for _ in range(2):
        assert ledger.charge([remembered(b"")], budget=10, caps=[1]) == (b"",)
    assert ledger.recall("r", "cut", "v") == b""


def test_a_group_that_is_refused_remembers_nothing(ledger):
    with pytest.raises(BudgetExhausted):
        ledger.charge([remembered(), replace(CHARGE, units=91)], budget=100, caps=[9, 9])
    assert ledger.recall("r", "cut", "v") is None


def test_an_auditor_finds_what_he_recorded_on_the_wire(ledger):
    pay(ledger, CHARGE, replace(CHARGE, payload=b"seen"), replace(CHARGE, payload=b"seen"))
    assert ledger.knows(hashlib.sha256(b"seen").hexdigest()) == 2
    assert ledger.knows(hashlib.sha256(b"never paid").hexdigest()) is None
    assert ledger.knows("") is None


def test_payloads_are_not_readable_on_disk_and_not_shown(tmp_path):
    ledger, payload = Ledger(tmp_path), b"bytes that left the site" * 9
    pay(ledger, remembered(payload))
    assert all(payload[:24] not in path.read_bytes() for path in tmp_path.iterdir())
    assert "bytes that" not in repr(remembered(payload))
    ledger.close()


# ---- several processes -----------------------------------------------------------------------------------------------

SPENDER = """
import sys
from securesplit.errors import BudgetExhausted
from securesplit.privacy.ledger import Charge, Ledger
sys.stdin.readline()
ledger, paid = Ledger(sys.argv[1]), 0
try:
    while True:
        ledger.charge([Charge("r", "cut", 7, 1.0, 2.0, "p")], budget=300, caps=[10_000])
        paid += 7
except BudgetExhausted:
    print(paid, ledger.key(b"text"))
"""


def test_processes_that_start_and_spend_at_once_share_one_key_and_one_budget(tmp_path):
    command = [sys.executable, "-c", SPENDER, str(tmp_path / "ledger")]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in started:  # All have imported or will soon; the ledger does not exist yet.
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0].split() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert sum(int(paid) for paid, _ in said) == 294  # 42 charges of 7 fit into 300
    assert len({key for _, key in said}) == 1
    ledger = Ledger(tmp_path / "ledger")  # verifies the chain
    assert ledger.spent_units() == 294
    ledger.close()


def test_threads_that_share_a_ledger_share_its_budget(ledger):
    paid = []

    def spend():
        for _ in range(20):
            try:
                pay(ledger, CHARGE, CHARGE)
                paid.append(20)
                assert ledger.spent_units() % 20 == 0  # nobody sees half a group
            except BudgetExhausted:
                return

    threads = [threading.Thread(target=spend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(paid) == ledger.spent_units() == 100
    ledger.verify()


PAYER = """
import sys, time
from securesplit.privacy.ledger import Charge, Ledger
ledger = Ledger(sys.argv[1])
ledger.charge([Charge("r", "cut", 60, 1.0, 2.0, "p")], budget=100, caps=[9])
print("charged", flush=True)
time.sleep(60)  # here it would draw noise and send
"""


def test_a_kill_between_charge_and_send_leaves_the_charge(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", PAYER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with child.stdout:
        assert child.stdout.readline() == "charged\n"
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    ledger = Ledger(tmp_path)
    assert ledger.spent_units() == 60
    with pytest.raises(BudgetExhausted):
        pay(ledger, replace(CHARGE, units=60))
    ledger.close()


def test_a_commit_waits_for_the_disk(ledger):
    db = ledger._custody.db
    assert db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL; a kill cannot show it, only a power cut could
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
