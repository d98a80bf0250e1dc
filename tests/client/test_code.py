"""A whole site and its server joined by a code: what crosses, how wide it is, what comes back, and who is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from securesplit.client.client import Client
from securesplit.errors import InputError, RemoteProtocolError
from securesplit.model.code import Clips, CodeFacts, CutCode
from securesplit.model.lora import Layout, adapter_layout, write_adapters
from securesplit.model.store import load_back, load_front, load_middle, load_tokenizer
from securesplit.privacy.plan import plan_for
from securesplit.protocol.codec import decode
from securesplit.protocol.messages import Backward, Blob, Forward, Gradient, Hidden
from securesplit.server.build import build_core
from securesplit.transport.memory import MemoryServer
from tests.client.test_step import spread, whole_like
from tests.e2e.house import ANY, FROZEN, ROUND, WIDTH, batches_of, policy_of, sentences

K, SENTINEL = 6, 1


def code_of(house, width=K, *, sentinel=SENTINEL):
    """A random code for the house's model; with k = D the identity around a mean."""
    g = torch.Generator().manual_seed(3)
    row = mixed = None
    if sentinel is not None:
        with torch.no_grad():
            row = load_front(house.model)(torch.tensor([[sentinel]]))[0, 0].float()
            mixed = load_middle(house.model)(row[None, None])[0, 0].float()
    facts = CodeFacts(
        model=house.digest, front=1, back=1, hidden=WIDTH, width=width, sentinel=sentinel, whitened=False, text="1" * 64,
        rows=1, explained=1.0, clips=Clips(rows=48, sequence=(1.0, 1.0, 1.0), row=(1.0, 1.0, 1.0)),
    )  # fmt: skip
    square = torch.eye(WIDTH) if width == WIDTH else torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g)).Q
    return CutCode(
        facts,
        torch.randn(WIDTH, generator=g),
        torch.ones(WIDTH),
        square[:width].contiguous(),
        torch.ones(width),
        row,
        mixed,
    )


def job_with(house, code):
    raw = house.job().model_dump(mode="json", exclude_none=True)
    if code is not None:
        raw["code"] = {"digest": code.digest, "width": code.width}
    return type(house.job()).model_validate(raw)


def joined(house, policy, code, *, ledger=None):
    """One client and its server in memory, each with a copy of the code."""
    core = build_core(job_with(house, code), policy, load_middle(house.model), house.digest, code)
    link, spy = house.link(MemoryServer(core), policy)
    client = Client(
        load_front(house.model), load_back(house.model), load_tokenizer(house.model), model=house.digest, policy=policy,
        link=link, ledger=ledger, code=code,
    )  # fmt: skip
    return client, spy, core


def test_through_the_wire_the_loss_is_the_unsplit_models_behind_the_sentinel(house):
    client, _, core = joined(house, policy_of(), code_of(house, WIDTH))
    whole, layout = whole_like(client.job)
    # Only C's adapters have learnt, as in regime frozen: then the sentinel's rows are the public model's.
    held = adapter_layout(client.back)
    values = np.zeros(layout.size, dtype=np.float32)  # Zeros switch the other adapters off, in the whole model too.
    values[-held.size :] = np.random.default_rng(4).normal(scale=0.2, size=held.size)
    write_adapters(client.back, held, values[-held.size :])
    write_adapters(whole, layout, values)
    for batch in batches_of(client, sentences(5, seed=1)):
        first = torch.full_like(batch.tokens[:, :1], SENTINEL)
        with torch.no_grad():
            logits = whole(torch.cat([first, batch.tokens], 1)).logits[:, 1:-1]
            without = float(whole(batch.tokens, labels=batch.labels).loss)
        scored = batch.labels[:, 1:]
        want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), scored.flatten(), ignore_index=-100)
        assert client.loss(batch) == pytest.approx(float(want), rel=1e-4)
        assert client.loss(batch) != pytest.approx(without, rel=1e-3)
    assert core._engine.code is client.code


def test_greedy_generation_is_the_unsplit_models_behind_the_sentinel(house):
    client, spy, core = joined(house, policy_of(), code_of(house, WIDTH))
    whole, _ = whole_like(client.job)
    prompt = sentences(1, seed=21)[0]
    ids = torch.tensor([[SENTINEL, *client.tokenizer.encode(prompt)]])
    want = whole.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=1
    )[0, ids.shape[1] :].tolist()
    made = client.generate(prompt, max_new_tokens=12)
    assert list(made.tokens) == [t for t in want if t != 1]
    assert [m.lengths for m in spy.messages(Forward)][:2] == [(ids.shape[1] - 1,), (1,)], "the sentinel is never sent"
    assert core._engine.caches.kept == {}
    others = [prompt, "w4 w5", "w6 w7 w8"]
    alone = [client.generate(p, max_new_tokens=12).tokens for p in others]
    assert [m.tokens for m in client.generate_batch(others, max_new_tokens=12)] == alone, "the same of several lengths"


def width_of(spy):
    """Columns by kind of message, both ways."""
    found = {}
    for data in (*spy.sent, *spy.received):
        message = decode(data, ANY)
        for name in type(message).model_fields:
            blob = getattr(message, name)
            if isinstance(blob, Blob) and len(blob.shape) == 2:
                found.setdefault(type(message), set()).add(blob.shape[1])
    return found


@pytest.mark.parametrize("sentinel", [None, SENTINEL])
def test_a_learning_step_sends_k_columns_up_and_gets_k_back(house, sentinel):
    client, spy, core = joined(house, policy_of(), code_of(house, sentinel=sentinel))
    plain, before, _ = house.joined(house.job(), policy_of())
    for one in (client, plain):
        held = Layout((*adapter_layout(one.front).tensors, *adapter_layout(one.back).tensors))
        spread((one.front, one.back), held)
        one.train("A")
    batch = batches_of(client, sentences(3, seed=2))[0]
    assert client.step(batch) > 0
    plain.step(batch)
    assert width_of(spy) == {Forward: {K}, Hidden: {WIDTH}, Backward: {WIDTH}, Gradient: {K}}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in client.parameters())
    rows = batch.tokens.numel()
    up, plain_up = (len(s.messages(Forward)[0].hidden.data) for s in (spy, before))
    assert (up, plain_up) == (4 * rows * K, 4 * rows * WIDTH)
    assert core._caps.code_width == K


def test_the_gradient_that_reaches_a_is_that_of_one_graph(house):
    """A, encoder, decoder, B and C in one autograd graph, without wire, gate or engine."""
    code = code_of(house)
    client, _, core = joined(house, policy_of(), code)
    middle = core._engine.middle
    spread((client.front, middle, client.back), whole_like(client.job)[1])
    client.train("A")
    batch = batches_of(client, sentences(4, seed=2))[0]
    ids = torch.cat([torch.full_like(batch.tokens[:, :1], SENTINEL), batch.tokens], 1)
    hidden = client.front(ids)[:, 1:]
    rows = ((hidden - code.mean) @ code.basis.T) @ code.basis + code.mean
    count = len(ids)
    mixed = middle(torch.cat([code.row.expand(count, 1, -1), rows], 1))[:, 1:]
    logits = client.back(torch.cat([code.mixed.expand(count, 1, -1), mixed], 1))[:, 1:-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100)
    want = torch.autograd.grad(loss, client.parameters())
    assert client.step(batch) == pytest.approx(float(loss.detach()), rel=1e-5)
    for parameter, expected in zip(client.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)


def test_under_a_private_policy_the_noise_is_on_the_codes(house, open_ledger):
    policy, ledger = policy_of(FROZEN), open_ledger()
    client, spy, _ = joined(house, policy, code_of(house), ledger=ledger)
    client.train("B")
    for batch in batches_of(client, sentences(4, seed=2)):
        client.step(batch)
    channel = plan_for(policy.privacy).cut
    for message in spy.messages(Forward):
        n = message.lengths[0] * K
        assert message.gain == pytest.approx(channel.clip / (channel.clip**2 + n * channel.sigma**2) ** 0.5, rel=1e-6)
    assert ledger.mu() == pytest.approx(channel.mu)


def test_another_code_is_another_release_and_no_code_is_another_still(house, open_ledger):
    """What is remembered for one code is never resent under another: it would be decoded to something else."""
    versions = set()
    for code in (None, code_of(house), code_of(house, sentinel=None)):
        ledger = open_ledger()
        client, _, _ = joined(house, policy_of(FROZEN), code, ledger=ledger)
        versions.add(client.gate.version)
        ledger.close()
    assert len(versions) == 3


def test_generation_under_a_private_policy(house, open_ledger):
    client, spy, _ = joined(house, policy_of(FROZEN), code_of(house), ledger=open_ledger())
    client.tokenizer.eos_token = None
    assert len(client.generate("w4 w5 w6", max_new_tokens=3).tokens) == 3
    assert [m.lengths for m in spy.messages(Forward)] == [(4,), (1,), (1,)]
    assert {m.hidden.shape[1] for m in spy.messages(Forward)} == {K}


def test_regime_round_runs_with_a_code(house, open_ledger):
    client, spy, _ = joined(house, policy_of(ROUND), code_of(house), ledger=open_ledger())
    client.train("B")
    assert client.step(batches_of(client, sentences(2, seed=2))[0]) > 0
    assert width_of(spy) == {Forward: {K}, Hidden: {WIDTH}, Backward: {WIDTH}, Gradient: {K}}


def test_whoever_has_another_code_is_refused_before_any_row_is_sent(house):
    code, policy = code_of(house), policy_of()
    other = code_of(house, sentinel=None)
    for theirs, mine in ((code, None), (None, code), (code, other), (code, code_of(house, K + 1))):
        core = build_core(job_with(house, theirs), policy, load_middle(house.model), house.digest, theirs)
        link, spy = house.link(MemoryServer(core), policy)
        with pytest.raises(InputError, match="SS-1431"):
            Client(
                load_front(house.model), load_back(house.model), None, model=house.digest, policy=policy, link=link,
                ledger=None, code=mine,
            )  # fmt: skip
        assert spy.messages(Forward) == []
    for named, held in ((code, None), (None, code), (code, other)):
        with pytest.raises(InputError, match="SS-1431"):
            build_core(job_with(house, named), policy, load_middle(house.model), house.digest, held)


def test_rows_of_another_width_end_the_session(house):
    client, _, _ = joined(house, policy_of(), code_of(house))
    wide = Blob(dtype="f32", shape=(4, WIDTH), data=bytes(4 * 4 * WIDTH))
    client.link.tell(Forward(step=0, lengths=(4,), learn=False, hidden=wide))
    with pytest.raises(RemoteProtocolError, match="SS-4005"):
        client.link.next()
