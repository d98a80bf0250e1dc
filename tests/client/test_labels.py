"""Classification: under a policy of labels C learns from answers, and what leaves is made from them and from nothing else.

The oracle for a gradient is torch's own cross-entropy on what a spy saw the server send.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import torch
from torch.nn import functional

import securesplit.client.train as train_module
from securesplit.aggregate.fixedpoint import Aggregate, quantise
from securesplit.client.rounds import Opened
from securesplit.client.step import step
from securesplit.client.train import Trainer
from securesplit.errors import PolicyDenied
from securesplit.privacy.gate import Gate
from securesplit.protocol.codec import decode
from securesplit.protocol.messages import Backward, Forward, Hidden
from securesplit.transport.memory import MemoryServer
from tests.client.test_code import SENTINEL, code_of, joined
from tests.e2e.house import ANY, FROZEN, LAB, ROUND, WORDS, batches_of, policy_of, sentences
from tests.e2e.ward import NAMES, batches, labels_policy, records, with_task

LABELS = {regime: labels_policy(regime, activations=9, updates=9) for regime in ("round", "step")}
FOUND = records(5, seed=3)
TOKENS = [WORDS.index(name) for name in NAMES]


@pytest.fixture
def site(house):
    """One client and its server in memory, with a task, and the batches of ``FOUND``."""

    def make(privacy, ledger=None, *, found=FOUND, buckets=(4,), **schedule):
        policy = policy_of(privacy, buckets=list(buckets))
        job = with_task(house.job(blind=not policy.unsafe), **{"epochs": 1, **schedule})
        client, spy, _ = house.joined(job, policy, ledger=ledger)
        client.link.folder = house.folder("alice")
        training, held_out = batches(client, found)
        client.train("B")
        return client, spy, training, held_out

    return make


@pytest.fixture
def answers(monkeypatch):
    """Every second answer is the other class. No production path has this."""
    flips = cycle((0, 1))
    monkeypatch.setattr("securesplit.privacy.gate.respond", lambda label, classes, _: (label + next(flips)) % classes)


@pytest.fixture
def given(monkeypatch):
    """All answers that any gate gave, in order."""
    seen, respond = [], Gate.respond

    def spy(self, *args, **options):
        seen.append(respond(self, *args, **options))
        return seen[-1]

    monkeypatch.setattr(Gate, "respond", spy)
    return seen


@pytest.fixture
def alone(monkeypatch):
    """Sums of one client's update alone."""

    def one(link, folder, policy, update, **_):
        scale = 1 << 40  # Fine enough that what comes back is what was given, for the digits that are looked at.
        words, _ = quantise(update.vector, 1, scale=scale, clip=64.0, w_max=1, bits=64)
        return Opened(Aggregate(words, (link.name,), scale, 64.0), b"", words)

    monkeypatch.setattr(train_module, "secure_sum", one)


def hidden_of(spy):
    """B's output in the last answer, (N, D)."""
    last = [m for m in (decode(data, ANY) for data in spy.received) if isinstance(m, Hidden)][-1]
    return torch.frombuffer(bytearray(last.hidden.data), dtype=torch.float32).reshape(last.hidden.shape)


def clean_gradient(client, spy, classes):
    """d/d(B's output) of the sum of cross-entropies behind the last word of each text, (N, D)."""
    mixed = hidden_of(spy).reshape(len(classes), -1, 32).requires_grad_()
    behind = client.back(mixed)[:, -2]
    loss = functional.cross_entropy(behind, torch.tensor(TOKENS)[classes], reduction="sum")
    return torch.autograd.grad(loss, mixed)[0].flatten(0, 1)


def sent_gradient(spy):
    (message,) = spy.messages(Backward)
    return torch.frombuffer(bytearray(message.gradient.data), dtype=torch.float32).reshape(message.gradient.shape)


def counted(ledger):
    return {spent.channel: spent.releases for spent in ledger.summary()}


@pytest.mark.parametrize("regime", LABELS)
@pytest.mark.usefixtures("answers")
def test_the_gradient_that_leaves_is_of_the_answers(site, open_ledger, given, regime):
    ledger = open_ledger()
    client, spy, (batch,), _ = site(LABELS[regime], ledger)
    loss = client.step(batch)
    (responded,) = given
    assert responded.labels.tolist() == [(c + i % 2) % 2 for i, c in enumerate(batch.classes.tolist())]
    sent = sent_gradient(spy)
    assert torch.allclose(sent, clean_gradient(client, spy, responded.labels), rtol=1e-5, atol=1e-7)
    true = clean_gradient(client, spy, batch.classes)
    differs = (sent - true).reshape(4, -1).abs().amax(1) > 1e-3
    assert differs.tolist() == [bool(i % 2) for i in range(4)], "exactly where the answer is another class"
    # The loss that is reported, here on this site, is of the answers too.
    logits = client.back(hidden_of(spy).reshape(4, -1, 32))[:, -2].detach()
    want = functional.cross_entropy(logits, torch.tensor(TOKENS)[responded.labels])
    assert loss == pytest.approx(want.item(), rel=1e-5)
    assert counted(ledger) == {"cut": 4, "labels": 4}


def traffic(spy):
    return [
        (type(m).__name__, (m.hidden if isinstance(m, Forward) else m.gradient).data)
        for m in spy.messages()
        if isinstance(m, Forward | Backward)
    ]


@pytest.mark.parametrize("regime", LABELS)
def test_with_the_answers_kept_another_truth_changes_no_bit_of_the_traffic(site, open_ledger, given, regime):
    ledger, seen = open_ledger(), []
    for turn in (False, True):
        client, spy, (batch,), _ = site(LABELS[regime], ledger)
        client.step(batch.with_classes(1 - batch.classes) if turn else batch)
        seen.append(traffic(spy))
    assert [name for name, _ in seen[0]] == ["Forward", "Backward"]
    assert seen[0] == seen[1]
    assert torch.equal(given[0].labels, given[1].labels)
    assert counted(ledger) == {"cut": 4, "labels": 4}


def test_texts_of_any_length_and_any_class_go_out_in_one_shape_and_the_class_is_no_token(site, open_ledger):
    """The naive ways: a label behind the text, at a place that tells its length, or among the tokens that A sees."""
    found = records(9, seed=4, longest=6)
    assert len({len(record.text.split()) for record in found}) >= 4
    client, spy, training, _ = site(LABELS["round"], open_ledger(), found=found, buckets=(8,))
    seen = []
    forward = client.front.forward
    client.front.forward = lambda tokens, *rest, **named: seen.append(tokens) or forward(tokens, *rest, **named)
    for batch in training:
        client.step(batch)
    for tokens in seen:
        assert not set(tokens.flatten().tolist()) & set(TOKENS)
    for message in spy.messages(Forward):
        assert message.lengths == (8,) * len(message.lengths)
    # Only one place of a row has a loss of its own: the same in every row, whatever the text's length.
    losses = torch.cat([batch.labels for batch in training]) != -100
    assert losses.sum(0).tolist() == [0] * 7 + [8]


@pytest.mark.usefixtures("alone")
def test_over_several_epochs_and_rounds_each_record_answers_once(site, open_ledger, given):
    ledger = open_ledger()
    client, spy, training, held_out = site(LABELS["step"], ledger, epochs=3, rounds=2)
    Trainer(client, training, held_out, answers=None, progress=lambda *_: None).run()
    assert counted(ledger) == {"cut": 4 * 6 + 3, "labels": 4, "update": 4 * 6}
    assert len(given) == 6
    assert all(torch.equal(one.labels, given[0].labels) for one in given)
    assert len(spy.messages(Backward)) == 6
    (record,) = held_out[0].records
    assert record not in {e.record for e in ledger.entries() if e.channel == "labels"}, "what never leaves is not asked"
    ledger.verify()


@pytest.mark.usefixtures("answers")
def test_loss_and_accuracy_of_held_out_records_are_of_the_truth(site, open_ledger, given):
    ledger = open_ledger()
    client, spy, (batch,), _ = site(LABELS["round"], ledger)
    client.train(None)
    loss = client.loss(batch)
    behind = client.back(hidden_of(spy).reshape(4, -1, 32))[:, -2].detach()
    want = functional.cross_entropy(behind, torch.tensor(TOKENS)[batch.classes])
    assert loss == pytest.approx(want.item(), rel=1e-5)
    right = [int(row[TOKENS[1]] > row[TOKENS[0]]) == int(c) for row, c in zip(behind, batch.classes, strict=True)]
    head = ledger.head()
    assert client.accuracy((batch,)) == sum(right) / 4
    assert client.evaluate((batch,)) == pytest.approx(loss, rel=1e-6)
    assert ledger.head() == head, "the same bytes again, free"
    first, *again = [m.hidden.data for m in spy.messages(Forward)]
    assert all(data == first for data in again)
    assert given == []
    assert spy.messages(Backward) == []


def test_accuracy_is_of_what_follows_the_text_and_not_of_what_follows_the_last_token(site):
    client, spy, training, _ = site(LAB, found=records(13, seed=6))
    named, behind_all = [], []
    for single in (single for batch in training for single in batch.singles()):
        named.append(client.accuracy((single,)))
        logits = client.back(hidden_of(spy)[None])[0, :, TOKENS].argmax(1) == single.classes
        behind_all.append([float(right) for right in logits])
    assert named == [rows[-2] for rows in behind_all]
    assert named != [rows[-1] for rows in behind_all], "the test would see nothing otherwise"
    assert client.accuracy(training) == pytest.approx(np.mean(named))


def test_without_classes_there_is_no_accuracy(house):
    client, spy, _ = house.joined(house.job(), policy_of())
    assert client.accuracy(batches_of(client, sentences(2, seed=1))) is None
    assert spy.messages(Forward) == []


# Other policies. --------------------------------------------------------------------------------------------------


def test_with_noised_gradients_a_task_works_and_nobody_is_asked(site, open_ledger, given):
    ledger = open_ledger()
    client, spy, (batch,), _ = site(ROUND, ledger)
    client.step(batch)
    assert counted(ledger) == {"cut": 4, "gradient": 4}
    assert given == []
    assert not torch.allclose(sent_gradient(spy), clean_gradient(client, spy, batch.classes), atol=1e-2)


def test_without_protection_the_gradient_is_of_the_truth(site, given):
    client, spy, (batch,), _ = site(LAB)
    client.step(batch)
    want = clean_gradient(client, spy, batch.classes) / 4
    assert torch.allclose(sent_gradient(spy), want, rtol=1e-5, atol=1e-7)
    assert given == []


def test_in_frozen_a_corrected_label_costs_nothing(site, open_ledger):
    ledger = open_ledger()
    for labels in (NAMES, NAMES[::-1]):
        found = tuple(replace(r, label=labels[NAMES.index(r.label)]) for r in FOUND)
        client, _, (batch,), _ = site(FROZEN, ledger, found=found)
        client.step(batch)
    assert counted(ledger) == {"cut": 4}


@pytest.mark.parametrize("sentinel", [SENTINEL, None])
def test_behind_a_code_the_answers_are_learnt_from_at_the_same_place(house, open_ledger, monkeypatch, given, sentinel):
    job = house.job
    monkeypatch.setattr(type(house), "job", lambda _, **options: with_task(job(**options), epochs=1))
    ledger = open_ledger()
    client, spy, _ = joined(
        house, policy_of(LABELS["round"], buckets=[4]), code_of(house, sentinel=sentinel), ledger=ledger
    )
    (batch,), _ = batches(client, FOUND)
    client.train("B")
    loss = client.step(batch)
    logits = client.coded_back(hidden_of(spy).reshape(4, -1, 32))[:, -2].detach()
    want = functional.cross_entropy(logits, torch.tensor(TOKENS)[given[0].labels])
    assert loss == pytest.approx(want.item(), rel=1e-5)
    right = int((logits[:, TOKENS].argmax(1) == batch.classes).sum())
    assert client.accuracy((batch,)) == right / 4


# What cannot be done. ---------------------------------------------------------------------------------------------


def nothing_leaves(spy, ledger, call, error, code):
    sent, head = list(spy.sent), ledger.head()
    with pytest.raises(error, match=code):
        call()
    assert spy.sent == sent
    assert ledger.head() == head


def test_records_without_a_class_are_refused_before_anything_is_sent_or_paid(site, open_ledger):
    ledger = open_ledger()
    client, spy, _, _ = site(LABELS["round"], ledger)
    (plain,) = batches_of(client, ["w9 w8 w7"])
    nothing_leaves(spy, ledger, lambda: client.step(plain), PolicyDenied, "SS-2010")


def test_a_corrected_label_keeps_the_answer_that_was_given(site, open_ledger):
    """A fresh answer would differ from the first one in most cases, and so show the server that somebody corrected it."""
    ledger = open_ledger()
    client, spy, (batch,), _ = site(LABELS["round"], ledger)
    client.step(batch)
    first, paid = spy.messages(Backward), ledger.head()
    other = tuple(replace(r, label=NAMES[1 - NAMES.index(r.label)]) for r in FOUND)
    client, spy, (batch,), _ = site(LABELS["round"], ledger, found=other)
    client.step(batch)
    assert [m.gradient for m in spy.messages(Backward)] == [m.gradient for m in first]
    assert ledger.head() == paid


def test_answers_let_out_one_gradient_and_no_other_of_the_same_records(site, open_ledger):
    """A loss of the true labels after a step on the answers: the gate has no proof for it."""
    ledger = open_ledger()
    client, spy, (batch,), _ = site(LABELS["round"], ledger)
    client.step(batch)
    with pytest.raises(PolicyDenied, match="SS-2010"):
        step(batch, client.coded_front, client.gate, client.middle, client.coded_back)
    assert len(spy.messages(Backward)) == 1
    # Answers that were given for other records are none for these.
    client.remote.about(
        batch, client.gate.respond(batch.classes[:1], records=batch.records[:1], contents=batch.labelled[:1])
    )
    with pytest.raises(PolicyDenied, match="SS-2010"):
        step(batch, client.coded_front, client.gate, client.middle, client.coded_back)
    assert len(spy.messages(Backward)) == 1


@pytest.mark.parametrize(
    ("names", "said"), [(None, r"\[task\]"), (("w60", "w61", "w62"), "privacy.labels.classes is 2")]
)
def test_a_job_that_cannot_answer_is_refused_by_the_handshake(house, names, said):
    job = house.job(epochs=1) if names is None else with_task(house.job(epochs=1), names)
    server = MemoryServer(house.core(job, policy_of()))
    with pytest.raises(PolicyDenied, match="SS-2001") as caught:
        house.link(server, policy_of(LABELS["round"]))
    (detail,) = caught.value.details
    assert said.replace("\\", "") in detail
