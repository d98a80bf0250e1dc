"""A ledger that was deleted, truncated, rolled back, forked, copied, swapped or edited is refused, with exit status 3."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import CheckFailed, InputError, PolicyDenied
from securesplit.privacy.chain import Link
from securesplit.privacy.inode import Inode
from securesplit.privacy.ledger import Charge, Ledger
from securesplit.privacy.sealed import SEALED_BYTES, seal, unseal

CHARGE = Charge(record="r", channel="cut", units=10, clip=1.0, sigma=2.0, policy="p")


@dataclass(frozen=True)
class Site:
    """A client's key folder with its ledger, and the machine's anchors."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "keys" / "alice"

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger"

    @property
    def file(self) -> Path:
        return self.ledger / "ledger.sqlite"

    @property
    def anchors(self) -> Path:
        return self.root / "state"

    def provision(self, key: bytes = b"the first key") -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "key.pem").write_bytes(key)

    def open(self, at: Path | None = None) -> Ledger:
        return Ledger(at or self.ledger, anchors=self.anchors)

    def adopt(self, at: Path | None = None) -> Ledger:
        return Ledger.adopt(at or self.ledger, anchors=self.anchors)

    def spend(self, number: int = 1, at: Path | None = None) -> None:
        ledger = self.open(at)
        for i in range(number):
            version = f"{sum(1 for _ in ledger.entries())}-{i}"
            ledger.charge(
                [replace(CHARGE, version=version, payload=b"left as " + version.encode())], budget=10**6, caps=[10**6]
            )
        ledger.close()

    def backup(self) -> Path:
        return Path(shutil.copytree(self.ledger, self.root / "backup", dirs_exist_ok=True))

    def restore(self, *, in_place: bool = True) -> None:
        if not in_place:
            shutil.rmtree(self.ledger)
            shutil.copytree(self.root / "backup", self.ledger)
            return
        for path in self.ledger.iterdir():
            if not (self.root / "backup" / path.name).exists():
                path.unlink()
        for path in (self.root / "backup").iterdir():
            (self.ledger / path.name).write_bytes(path.read_bytes())  # keeps the inode, as `cp` does

    def sql(self, statement: str, at: Path | None = None) -> None:
        db = sqlite3.connect(at or self.file)
        db.execute(statement)
        db.commit()
        db.close()


@pytest.fixture
def site(tmp_path) -> Site:
    made = Site(tmp_path)
    made.provision()
    made.spend(3)
    return made


def refused(code: str, action: Callable[[], object]) -> None:
    with pytest.raises(PolicyDenied) as caught:
        action()
    assert (caught.value.code, caught.value.exit_code) == (code, 3), caught.value
    assert caught.value.hint
    assert "delete" not in caught.value.hint.lower()
    assert "nothing may be sent" in caught.value.what


# ---- the table -------------------------------------------------------------------------------------------------------


def cut_file(site: Site) -> None:
    os.truncate(site.file, site.file.stat().st_size // 2)


def rolled_back(site: Site, *, in_place: bool) -> None:
    site.backup()
    site.spend()
    site.restore(in_place=in_place)


def rolled_back_with_its_log(site: Site) -> None:
    ledger = site.open()  # held open, so that the write-ahead log is part of what is put back
    ledger.charge([CHARGE], budget=10**6, caps=[10**6])
    site.backup()
    assert (site.root / "backup" / "ledger.sqlite-wal").stat().st_size > 0
    ledger.charge([CHARGE], budget=10**6, caps=[10**6])
    ledger.close()
    site.restore()


def without_its_log(site: Site) -> None:
    ledger = site.open()
    ledger.charge([CHARGE], budget=10**6, caps=[10**6])
    (site.root / "aside").write_bytes(site.file.read_bytes())  # what was checkpointed, without the log
    ledger.close()
    site.file.write_bytes((site.root / "aside").read_bytes())


def forked(site: Site) -> None:
    site.backup()
    site.spend(2)
    used = site.root / "used"
    shutil.copytree(site.ledger, used)
    site.restore()
    state = site.root / "aside"  # on another machine the older copy is adopted and used on
    Ledger.adopt(site.ledger, anchors=state).close()
    other = Ledger(site.ledger, anchors=state)
    for _ in range(3):
        other.charge([CHARGE], budget=10**6, caps=[10**6])
    other.close()


def swapped_site_key(site: Site) -> None:
    (site.ledger / "site.key").write_bytes(os.urandom(32))


def anothers_ledger(site: Site) -> None:
    """Bob's fresh ledger in place of Alice's, her folder untouched."""
    bob = site.root / "keys" / "bob"
    bob.mkdir()
    (bob / "key.pem").write_bytes(b"bob's key")
    site.open(bob / "ledger").close()
    shutil.rmtree(site.ledger)
    (bob / "ledger").rename(site.ledger)


def emptied_and_rebuilt(site: Site) -> None:
    """An empty ledger of the same identity, made by an editor of the file."""
    site.sql("DELETE FROM entries")
    site.sql("DELETE FROM memo")


TABLE: dict[str, tuple[str, Callable[[Site], object]]] = {
    "folder deleted": ("SS-2020", lambda s: shutil.rmtree(s.ledger)),
    "file deleted": ("SS-2020", lambda s: s.file.unlink()),
    "file emptied": ("SS-2020", lambda s: os.truncate(s.file, 0)),
    "file and key deleted": ("SS-2020", lambda s: (s.file.unlink(), (s.ledger / "site.key").unlink())),
    "site key deleted": ("SS-2020", lambda s: (s.ledger / "site.key").unlink()),
    "last entry removed": ("SS-2025", lambda s: s.sql("DELETE FROM entries WHERE seq = 3")),
    "last entry and its payload removed": (
        "SS-2021",
        lambda s: (s.sql("DELETE FROM entries WHERE seq = 3"), s.sql("DELETE FROM memo WHERE seq = 3")),
    ),
    "all removed": ("SS-2021", emptied_and_rebuilt),
    "entry in the middle removed": ("SS-2024", lambda s: s.sql("DELETE FROM entries WHERE seq = 2")),
    "file cut short": ("SS-2024", cut_file),
    "file overwritten": ("SS-2024", lambda s: s.file.write_bytes(b"not what it was" * 1000)),
    "table dropped": ("SS-2024", lambda s: s.sql("DROP TABLE entries")),
    "identity removed": ("SS-2024", lambda s: s.sql("DELETE FROM meta")),
    "identity edited": ("SS-2024", lambda s: s.sql("UPDATE meta SET owner = ''")),
    "rolled back in place": ("SS-2021", lambda s: rolled_back(s, in_place=True)),
    "rolled back by new files": ("SS-2021", lambda s: rolled_back(s, in_place=False)),
    "rolled back with its log": ("SS-2021", rolled_back_with_its_log),
    "log removed": ("SS-2021", without_its_log),
    "forked": ("SS-2021", forked),
    "put back from a full backup": ("SS-2022", lambda s: (s.backup(), s.restore(in_place=False))),
    "anchor deleted": ("SS-2022", lambda s: [p.unlink() for p in s.anchors.glob("*.json")]),
    "all anchors deleted": ("SS-2022", lambda s: shutil.rmtree(s.anchors)),
    "anchor damaged": ("SS-2022", lambda s: [p.write_bytes(b"{") for p in s.anchors.glob("*.json")]),
    "site key swapped": ("SS-2024", swapped_site_key),
    "site key cut": ("SS-2024", lambda s: os.truncate(s.ledger / "site.key", 31)),
    "client key swapped": ("SS-2023", lambda s: (s.folder / "key.pem").write_bytes(b"another's key")),
    "client key gone": ("SS-2023", lambda s: (s.folder / "key.pem").unlink()),
    "another's ledger": ("SS-2023", anothers_ledger),
    "payload removed": ("SS-2025", lambda s: s.sql("DELETE FROM memo WHERE seq = 2")),
    "payload without entry": ("SS-2025", lambda s: s.sql("INSERT INTO memo VALUES (9, x'00')")),
}


@pytest.mark.parametrize("what", TABLE)
def test_what_was_done_to_a_ledger_is_found_when_it_is_opened(site, what):
    code, does = TABLE[what]
    does(site)
    refused(code, site.open)
    refused(code, site.open)  # refusing changes nothing


LIVE = {
    "folder deleted": "SS-2020", "file deleted": "SS-2020", "last entry and its payload removed": "SS-2021",
    "all removed": "SS-2021", "anchor deleted": "SS-2022", "put back from a full backup": "SS-2022",
}  # fmt: skip


@pytest.mark.parametrize("what", LIVE)
def test_what_is_done_to_an_open_ledger_is_found_before_the_next_charge(site, what):
    ledger = site.open()
    TABLE[what][1](site)
    refused(LIVE[what], lambda: ledger.charge([CHARGE], budget=10**6, caps=[10**6]))
    ledger.close()


def test_an_entry_forged_behind_an_open_ledgers_back_is_found_before_the_next_charge(site):
    ledger = site.open()
    columns = "record, channel, units, clip, sigma, step, version, payload, policy, unit, time"
    site.sql(f"INSERT INTO entries SELECT 4, hash, hash, {columns} FROM entries WHERE seq = 3")
    refused("SS-2024", lambda: ledger.charge([CHARGE], budget=10**6, caps=[10**6]))
    ledger.close()


@pytest.mark.parametrize(
    "edit",
    [
        "payload = zeroblob(length(payload))",
        "payload = x''",
        "payload = substr(payload, 1, 12)",
        "payload = (SELECT payload FROM memo WHERE seq = 3)",
    ],
)
def test_an_edited_payload_is_never_sent_again(site, edit):
    site.sql(f"UPDATE memo SET {edit} WHERE seq = 1")
    ledger = site.open()
    refused("SS-2025", lambda: ledger.recall("r", "cut", "0-0"))
    refused("SS-2025", lambda: ledger.charge([replace(CHARGE, version="0-0")], budget=10**6, caps=[10**6]))
    refused("SS-2025", ledger.verify)
    assert ledger.recall("r", "cut", "1-1") == b"left as 1-1"
    assert ledger.spent_units() == 30
    ledger.close()


def test_a_payload_removed_behind_an_open_ledgers_back_is_refused_and_not_replaced_by_fresh_noise(site):
    ledger = site.open()
    site.sql("DELETE FROM memo WHERE seq = 1")
    refused("SS-2025", lambda: ledger.recall("r", "cut", "0-0"))
    refused("SS-2025", lambda: ledger.charge([replace(CHARGE, version="0-0")], budget=10**6, caps=[10**6]))
    ledger.close()


# ---- copies, and sites that are new ----------------------------------------------------------------------------------


def test_a_copy_elsewhere_is_refused_and_the_original_is_not(site):
    shutil.copytree(site.root / "keys", site.root / "copy")
    refused("SS-2022", lambda: site.open(site.root / "copy" / "alice" / "ledger"))
    shutil.copytree(site.ledger, site.folder / "ledger2")
    refused("SS-2022", lambda: site.open(site.folder / "ledger2"))
    site.open().close()


def test_the_keys_without_their_ledger_make_no_second_budget(site):
    shutil.copytree(site.folder, site.root / "copy", ignore=shutil.ignore_patterns("ledger"))
    refused("SS-2020", lambda: site.open(site.root / "copy" / "ledger"))
    (site.folder / "ledger").rename(site.root / "aside")
    site.folder.rename(site.root / "keys" / "alice2")
    refused("SS-2020", lambda: site.open(site.root / "keys" / "alice2" / "ledger"))


def test_a_renewed_key_makes_no_second_budget_either(site):
    shutil.rmtree(site.ledger)
    (site.folder / "key.pem").write_bytes(b"renewed")
    refused("SS-2020", site.open)


def test_a_folder_that_was_moved_whole_is_the_same_site_and_its_old_place_is_free(site):
    (site.root / "keys").rename(site.root / "moved")
    moved = site.root / "moved" / "alice" / "ledger"
    site.spend(at=moved)
    site.provision(b"a new client's key")
    site.spend()
    assert len(list(site.open(moved).entries())) == 4


def test_a_ledger_moved_out_of_its_folder_is_refused(site):
    site.ledger.rename(site.root / "ledger")
    refused("SS-2023", lambda: site.open(site.root / "ledger"))
    (site.root / "key.pem").write_bytes(b"the first key")
    refused("SS-2022", lambda: site.open(site.root / "ledger"))


@pytest.mark.parametrize("again", range(4))
def test_new_keys_in_a_folder_made_anew_are_a_new_site(site, again):
    # ext4 gives the inode number of a deleted folder to the next one, which the time of birth tells apart.
    for i in range(again + 1):
        shutil.rmtree(site.root / "keys")
        site.provision(b"key %d" % i)
        ledger = site.open()
        assert ledger.spent_units() == 0
        ledger.close()
        site.spend()


def test_without_a_time_of_birth_new_keys_decide(site, monkeypatch):
    monkeypatch.setattr("securesplit.privacy.inode._born", lambda *_: 0)
    number = site.folder.stat().st_ino
    (site.folder / "key.pem").write_bytes(b"issued anew")
    shutil.rmtree(site.ledger)
    assert site.folder.stat().st_ino == number
    site.open().close()


def test_a_ledger_without_a_client_is_bound_to_its_folder(tmp_path):
    anchors = tmp_path / "state"
    Ledger(tmp_path / "site" / "ledger", anchors=anchors).close()
    shutil.rmtree(tmp_path / "site" / "ledger")
    refused("SS-2020", lambda: Ledger(tmp_path / "site" / "ledger", anchors=anchors))
    shutil.rmtree(tmp_path / "site")
    Ledger(tmp_path / "site" / "ledger", anchors=anchors).close()
    refused("SS-2023", lambda: Ledger(tmp_path / "site" / "ledger", anchors=anchors, owner=b"somebody"))


def test_a_link_to_a_ledger_is_that_ledger(site):
    (site.root / "link").symlink_to(site.ledger)
    site.spend(at=site.root / "link")
    assert len(list(site.open().entries())) == 4


# ---- anchors ---------------------------------------------------------------------------------------------------------


def test_anchors_lie_under_the_home_folder_and_say_what_was_last_committed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ledger = Ledger(tmp_path / "keys" / "ledger")
    ledger.charge([CHARGE, CHARGE], budget=100, caps=[9, 9])
    (path,) = (tmp_path / "home/.local/state/securesplit/anchors").glob("*.json")
    assert path.stem == ledger.id
    assert path.stat().st_mode & 0o077 == path.parent.stat().st_mode & 0o077 == 0
    assert f'"seq":2,"head":"{ledger.head()}"' in path.read_text()
    assert b"key" not in path.read_bytes().replace(str(tmp_path).encode() + b"/keys", b"")
    ledger.close()


def test_a_ledger_ahead_of_its_anchor_is_whole_and_the_anchor_catches_up_before_bytes_leave(site):
    (path,) = site.anchors.glob("*.json")
    behind = path.read_bytes()
    other = site.open()
    site.spend(2)  # by another process, which dies after its last commit ...
    ahead = path.read_bytes()
    path.write_bytes(behind)  # ... and before its anchors
    assert other.recall("r", "cut", "4-1") == b"left as 4-1"
    assert path.read_bytes() == ahead
    path.write_bytes(behind)
    other.close()
    site.open().close()
    assert path.read_bytes() == ahead


def test_an_anchor_that_cannot_be_written_lets_nothing_out_and_loses_nothing(site, monkeypatch):
    ledger = site.open()

    def full(*_):
        raise OSError(28, "No space left on device")

    paid = replace(CHARGE, version="new", payload=b"paid")
    with monkeypatch.context() as patch:
        patch.setattr("securesplit.privacy.anchor.Anchors._replace", full)
        for _ in range(2):
            with pytest.raises(CheckFailed) as caught:
                ledger.charge([paid], budget=10**6, caps=[10**6])
            assert caught.value.code == "SS-1522"
        with pytest.raises(CheckFailed):
            ledger.recall("r", "cut", "new")
    assert ledger.charge([replace(paid, payload=b"later")], budget=10**6, caps=[10**6]) == (b"paid",)
    assert ledger.spent_units() == 40
    ledger.close()


def test_a_crash_between_the_making_and_the_first_anchor_is_mended(site, monkeypatch):
    bob = site.root / "keys" / "bob" / "ledger"
    for point in ("Anchors.write", "Anchors._target"):
        with monkeypatch.context() as patch:
            patch.setattr(f"securesplit.privacy.anchor.{point}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                site.open(bob)
        if point == "Anchors.write":
            assert (bob / "ledger.sqlite").exists()
    site.spend(at=bob)
    assert len(list(site.open(bob).entries())) == 1


def test_no_place_for_anchors_is_an_unusable_disk(site):
    (site.root / "file").write_text("")
    with pytest.raises(InputError) as caught:
        Ledger(site.ledger, anchors=site.root / "file" / "state")
    assert caught.value.code == "SS-1520"


# ---- adoption --------------------------------------------------------------------------------------------------------


def test_a_ledger_on_a_new_machine_is_adopted_once_and_says_so_for_ever(site):
    moved = Path(shutil.copytree(site.folder, site.root / "new machine"))
    state = site.root / "new state"
    refused("SS-2022", lambda: Ledger(moved / "ledger", anchors=state))
    Ledger.adopt(moved / "ledger", anchors=state).close()
    again = Ledger(moved / "ledger", anchors=state)
    assert [e.adopted for e in again.entries()] == [False] * 3 + [True]
    assert again.spent_units() == 30
    assert {s.channel for s in again.summary()} == {"cut"}
    assert again.recall("r", "cut", "0-0") == b"left as 0-0"
    again.verify()
    again.close()


def test_a_renewed_client_key_is_adopted(site):
    (site.folder / "key.pem").write_bytes(b"renewed")
    refused("SS-2023", site.open)
    site.adopt().close()
    site.spend()
    (site.folder / "key.pem").write_bytes(b"the first key")
    refused("SS-2023", site.open)


@pytest.mark.parametrize("what", [k for k, (code, _) in TABLE.items() if code in {"SS-2021", "SS-2024", "SS-2025"}])
def test_what_is_not_whole_or_not_newest_cannot_be_adopted(site, what):
    code, does = TABLE[what]
    does(site)
    refused(code, site.adopt)


def test_a_fresh_ledger_cannot_be_adopted_in_an_old_ones_place(site):
    fresh = site.root / "fresh" / "ledger"
    site.open(fresh).close()
    shutil.rmtree(site.ledger)
    fresh.rename(site.ledger)
    refused("SS-2023", site.open)
    refused("SS-2020", site.adopt)


def test_there_must_be_something_to_adopt(tmp_path):
    with pytest.raises(InputError) as caught:
        Ledger.adopt(tmp_path / "nothing", anchors=tmp_path / "state")
    assert caught.value.code == "SS-1532"
    assert not (tmp_path / "nothing").exists()


# ---- the remote anchor -----------------------------------------------------------------------------------------------


def test_a_copy_of_ledger_and_anchors_together_is_found_by_the_remote_anchor_alone(site):
    old = Path(shutil.copytree(site.anchors, site.root / "old state"))
    site.backup()
    site.spend(2)
    ledger = site.open()
    blob = ledger.seal()
    ledger.check_sealed(blob)
    ledger.close()
    site.restore()
    turned_back = Ledger(site.ledger, anchors=old)  # nothing on the machine knows
    refused("SS-2021", lambda: turned_back.check_sealed(blob))
    for _ in range(3):
        turned_back.charge([CHARGE], budget=10**6, caps=[10**6])
    refused("SS-2021", lambda: turned_back.check_sealed(blob))  # as long, but another
    turned_back.close()


def test_an_older_blob_of_the_same_chain_is_no_fault(site):
    ledger = site.open()
    blob = ledger.seal()
    ledger.charge([CHARGE], budget=10**6, caps=[10**6])
    ledger.check_sealed(blob)
    assert len(blob) == len(ledger.seal()) == SEALED_BYTES == 84
    assert ledger.seal() != ledger.seal()
    ledger.close()


def test_a_blob_of_another_ledger_or_none_is_refused(site):
    ledger, other = site.open(), site.open(site.root / "other" / "ledger")
    blob = bytearray(ledger.seal())
    for forged in (
        b"",
        bytes(84),
        other.seal(),
        bytes(blob) + b"x",
        bytes([blob[0] ^ 1]) + bytes(blob[1:]),
        bytes(blob[:-1]),
    ):
        refused("SS-2026", lambda forged=forged: ledger.check_sealed(forged))
    ledger.close()
    other.close()


@given(st.integers(0, 2**63), st.binary(min_size=32, max_size=32), st.binary(min_size=16, max_size=16))
@settings(max_examples=50, deadline=None)
def test_sealing_loses_nothing_and_another_key_or_ledger_opens_nothing(seq, digest, name):
    link, key = Link(seq, digest.hex()), os.urandom(32)
    blob = seal(key, name.hex(), link)
    assert unseal(key, name.hex(), blob) == link
    refused("SS-2026", lambda: unseal(os.urandom(32), name.hex(), blob))
    refused("SS-2026", lambda: unseal(key, os.urandom(16).hex(), blob))


# ---- which file it is ------------------------------------------------------------------------------------------------


def test_an_inode_is_told_from_the_next_one_of_its_number(tmp_path):
    seen = []
    for _ in range(3):
        (tmp_path / "d").mkdir()
        seen.append(Inode.of(tmp_path / "d"))
        assert seen[-1].same(Inode.of(tmp_path / "d"))
        (tmp_path / "d").rmdir()
    if all(i.born for i in seen):
        assert not any(a.same(b) for a in seen for b in seen if a is not b)


def test_a_disk_may_change_its_device_number_but_not_its_identity(tmp_path):
    here = Inode.of(tmp_path).model_copy(update={"filesystem": 7})
    assert here.same(here.model_copy(update={"device": here.device + 1}))
    assert not here.same(here.model_copy(update={"device": here.device + 1, "filesystem": 8}))
    unknown = here.model_copy(update={"filesystem": 0})
    assert not unknown.same(unknown.model_copy(update={"device": here.device + 1}))
    assert not here.same(here.model_copy(update={"number": here.number + 1}))
