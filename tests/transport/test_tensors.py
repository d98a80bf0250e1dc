"""Tensors to blobs and back: what each codec keeps of a number, and what int8 cannot say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import LocalProtocolError
from securesplit.protocol.transcript import array_of
from securesplit.transport.tensors import blob_of, tensor_of


@given(seed=st.integers(0, 2**32), rows=st.integers(0, 5), width=st.integers(1, 40), size=st.integers(-100, 100))
@settings(max_examples=60, deadline=None)
def test_int8_is_off_by_half_a_scale_at_most(seed, rows, width, size):
    tensor = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    blob = blob_of(tensor, "int8")
    back = tensor_of(blob)
    assert back.dtype == torch.float32
    assert back.shape == tensor.shape
    scale = tensor.abs().amax(dim=1, keepdim=True).double() / 127
    assert bool(((back.double() - tensor.double()).abs() <= scale * (0.5 + 2**-15)).all())
    assert np.array_equal(array_of(blob), back.numpy())  # The reader of transcripts reads the same.
    back += 1  # A tensor of the caller's own.
    assert np.array_equal(array_of(blob), tensor_of(blob).numpy())


@pytest.mark.parametrize(
    ("dtype", "codec"), [(torch.float32, "f32"), (torch.bfloat16, "bf16"), (torch.bfloat16, "f32")]
)
def test_f32_and_bf16_keep_what_they_can_hold(dtype, codec):
    tensor = torch.randn(4, 6, requires_grad=True).to(dtype).T
    back = tensor_of(blob_of(tensor, codec))
    assert torch.equal(back.float(), tensor.float())
    assert tensor_of(blob_of(torch.zeros(0, 3), codec)).shape == (0, 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_int8_cannot_say_is_told_by_the_code_that_the_client_would_give(value):
    tensor = torch.zeros(3, 2)
    tensor[1, 1] = value
    assert not bool(tensor_of(blob_of(tensor, "f32")).isfinite().all())
    with pytest.raises(LocalProtocolError) as caught:
        blob_of(tensor, "int8")
    assert caught.value.code == "SS-4019"
