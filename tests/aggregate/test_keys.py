"""Keys against HKDF and SHA-256 written out from RFC 5869, and what must never coincide."""

import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from securesplit.aggregate import keys
from securesplit.errors import AggregationAborted

A, B = (X25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in (1, 2))
CHANNEL_A, CHANNEL_B = (keys.Channel(bytes([i]) * 32) for i in (1, 2))
T = bytes(range(32))


def hkdf(secret: bytes, salt: bytes, label: str, *parts: str) -> bytes:
    info = label.encode() + b"|" + b"".join(len(p).to_bytes(4, "big") + p.encode() for p in parts)
    extracted = hmac.digest(salt, secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def test_every_derivation_is_hkdf_with_its_own_label():
    ab = A.exchange(B.public_key())
    a, b = keys.raw_public(A), keys.raw_public(B)
    assert (
        keys.pair_key(A, b, T, "bea", "amir")
        == hkdf(ab, T, "ssa-1/pair", "amir", "bea")
        == keys.pair_key(B, a, T, "amir", "bea")
    )
    forth = keys.share_key(CHANNEL_A, b, T, sender="amir", receiver="bea", other="bea")
    assert (
        forth
        == hkdf(ab, T, "ssa-1/share", "amir", "bea")
        == keys.share_key(CHANNEL_B, a, T, sender="amir", receiver="bea", other="amir")
    )
    assert keys.self_key(b"b" * 32, T, "amir") == hkdf(b"b" * 32, T, "ssa-1/self", "amir")
    assert keys.group_key([b"g" * 32, b"h" * 32], T) == hkdf(b"g" * 32 + b"h" * 32, T, "ssa-1/group")
    assert keys.blind_key(b"k" * 32, T, "amir") == hkdf(b"k" * 32, T, "ssa-1/blind", "amir")
    seed = hkdf(b"s" * 32, T, "ssa-1/mask-sk")
    assert keys.raw_public(keys.mask_private(b"s" * 32, T)) == keys.raw_public(
        X25519PrivateKey.from_private_bytes(seed)
    )
    assert keys.commit("cb", b"b" * 32) == hashlib.sha256(b"ssa-1/cb|" + b"b" * 32).digest()
    assert keys.bind("x", b"pp", [b"q"]) == hashlib.sha256(b"x|\0\0\0\x02pp\0\0\0\x01q").digest()


def test_no_two_uses_share_a_key():
    b, other = keys.raw_public(B), bytes(32)
    found = [
        keys.pair_key(A, b, T, "amir", "bea"), keys.pair_key(A, b, other, "amir", "bea"), keys.pair_key(A, b, T, "amir", "bob"),
        keys.share_key(CHANNEL_A, b, T, sender="amir", receiver="bea", other="bea"), keys.share_key(CHANNEL_A, b, T, sender="bea", receiver="amir", other="bea"),
        keys.self_key(T, T, "amir"), keys.self_key(T, T, "bea"), keys.self_key(T, other, "amir"), keys.blind_key(T, T, "amir"),
        keys.group_key([T], T),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    # Lengths keep neighbouring names apart.
    assert keys.pair_key(A, b, T, "ab", "c") != keys.pair_key(A, b, T, "a", "bc")
    assert keys.bind("x", b"", [b"ab", b"c"]) != keys.bind("x", b"", [b"a", b"bc"])


def test_a_box_opens_only_as_it_was_sealed():
    key, other = b"k" * 32, b"j" * 32
    box = keys.seal_box(key, b"content", T, sender="amir", receiver="bea")
    assert keys.open_box(key, box, T, sender="amir", receiver="bea") == b"content"
    wrong = [
        (other, box, T, "amir", "bea"), (key, box[:-1], T, "amir", "bea"), (key, bytes([box[0] ^ 1]) + box[1:], T, "amir", "bea"),
        (key, box, bytes(32), "amir", "bea"), (key, box, T, "bea", "amir"), (key, box, T, "amir", "bob"), (key, b"", T, "amir", "bea"),
    ]  # fmt: skip
    for k, data, t, sender, receiver in wrong:
        with pytest.raises(AggregationAborted) as error:
            keys.open_box(k, data, t, sender=sender, receiver=receiver)
        assert error.value.code == "SS-6007"


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31)])
def test_public_keys_of_low_order_are_refused(public):
    with pytest.raises(AggregationAborted) as error:
        keys.pair_key(A, public, T, "amir", "bea")
    assert error.value.code == "SS-6003"


def test_secrets_do_not_print():
    drawn = keys.RoundSecrets.draw(lambda n: b"\x41" * n, blind=True)
    assert "A" * 8 not in repr(drawn)
    assert "41414141" not in repr(drawn)
    assert len(drawn.group) == 32
    assert keys.RoundSecrets.draw(lambda n: b"\x41" * n, blind=False).group == b""
