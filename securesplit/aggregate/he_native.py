"""The process that works on ciphertexts, and the only one that loads TenSEAL: ``python -m securesplit.aggregate.he_native FD``.

SEAL parses bytes that a hostile party made. Here that happens in a process of its own without anybody's keys but those of
the request, without core dumps, and with bounded memory and files; he_worker.py starts it, waits for it and does without
it when it dies. TenSEAL's binding of SEAL reads and writes files only; those are anonymous ones in memory.

What this does not protect: the process runs as the user and may do what the user may; it is a wall against crashes and
exhausted memory, no sandbox.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from securesplit.aggregate.he import (
    CLIENT,
    DEGREE,
    SCHEMES,
    SUM,
    HeScheme,
    key_id_of,
    pack_frame,
    ternary,
    unpack_frame,
)
from securesplit.aggregate.he_pipe import (
    ADD,
    ADD_PLAIN,
    DECRYPT,
    DROP,
    ENCRYPT,
    FINISH,
    HELLO,
    MALFORMED,
    MEMORY,
    MISSING,
    OK,
    SCHEME,
    WRONG,
    receive,
    send,
)
from securesplit.errors import SecureSplitError

__all__: list[str] = []

_MAX_FILE = 4 << 20  # A ciphertext takes 64 KiB; a decompressor that writes more than this has been fooled.

Signed = npt.NDArray[np.int64]


class _Wrong(Exception):
    """A decrypted sum that cannot be."""


class _Malformed(Exception):
    """Bytes that are no ciphertext of the scheme."""


class _Seal:
    """SEAL set up for one scheme: words to ciphertexts and back, one ciphertext of N words at a time."""

    def __init__(self, scheme: HeScheme) -> None:
        from tenseal import sealapi

        self.api: Any = sealapi
        self.scheme, self.bfv = scheme, scheme.name == "bfv"
        kind = sealapi.SCHEME_TYPE.BFV if self.bfv else sealapi.SCHEME_TYPE.CKKS
        self.context = self._context(kind, scheme.plain_modulus if self.bfv else 0)
        self.encoder = sealapi.BatchEncoder(self.context) if self.bfv else sealapi.CKKSEncoder(self.context)
        self.adder = sealapi.Evaluator(self.context)
        self.level = self.context.first_parms_id()
        self.scale = 1.0 if self.bfv else float(scheme.scale)
        self._file = os.memfd_create("securesplit", os.MFD_CLOEXEC)
        self._path = f"/proc/self/fd/{self._file}"

    def _context(self, kind: object, plain: int) -> Any:
        parameters = self.api.EncryptionParameters(kind)
        parameters.set_poly_modulus_degree(DEGREE)
        parameters.set_coeff_modulus([self.api.Modulus(self.scheme.modulus)])
        if plain:
            parameters.set_plain_modulus(plain)
        context = self.api.SEALContext(parameters, True, self.api.SEC_LEVEL_TYPE.TC256)  # noqa: FBT003 - SEAL's argument
        assert context.parameters_set(), "SEAL accepts every scheme that HeScheme lets be built, at 256 bits"
        return context

    def write(self, thing: Any) -> bytes:
        os.ftruncate(self._file, 0)
        thing.save(self._path)
        return os.pread(self._file, os.fstat(self._file).st_size, 0)

    def read(self, thing: Any, data: bytes | memoryview) -> Any:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, data, 0)
        thing.load(self.context, self._path)
        return thing

    def ciphertext(self, blob: memoryview) -> Any:
        """Parse untrusted bytes; SEAL checks the parameters and that every coefficient is below q."""
        try:
            found = self.read(self.api.Ciphertext(), blob)
            fits = (
                found.size() == 2
                and found.parms_id() == self.level
                and found.is_ntt_form() is not self.bfv
                and found.scale == self.scale
                and not found.is_transparent()
            )
        except (ValueError, RuntimeError, IndexError, OverflowError, TypeError):
            fits = False
        if not fits:
            raise _Malformed
        return found

    def encode(self, words: Signed) -> Any:
        """(N,) integers of 32 bits, signed."""
        plain = self.api.Plaintext()
        if self.bfv:
            self.encoder.encode(words.tolist(), plain)
        else:
            self.encoder.encode(words.astype(np.float64).view(np.complex128).tolist(), self.level, self.scale, plain)
        return plain

    def decode(self, plain: Any) -> tuple[Signed, bool]:
        """(N,) integers, and whether they can be a sum: near to integers and not too large."""
        if self.bfv:
            integers = np.array(self.encoder.decode_int64(plain), dtype=np.int64)
            near = True
        else:
            values = np.array(self.encoder.decode_complex(plain), dtype=np.complex128).view(np.float64)
            # What no sum can be is brought into int64 first; NaN, which no rounding would show, becomes too large.
            values = np.clip(np.nan_to_num(values, nan=2.0**60), -(2.0**60), 2.0**60)
            integers = np.rint(values).astype(np.int64)
            near = bool(np.abs(values - integers).max() < 0.25)
        return integers, near and bool(np.abs(integers).max() <= self.scheme.largest)

    def secret(self, secret: bytes) -> Any:
        """SEAL's form of a secret: the values of the ternary polynomial at the roots of unity mod q."""
        polynomial, plain = ternary(self.scheme, secret), self.api.Plaintext()
        if self.bfv:
            t = self.scheme.plain_modulus
            terms = [f"{int(a) % t:X}x^{j}" for j, a in reversed(list(enumerate(polynomial))) if a]
            self.adder.transform_to_ntt(self.api.Plaintext(" + ".join(terms)), self.context.key_parms_id(), plain)
        else:
            # CKKS encodes by values at complex roots: slot k holds that at zeta^(3^k), zeta = exp(i pi / N). At scale 1 the
            # encoder rounds back to the very coefficients.
            twisted = polynomial * np.exp(1j * np.pi * np.arange(DEGREE) / DEGREE)
            odd = np.fft.ifft(twisted) * DEGREE  # odd[m] is the value at zeta^(2 m + 1).
            order = [(pow(3, k, 2 * DEGREE) - 1) // 2 for k in range(DEGREE // 2)]
            self.encoder.encode(odd[order].tolist(), self.level, 1.0, plain)
        return self.read(self.api.SecretKey(), self.write(plain))


@lru_cache(maxsize=4)
def _seal(scheme: HeScheme) -> _Seal:
    return _Seal(scheme)


def _blocks(words: bytes) -> list[Signed]:
    """Ring words (d,), little-endian, as signed integers in blocks of N, the last one filled up with zeros."""
    signed = np.frombuffer(words, dtype="<i4").astype(np.int64)
    return list(np.concatenate([signed, np.zeros(-signed.size % DEGREE, np.int64)]).reshape(-1, DEGREE))


class _Sums:
    """The running sums: one ciphertext for every N words of each, whatever the number of clients."""

    def __init__(self) -> None:
        self._open: dict[bytes, tuple[_Seal, int, bytes, list[Any]]] = {}

    def begin(self, scheme: HeScheme, dim: int, key_id: bytes, handle: bytes) -> None:
        self._open[handle] = (_seal(scheme), dim, key_id, [])

    def add(self, handle: bytes, frame: bytes) -> None:
        seal, dim, key_id, total = self._open[handle]
        # All are parsed before one is added: a frame that is bad at its end leaves the sum as it was.
        blobs = unpack_frame(seal.scheme, CLIENT, dim, key_id, frame)
        found = [seal.ciphertext(blob) for blob in blobs]
        if not total:
            total.extend(found)
            return
        for mine, theirs in zip(total, found, strict=True):
            seal.adder.add_inplace(mine, theirs)

    def add_plain(self, handle: bytes, words: bytes) -> None:
        seal, _, _, total = self._open[handle]
        for mine, block in zip(total, _blocks(words), strict=True):
            seal.adder.add_plain_inplace(mine, seal.encode(block))

    def finish(self, handle: bytes) -> bytes:
        seal, dim, key_id, total = self._open.pop(handle)
        return pack_frame(seal.scheme, SUM, dim, key_id, [seal.write(one) for one in total])

    def drop(self, handle: bytes) -> None:
        self._open.pop(handle, None)


def _encrypt(scheme: HeScheme, dim: int, secret: bytes, words: bytes) -> bytes:
    seal = _seal(scheme)
    encryptor = seal.api.Encryptor(seal.context, seal.secret(secret))
    # The form that is only for saving holds the seed of its uniform polynomial in place of the polynomial.
    blobs = [seal.write(encryptor.encrypt_symmetric(seal.encode(block))) for block in _blocks(words)]
    return pack_frame(scheme, CLIENT, dim, key_id_of(scheme, secret), blobs)


def _decrypt(scheme: HeScheme, dim: int, secret: bytes, frame: bytes, *, strict: bool) -> bytes:
    seal, plain, out = _seal(scheme), None, list[Signed]()
    decryptor = seal.api.Decryptor(seal.context, seal.secret(secret))
    possible = True
    for blob in unpack_frame(scheme, SUM, dim, key_id_of(scheme, secret), frame):
        plain = seal.api.Plaintext()
        decryptor.decrypt(seal.ciphertext(blob), plain)
        integers, fine = seal.decode(plain)
        possible &= fine
        out.append(integers)
    words = np.concatenate(out)
    # What fills the last block up is zero in every client's words and in the plain ones.
    if strict and not (possible and not words[dim:].any()):
        raise _Wrong
    return words[:dim].astype("<u4").tobytes()  # int64 to uint32 keeps the low 32 bits.


def _serve_one(sums: _Sums, code: int, parts: Sequence[bytes]) -> bytes:
    if code == HELLO:
        from tenseal import sealapi

        return b"" if sealapi else b"?"
    if code in (ADD, ADD_PLAIN):
        (sums.add if code == ADD else sums.add_plain)(parts[0], parts[1])
        return b""
    if code == FINISH:
        return sums.finish(parts[0])
    if code == DROP:
        sums.drop(parts[0])
        return b""
    number, clients, dim = SCHEME.unpack(parts[0])
    scheme = HeScheme(SCHEMES[number], clients)
    if code == ENCRYPT:
        return _encrypt(scheme, dim, parts[1], parts[2])
    if code == DECRYPT:
        return _decrypt(scheme, dim, parts[1], parts[2], strict=parts[3] == b"strict")
    sums.begin(scheme, dim, parts[1], parts[2])
    return b""


def main() -> None:
    """Answer requests until the other end is gone."""
    link, memory = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    for limit, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, _MAX_FILE),
    ):
        resource.setrlimit(limit, (most, most))
    sums = _Sums()
    while True:
        try:
            code, parts = receive(link, memory)
        except (EOFError, OSError):
            return
        status, answer = OK, b""
        try:
            answer = _serve_one(sums, code, parts)
        except ImportError:
            status = MISSING
        except MemoryError:
            status = MEMORY
        except _Wrong:
            status = WRONG
        except (_Malformed, SecureSplitError):
            status = MALFORMED
        del parts
        send(link, status, [answer])


if __name__ == "__main__":
    main()
