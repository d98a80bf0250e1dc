"""Homomorphic sums against plain Python integers, and their bounds against exact fractions, sympy and SEAL's own meter."""

import hashlib
import os
import threading
from fractions import Fraction

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.aggregate import he, he_native
from securesplit.aggregate.he import CLIENT, DEGREE, SCHEMES, SUM, HeKeys, HeScheme, derive_keys, ternary, unpack_frame
from securesplit.aggregate.he_worker import HeWorker
from securesplit.errors import SecureSplitError

both = pytest.mark.parametrize("name", SCHEMES)
EDGES = (0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1)


@pytest.fixture(scope="module")
def worker():
    with HeWorker() as one:
        yield one


def random_words(dim: int) -> np.ndarray:
    return np.frombuffer(os.urandom(4 * dim), dtype="<u4").astype(np.uint32)


def integer_sum(vectors: list[np.ndarray]) -> list[int]:
    return [sum(column) % 2**32 for column in zip(*(v.tolist() for v in vectors), strict=True)]


def sum_frame(
    worker: HeWorker, scheme: HeScheme, keys: HeKeys, vectors: list[np.ndarray], plain: np.ndarray | None = None
):
    handle = worker.begin(scheme, keys.public, vectors[0].size)
    for vector in vectors:
        worker.add(handle, worker.encrypt(scheme, keys.secret, vector))
    if plain is not None:
        worker.add_plain(handle, plain)
    return worker.finish(handle)


def code_of(action, *args, **kwargs) -> str:
    with pytest.raises(SecureSplitError) as caught:
        action(*args, **kwargs)
    return caught.value.code


class TestParameters:
    @both
    def test_every_size_is_proven(self, name):
        for n in range(1, 257):
            scheme = HeScheme(name, n)
            t, q = scheme.plain_modulus, scheme.modulus
            # SEAL's batching and its transforms need p = 1 mod 2N; the standard's table has 58 bits for 256-bit security.
            assert q % 8192 == 1
            assert q < 2**58
            largest = n * 2**31 + 2**31
            assert scheme.largest == largest
            if name == "bfv":
                assert t % 8192 == 1
                assert t > 4 * largest
                noise = n * Fraction(43, 2) + Fraction(1, 2)
                assert noise < Fraction(q, 2 * t)
            else:
                deviation = Fraction(n * 42 * 2048, 4) + Fraction((n + 1) * 2048, 4)
                assert 100 * deviation <= Fraction(3, 16) ** 2 * scheme.scale**2
                # Coefficients of the sum, with sqrt(2) from above, and all noise at its worst.
                assert 2 * (scheme.scale * largest * Fraction(14143, 10000) + 22 * n + 1) < q

    def test_primes_are_primes(self):
        for name in SCHEMES:
            for n in (1, 2, 3, 10, 50, 100, 199, 256):
                scheme = HeScheme(name, n)
                assert sympy.isprime(scheme.modulus)
                assert sympy.isprime(scheme.plain_modulus)

    @given(st.integers(0, 2**58))
    @settings(max_examples=300, deadline=None)
    def test_the_primality_test_agrees_with_another(self, n):
        assert he.is_prime(n) == sympy.isprime(n)

    def test_pseudoprimes_are_told_apart(self):
        for n in (561, 1105, 3215031751, 3825123056546413051, 341550071728321, 2047, 25326001):
            assert not he.is_prime(n)
        assert [n for n in range(60) if he.is_prime(n)] == list(sympy.primerange(60))

    @pytest.mark.parametrize(
        ("name", "clients"), [("bfv", 257), ("ckks", 257), ("bfv", 0), ("ckks", -1), ("paillier", 3)]
    )
    def test_what_is_not_proven_is_refused(self, name, clients):
        assert code_of(HeScheme, name, clients) == "SS-1601"

    @pytest.mark.parametrize("dim", [0, -1, 2**24 + 1])
    def test_an_impossible_dimension_is_refused(self, dim):
        assert code_of(HeScheme("bfv", 3).frame_bytes, dim) == "SS-1601"


class TestKeys:
    def test_the_secret_polynomial_is_uniform_ternary(self):
        counts = np.zeros(3)
        for seed in range(20):
            counts += np.bincount(ternary(HeScheme("bfv", 3), bytes([seed]) * 32) + 1, minlength=3)
        expected = 20 * DEGREE / 3
        assert ((counts - expected) ** 2 / expected).sum() < 13.8  # chi-square, 2 degrees of freedom, 0.999

    def test_the_same_secret_gives_the_same_keys_everywhere(self):
        # A committed answer: clients on other machines and releases must get this polynomial from this secret.
        found = ternary(HeScheme("bfv", 3), bytes(range(32))).astype(np.int8).tobytes()
        assert hashlib.sha256(found).hexdigest() == "5b49823dc0a69325bf84701c752831979053c978fa83848ceb03ba7d96897625"

    def test_scheme_size_and_secret_all_make_another_key(self):
        secrets = (bytes(32), b"\1" + bytes(31))
        keys = {derive_keys(HeScheme(name, n), s).public for name in SCHEMES for n in (3, 4) for s in secrets}
        assert len(keys) == 8
        polynomials = {ternary(HeScheme(name, n), s).tobytes() for name in SCHEMES for n in (3, 4) for s in secrets}
        assert len(polynomials) == 8

    def test_neither_repr_nor_public_part_holds_the_secret(self, worker):
        keys = worker.make_keys(HeScheme("bfv", 3))
        assert len(keys.secret) == 32
        assert keys.secret != worker.make_keys(HeScheme("bfv", 3)).secret
        assert repr(keys.secret) not in repr(keys)
        assert all(keys.secret[at : at + 4] not in keys.public for at in range(29))

    @both
    def test_a_secret_or_a_foreign_key_in_place_of_a_public_part_is_refused(self, worker, name):
        scheme, other = HeScheme(name, 3), HeScheme("ckks" if name == "bfv" else "bfv", 3)
        keys = worker.make_keys(scheme)
        for wrong in (keys.secret, b"", keys.public + b"\0", keys.public[:-1], keys.public + keys.secret,
                      worker.make_keys(other).public, worker.make_keys(HeScheme(name, 4)).public):  # fmt: skip
            assert code_of(worker.begin, scheme, wrong, 5) == "SS-6014"

    def test_a_secret_of_another_length_is_refused(self, worker):
        scheme = HeScheme("bfv", 3)
        for wrong in (b"", bytes(31), bytes(33), worker.make_keys(scheme).public):
            assert code_of(worker.encrypt, scheme, wrong, random_words(4)) == "SS-6011"
            assert code_of(worker.decrypt, scheme, wrong, b"", 4) == "SS-6011"

    @both
    def test_seal_holds_the_very_polynomial(self, name):
        # Oracle: the polynomial's values, by Horner's rule, at the odd powers of SEAL's root of unity in its order, which
        # is that of reversed bits; the root is the smallest of order 2N.
        scheme, secret = HeScheme(name, 3), os.urandom(32)
        q, n = scheme.modulus, DEGREE
        root = next(r for g in range(2, 100) if pow(r := pow(g, (q - 1) // (2 * n), q), n, q) == q - 1)
        root = min(pow(root, odd, q) for odd in range(1, 2 * n, 2))
        polynomial = ternary(scheme, secret).tolist()
        key = he_native._Seal(scheme).secret(secret)
        for at in (0, 1, 2, 3, 1000, 2047, 2048, 4095):
            x, value = pow(root, 2 * int(f"{at:012b}"[::-1], 2) + 1, q), 0
            for coefficient in reversed(polynomial):
                value = (value * x + coefficient) % q
            assert key.data()[at] == value


class TestSums:
    @both
    @pytest.mark.parametrize("clients", [1, 2, 10])
    def test_the_sum_is_that_of_plain_integers(self, worker, name, clients):
        scheme = HeScheme(name, clients)
        keys = worker.make_keys(scheme)
        vectors = [np.concatenate([np.array(EDGES, np.uint32), random_words(5)]) for _ in range(clients)]
        plain = np.concatenate([np.array(EDGES[::-1], np.uint32), random_words(5)])
        frame = sum_frame(worker, scheme, keys, vectors, plain)
        assert len(frame) <= scheme.frame_bytes(12, kind=SUM)
        assert worker.decrypt(scheme, keys.secret, frame, 12).tolist() == integer_sum([*vectors, plain])

    @both
    def test_the_most_clients_with_the_largest_words_do_not_wrap(self, worker, name):
        # The first block has every slot at its largest, which gives the largest coefficient that there can be.
        scheme = HeScheme(name, 256)
        keys = worker.make_keys(scheme)
        block = np.full(DEGREE, 2**31, np.uint32)
        vectors = [np.concatenate([block, np.array(EDGES, np.uint32), random_words(5)]) for _ in range(256)]
        frame = sum_frame(worker, scheme, keys, vectors, vectors[0])
        opened = worker.decrypt(scheme, keys.secret, frame, DEGREE + 12)
        assert opened.tolist() == integer_sum([*vectors, vectors[0]])

    @pytest.mark.parametrize("dim", [1, DEGREE - 1, DEGREE, DEGREE + 1, 3 * DEGREE + 17])
    def test_both_schemes_give_the_same_at_every_length(self, worker, dim):
        vectors, plain, opened = [random_words(dim) for _ in range(3)], random_words(dim), []
        for name in SCHEMES:
            scheme = HeScheme(name, 3)
            keys = worker.make_keys(scheme)
            frame = sum_frame(worker, scheme, keys, vectors, plain)
            opened.append(worker.decrypt(scheme, keys.secret, frame, dim).tolist())
        assert opened[0] == opened[1] == integer_sum([*vectors, plain])

    @both
    def test_fewer_clients_than_the_scheme_is_for_are_as_good(self, worker, name):
        scheme = HeScheme(name, 50)
        keys, vector = worker.make_keys(scheme), random_words(9)
        frame = sum_frame(worker, scheme, keys, [vector])
        assert worker.decrypt(scheme, keys.secret, frame, 9).tolist() == vector.tolist()

    @both
    def test_a_frame_stays_under_its_cap_and_no_two_are_alike(self, worker, name):
        scheme = HeScheme(name, 10)
        keys, words = worker.make_keys(scheme), np.zeros(20_000, np.uint32)
        first, second = (worker.encrypt(scheme, keys.secret, words) for _ in range(2))
        assert max(len(first), len(second)) <= scheme.frame_bytes(20_000)
        for one, two in zip(
            unpack_frame(scheme, CLIENT, 20_000, keys.public[-16:], first),
            unpack_frame(scheme, CLIENT, 20_000, keys.public[-16:], second),
            strict=True,
        ):
            same = np.frombuffer(one[200:20_000], np.uint8) == np.frombuffer(two[200:20_000], np.uint8)
            assert same.mean() < 0.3  # Zeros of the topmost bytes are alike; a constant noise would make all so.

    def test_threads_share_a_worker(self, worker):
        found, scheme = {}, HeScheme("bfv", 4)

        def party(number):
            keys, vectors = worker.make_keys(scheme), [random_words(50) for _ in range(4)]
            frame = sum_frame(worker, scheme, keys, vectors)
            found[number] = worker.decrypt(scheme, keys.secret, frame, 50).tolist() == integer_sum(vectors)

        threads = [threading.Thread(target=party, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == dict.fromkeys(range(4), True)

    @pytest.mark.slow
    @both
    @pytest.mark.parametrize("clients", [100, 256])
    def test_many_clients_with_many_words(self, worker, name, clients):
        scheme, total = HeScheme(name, clients), np.zeros(100_000, np.uint32)
        keys = worker.make_keys(scheme)
        handle = worker.begin(scheme, keys.public, total.size)
        for _ in range(clients):
            vector = random_words(total.size)
            total += vector
            worker.add(handle, worker.encrypt(scheme, keys.secret, vector))
        opened = worker.decrypt(scheme, keys.secret, worker.finish(handle), total.size)
        assert np.array_equal(opened, total)


class TestNoise:
    """SEAL inside this process, to look at what the worker never shows."""

    def test_bfv_keeps_a_bit_at_the_maximum(self):
        scheme = HeScheme("bfv", 256)
        seal = he_native._Seal(scheme)
        secret = seal.secret(bytes(32))
        encryptor, decryptor = seal.api.Encryptor(seal.context, secret), seal.api.Decryptor(seal.context, secret)
        total = seal.read(seal.api.Ciphertext(), seal.write(encryptor.encrypt_symmetric(seal.encode(signed_words()))))
        fresh = decryptor.invariant_noise_budget(total)
        one = seal.read(seal.api.Ciphertext(), seal.write(encryptor.encrypt_symmetric(seal.encode(signed_words()))))
        for _ in range(255):  # The same ciphertext again: its noise adds up in a line, the worst that can be.
            seal.adder.add_inplace(total, one)
        seal.adder.add_plain_inplace(total, seal.encode(signed_words()))
        assert fresh >= 9  # 8 of them for 256 clients.
        assert decryptor.invariant_noise_budget(total) >= 1

    @pytest.mark.parametrize("clients", [2, 64, 256])
    def test_ckks_errs_as_it_is_said_to(self, clients):
        scheme = HeScheme("ckks", clients)
        seal = he_native._Seal(scheme)
        secret = seal.secret(bytes(32))
        encryptor, decryptor = seal.api.Encryptor(seal.context, secret), seal.api.Decryptor(seal.context, secret)
        want = signed_words()
        total = seal.read(seal.api.Ciphertext(), seal.write(encryptor.encrypt_symmetric(seal.encode(want))))
        for _ in range(clients - 1):
            more = signed_words()
            want = want + more
            blob = seal.write(encryptor.encrypt_symmetric(seal.encode(more)))
            seal.adder.add_inplace(total, seal.read(seal.api.Ciphertext(), blob))
        plain = seal.api.Plaintext()
        decryptor.decrypt(total, plain)
        errors = np.array(seal.encoder.decode_complex(plain)).view(np.float64) - want
        # The bound is ten deviations with rounding at 1/4; its true variance is 1/12. 4096 errors tell 5 percent.
        deviation = np.sqrt((clients * 10.5 + (clients + 1) / 12) * 2048) / scheme.scale
        assert errors.std() == pytest.approx(deviation, rel=0.06)
        assert np.abs(errors).max() < scheme.error_bound / 1.5
        assert scheme.error_bound < 3 / 16


def signed_words() -> np.ndarray:
    return random_words(DEGREE).view(np.int32).astype(np.int64)
