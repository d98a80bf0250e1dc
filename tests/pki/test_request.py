"""Requests: the words name everything that is signed, and nothing is signed that they do not name."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import InputError, SecureSplitError
from securesplit.pki.authority import Authority
from securesplit.pki.bring import bring_in, confirmed_by
from securesplit.pki.certificate import fingerprint
from securesplit.pki.grant import read_parcel
from securesplit.pki.identity import Identity
from securesplit.pki.profile import Hosts, host_names
from securesplit.pki.request import Request, approve, authority_words, make_request, read_request
from securesplit.pki.store import KeyFolder
from securesplit.pki.words import same_words, words_of
from tests.pki.forge import FLAWS, Leaf, Signer, sign
from tests.pki.oracle import openssl

DORA = Identity("securesplit.local", "client", "dora")


def made(tmp_path: Path, identity: Identity = DORA, hosts: Hosts | None = None) -> Request:
    return make_request(tmp_path / "site" / identity.name, identity, hosts or Hosts())


def test_both_sides_print_the_same_words_and_openssl_reads_the_request(tmp_path: Path) -> None:
    mine = made(tmp_path)
    theirs = read_request(mine.path)
    assert theirs.words == mine.words
    assert len(mine.words.split("-")) == 6
    assert theirs.identity == DORA
    said = openssl("req", "-in", mine.path, "-noout", "-verify", "-text")
    assert "URI:spiffe://securesplit.local/securesplit/client/dora" in said.stdout
    assert (mine.path.parent / "key.next.pem").stat().st_mode & 0o777 == 0o600
    assert made(tmp_path).words == mine.words, "asked again, it is the same request"


def test_another_key_name_role_host_or_domain_has_other_words(tmp_path: Path) -> None:
    seen = {made(tmp_path / "again").words}
    server = Identity("securesplit.local", "server", "dora")
    for number, (identity, hosts) in enumerate((
        (DORA, Hosts()),
        (Identity("securesplit.local", "client", "dora2"), Hosts()),
        (Identity("other.local", "client", "dora"), Hosts()),
        (server, host_names("server", ["a.example"], [])),
        (server, host_names("server", ["b.example"], [])),
        (server, host_names("server", [], ["10.0.0.7"])),
    )):  # fmt: skip
        site = tmp_path / f"s{number}" / identity.name
        if number:
            site.mkdir(parents=True, mode=0o700)
            shutil.copy(tmp_path / "s0/dora/key.next.pem", site / "key.next.pem")
        seen.add(make_request(site, identity, hosts).words)
    assert len(seen) == 7


def test_words_confirm_only_themselves(authority: Authority, tmp_path: Path) -> None:
    asked = made(tmp_path)
    before = len(list((authority.path / "issued").iterdir()))
    wrong = "-".join(asked.words.split("-")[:5])
    for words in ("", wrong, asked.words[::-1], "babab-" * 5 + "babab"):
        with pytest.raises(InputError, match="SS-1818"):
            approve(authority, asked, words)
    with pytest.raises(InputError, match="SS-1818"):
        approve(authority, asked, lambda _: False)
    assert len(list((authority.path / "issued").iterdir())) == before
    spoken = asked.words.replace("-", ", ").upper()
    assert approve(authority, asked, spoken).leaf.public_key() == asked.key


def test_what_is_signed_is_what_was_asked(authority: Authority, tmp_path: Path) -> None:
    identity = Identity("securesplit.local", "server", "gpu2")
    asked = make_request(tmp_path / "gpu2", identity, host_names("server", ["gpu.example"], ["10.0.0.7"]))
    grant = approve(authority, read_request(asked.path), asked.words, days=3)
    names = grant.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == [identity.uri, "gpu.example", "10.0.0.7"]


def test_a_stranger_s_domain_and_a_name_that_is_taken(authority: Authority, tmp_path: Path) -> None:
    other = made(tmp_path, Identity("other.local", "client", "dora"))
    with pytest.raises(InputError, match="SS-1802"):
        approve(authority, other, other.words)
    alice = made(tmp_path, Identity("securesplit.local", "client", "alice"))
    with pytest.raises(InputError, match="SS-1809"):
        approve(authority, alice, alice.words)
    assert approve(authority, alice, alice.words, again=True).leaf.public_key() == alice.key
    gpu = made(tmp_path, Identity("securesplit.local", "client", "gpu"))
    with pytest.raises(InputError, match="SS-1813"):
        approve(authority, gpu, gpu.words, again=True)


URI = "spiffe://securesplit.local/securesplit/client/dora"
SERVER = URI.replace("client", "server")


def csr(
    at: Path,
    names: list[x509.GeneralName] | None,
    *,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
    more: list[x509.ExtensionType] = [],  # noqa: B006
) -> Path:
    key = key or ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dora")])
    )
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension in more:
        builder = builder.add_extension(extension, critical=False)
    at.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return at


def faults(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_request(path)
    assert caught.value.code == "SS-1817"
    assert caught.value.hint
    return "; ".join(caught.value.details)


def test_hostile_requests_and_all_of_their_faults_at_once(tmp_path: Path) -> None:
    u, d = x509.UniformResourceIdentifier, x509.DNSName
    file = tmp_path / "bad.csr"
    assert "names nobody" in faults(csr(file, None))
    assert "2 URIs" in faults(csr(file, [u(URI), u(URI.replace("dora", "alice"))]))
    assert "0 URIs" in faults(csr(file, [d("dora")]))
    assert "no host name or address" in faults(csr(file, [u(URI), d("dora.example")]))
    assert "has to name the hosts" in faults(csr(file, [u(SERVER)]))
    assert "not a host name" in faults(csr(file, [u(SERVER), d("*.example")]))
    assert "kind of name" in faults(csr(file, [u(SERVER), d("a.example"), x509.RFC822Name("a@example.org")]))
    assert "more than names" in faults(csr(file, [u(URI)], more=[x509.BasicConstraints(ca=True, path_length=None)]))
    assert "another use" in faults(csr(file, [u(URI)], more=[x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])]))
    small = rsa.generate_private_key(65537, 2048)
    told = faults(csr(file, [u(SERVER)], key=small, more=[x509.BasicConstraints(ca=True, path_length=None)]))
    assert "neither P-256" in told
    assert "more than names" in told
    assert "has to name the hosts" in told
    good = csr(file, [u(URI)])
    assert read_request(good).identity == DORA
    forged = x509.load_pem_x509_csr(good.read_bytes()).public_bytes(serialization.Encoding.DER)
    file.write_bytes(forged[:-1] + bytes([forged[-1] ^ 1]))
    assert "signature" in faults(file)
    for junk in (b"", b"junk", b"-----BEGIN CERTIFICATE REQUEST-----\n"):
        file.write_bytes(junk)
        faults(file)
    faults(tmp_path / "none.csr")


@given(st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_bytes_that_are_no_request_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.mktemp("csr") / "x.csr"
    file.write_bytes(data)
    faults(file)


# --- words ------------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=40), st.binary(max_size=40))
@settings(max_examples=100, deadline=None)
def test_words_differ_where_bytes_do(left: bytes, right: bytes) -> None:
    assert same_words(words_of(b"request", left), words_of(b"request", right)) == (left == right)
    assert not same_words(words_of(b"request", left), words_of(b"authority", left))


def test_every_word_is_five_letters_and_carries_sixteen_bits() -> None:
    found = {word for n in range(2000) for word in words_of(b"request", str(n).encode()).split("-")}
    assert all(len(word) == 5 for word in found)
    assert len(found) > 10_000
    assert words_of(b"request", b"") == words_of(b"request", b"")


# --- import -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def answered(authority: Authority, tmp_path: Path) -> tuple[Path, Path]:
    asked = made(tmp_path)
    answer = tmp_path / "dora.signed.pem"
    answer.write_bytes(approve(authority, read_request(asked.path), asked.words).parcel())
    return asked.path.parent, answer


def refused(site: Path, files: list[Path], code: str, said: str = "") -> SecureSplitError:
    before = {path: path.read_bytes() for path in site.iterdir()}
    with pytest.raises(SecureSplitError) as caught:
        bring_in(site, read_parcel(files), confirmed_by(said), datetime.now(UTC))
    assert caught.value.code == code, caught.value
    assert {path: path.read_bytes() for path in site.iterdir()} == before, (
        "nothing changes before everything is checked"
    )
    return caught.value


def test_an_answer_is_taken_by_words_or_by_fingerprint(
    authority: Authority, answered: tuple[Path, Path], tmp_path: Path
) -> None:
    site, answer = answered
    told = refused(site, [answer], "SS-1819")
    words = authority_words(authority.certificate)
    assert words in told.what
    refused(site, [answer], "SS-1819", "babab-babab-babab-babab-babab-babab")
    other = shutil.copytree(site, tmp_path / "copy" / "dora")
    for folder, said in ((site, words.upper()), (other, fingerprint(authority.certificate).upper())):
        brought = bring_in(folder, read_parcel([answer]), confirmed_by(said), datetime.now(UTC))
        assert brought.new_key
        assert KeyFolder.open(folder, "client").identity == DORA
        assert not (folder / "request.csr").exists()
        assert not (folder / "key.next.pem").exists()


def test_answers_that_are_not_for_this_site(
    authority: Authority, keys: Path, answered: tuple[Path, Path], tmp_path: Path
) -> None:
    site, answer = answered
    words = authority_words(authority.certificate)
    refused(site, [keys / "alice/chain.pem"], "SS-1822", words)
    # The right key, another identity: an authority that errs, or one that is made to.
    key = serialization.load_pem_private_key((site / "key.next.pem").read_bytes(), None)
    wrong = Leaf(name="carol", key=lambda: key)  # type: ignore[arg-type, return-value]
    certificate, _ = sign(wrong, Signer.of(keys))
    (tmp_path / "carol.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    told = refused(site, [tmp_path / "carol.pem", keys / "ca/cert.pem", keys / "ca/crl.pem"], "SS-1822", words)
    assert len(told.details) == 2, "both faults at once"
    for flaw, code in (("expired", "SS-3203"), ("wrong-eku", "SS-3210"), ("is-ca", "SS-3202"), ("two-uris", "SS-3201")):
        forged, _ = sign(FLAWS[flaw](Leaf(name="dora", key=lambda: key)), Signer.of(keys))  # type: ignore[arg-type, return-value]
        (tmp_path / "bad.pem").write_bytes(forged.public_bytes(serialization.Encoding.PEM))
        refused(site, [tmp_path / "bad.pem", keys / "ca/cert.pem", keys / "ca/crl.pem"], code, words)
    authority.revoke("dora")
    leaf = tmp_path / "leaf.pem"
    leaf.write_bytes(answer.read_bytes().split(b"-----BEGIN X509 CRL-----")[0])
    refused(site, [leaf, keys / "ca/crl.pem"], "SS-3205", words)
    refused(site, [leaf], "SS-3206", words)


def test_files_that_hold_something_else(answered: tuple[Path, Path], keys: Path, tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"junk")
    for files, count in (([tmp_path / "junk", tmp_path / "none", keys / "alice/key.pem"], 3), ([tmp_path / "junk"], 1)):
        with pytest.raises(InputError) as caught:
            read_parcel(files)
        assert caught.value.code == "SS-1812"
        assert len(caught.value.details) == count


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_bytes_that_are_no_parcel_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.mktemp("parcel") / "x.pem"
    file.write_bytes(data)
    with pytest.raises(InputError, match="SS-1812"):
        read_parcel([file])
