"""Samples of any law on the integers, by inversion of a 256-bit cumulative table, from ChaCha20 under a fresh key.

A uniform 256-bit number u gives the value ``first + #{k: edge_k <= u}``. Almost always its top 16 bits decide already
(a lookup); else the top 64 (a binary search); else, with probability below 2^-40 in a block, all 256. The bits that are
not needed are never drawn, which changes nothing about the result's law.

What the sampler's time and memory show, to one who measures them. The number of undecided draws per block is a function
of random bits alone, never of data, and they are searched in a batch of fixed size; but it is a weak function of the
values drawn, and collecting them takes time that grows with it by some nanoseconds each. The lookups and searches touch
addresses that depend on the value, so one who shares the processor's caches and watches every access could learn the
noise. Against the server, which sees when a whole message arrives, neither is measurable; against a co-tenant of the
client's machine this file protects nothing.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

BITS = 256
_COARSE, _HIGH = 16, 64
_CELLS = 1 << _COARSE
_UNDECIDED = -(1 << 31)
_SIGN = np.uint64(1 << 63)

Ints = npt.NDArray[np.int32]
Part = Literal[0, 1, 2]  # Which bits of the draws a stream holds: the top 16, the next 48, the last 192.


def fresh_key() -> bytes:
    """32 bytes from the operating system, for one call."""
    return os.urandom(32)


def stream(key: bytes, block: int, part: Part, length: int) -> bytes:
    """The ``length`` bytes of ChaCha20 that one part of one block's draws is made from.

    Each (block, part) has its own nonce, so that blocks may be made in any order and by any thread.
    """
    nonce = bytes(8) + (block * 4 + part).to_bytes(8, "little")
    return Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update(bytes(length))


def _flipped(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Unsigned words as signed ones of the same order, because torch has no unsigned comparison."""
    return (words ^ _SIGN).view(np.int64)


@dataclass(frozen=True, slots=True)
class Table:
    """The cumulative table of a law on ``first, first + 1, ...``. Make one with :meth:`of`.

    Attributes:
        first: the smallest value that is drawn.
        edges: not decreasing; ``edges[k] = 2^256 P(X <= first + k)``, rounded to the nearest integer, where between 0 and 2^256.
        coarse: (65536,) int32, the value that these top 16 bits decide, or a sentinel.
        high: (len(edges),) int64, the edges' top 64 bits, the sign flipped.
        undecided: the fraction of draws that 16 bits do not decide.
    """

    first: int
    edges: tuple[int, ...] = field(repr=False)
    coarse: Ints = field(repr=False)
    high: npt.NDArray[np.int64] = field(repr=False)
    undecided: float

    @classmethod
    def of(cls, first: int, weights: Sequence[int]) -> Table:
        """The table of ``P(X = first + k) = weights[k] / sum(weights)``.

        Args:
            first: the smallest value.
            weights: not negative; exact integers, so that the only error is the rounding of the edges.

        Raises:
            ValueError: for a law that has one value only.
        """
        total, running, edges = sum(weights), 0, []
        for weight in weights:
            running += weight
            edges.append((2 * (running << BITS) + total) // (2 * total))
        first += edges.count(0)  # Values at either end whose probability rounds to zero are never drawn.
        edges = [edge for edge in edges if 0 < edge < 1 << BITS]
        if not edges:
            raise ValueError("a law with one value only is no noise")
        shift = BITS - _COARSE
        whole = np.array([-(-edge >> shift) for edge in edges], dtype=np.int64)  # The first cell that is all above it.
        coarse = (first + np.searchsorted(whole, np.arange(_CELLS), side="right")).astype(np.int32)
        split = sorted({edge >> shift for edge in edges if edge & ((1 << shift) - 1)})
        coarse[split] = _UNDECIDED
        high = _flipped(np.array([edge >> (BITS - _HIGH) for edge in edges], dtype=np.uint64))
        for fixed in (coarse, high):
            fixed.setflags(write=False)
        return cls(first=first, edges=tuple(edges), coarse=coarse, high=high, undecided=len(split) / _CELLS)

    def batch(self, count: int) -> int:
        """How many draws are searched when ``count`` are made: more than are ever undecided, but for 2^-100."""
        mean = count * self.undecided
        return min(count, int(mean + 12 * mean**0.5) + 64)

    def block(self, key: bytes, index: int, count: int) -> Ints:
        """Block ``index`` of the samples under a key.

        Returns:
            (count,) int32, independent samples.
        """
        top = np.frombuffer(stream(key, index, 0, 2 * count), dtype="<u2")
        values: Ints = self.coarse.take(top)
        open_ = np.flatnonzero(values == _UNDECIDED)
        step = self.batch(count)
        words = self._fine(key, index, len(open_), step)
        for start in range(0, len(words), step):
            at = open_[start : start + step]
            padded = np.zeros(step, dtype=np.uint64)
            padded[: len(at)] = top[at]
            wanted = _flipped((padded << np.uint64(48)) | words[start : start + step])
            found = np.searchsorted(self.high, wanted, side="left")
            tied = self.high.take(found, mode="clip") == wanted
            values[at] = (self.first + found[: len(at)]).astype(np.int32)
            for i in np.flatnonzero(tied[: len(at)]):
                values[at[i]] = self._exact(key, index, start + int(i), int(wanted[i]))
        return values

    def block_on(self, device: torch.device, key: bytes, index: int, count: int) -> Tensor:
        """The same samples as :meth:`block`, looked up and searched on ``device``; only key stream is carried there.

        Returns:
            (count,) int32 on the device.
        """
        sent = torch.frombuffer(bytearray(stream(key, index, 0, 2 * count)), dtype=torch.int16).to(device)
        top = sent.to(torch.int32) & (_CELLS - 1)
        coarse, high = (torch.from_numpy(fixed.copy()).to(device) for fixed in (self.coarse, self.high))
        values = coarse.index_select(0, top)
        open_ = (values == _UNDECIDED).nonzero().squeeze(1)
        words = torch.from_numpy(_flipped(self._fine(key, index, len(open_), self.batch(count)))[: len(open_)])
        wanted = words.to(device) ^ (top.index_select(0, open_).to(torch.int64) << 48)
        found = torch.searchsorted(high, wanted)
        values[open_] = (self.first + found).to(torch.int32)
        tied = (high.index_select(0, found.clamp_max(len(high) - 1)) == wanted).nonzero().squeeze(1)
        for i in tied.tolist():
            values[open_[i]] = self._exact(key, index, i, int(wanted[i]))
        return values

    def _fine(self, key: bytes, index: int, count: int, step: int) -> npt.NDArray[np.uint64]:
        """48 random bits for each undecided draw, whole batches of them, at least one."""
        batches = max(1, -(-count // step)) if step else 0
        return np.frombuffer(stream(key, index, 1, 8 * batches * step), dtype="<u8") >> np.uint64(_COARSE)

    def _exact(self, key: bytes, index: int, draw: int, wanted: int) -> int:
        """The value of an undecided draw whose top 64 bits are those of an edge, by all 256."""
        width = (BITS - _HIGH) // 8
        rest = int.from_bytes(stream(key, index, 2, width * (draw + 1))[-width:], "little")
        top = (wanted + (1 << 63)) << (BITS - _HIGH)
        return self.first + bisect_right(self.edges, top | rest)
