"""``aggregate verify`` as an auditor and a script see it: real certificates, real rounds, files."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from securesplit.aggregate import wire
from securesplit.aggregate.client import ClientRound
from securesplit.aggregate.config import Floors, RoundConfig
from securesplit.aggregate.record import RoundRecord, encode_record, read_record, record_round, seal
from securesplit.aggregate.server import ServerRound
from securesplit.errors import ConnectionFailed
from securesplit.pki.authority import Authority
from securesplit.pki.certificate import verify_signature
from securesplit.pki.files import write_atomically
from securesplit.pki.store import KeyFolder

NAMES = ("alice", "bob", "carol", "dave")
KEYS = {
    "file",
    "round",
    "session",
    "clients",
    "members",
    "survivors",
    "signers",
    "threshold",
    "blind",
    "aborted",
    "checks",
}
NOW = datetime.now(UTC)


def config_of(number: int = 1, session: int = 1) -> RoundConfig:
    return RoundConfig(
        session_id=bytes([session]) * 16, round=number, roster=NAMES, threshold=3, min_clients=3, dim=5, scale=1000, clip=0.5,
        w_max=10, model="0" * 64, frozen="a" * 64, blind=False,
    )  # fmt: skip


@dataclass
class Consortium:
    """An authority, four clients and a server, and the files that their rounds leave."""

    root: Path
    now: datetime = NOW

    def folder(self, name: str) -> KeyFolder:
        return KeyFolder.open(self.root / "keys" / name, "server" if name == "gpu" else "client", now=self.now)

    @property
    def ca(self) -> Path:
        return self.root / "keys" / "ca" / "cert.pem"

    def round(self, config: RoundConfig, missing: str = "") -> tuple[ServerRound, dict[str, ClientRound]]:
        def verify(folder: KeyFolder, name: str, certificate: bytes, signature: bytes, data: bytes) -> None:
            if folder.verify_peer(certificate, "client", now=self.now).name != name:
                raise ConnectionFailed("SS-3213", "another client")
            verify_signature(certificate, signature, data)

        floors, clients = Floors(min_clients=3, min_threshold=3, max_update=1.0, blind=False), {}
        for name in NAMES:
            folder = self.folder(name)
            clients[name] = ClientRound(
                config,
                name,
                folder.cert_der,
                sign=folder.sign,
                verify=partial(verify, folder),
                floors=floors,
                persist=lambda _: None,
            )
        server, queue = ServerRound(config), deque()
        for name, client in clients.items():
            client.contribute(np.full(config.dim, 0.25), 1)
            queue += server.receive(name, 0, client.advertise())
        while queue or not server.finished:
            if not queue:
                queue += server.timeout()
                continue
            to, stage, body, vector = queue.popleft()
            if stage == wire.CONSISTENT:
                self.bundle = wire.decode(wire.Bundle, body).signatures
            if stage < wire.ABORT and not (to == missing and stage >= wire.SHARES):
                for out in clients[to].receive(stage, body, vector):
                    queue += server.receive(to, *out)
        return server, clients

    def write(self, config: RoundConfig, *makers: str, missing: str = "") -> list[Path]:
        server, clients = self.round(config, missing)
        paths = []
        for maker in makers:
            folder = self.folder(maker)
            result = server.result.aggregate if maker == "gpu" else clients[maker].result
            record = record_round(
                config, server._peers, role=folder.identity.role, maker=maker, made=int(self.now.timestamp()), members=server._members,
                survivors=server._survivors, signatures=self.bundle, sum_digest=hashlib.sha256(result.ring_sum.tobytes()).digest(),
            )  # fmt: skip
            paths.append(self.root / f"{maker}-{config.session_id.hex()[:4]}-{config.round}.record")
            self.save(paths[-1], seal(record, folder.cert_der, folder.sign))
        return paths

    @staticmethod
    def save(path: Path, record: RoundRecord) -> None:
        write_atomically(path, encode_record(record), mode=0o600)


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    made = Consortium(tmp_path_factory.mktemp("consortium"))
    authority = Authority.create(made.root / "keys")
    authority.issue("gpu", "server")
    for name in NAMES:
        authority.issue(name, "client")
    return made


@pytest.fixture(scope="module")
def records(consortium: Consortium) -> list[Path]:
    return consortium.write(config_of(), "alice", "bob", "gpu")


@pytest.fixture
def verify(command, consortium):
    """Run the command; exit code, the parsed object when there is one, stderr."""

    def call(*arguments: object, ca: Path | None = None) -> tuple[int, dict, str]:
        code, out, err = command("aggregate", "verify", *arguments, "--ca", ca or consortium.ca, "--output", "json")
        assert out.count("\n") == (1 if out else 0)
        return code, json.loads(out) if out else {}, err

    return call


def check(told: dict, name: str) -> dict:
    return next(c for c in told["checks"] if c["name"] == name)


def test_good_records_give_one_object_with_the_promised_keys(verify, records):
    code, told, err = verify(*records, *(f"--roster={name}" for name in NAMES))
    assert (code, told["valid"], err) == (0, True, "")
    assert [r["file"] for r in told["rounds"]] == [str(path) for path in records]
    for r in told["rounds"]:
        assert r.keys() >= KEYS
        assert (r["round"], r["session"], r["threshold"], r["blind"], r["aborted"]) == (1, "01" * 16, 3, False, None)
        assert r["clients"] == r["members"] == r["survivors"] == r["signers"] == list(NAMES)
        assert all(c.keys() == {"name", "ok", "warning", "detail"} for c in r["checks"])
        assert not [c for c in r["checks"] if not c["ok"] or c["warning"]]
    assert len({r["sum"] for r in told["rounds"]}) == 1


def test_text_for_people(command, consortium, records):
    code, out, _ = command("aggregate", "verify", records[0], "--ca", consortium.ca)
    assert code == 0
    assert "every record holds" in out
    assert "agreement" in out
    code, out, _ = command("aggregate", "verify", *records, "--ca", consortium.ca)
    assert code == 0
    assert out.count("holds") == 4
    assert "4 of 3" in out  # Signatures, of how many are needed.


def test_an_altered_record_exits_1_and_says_which_check_failed(verify, command, consortium, records, tmp_path):
    record = read_record(records[0])
    bad = tmp_path / "bad.record"
    consortium.save(bad, record.model_copy(update={"survivors": NAMES[:3]}))
    code, told, err = verify(bad)
    assert (code, told["valid"]) == (1, False)
    assert {c["name"] for c in told["rounds"][0]["checks"] if not c["ok"]} == {"maker", "signers", "agreement"}
    assert err.startswith("error[SS-1623]: 1 of 1 records do not hold")
    assert "hint: " in err
    code, out, _ = command("aggregate", "verify", bad, records[1], "--ca", consortium.ca)
    assert code == 1
    assert "FAILED" in out
    assert "1 of 2 records hold" in out


def test_records_that_contradict_each_other_fail_together(verify, command, consortium, records, tmp_path):
    other, bob = tmp_path / "other.record", consortium.folder("bob")
    consortium.save(
        other, seal(read_record(records[1]).model_copy(update={"sum_digest": bytes(32)}), bob.cert_der, bob.sign)
    )
    code, told, _ = verify(records[0], other)
    assert (code, [r["valid"] for r in told["rounds"]]) == (1, [False, False])
    assert "bob (other.record)" in check(told["rounds"][0], "same sum")["detail"]
    code, out, _ = command("aggregate", "verify", records[0], other, "--ca", consortium.ca)
    assert (code, out.count("same sum")) == (1, 2)


def test_an_illegal_configuration_is_a_failed_check_and_not_a_crash(verify, consortium, records, tmp_path):
    record = read_record(records[0])
    bad = tmp_path / "bad.record"
    consortium.save(bad, record.model_copy(update={"config": b"{}"}))
    code, told, _ = verify(bad, records[1])
    assert code == 1
    assert (told["rounds"][0]["round"], told["rounds"][0]["threshold"], told["rounds"][0]["clients"]) == (
        None,
        None,
        [],
    )
    assert [c["name"] for c in told["rounds"][0]["checks"]] == ["configuration"]
    assert told["rounds"][1]["valid"]


def test_the_roster_and_the_policy_are_held_against_the_round(verify, records):
    code, told, _ = verify(records[0])
    assert code == 0
    assert check(told["rounds"][0], "roster")["warning"]
    code, told, _ = verify(records[0], "--roster", "alice", "--roster", "bob", "--policy", "policies/strict.toml")
    assert code == 1
    assert not check(told["rounds"][0], "roster")["ok"]
    assert "carol, dave" in check(told["rounds"][0], "roster")["detail"]
    assert "blind" in check(told["rounds"][0], "floors")["detail"]


def test_consecutive_sums_that_differ_by_one_client_are_a_warning(verify, consortium, records):
    (later,) = consortium.write(config_of(2, session=2), "alice", missing="dave")
    code, told, _ = verify(records[0], later)
    assert (code, told["valid"]) == (0, True)
    warned = check(told["rounds"][1], "differencing")
    assert (warned["ok"], warned["warning"]) == (True, True)
    assert "dave (round 1" in warned["detail"]


def test_a_round_of_last_year_holds_and_a_revocation_counts_unless_vouched_for(verify, tmp_path):
    then = NOW - timedelta(days=400)
    consortium = Consortium(tmp_path, now=then)
    authority = Authority.create(tmp_path / "keys", now=then)
    for name in NAMES:
        authority.issue(name, "client", now=then)
    (path,) = consortium.write(config_of(), "alice")
    # The list of that day is out of date; it would hide whom the authority shut out since.
    assert "SS-1621" in verify(path, ca=consortium.ca)[2]
    assert verify(path, "--at", then.isoformat(), ca=consortium.ca)[0] == 0
    # With today's list it does not matter that every certificate expired long ago.
    authority.write_crl()
    assert verify(path, ca=consortium.ca)[0] == 0
    for moment, code in ((NOW, "SS-3203"), (then - timedelta(days=1), "SS-3204")):
        status, told, _ = verify(path, "--at", moment.isoformat(), ca=consortium.ca)
        assert status == 1
        assert code in check(told["rounds"][0], "identities")["detail"]
    # A revoked certificate proves nothing, whatever time the record states ...
    authority.revoke("bob")
    authority.revoke("dave")
    code, told, _ = verify(path, ca=consortium.ca)
    assert (code, told["rounds"][0]["signers"]) == (1, ["alice", "carol"])
    assert "SS-3205" in check(told["rounds"][0], "identities")["detail"]
    # ... unless the auditor knows that the round came first.
    assert verify(path, "--at", then.isoformat(), ca=consortium.ca)[0] == 0
    assert verify(path, "--at", then.replace(tzinfo=None).isoformat(), ca=consortium.ca)[0] == 0


def test_another_authority_vouches_for_nobody(verify, records, tmp_path):
    Authority.create(tmp_path / "keys")
    code, told, _ = verify(records[0], ca=tmp_path / "keys" / "ca" / "cert.pem")
    assert code == 1
    assert {"maker", "identities", "agreement"} <= {c["name"] for c in told["rounds"][0]["checks"] if not c["ok"]}


def test_unreadable_input_exits_2_and_prints_nothing_on_stdout(verify, consortium, records, tmp_path):
    junk = tmp_path / "junk.record"
    junk.write_bytes(b"junk")
    gone = tmp_path / "gone.record"
    for arguments, code in (
        ((junk,), "SS-1620"), ((gone,), "SS-1620"), ((tmp_path,), "SS-1620"), ((records[0], "--at", "yesterday"), "SS-1622"),
        ((records[0], "--crl", junk), "SS-1621"), ((records[0], "--crl", gone), "SS-1621"), ((records[0], "--policy", gone), "SS-1100"),
        ((), "SS-1001"),
    ):  # fmt: skip
        status, told, err = verify(*arguments)
        assert (status, told) == (2, {})
        assert f"error[{code}]" in err
        assert "Traceback" not in err
    assert verify(records[0], ca=junk)[2].startswith("error[SS-1621]")
    _, _, err = verify(junk, records[0], gone)
    assert str(junk) in err
    assert str(gone) in err


def test_start_up_loads_nothing_heavy():
    script = "import sys, securesplit.cli.aggregate; print([m for m in ('torch', 'numpy', 'cryptography', 'rich.table') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )
