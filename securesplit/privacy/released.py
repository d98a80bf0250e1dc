"""What may leave a client, as types. Only a gate can make one: the mint is imported by securesplit/privacy/gate.py alone.

Senders take these and no tensors, so that a second way out of a client would not type-check and does not run.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["Codec", "Released", "ReleasedUpdate", "Responded"]

_MINT = object()

Codec = Literal["f32", "bf16", "int8"]


@dataclass(frozen=True, slots=True)
class Released:
    """Rows that may leave. Only a gate can make one.

    Attributes:
        payload: bytes of type ``codec``, little-endian, C order, shape (B, T, D); under ``int8`` each row is a float32
            scale and D signed bytes.
        shape: (B, T, D).
        codec: ``f32``, ``bf16`` or ``int8``.
        gain: public factor for B's input; see :meth:`securesplit.privacy.plan.ChannelPlan.gain`.
        graph: the clipped tensor with its autograd graph. It stays on the client; B's gradient is sent back into it.
    """

    payload: bytes = field(repr=False)
    shape: tuple[int, int, int]
    codec: Codec
    gain: float
    graph: Tensor = field(repr=False)
    mint: InitVar[object]  # Not kept, so that no instance lends it to a forgery or to dataclasses.replace.

    def __post_init__(self, mint: object) -> None:
        if mint is not _MINT:
            raise TypeError("Released is made by Gate.release and by nothing else")


@dataclass(frozen=True, slots=True)
class ReleasedUpdate:
    """An adapter update that may enter a secure sum. Only a gate can make one.

    Attributes:
        vector: (d,) float64.
        noised: whether DP noise of this client's own is in it. Without it the update is protected by the masks alone:
            from the server entirely in blind mode, from the other clients only as far as a sum of all hides one part.
        honest: how many honest clients a sum must hold for its noise to be enough; 1 where the noise is all this client's
            own, or where there is none.
        step: with ``honest`` above 1, the lattice step that the ring of the sum must have; every coordinate of ``vector`` is
            a multiple of it. Else 0.
    """

    vector: npt.NDArray[np.float64] = field(repr=False)
    noised: bool
    mint: InitVar[object]
    honest: int = 1
    step: float = 0.0

    def __post_init__(self, mint: object) -> None:
        if mint is not _MINT:
            raise TypeError("ReleasedUpdate is made by Gate.release_update and by nothing else")


@dataclass(frozen=True, slots=True)
class ReleasedCommon:
    """What all clients hold alike where a round begins, fit to be sealed for another client of the roster. Only a gate makes one.

    Attributes:
        payload: the values, float32, little-endian; empty where their digest alone may leave.
    """

    payload: bytes = field(repr=False)
    mint: InitVar[object]

    def __post_init__(self, mint: object) -> None:
        if mint is not _MINT:
            raise TypeError("ReleasedCommon is made by Gate.release_common and by nothing else")


@dataclass(frozen=True, slots=True)
class Responded:
    """Class labels after randomised response: what a loss may use where the policy releases labels instead of gradients.

    Attributes:
        labels: (B,) int64 in 0..K-1, noised; safe to show.
        records: whose they are.
        policy: digest of the policy under which they were answered.
    """

    labels: Tensor = field(repr=False)
    records: tuple[str, ...]
    policy: str
    mint: InitVar[object]

    def __post_init__(self, mint: object) -> None:
        if mint is not _MINT:
            raise TypeError("Responded is made by Gate.respond and by nothing else")
