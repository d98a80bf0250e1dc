"""Whether a certificate was good then: dates count at that moment, revocations as they are known now."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.authority import Authority
from securesplit.pki.founding import Plan
from securesplit.pki.past import PastAuthority
from securesplit.pki.profile import Scope
from securesplit.pki.renew import renew_all
from securesplit.pki.rotate import begin_rotation, finish_rotation
from securesplit.pki.store import KeyFolder

NOW = datetime.now(UTC)


@pytest.fixture(autouse=True)
def fresh_now():
    """A long test run may reach this file hours after it was imported, and certificates are good from ten minutes ago."""
    global NOW  # noqa: PLW0603  # the tests read it as a constant
    NOW = datetime.now(UTC)


DAY = timedelta(days=1)


def past(keys: Path) -> PastAuthority:
    return PastAuthority.parse((keys / "ca" / "cert.pem").read_bytes(), (keys / "ca" / "crl.pem").read_bytes())


def der(keys: Path, name: str) -> bytes:
    certificate = x509.load_pem_x509_certificate((keys / name / "cert.pem").read_bytes())
    return certificate.public_bytes(serialization.Encoding.DER)


def refusal(
    authority: PastAuthority, leaf: bytes, role: str = "client", *, at: datetime | None = None, vouched: bool = False
) -> str:
    with pytest.raises(ConnectionFailed) as seen:
        authority.verify(leaf, role, at=at or NOW, vouched=vouched)
    return seen.value.code


def test_dates_count_at_that_moment(keys: Path, authority: Authority) -> None:
    leaf, known = der(keys, "alice"), past(keys)
    assert known.verify(leaf, "client", at=NOW, vouched=False).name == "alice"
    assert refusal(known, leaf, at=NOW + 31 * DAY) == "SS-3203"
    assert refusal(known, leaf, at=NOW - DAY) == "SS-3204"
    # A year from now the certificate has long expired; what was signed today is still good.
    known.require_newest(at=NOW, vouched=True, now=NOW + 365 * DAY)
    assert known.verify(leaf, "client", at=NOW, vouched=True).role == "client"


def test_a_revocation_counts_unless_somebody_vouches_for_an_earlier_moment(keys: Path, authority: Authority) -> None:
    leaf = der(keys, "alice")
    authority.revoke("alice")
    known, earlier, later = past(keys), NOW - timedelta(seconds=30), datetime.now(UTC) + timedelta(minutes=5)
    assert refusal(known, leaf, at=earlier) == "SS-3205"
    assert known.verify(leaf, "client", at=earlier, vouched=True).name == "alice"
    assert refusal(known, leaf, at=later, vouched=True) == "SS-3205"


def test_an_old_list_is_refused_unless_it_covers_a_moment_vouched_for(keys: Path, authority: Authority) -> None:
    known = past(keys)
    known.require_newest(at=NOW - 365 * DAY, vouched=False, now=NOW)
    for at, vouched, now in ((NOW, False, NOW + 8 * DAY), (NOW + 8 * DAY, True, NOW + 8 * DAY)):
        with pytest.raises(InputError) as seen:
            known.require_newest(at=at, vouched=vouched, now=now)
        assert seen.value.code == "SS-1621"


def test_roles_domains_and_authorities_are_told_apart(keys: Path, authority: Authority, tmp_path: Path) -> None:
    known = past(keys)
    assert refusal(known, der(keys, "gpu")) == "SS-3210"
    assert known.verify(der(keys, "gpu"), "server", at=NOW, vouched=False).name == "gpu"
    other = Authority.create(tmp_path / "other")
    other.issue("alice", "client")
    assert refusal(known, der(tmp_path / "other", "alice")) == "SS-3202"
    assert refusal(known, der(keys, "ca")) == "SS-3201"


@pytest.mark.filterwarnings("ignore:Parsed a serial number which wasn't positive")
def test_a_malformed_certificate_is_refused_wherever_it_is_broken(keys: Path, authority: Authority) -> None:
    leaf, known = der(keys, "alice"), past(keys)
    signed = len(x509.load_der_x509_certificate(leaf).tbs_certificate_bytes) + 4
    for at in range(signed):  # The signature behind it has more than one valid encoding.
        for value in (leaf[at] ^ 0x01, leaf[at] ^ 0x80):
            assert refusal(known, leaf[:at] + bytes([value]) + leaf[at + 1 :]).startswith("SS-32")
    assert refusal(known, b"") == refusal(known, leaf[:-1]) == "SS-3208"


def test_a_signature_is_of_that_party_over_that(keys: Path, authority: Authority) -> None:
    folder, known = KeyFolder.open(keys / "alice", "client"), past(keys)
    signature = folder.sign(b"said")
    known.verify_signed("alice", folder.cert_der, signature, b"said", role="client", at=NOW, vouched=False)
    for name, data, code in (("bob", b"said", "SS-3213"), ("alice", b"other", "SS-3207")):
        with pytest.raises(ConnectionFailed) as seen:
            known.verify_signed(name, folder.cert_der, signature, data, role="client", at=NOW, vouched=False)
        assert seen.value.code == code


def test_files_that_are_not_one_authority_and_its_list_are_refused(
    keys: Path, authority: Authority, tmp_path: Path
) -> None:
    ca, crl = ((keys / "ca" / name).read_bytes() for name in ("cert.pem", "crl.pem"))
    Authority.create(tmp_path / "other")
    foreign = (tmp_path / "other" / "ca" / "crl.pem").read_bytes()
    leaf = (keys / "alice" / "cert.pem").read_bytes()
    for pair in (
        (b"", crl),
        (ca + ca, crl),
        (leaf, crl),
        (b"junk", crl),
        (ca, b""),
        (ca, b"junk"),
        (ca, foreign),
        (ca, ca),
    ):
        with pytest.raises(InputError) as seen:
            PastAuthority.parse(*pair)
        assert (seen.value.code, bool(seen.value.hint)) == ("SS-1621", True)


def test_records_of_before_during_and_after_an_exchange(keys: Path, tmp_path: Path) -> None:
    authority = Authority.create(keys, plan=Plan(Scope("securesplit.local"), intermediate=True))
    authority.issue("alice", "client")
    first, old = der(keys, "alice"), keys / "ca/cert.pem"
    known = PastAuthority.parse((keys / "ca/trust.pem").read_bytes(), (keys / "ca/crl.pem").read_bytes())
    assert known.verify(first, "client", at=NOW, vouched=False).name == "alice"
    with pytest.raises(InputError, match="SS-1621"):
        PastAuthority.parse(old.read_bytes(), (keys / "ca/crl.pem").read_bytes())
    begin_rotation(authority)
    renew_all(Authority.open(keys))
    during = PastAuthority.parse((keys / "ca/trust.pem").read_bytes(), (keys / "ca/crl.pem").read_bytes())
    for leaf in (first, der(keys, "alice")):
        assert during.verify(leaf, "client", at=NOW, vouched=False).name == "alice"
    finish_rotation(Authority.open(keys))
    after = PastAuthority.parse((keys / "ca/trust.pem").read_bytes(), (keys / "ca/crl.pem").read_bytes())
    assert refusal(after, first) == "SS-3202"
    # What the old authority signed stays provable with what is kept of it.
    (kept,) = (keys / "ca/retired").glob("[0-9A-F]*")
    past = PastAuthority.parse((kept / "trust.pem").read_bytes(), (kept / "crl.pem").read_bytes())
    assert past.verify(first, "client", at=NOW, vouched=True).name == "alice"
