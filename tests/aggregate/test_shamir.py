"""Secret sharing against the polynomial written out."""

import hashlib
import os
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.aggregate.shamir import PRIME, Share, combine, field_bytes, is_field_element, split, weights_at_zero
from securesplit.errors import AggregationAborted

secrets = st.integers(0, PRIME - 1).map(lambda v: v.to_bytes(32, "big"))


def test_the_modulus_is_a_prime_of_256_bits():
    assert PRIME.bit_length() == 256
    d, r = PRIME - 1, 0
    while d % 2 == 0:
        d, r = d // 2, r + 1
    for base in range(2, 60):  # Miller-Rabin
        x = pow(base, d, PRIME)
        assert x in {1, PRIME - 1} or any((x := x * x % PRIME) == PRIME - 1 for _ in range(r - 1))


@settings(deadline=None, max_examples=60)
@given(secret=secrets, n=st.integers(1, 12), data=st.data())
def test_any_t_shares_give_the_secret(secret, n, data):
    t = data.draw(st.integers(1, n))
    xs = data.draw(st.lists(st.integers(1, 200), min_size=n, max_size=n, unique=True))
    shares = split(secret, xs, t, os.urandom)
    assert [s.x for s in shares] == xs
    chosen = data.draw(st.permutations(shares))[:t]
    assert combine(chosen) == secret
    assert combine(chosen, weights_at_zero([s.x for s in chosen])) == secret


@settings(deadline=None, max_examples=30)
@given(secret=secrets, guess=secrets)
def test_fewer_than_t_shares_fit_every_secret_equally(secret, guess):
    shares = split(secret, [1, 2, 3, 4, 5], 3, os.urandom)
    # Two shares and any guessed secret lie on exactly one polynomial of degree 2: nothing is excluded.
    a, b = shares[0], shares[3]
    third = (
        sum(
            w * int.from_bytes(y, "big") for w, y in zip(_lagrange_at(9, [0, a.x, b.x]), [guess, a.y, b.y], strict=True)
        )
        % PRIME
    )
    assert combine([a, b, Share(9, third.to_bytes(32, "big"))]) == guess


def _lagrange_at(x: int, points: list[int]) -> list[int]:
    weights = []
    for p in points:
        w = Fraction(1)
        for q in points:
            if q != p:
                w *= Fraction(x - q, p - q)
        weights.append(w.numerator * pow(w.denominator, -1, PRIME) % PRIME)
    return weights


def test_shares_are_values_of_the_polynomial():
    coefficients = [hashlib.sha256(bytes([i])).digest() for i in range(3)]
    feed = iter(coefficients[1:])
    shares = split(coefficients[0], [1, 7, 19], 3, lambda _n: next(feed))
    a, b, c = (int.from_bytes(v, "big") for v in coefficients)
    # The subject may use the drawn coefficients in either order of powers.
    either = [
        [(a + b * x + c * x * x) % PRIME for x in (1, 7, 19)],
        [(a + c * x + b * x * x) % PRIME for x in (1, 7, 19)],
    ]
    assert [int.from_bytes(s.y, "big") for s in shares] in either


def test_a_wrong_share_gives_a_wrong_secret_and_every_subset_agrees_otherwise():
    secret = bytes(31) + b"\x2a"
    shares = split(secret, range(1, 7), 4, os.urandom)
    assert {combine(chosen) for chosen in combinations(shares, 4)} == {secret}
    wrong = Share(shares[0].x, bytes(32))
    assert combine([wrong, *shares[1:4]]) != secret


@pytest.mark.parametrize(
    ("secret", "xs", "t"),
    [
        (bytes(32), [1, 1, 2], 2), (bytes(32), [0, 1, 2], 2), (bytes(32), [1, 2], 3), (bytes(32), [1, 2], 0),
        (PRIME.to_bytes(32, "big"), [1, 2], 2), (bytes(31), [1, 2], 2), (bytes(32), [1, PRIME + 1, PRIME], 2),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(secret, xs, t):
    with pytest.raises(ValueError, match="below p"):
        split(secret, xs, t, os.urandom)


def test_bad_shares_are_refused():
    with pytest.raises(AggregationAborted):
        combine([Share(1, PRIME.to_bytes(32, "big")), Share(2, bytes(32))])
    with pytest.raises(ValueError, match="distinct"):
        combine([Share(1, bytes(32)), Share(1, bytes(32))])


def test_field_elements_are_drawn_by_rejection():
    feed = iter([b"\xff" * 32, PRIME.to_bytes(32, "big"), (PRIME - 1).to_bytes(32, "big")])
    assert field_bytes(lambda _n: next(feed)) == (PRIME - 1).to_bytes(32, "big")
    assert is_field_element(bytes(32))
    assert not is_field_element(PRIME.to_bytes(32, "big"))


def test_a_share_does_not_print_its_value():
    assert repr(Share(3, b"\x11" * 32)) == "Share(x=3)"
