"""Homomorphic sums of ring words: schemes, their parameters with proof, keys, and frames of ciphertexts.

A second envelope around masked words (secure-aggregation.md 5; docs/adr/0006-homomorphic-sums.md). What is encrypted are
words of the 32-bit ring, read as signed integers; n clients' words and one plain vector of words are added *in the
integers*, which neither scheme can wrap, and the sum is reduced mod 2^32. So it is the ring sum of the mask path, bit for
bit. Parameters are computed on both sides from the scheme and the number of clients and never sent: nobody can weaken
them. All clients of a round hold one secret of 32 bytes and encrypt under it; the server needs no key to add.

    BFV   N words a ciphertext; noise of a fresh ciphertext is at most 21 in every coefficient, so decryption never fails
    CKKS  N/2 slots of two words, real and imaginary part; the error is below 1/4 but with a probability under 2^-47

What this does not protect: neither scheme withstands chosen ciphertexts, so nothing that was decrypted, and no complaint
about it that the server could provoke at will, may go back to it. One client that gives the secret away opens every
ciphertext of the round; masked words are all that is in them. Frames carry no authentication; the rounds sign them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from securesplit.aggregate.config import MAX_ENCRYPTED
from securesplit.aggregate.masks import add_streams
from securesplit.errors import InputError, LocalProtocolError, RemoteProtocolError

__all__ = [
    "CLIENT", "DEGREE", "MAX_HE_CLIENTS", "MAX_HE_DIM", "SCHEMES", "SECRET_BYTES", "SUM", "HeKeys", "HeScheme", "derive_keys", "key_id_of",
    "pack_frame", "read_public", "ternary", "unpack_frame",
]  # fmt: skip

SCHEMES: tuple[Literal["bfv"], Literal["ckks"]] = ("bfv", "ckks")

DEGREE = 4096
"""N, degree of the ring of polynomials, and words in one ciphertext, of both schemes."""

MODULUS_BITS = 58
"""Largest modulus q for N = 4096, ternary secrets and noise of deviation 3.2 at 256 bits of classical security: the table
of the HomomorphicEncryption.org standard (2018), which SEAL enforces. One level, no switching keys: q is one prime."""

MAX_HE_CLIENTS = 256
MAX_HE_DIM = MAX_ENCRYPTED
SECRET_BYTES = 32

_NOISE = 21  # SEAL's centred binomial: 21 bits less 21 bits, so at most 21, and of variance 42 / 4.
_VARIANCE = Fraction(42, 4)
_TAIL = 10  # Standard deviations; see HeScheme.error_bound.

_PUBLIC = struct.Struct("<4sBBH16s")
_HEADER = struct.Struct("<4sBBBxHHII16sQ")
_LENGTH = struct.Struct("<I")
_BLOB = struct.Struct("<HBBBBHQ")  # SEAL's own header: magic, its size, version, compression, zero, size of all.
_VERSION = 1
CLIENT, SUM = 1, 2
_HINT = "The other side is of another release, faulty or hostile; start a new round."


def is_prime(n: int) -> bool:
    """Whether n < 2^64 is prime: Miller and Rabin with the first twelve primes, which leaves no doubt below 3.3e24."""
    witnesses = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if n < 2 or any(n % p == 0 for p in witnesses):
        return n in witnesses
    twos = ((n - 1) & -(n - 1)).bit_length() - 1
    for base in witnesses:
        x = pow(base, (n - 1) >> twos, n)
        if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(twos - 1)):
            return False
    return True


@lru_cache(maxsize=64)
def _prime_from(least: int) -> int:
    """The smallest prime p >= least with p = 1 mod 2N: for these, polynomials mod p split into N values."""
    p = least + (1 - least) % (2 * DEGREE)
    while not is_prime(p):
        p += 2 * DEGREE
    return p


@dataclass(frozen=True, slots=True)
class HeScheme:
    """A scheme sized for a number of clients. One that is not proven cannot be built.

    Attributes:
        name: ``bfv`` or ``ckks``.
        clients: n, most frames that may be added; a plain vector of words may come on top.

    Raises:
        InputError: SS-1601 for another name, or more clients than are proven.
    """

    name: Literal["bfv", "ckks"]
    clients: int

    def __post_init__(self) -> None:
        if self.name not in SCHEMES:
            raise InputError("SS-1601", "there is no such homomorphic scheme", hint="Use bfv or ckks.")
        if not 1 <= self.clients <= MAX_HE_CLIENTS or self.modulus.bit_length() > MODULUS_BITS:
            what = f"{self.name} is proven for 1 to {MAX_HE_CLIENTS} clients"
            raise InputError("SS-1601", what, hint="Use the backend masks, or a smaller roster.")

    @property
    def largest(self) -> int:
        """Largest absolute value of a sum of n + 1 words, read as signed integers."""
        return (self.clients + 1) << 31

    @property
    def plain_modulus(self) -> int:
        """t of BFV: twice the room that sums need, so that a garbled ciphertext, whose words are random mod t, shows."""
        return _prime_from(4 * self.largest + 1)

    @property
    def scale(self) -> int:
        """Delta of CKKS, the smallest power of two for which ten deviations of the noise stay below 3/16."""
        # In integers, so that all machines agree: 100 variance <= (3 Delta / 16)^2, with four times the variance whole.
        quadruple = int(4 * _VARIANCE * self.clients + self.clients + 1) * DEGREE // 2
        least = math.isqrt((_TAIL**2 * quadruple * 64 - 1) // 9) + 1
        return 1 << (least - 1).bit_length()

    @property
    def modulus(self) -> int:
        """q, the prime that the coefficients of ciphertexts are reduced by.

        BFV decrypts rightly while ``2 t |noise| < q``. A client adds at most 21, and 1/2 for rounding ``q m / t``; the
        plain vector adds 1/2. So 4 t (22 n + 1) leaves more than one bit. CKKS: a coefficient is at most Delta times the
        largest slot, sqrt(2) (n + 1) 2^31, and must stay below q / 2; 3 instead of 2 sqrt(2) is room for the noise.
        """
        if self.name == "bfv":
            return _prime_from(4 * self.plain_modulus * ((_NOISE + 1) * self.clients + 1))
        return _prime_from(3 * self.scale * self.largest)

    @property
    def _deviation(self) -> float:
        # Sub-Gaussian deviation of one part of a CKKS slot before division by Delta. The real part of e at a root of unity
        # is a sum of e_j cos(.), and the squares of these cosines add up to N / 2. Each of n ciphertexts brings noise, and
        # each of n + 1 encodings rounds its coefficients, by at most 1/2 and, as words are uniform, without a bias.
        return math.sqrt((self.clients * float(_VARIANCE) + (self.clients + 1) / 4) * DEGREE / 2)

    @property
    def error_bound(self) -> float:
        """What no coordinate's error exceeds but with a probability of ``2 exp(-50) < 2^-71`` (2^-47 for 2^24 of them).

        0 for BFV. For CKKS ten deviations, at most 3/16; the rest up to 1/4 is left to the floating point of encoding and
        decoding. A transform's relative error is below 2^-46 in the 2-norm (Higham, Accuracy and Stability, 24.1): for
        masked words 2^-6 at decoding, and about as much for n + 1 encodings, whose errors are independent. An error from
        1/4 to 3/4 is refused when it is decrypted; a wrong integer would need 3/4, 40 deviations.
        """
        return 0.0 if self.name == "bfv" else _TAIL * self._deviation / self.scale

    def count(self, dim: int) -> int:
        """Ciphertexts for so many words.

        Raises:
            InputError: SS-1601 when dim is outside 1..2^24.
        """
        if not 1 <= dim <= MAX_HE_DIM:
            what = f"homomorphic sums take 1 to {MAX_HE_DIM} words, not {dim}"
            raise InputError("SS-1601", what, hint="Use the backend masks, or adapters of a smaller rank.")
        return -(-dim // DEGREE)

    def blob_bytes(self, kind: int) -> tuple[int, int]:
        """Least and most bytes of one serialised ciphertext of a kind; it is compressed, so its length varies.

        A client's has one polynomial and the seed of the other; a sum has two. Their coefficients are uniform mod q, and
        no compression goes below their entropy; the most is what incompressible data takes.
        """
        raw = 16 + 73 + 24 + 8 * DEGREE * kind + (81 if kind == CLIENT else 0)
        return kind * DEGREE * (self.modulus.bit_length() - 1) // 8, raw + raw // 256 + 128

    def frame_bytes(self, dim: int, *, kind: int = CLIENT) -> int:
        """Most bytes of a frame of dim words: a client's, or with ``kind=SUM`` a sum's. A receiver's cap.

        Raises:
            InputError: SS-1601 when dim is out of range.
        """
        return _HEADER.size + self.count(dim) * (_LENGTH.size + self.blob_bytes(kind)[1])


@dataclass(frozen=True, slots=True)
class HeKeys:
    """One round's keys.

    Attributes:
        public: 24 bytes that name scheme, size and key; adding needs no more. A secret is refused in its place.
        secret: 32 bytes that every client has, for encrypting and decrypting; never at the server.
    """

    public: bytes
    secret: bytes = field(repr=False)


def key_id_of(scheme: HeScheme, secret: bytes) -> bytes:
    """A key's public name, 16 bytes: frames of another key are told apart before anything is computed.

    Raises:
        LocalProtocolError: SS-6011 when the secret is not 32 bytes.
    """
    if len(secret) != SECRET_BYTES:
        raise LocalProtocolError("SS-6011", f"a homomorphic secret has {SECRET_BYTES} bytes", hint="Start a new round.")
    return _derived(scheme, secret, b"id")[:16]


def derive_keys(scheme: HeScheme, secret: bytes) -> HeKeys:
    """The keys that follow from 32 uniform bytes; two clients that hold the same get the same.

    Raises:
        LocalProtocolError: SS-6011 when the secret is not 32 bytes.
    """
    name = key_id_of(scheme, secret)
    return HeKeys(_PUBLIC.pack(b"SSHP", _VERSION, SCHEMES.index(scheme.name), scheme.clients, name), bytes(secret))


def read_public(scheme: HeScheme, public: bytes) -> bytes:
    """The key's name, from a public part that came from outside.

    Raises:
        RemoteProtocolError: SS-6014 when it is not the public part of a key of this scheme and size; a secret is not.
    """
    want = (b"SSHP", _VERSION, SCHEMES.index(scheme.name), scheme.clients)
    if len(public) != _PUBLIC.size or _PUBLIC.unpack(public)[:4] != want:
        raise RemoteProtocolError(
            "SS-6014", f"no public part of a key of {scheme.name} for {scheme.clients} clients", hint=_HINT
        )
    return public[-16:]


def _derived(scheme: HeScheme, secret: bytes, use: bytes) -> bytes:
    info = b"securesplit/he|%s|%s|%d" % (use, scheme.name.encode(), scheme.clients)
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(secret)


def ternary(scheme: HeScheme, secret: bytes) -> npt.NDArray[np.int64]:
    """The secret polynomial's coefficients, (N,) of -1, 0 and 1, uniform: bytes of a stream mod 3, without the byte 255.

    Ours and not SEAL's sampler, whose values for one seed depend on the C++ library.
    """
    stream = np.zeros(DEGREE // 2, dtype=np.uint32)
    add_streams(stream, plus=[_derived(scheme, secret, b"ternary")])
    kept = (found := stream.astype("<u4").view(np.uint8))[found < 255][:DEGREE]
    assert kept.size == DEGREE, "of 8192 bytes a half is 255 with a probability below 2^-20000"
    return kept.astype(np.int64) % 3 - 1


def pack_frame(scheme: HeScheme, kind: int, dim: int, key_id: bytes, blobs: Sequence[bytes]) -> bytes:
    """A frame: header of 44 bytes, then each ciphertext behind its length."""
    parts = [part for blob in blobs for part in (_LENGTH.pack(len(blob)), blob)]
    total = _HEADER.size + sum(map(len, parts))
    return b"".join([_header(scheme, kind, dim, key_id, total), *parts])


def _header(scheme: HeScheme, kind: int, dim: int, key_id: bytes, total: int) -> bytes:
    return _HEADER.pack(
        b"SSHE", _VERSION, SCHEMES.index(scheme.name), kind, scheme.clients, DEGREE, dim, scheme.count(dim), key_id, total
    )  # fmt: skip


def unpack_frame(scheme: HeScheme, kind: int, dim: int, key_id: bytes, frame: bytes) -> tuple[memoryview, ...]:
    """The ciphertexts of a frame, still unparsed, if its every byte is accounted for.

    Args:
        scheme, kind, dim, key_id: what the frame must be of; it is not asked.
        frame: as it came.

    Raises:
        RemoteProtocolError: SS-6014 for a frame over the cap, cut short, with bytes left over, of another scheme, size,
            kind, dimension or key, or with a ciphertext whose length or SEAL header cannot be.
    """
    if len(frame) > scheme.frame_bytes(dim, kind=kind):
        raise RemoteProtocolError("SS-6014", f"a frame of {len(frame)} bytes is over its cap", hint=_HINT)
    if bytes(frame[: _HEADER.size]) != _header(scheme, kind, dim, key_id, len(frame)):
        raise RemoteProtocolError("SS-6014", "a frame is of another scheme, dimension, key or length", hint=_HINT)
    blobs = tuple(_walk(memoryview(frame)[_HEADER.size :], scheme.count(dim)))
    least, most = scheme.blob_bytes(kind)
    for blob in blobs:
        if not least <= len(blob) <= most or _BLOB.unpack(blob[:16]) != (0xA15E, 16, 4, blob[4], 2, 0, len(blob)):
            raise RemoteProtocolError("SS-6014", "a frame holds what is no ciphertext of its kind", hint=_HINT)
    return blobs


def _walk(rest: memoryview, count: int) -> Iterator[memoryview]:
    for _ in range(count):
        if len(rest) < _LENGTH.size or len(rest) - _LENGTH.size < (size := _LENGTH.unpack(rest[:4])[0]):
            raise RemoteProtocolError("SS-6014", "a frame ends inside a ciphertext", hint=_HINT)
        yield rest[4 : 4 + size]
        rest = rest[4 + size :]
    if len(rest):
        raise RemoteProtocolError("SS-6014", "a frame has bytes left over", hint=_HINT)
