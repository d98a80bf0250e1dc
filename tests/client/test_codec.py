"""One step of a whole client under each codec: int8 is close to f32, both ways, and what leaves is what was paid for."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from securesplit.errors import SecureSplitError
from securesplit.protocol.codec import decode
from securesplit.protocol.messages import Backward, Forward, Gradient, Hidden
from securesplit.protocol.transcript import array_of
from tests.e2e.house import ANY, FROZEN, LAB, ROUND, WIDTH, batches_of, policy_of, sentences

CODECS = ("f32", "bf16", "int8")
ROW = {"f32": 4 * WIDTH, "bf16": 2 * WIDTH, "int8": WIDTH + 4}


def stepped(house, codec, privacy=LAB, ledger=None):
    """A client after one learning step: it, its spy, the loss, and the gradients of its adapters."""
    job = house.job().model_copy(update={"codec": codec})
    client, spy, _ = house.joined(job, policy_of(privacy), ledger=ledger)
    client.train("both" if privacy == LAB else "B")
    loss = client.step(batches_of(client, sentences(4, seed=1))[0])
    gradients = [p.grad.flatten() for p in client.parameters() if p.grad is not None]
    return client, spy, loss, torch.cat(gradients)


def crossing(spy):
    """Every tensor of rows that left or came, in order."""
    for message in (decode(data, ANY) for data in spy.sent + spy.received):
        if isinstance(message, Forward | Hidden):
            yield message.hidden
        elif isinstance(message, Backward | Gradient):
            yield message.gradient


def test_a_step_under_int8_is_a_step_under_f32_but_for_its_rounding(house):
    exact = stepped(house, "f32")
    for codec, loss_off, turn in (("bf16", 0.01, 0.999), ("int8", 0.05, 0.99)):
        _, _, loss, gradients = stepped(house, codec)
        assert loss != exact[2]
        assert abs(loss - exact[2]) < loss_off
        assert float(torch.cosine_similarity(gradients, exact[3], dim=0)) > turn


@pytest.mark.parametrize("codec", CODECS)
def test_every_tensor_both_ways_is_of_the_jobs_codec(house, codec):
    _, spy, _, _ = stepped(house, codec)
    found = list(crossing(spy))
    assert len(found) == 4  # Forward, Hidden, Backward, Gradient.
    for rows in found:
        assert rows.dtype == codec
        assert len(rows.data) == rows.shape[0] * ROW[codec]


def test_what_leaves_under_int8_is_in_the_ledger_and_noised(house, open_ledger):
    ledger = open_ledger()
    client, spy, _, _ = stepped(house, "int8", ROUND, ledger)
    sent = [m for m in (decode(data, ANY) for data in spy.sent) if isinstance(m, Forward | Backward)]
    lengths = sent[0].lengths
    for message, at in zip(sent, ("cut", "gradient"), strict=True):
        rows = message.hidden if isinstance(message, Forward) else message.gradient
        ends = np.cumsum(lengths) * ROW["int8"]
        for end, length in zip(ends.tolist(), lengths, strict=True):
            block = rows.data[end - length * ROW["int8"] : end]
            assert ledger.knows(hashlib.sha256(block).hexdigest()) is not None
        channel = client.gate.plan.channel(at)
        spread = array_of(rows).std()
        signal = channel.clip / np.sqrt(lengths[0] * WIDTH)
        assert spread == pytest.approx(np.hypot(channel.sigma, signal), rel=0.3)


def test_generation_extends_its_cache_under_int8(house, open_ledger):
    job = house.job().model_copy(update={"codec": "int8"})
    client, spy, _ = house.joined(job, policy_of(FROZEN), ledger=open_ledger())
    client.generate("w5 w6 w7", max_new_tokens=3)
    assert any(message.cache for message in spy.messages(Forward))
    assert {rows.dtype for rows in crossing(spy)} == {"int8"}


def test_nan_from_b_ends_the_session_with_the_same_code_under_every_codec(house, monkeypatch):
    for codec in CODECS:
        job = house.job().model_copy(update={"codec": codec})
        client, _, core = house.joined(job, policy_of())
        original = core._engine.forward
        monkeypatch.setattr(core._engine, "forward", lambda *a, _f=original, **o: [x * torch.nan for x in _f(*a, **o)])
        with pytest.raises(SecureSplitError) as caught:
            client.loss(batches_of(client, sentences(4, seed=1))[0])
        assert caught.value.code == "SS-4019"
        assert caught.value.exit_code == 5
