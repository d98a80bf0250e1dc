"""Between torch tensors and the wire's blobs. The protocol itself knows no torch."""

from __future__ import annotations

import torch
from torch import Tensor

from securesplit.errors import LocalProtocolError
from securesplit.privacy.mechanism import encode
from securesplit.privacy.released import Codec
from securesplit.protocol import int8
from securesplit.protocol.messages import Blob

_TORCH = {"f32": torch.float32, "bf16": torch.bfloat16}


def tensor_of(blob: Blob) -> Tensor:
    """A blob's values, of its shape and type; float32 under ``int8``. Copies, so that the message may be forgotten."""
    if blob.dtype == "int8":
        return torch.from_numpy(int8.values(blob.data, blob.shape))
    return (
        torch.frombuffer(bytearray(blob.data), dtype=_TORCH[blob.dtype]).reshape(blob.shape)
        if blob.data
        else torch.zeros(blob.shape)
    )


def blob_of(tensor: Tensor, dtype: Codec) -> Blob:
    """A tensor (rows, columns) as a blob of the given type.

    For what the server computed. On a client only the gate turns tensors into bytes.

    Raises:
        LocalProtocolError: SS-4019 for NaN or infinity under ``int8``, which has neither. The client is told the code that
            it would have come to by itself.
    """
    wire = tensor.detach().to("cpu", torch.float32)
    if dtype == "int8" and not bool(torch.isfinite(wire).all()):
        raise LocalProtocolError("SS-4019", "B computed NaN or infinity", hint="Lower the server's learning rate.")
    return Blob(dtype=dtype, shape=tuple(wire.shape), data=encode(wire.numpy(), dtype))
