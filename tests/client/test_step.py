"""One step over the wire against the unsplit model: the same numbers, exactly; and nothing but the gate's bytes left."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from securesplit.client.train import Trainer
from securesplit.errors import InputError, PolicyDenied
from securesplit.model.lora import adapter_layout, adapter_parameters, add_adapters, read_adapters, write_adapters
from securesplit.privacy.gate import Gate, Released
from securesplit.privacy.plan import plan_for
from securesplit.protocol.messages import Backward, Blob, Confirm, Forward, Hello
from securesplit.transport.memory import MemoryServer
from tests.e2e.house import FROZEN, LAB, ROUND, WIDTH, batches_of, build_model, policy_of, sentences


def whole_like(job):
    """The unsplit model with the job's adapters, by HF's own forward."""
    whole = build_model()
    layout = add_adapters(whole, job.adapters.rank, job.adapters.alpha, job.adapters.targets, seed=job.adapters.seed)
    return whole, layout


def spread(parts, layout):
    """Give all adapters values far from zero: LoRA's B starts at zero and would hide A's gradient."""
    flat = np.random.default_rng(4).normal(scale=0.2, size=layout.size).astype(np.float32)
    start = 0
    for part in parts:
        held = adapter_layout(part)
        write_adapters(part, held, flat[start : start + held.size])
        start += held.size
    return flat


def values(parts):
    return np.concatenate([read_adapters(part, adapter_layout(part)) for part in parts])


def optimisers(job, client, whole):
    """The client's own optimiser, and one with the same steps for the whole model's layers."""
    mine = torch.optim.AdamW(client.parameters(), lr=job.optimiser.client_lr, weight_decay=0.0)
    grouped = {"client": [], "server": []}
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            grouped["server" if ".layers.1." in name or ".layers.2." in name else "client"].append(parameter)
    theirs = torch.optim.AdamW(
        [
            {"params": grouped["client"], "lr": job.optimiser.client_lr},
            {"params": grouped["server"], "lr": job.optimiser.server_lr},
        ],
        weight_decay=0.0,
    )
    return mine, theirs


def test_loss_and_every_lora_gradient_equal_the_unsplit_models(house):
    client, _, core = house.joined(house.job(), policy_of())
    middle = core._engine.middle
    whole, layout = whole_like(client.job)
    spread((whole,), layout)
    parts = (client.front, middle, client.back)
    spread(parts, layout)
    assert np.array_equal(values(parts), values((whole,)))
    client.train("both")
    kept = []
    core._engine.learner._descent._optimiser.register_step_pre_hook(
        lambda *_: kept.extend(p.grad for p in adapter_parameters(middle))
    )
    for batch in batches_of(client, sentences(5, seed=1)):
        spread(parts, layout)  # B learns at once; the comparison is at the same point.
        kept.clear()
        for parameter in (*client.parameters(), *adapter_parameters(whole)):
            parameter.grad = None
        mine = client.step(batch)
        loss = whole(batch.tokens, labels=batch.labels).loss
        loss.backward()
        assert mine == loss.item()
        gradients = [
            *(p.grad for p in adapter_parameters(client.front)),
            *kept,
            *(p.grad for p in adapter_parameters(client.back)),
        ]
        expected = [p.grad for p in adapter_parameters(whole)]
        assert len(gradients) == len(expected) == len(layout.tensors) == 4 * 3 * 2
        for got, want in zip(gradients, expected, strict=True):
            assert got.shape == want.shape
            assert torch.equal(got, want)
            assert want.abs().sum() > 0


def test_parameters_after_several_steps_equal_the_unsplit_models(house):
    """A and C by the client's AdamW, B by the server's; evaluation in between changes nothing."""
    client, _, core = house.joined(house.job(), policy_of())
    whole, layout = whole_like(client.job)
    parts = (client.front, core._engine.middle, client.back)
    client.train("both")
    mine, theirs = optimisers(client.job, client, whole)
    batches = batches_of(client, sentences(7, seed=2))
    for _ in range(2):
        for batch in batches:
            client.step(batch)
            whole(batch.tokens, labels=batch.labels).loss.backward()
            for optimiser in (mine, theirs):
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            with torch.no_grad():
                assert client.loss(batches[0]) == whole(batches[0].tokens, labels=batches[0].labels).loss.item()
    assert np.array_equal(values(parts), values((whole,)))
    start, _ = whole_like(client.job)
    assert np.count_nonzero(values((whole,)) != values((start,))) > 0.9 * layout.size


def test_with_one_factor_learning_the_other_stands_still(house):
    client, _, _ = house.joined(house.job(), policy_of())
    batch = batches_of(client, sentences(3, seed=2))[0]
    for factor, other in (("B", "A"), ("A", "B")):
        client.train(factor)
        before = client.read(other)
        optimiser = torch.optim.AdamW(client.parameters(), lr=0.01)
        moved = client.read(factor)
        client.step(batch)
        optimiser.step()
        assert np.array_equal(client.read(other), before)
        assert not np.array_equal(client.read(factor), moved)
    client.reset()
    assert np.count_nonzero(client.read("B")) == 0


@pytest.fixture
def released(monkeypatch) -> list[Released]:
    """Everything that any gate returned, in order."""
    out: list[Released] = []
    original = Gate.release

    def spy(self, *args, **options):
        out.append(original(self, *args, **options))
        return out[-1]

    monkeypatch.setattr(Gate, "release", spy)
    return out


@pytest.mark.parametrize("privacy", [LAB, FROZEN, ROUND], ids=["open", "frozen", "round"])
def test_every_tensor_byte_that_leaves_was_returned_by_the_gate(house, open_ledger, released, privacy):
    policy = policy_of(privacy)
    ledger = None if policy.unsafe else open_ledger()
    client, spy, _ = house.joined(house.job(), policy, ledger=ledger)
    client.train("B")
    batches = batches_of(client, sentences(6, seed=4))
    for batch in batches:
        client.step(batch)
        client.evaluate((batch,))
    if privacy != ROUND:
        client.generate("w9 w8 w7", max_new_tokens=4)
    left: list[Blob] = []
    for message in spy.messages():
        blobs = [v for v in (getattr(message, name) for name in type(message).model_fields) if isinstance(v, Blob)]
        assert blobs == ([] if not isinstance(message, Forward | Backward) else blobs[:1])
        left += blobs
        # What is not a tensor is numbers and digests; no field could carry text.
        others = message.model_dump(exclude={"hidden", "gradient", "gain"})
        assert isinstance(message, Hello | Confirm) or all(
            isinstance(n, int) for v in others.values() for n in (v if isinstance(v, tuple) else (v,))
        )
    payloads = {r.payload for r in released}
    assert len(left) >= len(batches)
    for blob in left:
        assert blob.data in payloads
    if privacy != FROZEN:
        # Nothing is remembered by the middle there: what left is what the gate returned, one for one and in order.
        assert [b.data for b in left] == [r.payload for r in released]
    else:
        assert not spy.messages(Backward)
    for message in spy.messages(Forward):
        # The one number that is not an integer follows from the policy and the shape alone: C / sqrt(C^2 + n sigma^2).
        n = message.lengths[0] * WIDTH
        channel = None if policy.unsafe else plan_for(policy.privacy).channel("decode" if n == WIDTH else "cut")
        want = 1.0 if channel is None else channel.clip / math.sqrt(channel.clip**2 + n * channel.sigma**2)
        assert message.gain == pytest.approx(want, rel=1e-12)
    if not policy.unsafe:
        clear = {client.front(b.tokens).detach().float().numpy().tobytes() for b in batches}
        assert not clear & payloads


def test_a_released_tensor_cannot_be_forged():
    with pytest.raises(TypeError, match=r"Gate\.release"):
        Released(payload=b"", shape=(1, 1, 1), codec="f32", gain=1.0, graph=torch.zeros(1, 1, 1), mint=object())


def test_another_model_or_a_job_that_the_policy_forbids_is_refused(house):
    core = house.core(house.job(blind=False), policy_of())
    server = MemoryServer(core)
    link, spy = house.link(server, policy_of())
    link._session.welcome = link._session.welcome.model_copy(update={"model": "0" * 64})
    with pytest.raises(InputError, match="SS-1430"):
        house.client(link, policy_of())
    sent = len(spy.sent)
    with pytest.raises(PolicyDenied, match="SS-2001") as caught:
        house.link(server, policy_of(FROZEN, min_front=2, max_sequences=1))
    assert len(caught.value.details) == 3, "front, batch and blind, all at once"
    assert len(spy.sent) == sent


def test_the_round_regime_wants_each_record_once_per_round(house, open_ledger):
    client, _, _ = house.joined(house.job(epochs=2), policy_of(ROUND), ledger=open_ledger())
    client.train("B")
    trainer = Trainer(client, batches_of(client, sentences(2, seed=1)), (), answers=None, progress=lambda *_: None)
    with pytest.raises(Exception, match="SS-4110"):
        trainer._record_gradients(0)
