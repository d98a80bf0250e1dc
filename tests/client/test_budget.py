"""The frozen regime, generation and the budget: what is sent, how often, at what price, and when nothing is sent."""

from __future__ import annotations

import pytest
import torch

from securesplit.client.sampling import Sampling
from securesplit.errors import BudgetExhausted, InputError, PolicyDenied
from securesplit.model.lora import add_adapters, write_adapters
from securesplit.privacy.plan import plan_for
from securesplit.protocol.messages import Backward, DropCache, Forward
from tests.client.test_step import spread, whole_like
from tests.e2e.house import FROZEN, SILENT, batches_of, build_model, policy_of, sentences

TEXTS = sentences(7, seed=5)
EPOCHS = 3
OTHER = FROZEN.replace("clip = 4.0", "clip = 5.0")


def run_epochs(client, texts=TEXTS, epochs=EPOCHS):
    batches = batches_of(client, texts)
    client.train("B")
    optimiser = torch.optim.AdamW(client.parameters(), lr=0.01)
    for _ in range(epochs):
        for batch in batches:
            client.step(batch)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    return batches


def rows_of(messages):
    """Each sequence's bytes."""
    out = []
    for message in messages:
        start = 0
        for length in message.lengths:
            size = 4 * length * message.hidden.shape[1]
            out.append(message.hidden.data[start : start + size])
            start += size
    return out


def charged(ledger):
    return {entry.channel: entry.releases for entry in ledger.summary()}


def test_frozen_each_record_crosses_once_and_costs_once_and_no_gradient_ever_does(house, open_ledger):
    policy = policy_of(FROZEN)
    ledger = open_ledger()
    client, spy, core = house.joined(house.job(), policy, ledger=ledger)
    before = client.read(), [p.clone() for p in core._engine.middle.parameters()]
    batches = run_epochs(client)
    client.evaluate(batches)
    assert len(spy.messages(Forward)) == len(batches) < EPOCHS * len(batches)
    assert len(rows_of(spy.messages(Forward))) == len(TEXTS)
    assert all(not message.learn for message in spy.messages(Forward))
    assert spy.messages(Backward) == []
    assert charged(ledger) == {"cut": len(TEXTS)}
    channel = plan_for(policy.privacy).cut
    assert ledger.mu() == pytest.approx(channel.mu)
    assert all(ledger.mu(record) == pytest.approx(channel.mu) for b in batches for record in b.records)
    # C alone has learnt.
    assert not (client.read() == before[0]).all()
    assert all(torch.equal(a, b) for a, b in zip(core._engine.middle.parameters(), before[1], strict=True))
    assert not any(p.requires_grad for p in client.front.parameters())


def test_after_a_restart_the_same_bytes_go_out_and_nothing_is_charged(house, open_ledger):
    policy, seen = policy_of(FROZEN), []
    for _ in range(2):
        ledger = open_ledger()
        client, spy, _ = house.joined(house.job(), policy, ledger=ledger)
        run_epochs(client, epochs=1)
        seen.append((rows_of(spy.messages(Forward)), ledger.head(), ledger.mu()))
        ledger.close()
    assert seen[0] == seen[1]
    assert len(set(seen[0][0])) == len(TEXTS)


def test_generation_is_charged_to_the_prompt_once_and_to_all_records_for_each_token(house, open_ledger):
    policy = policy_of(FROZEN)
    plan = plan_for(policy.privacy)
    ledger = open_ledger()
    client, spy, core = house.joined(house.job(), policy, ledger=ledger)
    client.tokenizer.eos_token = None  # Under noise any token may come; the lengths below are to be exact.
    made = client.generate("w4 w5 w6", max_new_tokens=4)
    assert len(made.tokens) == 4
    forwards = spy.messages(Forward)
    assert [m.lengths for m in forwards] == [(4,), *[(1,)] * (len(made.tokens) - 1)], "the bucket, then tokens"
    assert {m.cache for m in forwards} == {1}
    assert spy.messages(DropCache) == [DropCache(cache=1)]
    assert core._engine.caches.kept == {}
    assert charged(ledger) == {"cut": 1, "decode": len(made.tokens) - 1}
    prompt, stranger = ledger.key(b"w4 w5 w6"), ledger.key(b"never seen")
    everyone = (len(made.tokens) - 1) * plan.decode.units
    assert ledger.mu(stranger) == pytest.approx((everyone / 2**40) ** 0.5)
    assert ledger.mu(prompt) == pytest.approx(((everyone + plan.cut.units) / 2**40) ** 0.5)
    assert 0 < made.epsilon <= 8.0
    # The same prompt again: its rows are resent and cost nothing, new tokens are paid again.
    again = client.generate("w4 w5 w6", max_new_tokens=1)
    assert charged(ledger) == {"cut": 1, "decode": len(made.tokens) - 1}
    assert spy.messages(Forward)[-1].hidden == forwards[0].hidden
    assert len(again.tokens) == 1


def refused(spy, ledger, kind, code, call):
    """Nothing is sent and nothing is paid; the error names why."""
    sent, head = list(spy.sent), ledger.head()
    with pytest.raises(kind, match=code) as caught:
        call()
    assert spy.sent == sent
    assert ledger.head() == head
    return caught.value


def test_a_policy_without_generation_refuses_before_anything_is_sent(house, open_ledger):
    ledger = open_ledger()
    client, spy, _ = house.joined(house.job(), policy_of(SILENT), ledger=ledger)
    error = refused(spy, ledger, PolicyDenied, "SS-2010", lambda: client.generate("w4 w5", max_new_tokens=2))
    assert error.exit_code == 3


def test_a_generation_that_cannot_be_paid_to_its_end_sends_nothing(house, open_ledger):
    ledger = open_ledger()
    client, spy, _ = house.joined(house.job(), policy_of(FROZEN), ledger=ledger)
    error = refused(spy, ledger, BudgetExhausted, "SS-500", lambda: client.generate("w4 w5", max_new_tokens=10))
    assert error.exit_code == 6
    client.tokenizer.eos_token = None
    assert len(client.generate("w4 w5", max_new_tokens=9).tokens) == 9
    refused(spy, ledger, BudgetExhausted, "SS-500", lambda: client.generate("w4 w5", max_new_tokens=2))


def test_one_release_serves_every_job_on_the_same_frozen_layers(house, open_ledger):
    ledger, policy, seen = open_ledger(), policy_of(FROZEN), []
    for name in ("tiny", "another"):
        client, spy, _ = house.joined(house.job(name=name, rounds=len(name)), policy, ledger=ledger)
        run_epochs(client, TEXTS[:3], epochs=1)
        seen.append((rows_of(spy.messages(Forward)), ledger.head()))
    assert seen[0] == seen[1]


def test_a_record_whose_budget_is_spent_is_not_sent_again_under_another_policy(house, open_ledger):
    """Another clip is another release; each record's budget is its own."""
    ledger = open_ledger()
    first, _, _ = house.joined(house.job(), policy_of(FROZEN), ledger=ledger)
    run_epochs(first, TEXTS[:3], epochs=1)
    second, spy, _ = house.joined(house.job(), policy_of(OTHER), ledger=ledger)
    assert [type(m).__name__ for m in spy.messages()] == ["Hello", "Confirm"]
    for spent in TEXTS[:3]:
        error = refused(spy, ledger, BudgetExhausted, "SS-500", lambda text=spent: run_epochs(second, [text], epochs=1))
        assert error.exit_code == 6
    run_epochs(second, TEXTS[4:], epochs=1)
    assert len(rows_of(spy.messages(Forward))) == 3


def test_a_batch_with_one_exhausted_record_is_not_sent_at_all(house, open_ledger):
    ledger = open_ledger()
    first, _, _ = house.joined(house.job(), policy_of(FROZEN, buckets=[16]), ledger=ledger)
    run_epochs(first, TEXTS[:1], epochs=1)
    second, spy, _ = house.joined(house.job(), policy_of(OTHER, buckets=[16]), ledger=ledger)
    refused(spy, ledger, BudgetExhausted, "SS-500", lambda: run_epochs(second, TEXTS[:4], epochs=1))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_generation_equals_the_whole_model(house, seed):
    client, _, core = house.joined(house.job(), policy_of())
    whole, layout = whole_like(client.job)
    spread((whole,), layout)
    spread((client.front, core._engine.middle, client.back), layout)
    prompt = sentences(1, seed=20 + seed)[0]
    ids = torch.tensor([client.tokenizer.encode(prompt)])
    want = whole.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=1
    )[0, ids.shape[1] :].tolist()
    made = client.generate(prompt, max_new_tokens=12)
    assert list(made.tokens) == [t for t in want if t != 1]
    assert made.epsilon is None
    assert made.text == client.tokenizer.decode(want, skip_special_tokens=True)
    plain = build_model()
    add_adapters(plain, 2, 4.0, client.job.adapters.targets, seed=7)
    write_adapters(plain, layout, layout_zeros(layout))
    assert want != plain.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()


def layout_zeros(layout):
    import numpy as np

    return np.zeros(layout.size, dtype=np.float32)


def test_sampling_is_repeatable_and_bad_requests_are_refused(house):
    client, spy, _ = house.joined(house.job(), policy_of())
    hot = [client.generate("w4 w5", max_new_tokens=8, sampling=Sampling(2.0, seed)).tokens for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    sent = len(spy.sent)
    for call in (
        lambda: Sampling(-1.0),
        lambda: Sampling(float("nan")),
        lambda: client.generate("", max_new_tokens=3),
        lambda: client.generate("w4", max_new_tokens=0),
    ):
        with pytest.raises(InputError, match="SS-144"):
            call()
    assert len(spy.sent) == sent


def test_generation_leaves_the_adapters_alone(house, open_ledger):
    client, _, _ = house.joined(house.job(), policy_of(FROZEN), ledger=open_ledger())
    before = client.read()
    client.generate("w4 w5 w6", max_new_tokens=3)
    assert (client.read() == before).all()
