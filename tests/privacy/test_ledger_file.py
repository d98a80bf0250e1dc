"""What was spent is on disk before anything leaves; it outlives crashes, and a change of it is found."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace

import pytest

from securesplit.errors import BudgetExhausted, CheckFailed, InputError
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
    "units": "units - 1", "clip": "clip * 2", "sigma": "sigma + 0.5", "policy": "'q'", "time": "time + 1",
}  # fmt: skip


@pytest.mark.parametrize("row", [1, 2, 3])
@pytest.mark.parametrize("column", sorted(COLUMNS))
def test_a_change_of_any_column_of_any_entry_is_found(tmp_path, column, row):
    ledger = Ledger(tmp_path)
    pay(ledger, CHARGE, replace(CHARGE, record="s"), replace(CHARGE, channel="gradient"))
    ledger.close()
    raw(tmp_path, f"UPDATE entries SET {column} = {COLUMNS[column]} WHERE seq = {row}")
    with pytest.raises(CheckFailed) as caught:
        Ledger(tmp_path)
    assert caught.value.code == "SS-1521"
    assert caught.value.hint


@pytest.mark.parametrize("statement", [
    "DELETE FROM entries WHERE seq = 1",
    "DELETE FROM entries WHERE seq = 2",
    "INSERT INTO entries SELECT 4, prev, hash, record, channel, units, clip, sigma, policy, time FROM entries WHERE seq = 3",
])  # fmt: skip
def test_a_removed_or_repeated_entry_is_found(tmp_path, statement):
    ledger = Ledger(tmp_path)
    pay(ledger, CHARGE, CHARGE, CHARGE)
    ledger.close()
    raw(tmp_path, statement)
    with pytest.raises(CheckFailed) as caught:
        Ledger(tmp_path)
    assert caught.value.code == "SS-1521"


def test_a_ledger_without_its_key_is_refused_instead_of_forgetting_who_spent(tmp_path):
    Ledger(tmp_path).close()
    (tmp_path / "site.key").unlink()
    with pytest.raises(InputError) as caught:
        Ledger(tmp_path)
    assert caught.value.code == "SS-1520"
    assert not (tmp_path / "site.key").exists()


@pytest.mark.parametrize("broken", ["key", "file", "directory"])
def test_what_cannot_be_opened_is_refused(tmp_path, broken):
    place = tmp_path / "ledger"
    if broken == "directory":
        place.write_text("not a directory")
    else:
        Ledger(place).close()
        (place / {"key": "site.key", "file": "ledger.sqlite"}[broken]).write_bytes(b"not what it was" * 100)
    with pytest.raises(InputError) as caught:
        Ledger(place)
    assert caught.value.code == "SS-1520"


def test_a_file_with_torn_pages_is_not_read_as_empty(tmp_path):
    ledger = Ledger(tmp_path)
    for number in range(40):
        pay(ledger, *[replace(CHARGE, record=f"{number}-{i}") for i in range(20)])
    ledger.close()
    path = tmp_path / "ledger.sqlite"
    data = bytearray(path.read_bytes())
    data[8192:-4096] = os.urandom(len(data) - 8192 - 4096)
    path.write_bytes(bytes(data))
    with pytest.raises((CheckFailed, InputError)) as caught:
        Ledger(tmp_path)
    assert caught.value.code in {"SS-1521", "SS-1520"}


def test_a_full_disk_stops_the_charge_and_leaves_the_ledger_usable(ledger):
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    many = [replace(CHARGE, record=f"{number:064d}") for number in range(2000)]
    with pytest.raises(CheckFailed) as caught:
        pay(ledger, *many)
    assert caught.value.code == "SS-1522"
    assert caught.value.exit_code == 1
    with pytest.raises(CheckFailed) as caught:
        ledger.remember("r", "cut", "v", bytes(100_000))
    assert caught.value.code == "SS-1522"
    ledger.verify()
    ledger._db.execute(f"PRAGMA max_page_count = {pages + 100}")
    pay(ledger, replace(CHARGE, record="room again"))


def test_a_read_only_file_stops_the_charge(ledger):
    ledger._db.execute("PRAGMA query_only = ON")
    with pytest.raises(CheckFailed) as caught:
        pay(ledger, CHARGE)
    assert caught.value.code == "SS-1522"
    ledger._db.execute("PRAGMA query_only = OFF")
    assert ledger.spent_units() == 0


def test_a_commit_that_fails_charges_nothing_and_blocks_nothing(ledger, monkeypatch):
    real = ledger._db

    class Failing:
        in_transaction = property(lambda _: real.in_transaction)

        def execute(self, statement, *arguments):
            if statement == "COMMIT":
                raise sqlite3.OperationalError("disk I/O error")
            return real.execute(statement, *arguments)

    monkeypatch.setattr(ledger, "_db", Failing())
    with pytest.raises(CheckFailed) as caught:
        pay(ledger, CHARGE)
    assert caught.value.code == "SS-1522"
    monkeypatch.undo()
    assert ledger.spent_units() == 0
    pay(ledger, CHARGE)
    assert ledger.spent_units() == 10


def test_remembered_bytes_are_kept_as_they_were_first(ledger, tmp_path):
    assert ledger.recall("r", "cut", "v") is None
    ledger.remember("r", "cut", "v", b"first")
    ledger.remember("r", "cut", "v", b"second")
    assert ledger.recall("r", "cut", "v") == b"first"
    for other in (("s", "cut", "v"), ("r", "decode", "v"), ("r", "cut", "w")):
        assert ledger.recall(*other) is None
    again = Ledger(tmp_path / "ledger")
    assert again.recall("r", "cut", "v") == b"first"
    again.close()


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
