"""What two hostile readers found, held by tests: signals by stopping, mixed policies, poisoned answers, foreign adapters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from securesplit.aggregate.answered import AnswerLog
from securesplit.client import decoding
from securesplit.client.run import _restore
from securesplit.client.train import Trainer
from securesplit.errors import BudgetExhausted, InputError, PolicyDenied, RemoteProtocolError
from securesplit.model.export import collect_adapters, save_part_adapters
from securesplit.model.lora import adapter_layout, read_adapters
from securesplit.privacy.ledger import Charge
from securesplit.privacy.plan import plan_for
from securesplit.protocol.messages import Forward
from tests.e2e.house import FROZEN, batches_of, policy_of, sentences

OTHER = FROZEN.replace("clip = 4.0", "clip = 5.0")


@pytest.mark.parametrize("ends_after", [0, 1, 9])
def test_the_number_of_messages_does_not_tell_where_the_text_ended(house, open_ledger, monkeypatch, ends_after):
    ledger = open_ledger()
    client, spy, _ = house.joined(house.job(), policy_of(FROZEN), ledger=ledger)
    stop, made = client.tokenizer.eos_token_id, []

    def choose(*_):
        made.append(stop if len(made) == ends_after else 5)
        return made[-1]

    monkeypatch.setattr(decoding, "choose", choose)
    generated = client.generate("w4 w5", max_new_tokens=4)
    assert len(spy.messages(Forward)) == 4
    assert len(generated.tokens) == min(ends_after, 4)
    assert {s.channel: s.releases for s in ledger.summary()} == {"cut": 1, "decode": 3}


def test_two_policies_do_not_meet_in_one_sum(house, open_ledger):
    job = house.job()
    mine, _, _ = house.joined(job, policy_of(FROZEN), ledger=open_ledger())
    theirs, _, _ = house.joined(job, policy_of(OTHER), ledger=open_ledger())
    again, _, _ = house.joined(job, policy_of(FROZEN), ledger=open_ledger())
    assert mine.frozen_digest(0, "B") == again.frozen_digest(0, "B")
    assert mine.frozen_digest(0, "B") != theirs.frozen_digest(0, "B")


def test_in_frozen_the_server_reads_no_digest_of_what_was_learnt(house, open_ledger):
    client, _, _ = house.joined(house.job(), policy_of(FROZEN), ledger=open_ledger())
    before = client.frozen_digest(1, "A")
    client.write(client.read() + np.float32(0.5))
    assert client.frozen_digest(1, "A") == before


def test_an_answer_with_nan_is_refused_before_anything_private_meets_it(house, open_ledger):
    client, spy, core = house.joined(house.job(), policy_of(FROZEN), ledger=open_ledger())
    with torch.no_grad():
        next(core._engine.middle.parameters()).fill_(float("nan"))
    with pytest.raises(RemoteProtocolError, match="SS-4019"):
        client.loss(batches_of(client, sentences(1, seed=1))[0])
    assert len(spy.messages(Forward)) == 1


def test_adapters_of_another_policy_or_model_do_not_generate(house, open_ledger, tmp_path):
    client, _, _ = house.joined(house.job(), policy_of(FROZEN), ledger=open_ledger())
    for model, policy, error, code in (
        (client.link.model, policy_of(OTHER).digest, PolicyDenied, "SS-2013"),
        (client.link.model, "", PolicyDenied, "SS-2013"),
        ("0" * 64, client.policy.digest, InputError, "SS-1430"),
    ):
        save_part_adapters(
            collect_adapters(client.back, model=model, policy=policy), tmp_path / "adapter-back.safetensors"
        )
        with pytest.raises(error, match=code):
            _restore(client, tmp_path)
    good = collect_adapters(client.back, model=client.link.model, policy=client.policy.digest)
    save_part_adapters(good, tmp_path / "adapter-back.safetensors")
    _restore(client, tmp_path)


def test_a_front_of_another_run_is_not_restored_in_frozen(house, open_ledger, tmp_path):
    client, _, _ = house.joined(house.job(), policy_of(FROZEN), ledger=open_ledger())
    facts = {"model": client.link.model, "policy": client.policy.digest}
    save_part_adapters(collect_adapters(client.back, **facts), tmp_path / "adapter-back.safetensors")
    (tmp_path / "adapter-front.safetensors").write_bytes(b"whatever a run without noise left here")
    before = read_adapters(client.front, adapter_layout(client.front))
    _restore(client, tmp_path)
    assert np.array_equal(read_adapters(client.front, adapter_layout(client.front)), before)


def test_adapters_that_learnt_under_a_budget_do_not_generate_without_noise(house, open_ledger, tmp_path):
    private, _, _ = house.joined(house.job(), policy_of(FROZEN), ledger=open_ledger())
    saved = collect_adapters(private.back, model=private.link.model, policy=private.policy.digest)
    save_part_adapters(saved, tmp_path / "adapter-back.safetensors")
    unsafe, spy, _ = house.joined(house.job(), policy_of())
    with pytest.raises(PolicyDenied, match="SS-2013"):
        _restore(unsafe, tmp_path)
    assert spy.messages(Forward) == []


def test_a_run_that_cannot_pay_the_peers_reserve_sends_nothing(house, open_ledger, tmp_path):
    ledger = open_ledger()
    client, spy, _ = house.joined(house.job(), policy_of(FROZEN), ledger=ledger)
    plan = plan_for(client.policy.privacy)
    spent = Charge("*", "cut", plan.budget - 1, 1.0, 1.0, client.policy.digest)
    ledger.charge([spent], budget=plan.budget, caps=[1])
    batches = batches_of(client, sentences(2, seed=3))
    log = AnswerLog(tmp_path / "answered")
    with pytest.raises(BudgetExhausted, match="SS-5001"):
        Trainer(client, batches, batches, answers=log, progress=lambda *_: None).run()
    log.close()
    assert spy.messages(Forward) == []
