"""Keys that lie encrypted: whoever serves or dials is asked once, and without the passphrase nothing is sent."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from securesplit.client.dial import dial
from securesplit.errors import ConnectionFailed
from securesplit.pki.authority import Authority
from securesplit.transport.tls import ContextHolder
from tests.e2e.house import Loopback, batches_of, policy_of, sentences

POLICY = policy_of()
SECRET = b"correct horse battery staple"


@pytest.fixture
def locked(house):
    """Carol's key, as `openssl pkcs8 -topk8` would leave it."""
    path = house.keys / "carol/key.pem"
    key = load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(SECRET)))
    return house


def test_a_client_with_an_encrypted_key_trains_and_reconnects(locked):
    asked = []

    def passphrase():
        asked.append(1)
        return SECRET

    with (
        Loopback(locked.core(locked.job(), POLICY), locked.keys) as loop,
        dial(loop.url, keys=locked.keys / "carol", policy=POLICY, passphrase=passphrase) as link,
    ):
        client = locked.client(link, POLICY)
        client.train("B")
        loss = client.step(batches_of(client, sentences(4, seed=5))[0])
        assert float(loss) > 0
        link.redial(10.0).close()
    assert asked


@pytest.mark.parametrize(("given", "code"), [(None, "SS-3104"), (lambda: b"another passphrase", "SS-3105")])
def test_without_its_passphrase_nothing_is_dialled(locked, given, code):
    with pytest.raises(ConnectionFailed) as caught:
        dial("wss://127.0.0.1:1", keys=locked.keys / "carol", policy=POLICY, passphrase=given)
    assert caught.value.code == code
    assert "another passphrase" not in str(caught.value)


def test_a_server_opens_its_key_once_and_takes_up_a_renewal(house):
    from securesplit.pki.renew import renew

    authority = Authority.open(house.keys)
    authority.issue("vault", "server", passphrase=SECRET)
    holder = ContextHolder(house.keys / "vault", passphrase=lambda: SECRET)
    before = holder.folder.cert_der
    renew(authority, "vault", force=True)
    holder.reload()
    assert holder.folder.cert_der != before
