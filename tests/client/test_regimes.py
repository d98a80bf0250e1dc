"""Regimes ``round`` and ``step``: whose gradients move what, what each release costs, and what no code path can do.

The oracles are NumPy: clipping by unit, AdamW, and counts of what a spy saw leaving.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import securesplit.client.train as train_module
from securesplit.aggregate.fixedpoint import Aggregate, quantise
from securesplit.client.rounds import Opened
from securesplit.client.train import Trainer
from securesplit.data.batches import encode_records, make_batches
from securesplit.errors import PolicyDenied
from securesplit.model.lora import adapter_layout, read_adapters, write_adapters
from securesplit.model.persample import per_sample
from securesplit.privacy import mechanism
from securesplit.privacy.gate import ClippedSum, Gate
from securesplit.privacy.ledger import ALL
from securesplit.protocol.messages import Backward, Forward
from tests.client.test_code import SENTINEL, code_of
from tests.client.test_code import joined as coded
from tests.e2e.house import FROZEN, LAB, ROUND, batches_of, policy_of, sentences

STEP = ROUND.replace('"round"', '"step"')
TEXTS = sentences(7, seed=5)


def with_releases(privacy, activations, gradients, updates):
    """The same policy for more releases of a record."""
    head, *tables = privacy.split("releases = ")
    counts = (activations, gradients, updates)
    return head + "".join(f"releases = {n}{rest[1:]}" for n, rest in zip(counts, tables, strict=True))


def joined(house, job, policy, ledger):
    """One client and its server in memory; the client's keys are on its link, as after a dial."""
    client, spy, core = house.joined(job, policy, ledger=ledger)
    client.link.folder = house.folder("alice")
    return client, spy, core


def trainer_of(client, batches, held_out=()):
    return Trainer(client, batches, held_out, answers=None, progress=lambda *_: None)


@pytest.fixture
def alone(monkeypatch):
    """A sum of one: what the client gave, as a list. The real sums are tests/e2e/test_rounds.py's."""
    given = []

    def one(link, folder, policy, update, **_):
        given.append(update)
        scale = 1 << 40  # Fine enough that what comes back is what was given, for the digits that are looked at.
        words, _ = quantise(update.vector, 1, scale=scale, clip=64.0, w_max=1, bits=64)
        return Opened(Aggregate(words, (link.name,), scale, 64.0), b"", words)

    monkeypatch.setattr(train_module, "secure_sum", one)
    return given


@pytest.fixture
def no_noise(monkeypatch):
    """For comparisons of what is *under* the noise."""
    monkeypatch.setattr(mechanism, "discrete_gaussian_like", torch.zeros_like)


@pytest.fixture
def updates(monkeypatch):
    """Everything handed to any gate's release_update, with what came back; sums as they were before the noise."""
    seen, release = [], Gate.release_update

    def spy(self, update):
        before = update.steps * update.step if isinstance(update, ClippedSum) else update
        seen.append((update, before, release(self, update)))
        return seen[-1][2]

    monkeypatch.setattr(Gate, "release_update", spy)
    return seen


@pytest.fixture
def rows(monkeypatch):
    """Every batch's per-record gradients as the trainer had them."""
    seen, gradients = [], Trainer._gradients

    def spy(self, batch):
        seen.append((batch, *gradients(self, batch)))
        return seen[-1][1:]

    monkeypatch.setattr(Trainer, "_gradients", spy)
    return seen


def counted(ledger):
    return {spent.channel: spent.releases for spent in ledger.summary()}


def crossed(spy, kind):
    """Sequences that left in messages of one kind."""
    return sum(len(message.lengths) for message in spy.messages(kind)) if kind is Forward else len(spy.messages(kind))


def job_of(house, **schedule):
    job = house.job()
    return job.model_copy(update={"schedule": job.schedule.model_copy(update=schedule)})


@pytest.mark.parametrize("privacy", [ROUND, STEP], ids=["round", "step"])
@pytest.mark.usefixtures("no_noise")
def test_a_records_gradients_do_not_know_who_else_is_in_the_batch(house, open_ledger, monkeypatch, privacy):
    """Another, shorter text in row 2: what is released of the other rows is, before noise, the same bit for bit."""
    texts, released, gradients = list(TEXTS[:4]), [], []
    original = Gate.release

    def spy(self, tensor, *, at, **options):
        if at == "gradient":
            released.append(tensor.clone())
        return original(self, tensor, at=at, **options)

    monkeypatch.setattr(Gate, "release", spy)
    ledger = open_ledger()
    for row in (TEXTS[2], "w3 w4"):
        texts[2] = row
        client, _, _ = joined(house, house.job(), policy_of(privacy, buckets=[16]), ledger)
        rows = encode_records(texts, client.tokenizer, 16, ledger.key)
        (batch,) = make_batches(rows, buckets=(16,), size=4, padding=0, seed=3)
        before = client.loss(batch)
        client.train("B")
        with per_sample(client.trained) as kept:
            assert client.step(batch) == pytest.approx(before, rel=1e-6), "nats per token, as it was"
            gradients.append(kept.gradients())
        other = batch.sources.index(2)
    same = [i for i in range(4) if i != other]
    assert torch.equal(released[0][same], released[1][same])
    assert torch.equal(gradients[0][same], gradients[1][same])
    assert not torch.equal(released[0][other], released[1][other])
    assert (gradients[0][same].flatten(1).norm(dim=1) > 0).all()
    size = adapter_layout(client.front, "B").size
    assert (gradients[0][same][:, :size].norm(dim=1) > 0).all(), "A's too, though its gradient came from the server"


def clipped_sum_of(gradients, keys, bound):
    """Unit by unit, in float64: sum, then clip, then sum."""
    units: dict[str, np.ndarray] = {}
    for gradient, key in zip(gradients, keys, strict=True):
        units[key] = units.get(key, 0) + gradient.double().numpy()
    return sum(u * min(1.0, bound / np.linalg.norm(u)) for u in units.values())


def adam(values, gradients, lr):
    """AdamW without decay, by its paper's formulae (arXiv:1711.05101), from moments of zero."""
    m, v = np.zeros_like(values), np.zeros_like(values)
    for t, gradient in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        values = values - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return values


@pytest.mark.usefixtures("alone")
def test_round_the_sum_is_clipped_by_record_and_every_release_is_paid(house, open_ledger, updates, rows):
    policy, ledger = policy_of(with_releases(ROUND, 3, 2, 2)), open_ledger()
    client, spy, _ = joined(house, job_of(house, epochs=1, rounds=2), policy, ledger)
    batches = batches_of(client, TEXTS)
    held_out = batches_of(client, sentences(2, seed=9))
    trained = trainer_of(client, batches, held_out).run()
    assert trained.steps == 2 * len(batches)
    assert len(trained.curve) == 3
    plan = client.gate.plan
    assert len(updates) == 2
    for number, (total, before, noised) in enumerate(updates):
        mine = rows[number * len(batches) : (number + 1) * len(batches)]
        gradients = torch.cat([gradient for _, gradient, _ in mine])
        keys = [key for batch, _, _ in mine for key in batch.records]
        want = clipped_sum_of(gradients, keys, plan.update.clip)
        # Each record was cut down to the lattice: less than a step per coordinate and record, and clip's 2^-22.
        assert np.allclose(before, want, atol=len(TEXTS) * total.step + 1e-6 * plan.update.clip, rtol=0)
        assert np.linalg.norm(want) > 100 * total.step
        assert sorted(total.records) == sorted(keys)
        assert (noised.vector - before).std() == pytest.approx(plan.update.sigma, rel=0.25)
    # Seven records in two rounds, two held-out ones evaluated three times; and what was paid for is what left.
    assert counted(ledger) == {"cut": 7 * 2 + 2 * 3, "gradient": 7 * 2, "update": 7 * 2}
    assert crossed(spy, Forward) == 7 * 2 + 2 * 3
    assert crossed(spy, Backward) == 2 * len(batches)
    for record in (key for batch in batches for key in batch.records):
        want = 2 * (plan.cut.units + plan.gradient.units + plan.update.units)
        assert ledger.spent_units(record) == want <= plan.budget
    ledger.verify()


def test_step_is_dp_sgd_every_step_noised_and_every_state_paid(house, open_ledger, updates, rows, alone):
    policy, ledger = policy_of(with_releases(STEP, 4, 4, 4)), open_ledger()
    client, spy, _ = joined(house, job_of(house, epochs=2, rounds=2), policy, ledger)
    batches = batches_of(client, TEXTS)
    held_out = batches_of(client, sentences(2, seed=9))
    starts, one_round = [], Trainer._round

    class Watched(Trainer):
        def _round(self, number):
            starts.append(client.read("B" if number % 2 == 0 else "A"))
            return one_round(self, number)

    Watched(client, batches, held_out, answers=None, progress=lambda *_: None).run()
    plan, per_round = client.gate.plan, 2 * len(batches)
    sums = [entry for entry in updates if isinstance(entry[0], ClippedSum)]
    assert len(sums) == len(rows) == 2 * per_round
    for (total, before, noised), (batch, gradients, _) in zip(sums, rows, strict=True):
        want = clipped_sum_of(gradients, batch.records, plan.update.clip)
        assert np.allclose(before, want, atol=len(batch.records) * total.step + 1e-6 * plan.update.clip, rtol=0)
        assert noised.noised
        assert not np.array_equal(noised.vector, before)
    noise = np.concatenate([noised.vector - before for _, before, noised in sums])
    assert noise.std() == pytest.approx(plan.update.sigma, rel=0.1)
    # What entered each secure sum is AdamW's path along the noised gradients and nothing else.
    assert len(alone) == 2
    for number, (start, update) in enumerate(zip(starts, alone, strict=True)):
        mine = range(number * per_round, (number + 1) * per_round)
        along = [sums[i][2].vector / len(rows[i][0].records) for i in mine]
        end = adam(start.astype(np.float64), along, client.job.optimiser.client_lr)
        assert np.allclose(update.vector, end - start, atol=1e-5)
        assert update.noised
    assert counted(ledger) == {"cut": 7 * 4 + 2 * 3, "gradient": 7 * 4, "update": 7 * 4}
    assert crossed(spy, Forward) == 7 * 4 + 2 * 3
    assert crossed(spy, Backward) == 4 * len(batches)
    payloads = [entry.payload for entry in ledger.entries() if entry.channel == "cut"]
    assert len(set(payloads)) == len(payloads), "no state sends the bytes of another"
    ledger.verify()


@pytest.mark.usefixtures("alone")
def test_step_learns_when_the_budget_is_large(house, open_ledger):
    """Twenty-four noised steps on 48 dull records under epsilon 1000: the loss falls by 0.50 nats, with deviation 0.08."""
    job = job_of(house, epochs=4, rounds=1, batch=8)
    job = job.model_copy(update={"optimiser": job.optimiser.model_copy(update={"client_lr": 0.05})})
    privacy = policy_of(with_releases(STEP, 4, 4, 4), buckets=[16])
    client, _, _ = joined(house, job, privacy, open_ledger())
    texts = tuple(" ".join(f"w{4 + (i >> j % 6) % 2 + (j > 6)}" for j in range(13)) for i in range(48))
    losses = trainer_of(client, batches_of(client, texts, size=8))._round(0).losses
    assert len(losses) == 24
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.1


@pytest.mark.parametrize("sentinel", [SENTINEL, None])
def test_behind_a_code_gradients_are_kept_by_record_too(house, open_ledger, sentinel):
    policy, ledger = policy_of(ROUND, buckets=[16]), open_ledger()
    client, _, _ = coded(house, policy, code_of(house, sentinel=sentinel), ledger=ledger)
    (batch,) = batches_of(client, TEXTS[:4])
    before = client.loss(batch)
    client.train("B")
    with per_sample(client.trained) as kept:
        assert client.step(batch) == pytest.approx(before, rel=1e-5)
        rows, whole = kept.gradients(), torch.cat([p.grad.flatten() for p in client.parameters()])
    assert rows.shape == (4, client.read("B").size)
    assert torch.allclose(rows.sum(0), whole, rtol=1e-4, atol=1e-6)
    assert (rows.norm(dim=1) > 0).all()


@pytest.mark.parametrize("stated", [False, True], ids=["blind", "updates"])
def test_frozen_the_difference_is_noised_as_a_whole_where_the_policy_says_so(
    house, open_ledger, alone, updates, stated
):
    text = FROZEN.replace("share = 0.6", "share = 0.5") + "[privacy.updates]\nclip = 0.5\nshare = 0.1\nreleases = 2\n"
    policy, ledger = policy_of(text if stated else FROZEN), open_ledger()
    client, _, _ = joined(house, job_of(house, epochs=2, rounds=2), policy, ledger)
    batches = batches_of(client, TEXTS[:4])
    trainer_of(client, batches, batches_of(client, sentences(2, seed=9))).run()
    assert [update.noised for update in alone] == [stated, stated]
    differences = [before for _, before, _ in updates]
    if stated:
        assert counted(ledger) == {"cut": 6, "update": 2}
        for update, difference in zip(alone, differences, strict=True):
            clipped = difference * min(1.0, 0.5 / np.linalg.norm(difference))
            noise = update.vector - clipped
            assert noise.std() == pytest.approx(client.gate.plan.update.sigma, rel=0.25)
    else:
        assert counted(ledger) == {"cut": 6, "peers": 1, "bare": 1}
        assert all(np.array_equal(u.vector, d) for u, d in zip(alone, differences, strict=True))


# What cannot be done. ---------------------------------------------------------------------------------------------


def nothing_leaves(spy, ledger, call, code):
    sent, head = list(spy.sent), ledger.head()
    with pytest.raises(PolicyDenied, match=code):
        call()
    assert spy.sent == sent
    assert ledger.head() == head


@pytest.mark.parametrize("privacy", [ROUND, STEP], ids=["round", "step"])
@pytest.mark.parametrize("part", ["front", "back"])
def test_a_clean_step_on_a_or_c_closes_every_way_out(house, open_ledger, privacy, part):
    policy, ledger = policy_of(privacy), open_ledger()
    client, spy, _ = joined(house, house.job(), policy, ledger)
    batch = batches_of(client, TEXTS[:2])[0]
    client.train("B")
    client.step(batch)
    parameters = [p for p in getattr(client, part).parameters() if p.requires_grad]
    torch.optim.AdamW(parameters, lr=1e-3).step()  # Plain gradients of private records, as SplitFed would have it.
    nothing_leaves(spy, ledger, lambda: client.step(batch), "SS-2014")
    nothing_leaves(spy, ledger, lambda: client.loss(batch), "SS-2014")
    client.reset()
    client.loss(batch)


def test_in_frozen_a_clean_change_of_a_closes_the_way_out_and_of_c_does_not(house, open_ledger):
    ledger = open_ledger()
    client, spy, _ = joined(house, house.job(), policy_of(FROZEN), ledger)
    first, second = batches_of(client, TEXTS[:1])[0], batches_of(client, TEXTS[1:2])[0]
    client.train("B")
    client.step(first)
    client.write(client.read() + np.float32(0.1))
    client.step(first)
    layout = adapter_layout(client.front)
    write_adapters(client.front, layout, read_adapters(client.front, layout) + np.float32(1e-3))
    nothing_leaves(spy, ledger, lambda: client.step(second), "SS-2014")


@pytest.mark.parametrize("privacy", [ROUND, STEP], ids=["round", "step"])
def test_an_update_without_noise_is_no_reason_to_have_moved(house, open_ledger, privacy):
    ledger = open_ledger()
    client, spy, _ = joined(house, house.job(), policy_of(privacy), ledger)
    plain = Gate(policy_of(LAB), None).release_update(np.ones(client.read().size))
    client.write(client.read() + np.float32(0.1))
    with pytest.raises(PolicyDenied, match="SS-2014"):
        client.gate.moved(plain)
    nothing_leaves(spy, ledger, lambda: client.step(batches_of(client, TEXTS[:1])[0]), "SS-2014")
    # The gate of the run itself makes none: a plain difference is refused, in `step` unless the path to it was noised.
    code = "SS-2011" if privacy == ROUND else "SS-2014"
    nothing_leaves(spy, ledger, lambda: client.gate.release_update(np.ones(3)), code)


def test_in_frozen_a_has_no_gradient_and_no_gradient_can_leave(house, open_ledger):
    ledger = open_ledger()
    client, spy, _ = joined(house, house.job(), policy_of(FROZEN), ledger)
    batch = batches_of(client, TEXTS[:2])[0]
    client.train("B")
    client.step(batch)
    assert not any(p.requires_grad or p.grad is not None for p in client.front.parameters())
    assert any(p.grad is not None for p in client.back.parameters())
    client.remote.learn = True  # Against all that Client.train says.
    client.middle = client.remote
    with pytest.raises(PolicyDenied, match="SS-2010"):
        client.step(batch)
    assert spy.messages(Backward) == []
    assert counted(ledger) == {"cut": len(batch.records)}


def test_no_plain_sum_of_gradients_is_left_for_an_optimiser(house, open_ledger, alone):
    client, _, _ = joined(house, job_of(house, epochs=1), policy_of(ROUND), open_ledger())
    client.train("B")
    trainer_of(client, batches_of(client, TEXTS[:2]))._record_gradients(0)
    assert all(p.grad is None for p in client.parameters())
    assert alone == []


# Unit user. -------------------------------------------------------------------------------------------------------


def of_users(client, texts, users, *, size=2):
    rows = encode_records(texts, client.tokenizer, 16, client.ledger.key, users=users)
    return make_batches(rows, buckets=client.policy.limits.buckets, size=size, padding=0, seed=3)


USERS = ("ann", "ann", "ben", "ann", "cid", "ben", "ann")


@pytest.mark.usefixtures("alone")
def test_round_by_user_all_records_of_a_user_are_one_clipped_part(house, open_ledger, updates, rows):
    stated = with_releases(ROUND, 4, 4, 1).replace('"sequence"', '"user"')
    policy, ledger = policy_of(stated), open_ledger()
    client, _, _ = joined(house, job_of(house, epochs=1), policy, ledger)
    batches = of_users(client, TEXTS, USERS)
    ann = ledger.key(b"user:ann")
    assert sum(ann in batch.records for batch in batches) >= 2, "her records stand in several batches"
    trainer_of(client, batches)._round(0)
    ((total, before, _),) = updates
    assert sorted(total.records) == sorted(ledger.key(f"user:{user}".encode()) for user in set(USERS))
    gradients = torch.cat([gradient for _, gradient, _ in rows])
    keys = [key for batch, _, _ in rows for key in batch.records]
    plan = client.gate.plan
    want = clipped_sum_of(gradients, keys, plan.update.clip)
    assert np.allclose(before, want, atol=3 * total.step + 1e-6 * plan.update.clip, rtol=0)
    apart = clipped_sum_of(gradients, [f"{i}" for i in range(len(keys))], plan.update.clip)
    assert np.linalg.norm(want) <= 3 * plan.update.clip < np.linalg.norm(apart) * 3, "three users, not seven records"
    # Ann pays for each of her four sequences and gradients, and once for her part of the sum.
    assert ledger.spent_units(ann) == 4 * plan.cut.units + 4 * plan.gradient.units + plan.update.units
    assert counted(ledger) == {"cut": 7, "gradient": 7, "update": 3}


@pytest.mark.usefixtures("alone")
def test_step_by_user_a_user_enters_each_batchs_sum_once(house, open_ledger, updates, monkeypatch):
    along, descend = [], Trainer._descend

    def spy(self, optimiser, gradient):
        along.append(gradient)
        descend(self, optimiser, gradient)

    monkeypatch.setattr(Trainer, "_descend", spy)
    stated = with_releases(STEP, 4, 4, 4).replace('"sequence"', '"user"')
    policy, ledger = policy_of(stated, buckets=[16]), open_ledger()
    client, _, _ = joined(house, job_of(house, epochs=1), policy, ledger)
    batches = of_users(client, TEXTS, USERS, size=4)
    assert any(len(set(batch.records)) < len(batch.records) for batch in batches)
    trainer_of(client, batches)._round(0)
    noised = [entry[2].vector for entry in updates if isinstance(entry[0], ClippedSum)]
    sums = [entry[0] for entry in updates if isinstance(entry[0], ClippedSum)]
    assert [set(total.records) for total in sums] == [set(batch.records) for batch in batches]
    # The divisor is the number of rows, which the server sees; how many people they belong to is nobody's business.
    want = [vector / len(batch.records) for vector, batch in zip(noised, batches, strict=True)]
    assert all(np.array_equal(got, vector) for got, vector in zip(along, want, strict=True))
    assert counted(ledger)["update"] == sum(len(set(batch.records)) for batch in batches)


def test_a_record_that_stands_twice_is_one_unit_and_paid_once(house, open_ledger, updates):
    """Equal keys in one batch: the sum takes them together, where adding each would have moved it by 4C."""
    ledger = open_ledger()
    client, _, _ = joined(house, job_of(house, epochs=1), policy_of(ROUND, buckets=[16]), ledger)
    (batch,) = batches_of(client, TEXTS[:2])
    twice = replace(
        batch, tokens=batch.tokens[[0, 1, 0]], labels=batch.labels[[0, 1, 0]],
        lengths=(*batch.lengths, batch.lengths[0]), records=(*batch.records, batch.records[0]),
        sources=(*batch.sources, batch.sources[0]), contents=(*batch.contents, batch.contents[0]),
    )  # fmt: skip
    client.train("B")
    trainer_of(client, (twice,))._record_gradients(0)
    ((total, _, _),) = updates
    assert sorted(total.records) == sorted(batch.records)
    assert counted(ledger)["cut"] == counted(ledger)["update"] == 2
    assert ALL not in total.records
