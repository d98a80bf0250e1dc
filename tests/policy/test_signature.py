"""Signatures on policies, against the openssl command line, and every way in which one fails."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import InputError, PolicyDenied
from securesplit.policy.load import load_policy, parse_policy
from securesplit.policy.officer import (
    OFFICERS,
    add_signature,
    load_signed,
    make_officer,
    read_private,
    read_signatures,
    read_trusted,
    signature_path,
)
from securesplit.policy.signature import Signature, SignatureFile, fingerprint, require_signed, sign_policy

POLICIES = Path(__file__).parents[2] / "policies"
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
TEXT = (POLICIES / "strict.toml").read_text(encoding="utf-8")


@pytest.fixture
def desk(tmp_path):
    """An officer's key, a policy, and its signature."""
    make_officer(tmp_path / "officer", passphrase=None)
    policy = tmp_path / "site.toml"
    policy.write_text(TEXT)
    sign(tmp_path)
    return tmp_path


def sign(desk: Path, officer: str = "officer", *, now: datetime = NOW, days: int = 90) -> Signature:
    policy = load_policy(desk / "site.toml")
    made = sign_policy(policy, read_private(desk / officer, passphrase=None), now=now, days=days)
    add_signature(policy, desk / "site.toml.sig", made)
    return made


def opened(desk: Path, *officers: str, now: datetime = NOW, keys: Path | None = None):
    return load_signed(desk / "site.toml", tuple(desk / f"{name}.pub" for name in officers), keys=keys, now=now)


def code_of(call) -> str:
    with pytest.raises((PolicyDenied, InputError)) as caught:
        call()
    assert caught.value.hint
    assert caught.value.exit_code == (3 if caught.value.code.startswith("SS-2") else 2)
    return caught.value.code


def test_what_is_signed_is_the_stated_bytes_and_openssl_agrees(desk, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    (signature,) = read_signatures(desk / "site.toml.sig").signatures
    # The oracle: digest and statement from the file's own values, and another implementation of Ed25519.
    policy = json.dumps(json.loads(load_policy(desk / "site.toml").canonical()), sort_keys=True, separators=(",", ":"))
    parts = (
        b"securesplit policy signature v1", hashlib.sha256(policy.encode()).digest(), bytes.fromhex(signature.key),
        struct.pack("<q", int(signature.signed.timestamp())), struct.pack("<q", int(signature.expires.timestamp())),
    )  # fmt: skip
    (tmp_path / "said").write_bytes(b"".join(struct.pack("<Q", len(p)) + p for p in parts))
    (tmp_path / "value").write_bytes(bytes.fromhex(signature.value))
    argv = [
        "openssl",
        "pkeyutl",
        "-verify",
        "-pubin",
        "-inkey",
        desk / "officer.pub",
        "-rawin",
        "-in",
        tmp_path / "said",
        "-sigfile",
        tmp_path / "value",
    ]
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 0
    (tmp_path / "said").write_bytes(b"".join(struct.pack("<Q", len(p)) + p for p in parts[:-1]))
    assert subprocess.run(argv, capture_output=True, check=False).returncode != 0


def test_a_signed_policy_opens_and_says_who_vouched(desk):
    policy, signature = opened(desk, "officer")
    assert policy.digest == load_policy(desk / "site.toml").digest
    assert signature.key == fingerprint(read_trusted((desk / "officer.pub",))[0])
    assert signature.expires == NOW + timedelta(days=90)
    commented = "# read by two of us\n" + TEXT.replace("epsilon = 2.0 ", "epsilon   =   2.0 ")
    (desk / "site.toml").write_text(commented)
    assert opened(desk, "officer")[0] == policy, "comments and spacing are free"


@pytest.mark.parametrize("change", [
    ("epsilon = 2.0", "epsilon = 2.0000000001"), ('name = "strict"', 'name = "stricter"'), ("blind = true", "blind = false\n[privacy.updates]\nclip=1.0\nshare=0.1\nreleases=1\n[x]"),
    ("min_front = 2", "min_front = 1"), ("[16, 32,", "[8, 16, 32,"), ("loopback_only = false", "loopback_only = true"),
])  # fmt: skip
def test_any_changed_value_is_refused(desk, change):
    text = TEXT.replace(*change)
    assert text != TEXT
    if "[x]" in text:
        text = TEXT.replace("share = 1.0", "share = 0.5")
    (desk / "site.toml").write_text(text)
    assert code_of(lambda: opened(desk, "officer")) == "SS-2063"


@pytest.mark.parametrize("spoil", [
    lambda s: {**s, "value": s["value"][:-1] + ("0" if s["value"][-1] != "0" else "1")},
    lambda s: {**s, "expires": "2030-01-01T00:00:00Z"},
    lambda s: {**s, "signed": "2026-05-31T00:00:00Z"},
    lambda s: {**s, "key": "0" * 64},
    lambda s: {**s, "key": s["key"].upper()},
    lambda s: {**s, "value": "00" * 64},
    lambda s: {**s, "more": 1},
    lambda s: {k: v for k, v in s.items() if k != "expires"},
])  # fmt: skip
def test_any_changed_byte_of_a_signature_is_refused(desk, spoil):
    path = desk / "site.toml.sig"
    raw = json.loads(path.read_text())
    raw["signatures"] = [spoil(s) for s in raw["signatures"]]
    path.write_text(json.dumps(raw))
    assert code_of(lambda: opened(desk, "officer")) == "SS-2063"


def test_the_digest_in_the_file_is_for_people_and_is_not_believed(desk):
    path = desk / "site.toml.sig"
    (desk / "site.toml").write_text(TEXT.replace("epsilon = 2.0", "epsilon = 20.0"))
    raw = json.loads(path.read_text())
    raw["digest"] = load_policy(desk / "site.toml").digest
    path.write_text(json.dumps(raw))
    assert code_of(lambda: opened(desk, "officer")) == "SS-2063"


def test_a_signature_has_a_time(desk):
    assert opened(desk, "officer", now=NOW - timedelta(minutes=9))[1]
    assert opened(desk, "officer", now=NOW + timedelta(days=89))[1]
    for now in (NOW - timedelta(minutes=11), NOW + timedelta(days=90)):
        assert code_of(lambda now=now: opened(desk, "officer", now=now)) == "SS-2064"


def test_one_trusted_officer_is_enough_and_a_stranger_is_none(desk):
    for name in ("second", "stranger"):
        make_officer(desk / name, passphrase=None)
    sign(desk, "second", days=200)
    assert len(read_signatures(desk / "site.toml.sig").signatures) == 2
    assert opened(desk, "officer")[1].expires < opened(desk, "second")[1].expires
    assert opened(desk, "stranger", "officer")[1]
    assert code_of(lambda: opened(desk, "stranger")) == "SS-2063"
    sign(desk, "second", days=10)
    assert len(read_signatures(desk / "site.toml.sig").signatures) == 2, "a newer one replaces that of the same key"
    (desk / "site.toml").write_text(TEXT.replace("epsilon = 2.0", "epsilon = 1.0"))
    sign(desk, "second")
    assert len(read_signatures(desk / "site.toml.sig").signatures) == 1, "those on another policy go"
    assert code_of(lambda: opened(desk, "officer")) == "SS-2063"


def test_pinned_officers_bind_without_an_option(desk):
    keys = desk / "keys"
    keys.mkdir()
    assert opened(desk, keys=keys)[1] is None
    (keys / OFFICERS).write_bytes((desk / "officer.pub").read_bytes())
    assert opened(desk, keys=keys)[1]
    signature_path(desk / "site.toml").unlink()
    assert code_of(lambda: opened(desk, keys=keys)) == "SS-2062"
    (keys / OFFICERS).write_text("")
    assert code_of(lambda: opened(desk, keys=keys)) == "SS-1120", "an empty set is a fault and trusts nobody"


def test_an_officers_key_is_private_and_never_replaced(desk):
    path = desk / "officer"
    assert path.stat().st_mode & 0o777 == 0o600
    assert code_of(lambda: make_officer(path, passphrase=None)) == "SS-1121"
    path.chmod(0o640)
    assert code_of(lambda: read_private(path, passphrase=None)) == "SS-1120"
    make_officer(desk / "sealed", passphrase=b"correct horse battery")
    assert b"ENCRYPTED" in (desk / "sealed").read_bytes()
    assert read_private(desk / "sealed", passphrase=b"correct horse battery")
    for wrong in (None, b"another passphrase"):
        assert code_of(lambda wrong=wrong: read_private(desk / "sealed", passphrase=wrong)) == "SS-1120"
    for nonsense in (desk / "site.toml", desk / "absent"):
        assert code_of(lambda path=nonsense: read_trusted((path,))) == "SS-1120"


def test_a_file_of_public_keys_may_hold_several_and_no_other_kind(desk):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    make_officer(desk / "second", passphrase=None)
    both = desk / "both.pub"
    both.write_bytes((desk / "officer.pub").read_bytes() + b"# second\n" + (desk / "second.pub").read_bytes())
    assert len(read_trusted((both,))) == 2
    key, public = desk / "ec.key", desk / "ec.pub"
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", key],
        check=True,
        capture_output=True,
    )
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True, capture_output=True)
    assert code_of(lambda: read_trusted((public,))) == "SS-1120"
    key.chmod(0o600)
    assert code_of(lambda: read_private(key, passphrase=None)) == "SS-1120"


@given(st.binary(max_size=200) | st.recursive(st.none() | st.text(max_size=4) | st.integers(), lambda i: st.lists(i) | st.dictionaries(st.sampled_from(["version", "signatures", "key", "digest", "x"]), i), max_leaves=8).map(lambda v: json.dumps(v).encode()))  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_nonsense_beside_a_policy_is_refused_and_nothing_else(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("s") / "p.sig"
    path.write_bytes(data)
    with pytest.raises(PolicyDenied, match="SS-2063"):
        read_signatures(path)


def test_a_signature_by_an_untrusted_key_with_a_trusted_fingerprint_fails(tmp_path):
    for name in ("good", "evil"):
        make_officer(tmp_path / name, passphrase=None)
    policy = parse_policy(TEXT)
    (good,) = read_trusted((tmp_path / "good.pub",))
    forged = sign_policy(policy, read_private(tmp_path / "evil", passphrase=None), now=NOW, days=9)
    forged = forged.model_copy(update={"key": fingerprint(good)})
    file = SignatureFile(policy="strict", digest=policy.digest, signatures=(forged,))
    with pytest.raises(PolicyDenied, match="SS-2063"):
        require_signed(policy, file, (good,), now=NOW)
    for days in (0, 3651):
        with pytest.raises(ValueError, match="days"):
            sign_policy(policy, read_private(tmp_path / "good", passphrase=None), now=NOW, days=days)
