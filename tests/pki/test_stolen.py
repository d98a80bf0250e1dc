"""A key that was stolen, a party's or an authority's, gains nothing by renewal, approval or import, and no site is forgotten."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from securesplit.errors import CheckFailed, ConnectionFailed, InputError
from securesplit.pki.authority import Authority
from securesplit.pki.bring import bring_in, confirmed_by
from securesplit.pki.founding import Plan, certificate_pem
from securesplit.pki.grant import Parcel, read_parcel
from securesplit.pki.identity import Identity
from securesplit.pki.profile import Hosts, Scope, build_cross, host_names
from securesplit.pki.renew import renew, renew_all
from securesplit.pki.request import Request, approve, authority_words, make_request, read_request
from securesplit.pki.rotate import begin_rotation, finish_rotation
from securesplit.pki.store import KeyFolder
from tests.pki.forge import Leaf, Signer, sign, usage

ALICE = Identity("securesplit.local", "client", "alice")


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def asked_with(key: Path, folder: Path, identity: Identity, hosts: Hosts | None = None) -> Request:
    """A request for a key that somebody has already."""
    folder.mkdir(parents=True, mode=0o700)
    shutil.copy(key, folder / "key.next.pem")
    return read_request(make_request(folder, identity, hosts or Hosts()).path)


def test_a_renewal_never_goes_to_a_revoked_key(authority: Authority, keys: Path, tmp_path: Path) -> None:
    stolen = load(keys / "alice/cert.pem")
    authority.revoke("alice")
    new = make_request(tmp_path / "site/alice", ALICE, Hosts())
    approve(authority, read_request(new.path), new.words)
    before = {path: path.read_bytes() for path in (keys / "alice").iterdir() if path.is_file()}
    # The withdrawn certificate still lies beside the authority. It is neither a reason nor a place to renew.
    assert not any(one.renewed for one in renew_all(authority))
    done = renew(authority, "alice", force=True)
    assert done.parcel == keys / "alice.signed.pem"
    renewed = load(done.parcel)
    assert renewed.public_key() == new.key != stolen.public_key()
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(ConnectionFailed, match="SS-3205"):
        KeyFolder.open(keys / "alice", "client")
    with pytest.raises(ConnectionFailed, match="SS-3100"):
        renew(authority, "alice", force=True, new_key="p256")


def test_no_request_brings_a_revoked_key_back(authority: Authority, keys: Path, tmp_path: Path) -> None:
    authority.revoke("alice")
    before = len(list((keys / "ca/issued").iterdir()))
    for number, name in enumerate(("alice", "carol")):
        asked = asked_with(
            keys / "alice/key.pem", tmp_path / f"{number}" / name, Identity(ALICE.domain, "client", name)
        )
        for again in (False, True):
            with pytest.raises(InputError, match="SS-1827"):
                approve(authority, asked, asked.words, again=again)
    begin_rotation(authority)
    renew_all(Authority.open(keys))
    finish_rotation(Authority.open(keys))
    with pytest.raises(InputError, match="SS-1827"):
        approve(Authority.open(keys), asked, asked.words)
    assert len(list((keys / "ca/issued").iterdir())) == before + 1, "gpu's renewal"


def test_the_same_key_gets_no_second_role(authority: Authority, keys: Path, tmp_path: Path) -> None:
    server = Identity(ALICE.domain, "server", "alice")
    asked = asked_with(keys / "alice/key.pem", tmp_path / "a/alice", server, host_names("server", ["a.example"], []))
    for now in (datetime.now(UTC), datetime.now(UTC) + timedelta(days=40)):
        with pytest.raises(InputError, match="SS-1813"):
            approve(authority, asked, asked.words, again=True, now=now)


def thief_s_root(inter: x509.Certificate, signer: Signer, domain: str, *, bare: bool) -> x509.Certificate:
    """A root with the name and the key of an intermediate; ``bare`` leaves its constraints out."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(inter.subject)
        .issuer_name(inter.subject)
        .public_key(signer.key.public_key())
        .serial_number(7)
        .not_valid_before(datetime.now(UTC) - timedelta(minutes=5))
        .not_valid_after(datetime.now(UTC) + timedelta(days=3650))
    )
    own = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{domain}")])
    extensions = [
        x509.Extension(x509.BasicConstraints.oid, True, x509.BasicConstraints(True, None)),
        x509.Extension(x509.KeyUsage.oid, True, usage(authority=True)),
        x509.Extension(own.oid, False, own),
        inter.extensions.get_extension_for_class(x509.SubjectKeyIdentifier),
    ]
    dropped = x509.AuthorityKeyIdentifier.oid
    for one in extensions if bare else [one for one in inter.extensions if one.oid != dropped]:
        builder = builder.add_extension(one.value, critical=one.critical)
    return builder.sign(signer.key, hashes.SHA256())


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("pinned", [True, False])
def test_the_thief_of_an_intermediate_becomes_no_root(keys: Path, bare: bool, pinned: bool) -> None:
    authority = Authority.create(keys, plan=Plan(Scope("securesplit.local"), intermediate=True))
    authority.issue("alice", "client")
    site = keys / "alice"
    if not pinned:
        # The site pins the root only; the intermediate came along.
        (site / "ca.pem").write_bytes(b"".join(certificate_pem(one) for one in authority.trust.roots))
    signer = Signer.of(keys)
    root = thief_s_root(authority.certificate, signer, authority.domain, bare=bare)
    public = load(site / "cert.pem").public_key()
    key = serialization.load_pem_private_key((site / "key.pem").read_bytes(), None)
    leaf, _ = sign(Leaf(key=lambda: key), Signer(root, signer.key))  # type: ignore[arg-type, return-value]
    assert leaf.public_key() == public
    lists = tuple(x509.load_pem_x509_crl(one + b"-----END X509 CRL-----\n") for one in
                  (keys / "ca/crl.pem").read_bytes().split(b"-----END X509 CRL-----\n")[:-1])  # fmt: skip
    before = (site / "ca.pem").read_bytes()
    asked: list[object] = []

    def confirm(newcomer: object) -> bool:
        asked.append(newcomer)
        return False

    with pytest.raises(InputError, match="SS-1819"):
        bring_in(site, Parcel((leaf, root, authority.certificate), lists), confirm, datetime.now(UTC))
    assert len(asked) == 1
    assert (site / "ca.pem").read_bytes() == before


def test_a_cross_certificate_without_its_mark_or_with_other_rights_vouches_for_nobody(
    authority: Authority, keys: Path, tmp_path: Path
) -> None:
    site = shutil.copytree(keys / "alice", tmp_path / "site/alice")
    shutil.rmtree(keys / "alice")
    old = Signer.of(keys)
    begin_rotation(authority)
    done = renew(Authority.open(keys), "alice")
    assert done.parcel is not None
    parcel = read_parcel([done.parcel])
    cross = load(keys / "ca/cross.pem")
    extensions = list(cross.extensions)
    assert not any(one.critical for one in extensions if isinstance(one.value, x509.UnrecognizedExtension))
    rest = tuple(one for one in parcel.certificates if one != cross)
    for dropped in (x509.UnrecognizedExtension, x509.NameConstraints):
        builder = (
            x509.CertificateBuilder()
            .subject_name(cross.subject)
            .issuer_name(cross.issuer)
            .public_key(cross.public_key())
            .serial_number(9)
            .not_valid_before(cross.not_valid_before_utc)
            .not_valid_after(cross.not_valid_after_utc)
        )
        for one in extensions:
            if not isinstance(one.value, dropped):
                builder = builder.add_extension(one.value, critical=one.critical)
        forged = builder.sign(old.key, hashes.SHA256())
        with pytest.raises(InputError, match="SS-1819"):
            bring_in(site, Parcel((*rest, forged), parcel.lists), lambda _: False, datetime.now(UTC))
    brought = bring_in(site, parcel, lambda _: False, datetime.now(UTC))
    assert len(brought.pinned) == 2, "the true one vouches, and is no authority itself"
    again = build_cross(load(keys / "ca/cert.pem"), authority.signer, datetime.now(UTC))
    assert (
        bring_in(site, Parcel((*rest, again), parcel.lists), lambda _: False, datetime.now(UTC)).pinned
        == brought.pinned
    )


def test_the_exchange_is_not_finished_behind_the_back_of_a_site_elsewhere(
    authority: Authority, keys: Path, tmp_path: Path
) -> None:
    shutil.move(keys / "alice", tmp_path / "alice")
    begin_rotation(authority)
    renew_all(Authority.open(keys))
    with pytest.raises(CheckFailed, match="SS-1824") as caught:
        finish_rotation(Authority.open(keys))
    assert [one for one in caught.value.details if "gpu" in one] == []
    assert len([one for one in caught.value.details if ALICE.uri in one]) == 1
    assert "--yes" in str(caught.value.hint)
    done = finish_rotation(Authority.open(keys), carried=True)
    assert done.elsewhere == (ALICE.uri,)


def test_a_yes_does_not_cover_what_the_record_knows(authority: Authority, keys: Path, tmp_path: Path) -> None:
    shutil.move(keys / "alice", tmp_path / "alice")
    begin_rotation(authority)
    with pytest.raises(CheckFailed, match="SS-1824"):
        finish_rotation(Authority.open(keys), carried=True)


def test_a_certificate_with_other_hosts_than_the_request_s_is_refused(
    authority: Authority, keys: Path, tmp_path: Path
) -> None:
    server = Identity(ALICE.domain, "server", "srv")
    site = tmp_path / "site/srv"
    asked = make_request(site, server, host_names("server", ["a.example"], ["10.0.0.7"]))
    words = confirmed_by(authority_words(authority.certificate))
    parcel = tmp_path / "parcel.pem"
    now = datetime.now(UTC)
    wrong: list[tuple[list[str], list[str]]] = [
        (["a.example"], []),
        (["a.example", "b.example"], ["10.0.0.7"]),
        (["b.example"], ["10.0.0.7"]),
    ]
    for dns, ips in wrong:
        with authority.locked() as lists:
            hosts = host_names("server", dns, ips)
            parcel.write_bytes(authority.grant(server, asked.key, hosts, lists, days=5, now=now).parcel())
        with pytest.raises(InputError, match="SS-1822") as caught:
            bring_in(site, read_parcel([parcel]), words, now)
        assert "hosts" in caught.value.details[0]
    parcel.write_bytes(approve(authority, read_request(asked.path), asked.words).parcel())
    bring_in(site, read_parcel([parcel]), words, datetime.now(UTC))
    # A renewal is held to the certificate in use.
    with authority.locked() as lists:
        grant = authority.grant(server, asked.key, host_names("server", *wrong[2]), lists, days=5, now=now)
    parcel.write_bytes(grant.parcel())
    with pytest.raises(InputError, match="SS-1822"):
        bring_in(site, read_parcel([parcel]), words, datetime.now(UTC))
    with authority.locked() as lists:
        grant = authority.grant(server, asked.key, asked.hosts, lists, days=5, now=now)
    parcel.write_bytes(grant.parcel())
    bring_in(site, read_parcel([parcel]), words, datetime.now(UTC))
