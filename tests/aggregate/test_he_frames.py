"""Frames and sums that a hostile party, or a careless caller, hands to the homomorphic worker."""

import os
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from securesplit.aggregate import he_native
from securesplit.aggregate.he import CLIENT, DEGREE, SCHEMES, SUM, HeScheme, unpack_frame
from securesplit.aggregate.he_worker import HeWorker
from securesplit.errors import AggregationAborted, InputError, RemoteProtocolError, SecureSplitError

both = pytest.mark.parametrize("name", SCHEMES)
HEADER = 44


@pytest.fixture(scope="module")
def worker():
    with HeWorker() as one:
        yield one


def random_words(dim: int) -> np.ndarray:
    return np.frombuffer(os.urandom(4 * dim), dtype="<u4").astype(np.uint32)


def sum_frame(worker, scheme, keys, vectors):
    handle = worker.begin(scheme, keys.public, vectors[0].size)
    for vector in vectors:
        worker.add(handle, worker.encrypt(scheme, keys.secret, vector))
    return worker.finish(handle)


def code_of(action, *args, **kwargs) -> str:
    with pytest.raises(SecureSplitError) as caught:
        action(*args, **kwargs)
    return caught.value.code


class TestMisuse:
    @both
    def test_a_sum_takes_no_more_frames_than_are_proven(self, worker, name):
        scheme = HeScheme(name, 2)
        keys = worker.make_keys(scheme)
        frame = worker.encrypt(scheme, keys.secret, random_words(3))
        handle = worker.begin(scheme, keys.public, 3)
        assert code_of(worker.finish, handle) == "SS-6005"
        assert code_of(worker.add_plain, handle, random_words(3)) == "SS-6005"
        worker.add(handle, frame)
        worker.add(handle, frame)
        assert code_of(worker.add, handle, frame) == "SS-6005"
        assert code_of(worker.add_plain, handle, random_words(4)) == "SS-6011"
        worker.add_plain(handle, random_words(3))
        assert code_of(worker.add_plain, handle, random_words(3)) == "SS-6005"
        worker.finish(handle)
        assert code_of(worker.finish, handle) == "SS-6005"
        worker.drop(handle)

    def test_words_must_be_words(self, worker):
        scheme = HeScheme("bfv", 2)
        keys = worker.make_keys(scheme)
        for wrong in (np.zeros(3, np.int64), np.zeros((2, 2), np.uint32), np.zeros(3, np.float32)):
            assert code_of(worker.encrypt, scheme, keys.secret, wrong) == "SS-6011"
        assert code_of(worker.encrypt, scheme, keys.secret, np.zeros(0, np.uint32)) == "SS-1601"

    def test_sums_that_nobody_finishes_are_limited(self, worker):
        scheme = HeScheme("bfv", 2)
        public, handles = worker.make_keys(scheme).public, []
        handles.extend(worker.begin(scheme, public, 3) for _ in range(8))
        assert code_of(worker.begin, scheme, public, 3) == "SS-6005"
        for handle in handles:
            worker.drop(handle)
        worker.drop(worker.begin(scheme, public, 3))


class Sample:
    """Frames of one key, made once."""

    def __init__(self, worker: HeWorker, name: str) -> None:
        self.scheme, self.dim = HeScheme(name, 3), 5
        self.keys = worker.make_keys(self.scheme)
        self.words = random_words(self.dim)
        self.client = worker.encrypt(self.scheme, self.keys.secret, self.words)
        self.sum = sum_frame(worker, self.scheme, self.keys, [self.words])


@pytest.fixture(scope="module", params=SCHEMES)
def sample(worker, request):
    return Sample(worker, request.param)


@pytest.fixture
def running(worker, sample):
    handle = worker.begin(sample.scheme, sample.keys.public, sample.dim)
    yield handle
    worker.drop(handle)


def reframe(frame: bytes, blob: bytes) -> bytes:
    """The frame with another ciphertext, all lengths made right."""
    header = frame[: HEADER - 8] + struct.pack("<Q", HEADER + 4 + len(blob))
    return header + struct.pack("<I", len(blob)) + blob


few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class TestMalformed:
    def refused(self, worker, sample, handle, client: bytes, total: bytes) -> None:
        for action, args in (
            (worker.add, (handle, client)),
            (worker.decrypt, (sample.scheme, sample.keys.secret, total, 5)),
        ):
            with pytest.raises(RemoteProtocolError) as caught:
                action(*args)
            assert caught.value.code == "SS-6014"

    @few
    @given(st.data())
    def test_a_frame_cut_short_is_refused(self, worker, sample, running, data):
        cut = data.draw(st.integers(0, len(sample.client) - 1))
        self.refused(worker, sample, running, sample.client[:cut], sample.sum[:cut])

    @few
    @given(st.binary(min_size=1, max_size=70_000))
    def test_a_frame_with_more_behind_it_is_refused(self, worker, sample, running, more):
        self.refused(worker, sample, running, sample.client + more, sample.sum + more)

    @few
    @given(st.integers(0, HEADER + 20 - 1), st.integers(1, 255))
    def test_any_change_of_a_header_is_refused(self, worker, sample, running, at, change):
        # The frame's own header, the length of the first ciphertext, and SEAL's; but its minor version, byte 52.
        def edited(frame):
            return bytes([*frame[:at], frame[at] ^ change, *frame[at + 1 :]])

        if at != HEADER + 4 + 4:
            self.refused(worker, sample, running, edited(sample.client), edited(sample.sum))

    @few
    @given(st.binary(max_size=300))
    def test_bytes_from_anywhere_are_refused(self, worker, sample, running, noise):
        self.refused(worker, sample, running, noise, noise)

    def test_each_kind_stays_in_its_place(self, worker, sample, running):
        self.refused(worker, sample, running, sample.sum, sample.client)
        relabelled = bytearray(sample.client)
        relabelled[6] = SUM
        again = bytearray(sample.sum)
        again[6] = CLIENT
        self.refused(worker, sample, running, bytes(again), bytes(relabelled))

    def test_frames_of_others_are_refused(self, worker, sample, running):
        for scheme in (HeScheme("bfv", 3), HeScheme("ckks", 3), HeScheme("bfv", 4), HeScheme("ckks", 4)):
            keys = worker.make_keys(scheme)  # Another key also where the scheme is the same.
            client = worker.encrypt(scheme, keys.secret, sample.words)
            self.refused(worker, sample, running, client, sum_frame(worker, scheme, keys, [sample.words]))

    def test_another_dimension_is_refused(self, worker, sample, running):
        words = random_words(6)
        client = worker.encrypt(sample.scheme, sample.keys.secret, words)
        self.refused(worker, sample, running, client, sum_frame(worker, sample.scheme, sample.keys, [words]))

    def test_ciphertexts_of_other_parameters_are_refused_by_the_process(self, worker, sample, running):
        other = HeScheme("ckks" if sample.scheme.name == "bfv" else "bfv", 3)
        keys = worker.make_keys(other)
        client = worker.encrypt(other, keys.secret, sample.words)[HEADER + 4 :]
        total = sum_frame(worker, other, keys, [sample.words])[HEADER + 4 :]
        self.refused(worker, sample, running, reframe(sample.client, client), reframe(sample.sum, total))

    def test_a_ciphertext_at_another_scale_or_without_a_key_is_refused_by_the_process(self, worker, sample, running):
        seal = he_native._Seal(sample.scheme)
        total = seal.read(seal.api.Ciphertext(), sample.sum[HEADER + 4 :])
        if not seal.bfv:
            total.scale = total.scale * 2
            crooked = reframe(sample.sum, seal.write(total))
            assert code_of(worker.decrypt, sample.scheme, sample.keys.secret, crooked, 5) == "SS-6014"
        bare = seal.api.Ciphertext(seal.context)
        bare.resize(seal.context, seal.level, 2)
        crooked = reframe(sample.sum, seal.write(bare))
        assert code_of(worker.decrypt, sample.scheme, sample.keys.secret, crooked, 5) == "SS-6014"

    @few
    @given(st.data())
    def test_flipped_bits_of_a_ciphertext_end_no_process_but_the_worker_s(self, worker, sample, data):
        kind, frame = data.draw(st.sampled_from([(CLIENT, sample.client), (SUM, sample.sum)]))
        flipped = bytearray(frame)
        for at in data.draw(st.lists(st.integers(HEADER + 20, len(frame) - 1), min_size=1, max_size=3)):
            flipped[at] ^= 1 << data.draw(st.integers(0, 7))
        try:
            if kind == CLIENT:
                handle = worker.begin(sample.scheme, sample.keys.public, sample.dim)
                try:
                    worker.add(handle, bytes(flipped))
                    flipped[:] = worker.finish(handle)
                finally:
                    worker.drop(handle)
            opened = worker.decrypt(sample.scheme, sample.keys.secret, bytes(flipped), sample.dim)
        except (RemoteProtocolError, AggregationAborted) as error:
            ended = error.code
        else:
            ended = "opened" if opened.shape == (sample.dim,) else "misshapen"
        assert ended in {"SS-6011", "SS-6014", "SS-6016", "opened"}

    def test_a_refused_frame_leaves_the_sum_as_it_was(self, worker, sample):
        dim = 2 * DEGREE
        words = random_words(dim)
        good = worker.encrypt(sample.scheme, sample.keys.secret, words)
        first, second = unpack_frame(sample.scheme, CLIENT, dim, sample.keys.public[-16:], good)
        # The first ciphertext is good; the second one is from elsewhere.
        other = HeScheme("ckks" if sample.scheme.name == "bfv" else "bfv", 3)
        alien = worker.encrypt(other, worker.make_keys(other).secret, words[:5])[HEADER + 4 :]
        parts = b"".join(struct.pack("<I", len(part)) + bytes(part) for part in (first, alien))
        bad = good[: HEADER - 8] + struct.pack("<Q", HEADER + len(parts)) + parts
        handle = worker.begin(sample.scheme, sample.keys.public, dim)
        for _ in range(2):
            worker.add(handle, good)
            assert code_of(worker.add, handle, bad) == "SS-6014"
        opened = worker.decrypt(sample.scheme, sample.keys.secret, worker.finish(handle), dim)
        assert opened.tolist() == [2 * word % 2**32 for word in words.tolist()]
        assert len(second)

    def test_under_another_key_a_sum_is_impossible(self, worker, sample):
        # The name of the key in the header is no proof; a forged one leads to garbage, which shows.
        other = worker.make_keys(sample.scheme)
        forged = sample.sum[: HEADER - 24] + other.public[-16:] + sample.sum[HEADER - 8 :]
        assert code_of(worker.decrypt, sample.scheme, other.secret, forged, sample.dim) == "SS-6011"
        silent = worker.decrypt(sample.scheme, other.secret, forged, sample.dim, silent=True)
        assert silent.shape == (sample.dim,)
        assert silent.tolist() != sample.words.tolist()

    @pytest.mark.parametrize(
        ("name", "wrong"),
        [*((name, wrong) for name in SCHEMES for wrong in ("large", "negative", "filling")), ("ckks", "half")],
    )
    def test_an_impossible_plaintext_is_refused(self, worker, name, wrong):
        sample = Sample(worker, name)
        seal, values = he_native._Seal(sample.scheme), np.zeros(DEGREE)
        values[{"filling": 100}.get(wrong, 2)] = {
            "large": 2.0**33 + 1, "negative": -(2.0**33) - 1, "half": 0.5, "filling": 1.0
        }[wrong]  # fmt: skip
        plain = seal.api.Plaintext()
        if seal.bfv:
            seal.encoder.encode(values.astype(np.int64).tolist(), plain)
        else:
            seal.encoder.encode(values.view(np.complex128).tolist(), seal.level, seal.scale, plain)
        encryptor = seal.api.Encryptor(seal.context, seal.secret(sample.keys.secret))
        ciphertext = seal.api.Ciphertext()
        encryptor.encrypt_symmetric(plain, ciphertext)
        frame = reframe(sample.sum, seal.write(ciphertext))
        assert code_of(worker.decrypt, sample.scheme, sample.keys.secret, frame, 5) == "SS-6011"
        assert worker.decrypt(sample.scheme, sample.keys.secret, frame, 5, silent=True).shape == (5,)

    def test_a_header_that_promises_much_is_refused_before_anything_is_read(self):
        scheme = HeScheme("bfv", 3)
        with pytest.raises(RemoteProtocolError):
            unpack_frame(scheme, CLIENT, 5, bytes(16), bytes(scheme.frame_bytes(5) + 1))
        with pytest.raises(InputError):
            unpack_frame(scheme, CLIENT, 2**24 + 1, bytes(16), b"")
