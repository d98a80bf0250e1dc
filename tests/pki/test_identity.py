from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.identity import Identity, identity_of

NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True).filter(lambda name: name != "ca")
DOMAINS = st.sampled_from(["securesplit.local", "a", "hospital.example", "x-1.y-2.zz"])


@given(NAMES, DOMAINS, st.sampled_from(["client", "server"]))
@settings(max_examples=60, deadline=None)
def test_an_identity_survives_its_uri(name: str, domain: str, role: str) -> None:
    identity = Identity(domain=domain, role=role, name=name)  # type: ignore[arg-type]
    assert identity.uri == f"spiffe://{domain}/securesplit/{role}/{name}"
    assert Identity.parse(identity.uri) == identity


@given(st.text(max_size=60) | st.text(max_size=20).map(lambda end: "spiffe://a.b/securesplit/client/" + end))
@settings(max_examples=200, deadline=None)
def test_no_identity_has_two_spellings(text: str) -> None:
    with suppress(ConnectionFailed):
        assert Identity.parse(text).uri == text


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "https://securesplit.local/securesplit/client/alice",
        "SPIFFE://securesplit.local/securesplit/client/alice",
        "spiffe://securesplit.local/securesplit/client/alice/",
        "spiffe://securesplit.local/securesplit/client/alice\n",
        "spiffe://securesplit.local/securesplit/client/",
        "spiffe://securesplit.local/securesplit/client/Alice",
        "spiffe://securesplit.local/securesplit/client/%61lice",
        "spiffe://securesplit.local/securesplit/client/alice?x=1",
        "spiffe://securesplit.local/securesplit/client/alice#x",
        "spiffe://securesplit.local/securesplit/client/ca",
        "spiffe://securesplit.local/securesplit/admin/alice",
        "spiffe://securesplit.local:443/securesplit/client/alice",
        "spiffe://user@securesplit.local/securesplit/client/alice",
        "spiffe://Securesplit.local/securesplit/client/alice",
        "spiffe:///securesplit/client/alice",
        "spiffe://securesplit.local/other/client/alice",
        "spiffe://securesplit.local/securesplit/client/../server/gpu",
    ],
)
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(ConnectionFailed, match="SS-3201"):
        Identity.parse(uri)


@pytest.mark.parametrize("name", ["", "ca", "-a", "A", "a_b", "a.b", "a/b", "..", "a" * 64, "a\n", "ä"])
def test_names_that_cannot_be_a_folder_or_a_party_are_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        Identity(domain="a.b", role="client", name=name)
    assert caught.value.code == "SS-1801"


@pytest.mark.parametrize(
    "domain", ["", ".", "a..b", "A.b", "a/b", "-a.b", "a" * 64, "a b", "a.b\n", ".".join(["a" * 60] * 5)]
)
def test_domains_that_are_no_dns_name_are_refused(domain: str) -> None:
    with pytest.raises(InputError) as caught:
        Identity(domain=domain, role="client", name="alice")
    assert caught.value.code == "SS-1802"


def test_a_role_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        Identity(domain="a.b", role="admin", name="alice")  # type: ignore[arg-type]
    assert caught.value.code == "SS-1803"


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_bytes_that_are_no_certificate_are_refused(data: bytes) -> None:
    with pytest.raises(ConnectionFailed):
        identity_of(data)
