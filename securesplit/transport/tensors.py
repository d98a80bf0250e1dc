"""Between torch tensors and the wire's blobs. The protocol itself knows no torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from securesplit.protocol.messages import Blob

_TORCH = {"f32": torch.float32, "bf16": torch.bfloat16}


def tensor_of(blob: Blob) -> Tensor:
    """A blob's values, of its shape and type. Copies, so that the message may be forgotten."""
    return (
        torch.frombuffer(bytearray(blob.data), dtype=_TORCH[blob.dtype]).reshape(blob.shape)
        if blob.data
        else torch.zeros(blob.shape)
    )


def blob_of(tensor: Tensor, dtype: str) -> Blob:
    """A tensor as a blob of the given type.

    For what the server computed. On a client only the gate turns tensors into bytes.
    """
    wire = tensor.detach().to("cpu", _TORCH[dtype]).contiguous()
    words = wire.view(torch.int16 if dtype == "bf16" else torch.int32).numpy()
    return Blob.model_validate(
        {"dtype": dtype, "shape": tuple(wire.shape), "data": np.ascontiguousarray(words).tobytes()}
    )
