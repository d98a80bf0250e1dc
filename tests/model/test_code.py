"""A code as a value and as a file; and that no code, however hostile, moves what the gate promises."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from securesplit.errors import CheckFailed, InputError
from securesplit.model.code import CutCode, read_code, refuse_other_code, save_code
from securesplit.privacy.clip import clip_sequence, clip_tokens
from tests.model.test_coded import facts, narrow

HUGE = float(torch.finfo(torch.float32).max)
TINY = float(torch.finfo(torch.float32).tiny)


def header_of(path):
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def rewrite(path, header, body):
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + body)


@pytest.mark.parametrize("sentinel", [None, 5])
def test_round_trip(tmp_path, sentinel):
    code = narrow(sentinel=sentinel)
    save_code(code, tmp_path / "code.safetensors")
    again = read_code(tmp_path / "code.safetensors")
    assert again.facts == code.facts
    assert again.digest == code.digest
    assert [name for name, _ in again.tensors()] == [name for name, _ in code.tensors()]
    for (_, a), (_, b) in zip(again.tensors(), code.tensors(), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["code.safetensors"]


def test_the_digest_covers_every_fact_and_every_number():
    code = narrow(sentinel=5)
    digest = hashlib.sha256()
    text = json.dumps(code.facts.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()
    digest.update(struct.pack("<Q", len(text)) + text)
    for name in ("mean", "weight", "basis", "scale", "row", "mixed"):
        digest.update(name.encode() + np.asarray(getattr(code, name), dtype="<f4").tobytes())
    assert code.digest == digest.hexdigest()
    seen = {code.digest}
    for name, tensor in code.tensors():
        moved = tensor.clone()
        moved.view(-1)[-1] += 1e-3
        seen.add(CutCode(code.facts, **{**dict(code.tensors()), name: moved}).digest)
    for change in ({"sentinel": 6}, {"model": "2" * 64}, {"text": "2" * 64}, {"explained": 0.5}, {"whitened": True}):
        seen.add(CutCode(code.facts.model_copy(update=change), **dict(code.tensors())).digest)
    assert len(seen) == 1 + 6 + 5


def test_an_altered_file_is_refused(tmp_path):
    path = tmp_path / "code.safetensors"
    save_code(narrow(sentinel=5), path)
    header, body = header_of(path)
    good = path.read_bytes()
    for where in (0, len(body) // 2, len(body) - 3):
        altered = bytearray(body)
        altered[where] ^= 1
        rewrite(path, header, bytes(altered))
        with pytest.raises(CheckFailed, match="SS-1542"):
            read_code(path)
    facts_text = header["__metadata__"]["securesplit"]
    rewrite(
        path,
        {
            **header,
            "__metadata__": {**header["__metadata__"], "securesplit": facts_text.replace('"rows":10', '"rows":11')},
        },
        body,
    )
    with pytest.raises(CheckFailed, match="SS-1542"):
        read_code(path)
    path.write_bytes(good)
    assert read_code(path)


@pytest.mark.parametrize("change", ["extra fact", "no fact", "no digest", "no header", "not json", "NaN fact"])
def test_a_broken_header_is_refused(tmp_path, change):
    path = tmp_path / "code.safetensors"
    code = narrow()
    save_code(code, path)
    header, body = header_of(path)
    meta = header["__metadata__"]
    known = json.loads(meta["securesplit"])
    if change == "extra fact":
        meta["securesplit"] = json.dumps({**known, "epsilon": 1.0})
    elif change == "no fact":
        meta["securesplit"] = json.dumps({k: v for k, v in known.items() if k != "text"})
    elif change == "no digest":
        del meta["digest"]
    elif change == "no header":
        del header["__metadata__"]
    elif change == "not json":
        meta["securesplit"] = "{"
    else:
        meta["securesplit"] = meta["securesplit"].replace('"explained":1.0', '"explained":NaN')
    rewrite(path, header, body)
    with pytest.raises(InputError, match="SS-1416"):
        read_code(path)


def test_files_that_are_no_codes(tmp_path):
    code = narrow()
    meta = {"securesplit": code.facts.model_dump_json(), "digest": code.digest}
    (tmp_path / "text").write_text("hello")
    (tmp_path / "pickle").write_bytes(b"\x80\x04\x95")
    save_file({**dict(code.tensors()), "extra": torch.zeros(1)}, tmp_path / "extra", metadata=meta)
    save_file({"mean": code.mean}, tmp_path / "missing", metadata=meta)
    save_file({**dict(code.tensors()), "mean": code.mean.double()}, tmp_path / "double", metadata=meta)
    save_file({**dict(code.tensors()), "row": code.mean + 1, "mixed": code.mean - 1}, tmp_path / "first", metadata=meta)
    for name in ("absent", "text", "pickle", "extra", "missing", "double", "first"):
        with pytest.raises(InputError, match="SS-1416"):
            read_code(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean", torch.full((32,), torch.nan)),
        ("basis", torch.full((12, 32), torch.inf)),
        ("basis", torch.zeros(13, 32)),
        ("scale", torch.zeros(12)),
        ("scale", -torch.ones(12)),
        ("weight", torch.zeros(32)),
        ("weight", torch.ones(31)),
        ("row", None),
        ("mixed", torch.ones(33)),
    ],
)
def test_a_code_that_cannot_be_is_refused(name, value):
    good = dict(narrow(sentinel=5).tensors())
    with pytest.raises(InputError, match="SS-1416"):
        CutCode(facts(12, sentinel=5), **{**good, name: value})


def test_a_code_is_not_wider_than_the_model():
    ones = torch.ones(33)
    with pytest.raises(InputError, match="SS-1416"):
        CutCode(facts(33, sentinel=None), torch.ones(32), torch.ones(32), torch.ones(33, 32), ones)


def test_another_code_than_the_jobs_is_refused():
    code = narrow()
    wanted = {"digest": code.digest, "width": 12, "model": "0" * 64}
    refuse_other_code(code, **wanted)
    refuse_other_code(None, digest=None, width=None, model="0" * 64)
    for given_code, change in (
        (None, {}), (code, {"digest": None, "width": None}), (code, {"digest": "3" * 64}), (code, {"width": 13}),
        (code, {"model": "4" * 64}), (narrow(seed=2), {}),
    ):  # fmt: skip
        with pytest.raises(InputError, match="SS-1431") as caught:
            refuse_other_code(given_code, **{**wanted, **change})
        assert caught.value.exit_code == 2
        assert caught.value.hint


def hostile(scale_of_basis, scale_of_rest):
    g = torch.Generator().manual_seed(0)
    return CutCode(
        facts(7, sentinel=None),
        torch.full((32,), scale_of_rest),
        torch.full((32,), max(scale_of_rest, TINY)),
        (torch.rand(7, 32, generator=g) - 0.5) * scale_of_basis,
        torch.full((7,), TINY),
    )


@pytest.mark.parametrize("basis", [0.0, 1.0, 1e30, HUGE])
@pytest.mark.parametrize("rest", [TINY, 1.0, HUGE])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), size=st.sampled_from([0.0, 1e-30, 1.0, 1e30, HUGE]))
def test_no_code_moves_the_bound_on_what_is_released(basis, rest, seed, size):
    """Clipping comes after encoding: the exact norm stays within C, and codes are finite whatever the code."""
    hidden = (torch.rand(3, 4, 32, generator=torch.Generator().manual_seed(seed)) - 0.5) * size
    codes = hostile(basis, rest).encode(hidden)
    assert bool(torch.isfinite(codes).all()), "a client never stops because of what a text looks like in a code"
    for clipped in clip_sequence(codes, 4.0), clip_tokens(codes, 4.0):
        assert clipped.dtype == torch.float32
    for rows in clip_sequence(codes, 4.0):
        assert float(np.linalg.norm(rows.double().numpy())) <= 4.0
    for rows in clip_tokens(codes, 4.0).flatten(0, 1):
        assert float(np.linalg.norm(rows.double().numpy())) <= 4.0


def test_decoding_shrinks_towards_the_public_mean():
    code = narrow()
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    at_zero = code.decode(code.encode(hidden).float() * 0.0)
    torch.testing.assert_close(at_zero, code.mean.expand(5, -1))
    whole, half = (code.decode(code.encode(hidden).float() * g) for g in (1.0, 0.5))
    torch.testing.assert_close(half - code.mean, (whole - code.mean) / 2, rtol=1e-4, atol=1e-5)
    # Decoding is encoding's right inverse: what comes back encodes to the same numbers.
    codes = code.encode(hidden)
    torch.testing.assert_close(code.encode(code.decode(codes)), codes, rtol=1e-4, atol=1e-4)


def test_row_t_of_the_codes_depends_on_row_t_alone():
    code = narrow()
    hidden = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
    other = hidden.clone()
    other[0, 3] += 1.0
    moved = (code.encode(other) != code.encode(hidden)).any(-1)[0]
    assert moved.tolist() == [False, False, False, True, False, False]


def test_a_value_is_frozen():
    code = narrow()
    with pytest.raises(AttributeError):
        code.mean = torch.zeros(32)
    assert replace(code, mean=torch.zeros(32)).digest != code.digest
