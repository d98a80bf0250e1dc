"""Every mode of training over TLS on loopback, against unsplit models that are trained by hand.

The oracle is the library's own forward pass of the whole model with torch's own AdamW; which copy of which layer steps when,
and what is averaged, is written out here once more for each mode.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from securesplit.admit import admit
from securesplit.aggregate.answered import AnswerLog
from securesplit.client.dial import dial
from securesplit.client.train import Trainer
from securesplit.errors import PolicyDenied
from securesplit.model.lora import adapter_layout, add_adapters, read_adapters
from securesplit.privacy.ledger import Ledger
from securesplit.protocol.job import Job
from securesplit.suited import learning_breaches
from tests.e2e.house import FROZEN, LAB, ROUND, Loopback, batches_of, build_model, policy_of, sentences

COUNTS = {"alice": 4, "bob": 8, "carol": 12}
REGIMES = {"open": LAB, "frozen": FROZEN, "round": ROUND, "step": ROUND.replace('"round"', '"step"')}
MIDDLE = (".layers.1.", ".layers.2.")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    from tests.e2e.house import build_house

    return build_house(tmp_path_factory.mktemp("modes"))


def job_of(
    house, *, roster=("alice", "bob", "carol"), rounds=1, epochs=1, sharing="alternating", adapters=None, **training
) -> Job:
    raw = house.job(rounds=rounds, epochs=epochs).model_dump(mode="json", exclude_none=True)
    raw["training"], raw["adapters"]["sharing"] = training, sharing
    raw["adapters"] |= adapters or {}
    raw["sums"] = {**raw["sums"], "roster": list(roster), "stage_seconds": 20.0, "weights": "uniform"}
    return Job.model_validate(raw)


@dataclass
class Seen:
    """What each client's run gave, and the server."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    batches: dict[str, tuple] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)
    core: object = None


def train(house, job, tmp_path, *, privacy=LAB, counts=COUNTS) -> Seen:
    seen, policy = Seen(), policy_of(privacy)
    seen.core = core = house.core(job, policy)
    with Loopback(core, house.keys) as loop:
        # Which client comes first is nobody's business: they start at once.
        start = threading.Barrier(len(job.sums.roster))

        def one(number: int, name: str) -> None:
            try:
                start.wait(20)
                with dial(loop.url, keys=house.keys / name, policy=policy) as link:
                    client = house.client(link, policy)
                    batches = batches_of(client, sentences(counts[name], seed=50 + number))
                    held = batches_of(client, sentences(2, seed=90 + number))
                    seen.batches[name], losses = batches, []

                    def told(what, _done, _total, loss):
                        if loss is not None and "sum" not in what:
                            losses.append(loss)

                    log = AnswerLog(tmp_path / f"{name}.log")
                    Trainer(client, batches, held, answers=log, progress=told).run()
                    log.close()
                    seen.losses[name] = losses
                    seen.dims[name] = len(client.read())
                    seen.parts[name] = {
                        p.role: read_adapters(p, adapter_layout(p)) for p in (client.front, client.back)
                    }
            except BaseException as error:  # noqa: BLE001 (handed to the test's thread)
                seen.errors[name] = error

        threads = [
            threading.Thread(target=one, args=(n, name), daemon=True) for n, name in enumerate(sorted(job.sums.roster))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    assert seen.errors == {}
    return seen


def whole_of(job):
    whole = build_model()
    add_adapters(whole, job.adapters.rank, job.adapters.alpha, job.adapters.targets, seed=job.adapters.seed)
    return whole


def is_middle(name: str) -> bool:
    return any(where in name for where in MIDDLE)


def trained(model, *, middle: bool, factors=("A", "B")):
    return [
        p for n, p in model.named_parameters()
        if ".lora_" in n and is_middle(n) is middle and any(f"lora_{f}." in n for f in factors)
    ]  # fmt: skip


def adam(parameters, rate):
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


def share_middle(models):
    """All models hold the very same tensors in B."""
    first = dict(models[0].named_modules())
    for model in models[1:]:
        for name, module in model.named_modules():
            if ".lora_" in name and is_middle(f".{name}.") and hasattr(module, "weight"):
                module.weight = first[name].weight


def flat(model, where) -> np.ndarray:
    """One part's adapter values in the product's order, taken from the whole model."""
    layout = adapter_layout(model)
    layers = {"front": {0}, "middle": {1, 2}, "back": {3}}[where]
    pieces, values, at = [], read_adapters(model, layout), 0
    for tensor in layout.tensors:
        size = int(np.prod(tensor.shape))
        if tensor.layer in layers:
            pieces.append(values[at : at + size])
        at += size
    return np.concatenate(pieces)


def close(got, wanted, tolerance=1e-5):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)


def loss_of(model, batch):
    return model(batch.tokens, labels=batch.labels).loss


def server_values(seen) -> np.ndarray:
    middle = seen.core._engine.middle
    return read_adapters(middle, adapter_layout(middle))


# ---- one client, nothing summed: the unsplit model's own curve ----------------------------------------------------------


def test_one_client_alone_has_the_unsplit_models_loss_at_every_step(house, tmp_path):
    job = job_of(house, roster=("alice",), rounds=2, epochs=3, mode="splitfed-v3", every=1)
    seen = train(house, job, tmp_path, counts={"alice": 12})
    whole = whole_of(job)
    mine, theirs = adam(trained(whole, middle=False), 1e-2), adam(trained(whole, middle=True), 5e-3)
    losses = []
    for batch in [*seen.batches["alice"]] * 6:
        loss = loss_of(whole, batch)
        loss.backward()
        for optimiser in (mine, theirs):
            optimiser.step()
            optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert len(losses) == len(seen.losses["alice"]) > 10
    close(seen.losses["alice"], losses)
    assert abs(losses[0] - losses[-1]) > 0.1, "it learns, so equal losses say something"
    for where in ("front", "back"):
        close(seen.parts["alice"][where], flat(whole, where), 1e-4)
    close(server_values(seen), flat(whole, "middle"), 1e-4)


def test_dora_in_every_part_has_the_unsplit_models_loss_at_every_step(house, tmp_path):
    """Where nothing is summed A and C may have it, too; the oracle is PEFT's own DoRA on the whole model."""
    job = job_of(house, roster=("alice",), rounds=2, epochs=3, mode="splitfed-v3", every=1, adapters={"dora": True})
    seen = train(house, job, tmp_path, counts={"alice": 8})
    own = job.adapters
    whole = build_model()
    add_adapters(whole, own.rank, own.alpha, own.targets, seed=own.seed, dora=True)
    every = ("A", "B", "magnitude_vector")
    lengths = [p for n, p in whole.named_parameters() if "magnitude" in n]
    before = [p.detach().clone() for p in lengths]
    mine = adam(trained(whole, middle=False, factors=every), 1e-2)
    theirs = adam(trained(whole, middle=True, factors=every), 5e-3)
    losses = []
    for batch in [*seen.batches["alice"]] * 6:
        loss = loss_of(whole, batch)
        loss.backward()
        for optimiser in (mine, theirs):
            optimiser.step()
            optimiser.zero_grad()
        losses.append(float(loss.detach()))
    close(seen.losses["alice"], losses, 5e-5)
    assert abs(losses[0] - losses[-1]) > 0.1
    assert len(lengths) == 12
    assert all(not torch.equal(p, old) for p, old in zip(lengths, before, strict=True)), "lengths learn in every part"
    for where in ("front", "back"):
        close(seen.parts["alice"][where], flat(whole, where), 1e-3)
    close(server_values(seen), flat(whole, "middle"), 1e-3)


def test_dora_in_a_personal_part_stays_at_its_client(house, tmp_path):
    job = job_of(house, mode="splitfed-v1", personal=["back"], adapters={"back": {"dora": True}})
    seen = train(house, job, tmp_path)
    assert np.array_equal(seen.parts["alice"]["front"], seen.parts["bob"]["front"])
    assert not np.array_equal(seen.parts["alice"]["back"], seen.parts["bob"]["back"])
    assert seen.dims["alice"] == len(seen.parts["alice"]["front"])


@pytest.mark.parametrize(
    ("training", "adapters", "fault"),
    [
        ({}, {"dora": True}, "dora in front and back"),
        ({}, {"back": {"dora": True}}, "dora in back"),
        ({"personal": ["back"]}, {"dora": True}, "dora in front:"),
        ({"personal": ["back"]}, {"back": {"dora": True}, "sharing": "core"}, "stand still in sharing 'core'"),
        ({"mode": "splitfed-v3", "every": 1}, {"dora": True, "embedding": True}, "no dora in front"),
    ],
)
def test_lengths_that_a_sum_would_carry_are_refused(house, training, adapters, fault):
    with pytest.raises(ValueError, match=fault):
        job_of(house, adapters=adapters, **training)


@pytest.mark.parametrize("part", ["front", "back"])
def test_a_regime_that_clips_by_record_refuses_lengths(house, part):
    job = job_of(house, mode="splitfed-v3", every=1, adapters={part: {"dora": True}})
    told = {name: [breach.rule for breach in learning_breaches(policy_of(text), job)] for name, text in REGIMES.items()}
    assert {name for name, rules in told.items() if "privacy.regime.dora" in rules} == {"step", "round"}


# ---- all clients' batches at once ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["sequences", "uniform"])
def test_client_batch_is_one_step_on_the_mean_of_the_clients_losses(house, tmp_path, weighting):
    job = job_of(house, mode="client-batch", weighting=weighting, straggler_seconds=20.0)
    seen = train(house, job, tmp_path)
    models = {name: whole_of(job) for name in sorted(COUNTS)}
    share_middle(list(models.values()))
    alice = models["alice"]
    mine = {name: adam(trained(m, middle=False, factors=("B",)), 1e-2) for name, m in models.items()}
    theirs = adam(trained(alice, middle=True), 5e-3)
    losses = {name: [] for name in models}
    for step in range(max(len(b) for b in seen.batches.values())):
        active = {n: seen.batches[n][step] for n in models if step < len(seen.batches[n])}
        counts = {n: 1 if weighting == "uniform" else len(b.records) for n, b in active.items()}
        total = 0
        for name, batch in active.items():
            loss = loss_of(models[name], batch)
            losses[name].append(float(loss.detach()))
            own = [p for g in mine[name].param_groups for p in g["params"]]
            for p, g in zip(own, torch.autograd.grad(loss, own, retain_graph=True), strict=True):
                p.grad = g
            total = total + loss * counts[name] / sum(counts.values())
        shared = trained(alice, middle=True)
        for p, g in zip(shared, torch.autograd.grad(total, shared), strict=True):
            p.grad = g
        theirs.step()
        for name in active:
            mine[name].step()
            mine[name].zero_grad()
    for name in models:
        close(seen.losses[name], losses[name])
    close(server_values(seen), flat(alice, "middle"), 1e-4)


# ---- copies of B ----------------------------------------------------------------------------------------------------------


def each_by_itself(job, seen, *, factors):
    """A whole model for each client, trained on its own batches; nothing is shared."""
    models = {name: whole_of(job) for name in sorted(COUNTS)}
    losses = {}
    for name, model in models.items():
        mine, theirs = (
            adam(trained(model, middle=False, factors=factors), 1e-2),
            adam(trained(model, middle=True), 5e-3),
        )
        losses[name] = []
        for batch in seen.batches[name]:
            loss = loss_of(model, batch)
            loss.backward()
            losses[name].append(float(loss.detach()))
            for optimiser in (mine, theirs):
                optimiser.step()
            model.zero_grad()
    return models, losses


def mean_of(models, where, weights):
    total = sum(weights.values())
    return sum(flat(models[name], where).astype(np.float64) * weights[name] / total for name in models)


def test_splitfed_v1_averages_copies_of_b_as_it_averages_a_and_c(house, tmp_path):
    job = job_of(house, mode="splitfed-v1")
    seen = train(house, job, tmp_path)
    models, losses = each_by_itself(job, seen, factors=("B",))
    for name in models:
        close(seen.losses[name], losses[name])
    close(server_values(seen), mean_of(models, "middle", COUNTS), 1e-5)
    even = dict.fromkeys(COUNTS, 1)  # The job's sums count every update once.
    for where in ("front", "back"):
        wanted = mean_of(models, where, even)
        for name in COUNTS:
            close(seen.parts[name][where], wanted, 1e-5)


def test_splitfed_v3_leaves_a_and_c_to_each_client_and_sums_nothing(house, tmp_path):
    job = job_of(house, mode="splitfed-v3", every=1000)
    seen = train(house, job, tmp_path)
    models, losses = each_by_itself(job, seen, factors=("A", "B"))
    assert seen.core.sums.finished == 0
    for name in models:
        close(seen.losses[name], losses[name])
        for where in ("front", "back"):
            close(seen.parts[name][where], flat(models[name], where), 1e-4)
    # They have left: B holds the mean, whoever asks next.
    close(server_values(seen), mean_of(models, "middle", COUNTS), 1e-4)


def test_hierarchical_groups_share_a_copy_and_average_every_so_many_steps(house, tmp_path):
    counts = dict.fromkeys(COUNTS, 8)
    job = job_of(house, mode="hierarchical", every=1, groups=[["alice", "bob"]], order="roster", straggler_seconds=20.0)
    seen = train(house, job, tmp_path, counts=counts)
    models = {name: whole_of(job) for name in sorted(COUNTS)}
    share_middle([models["alice"], models["bob"]])
    lanes = {"alice": ("alice", "bob"), "carol": ("carol",)}
    mine = {name: adam(trained(m, middle=False, factors=("B",)), 1e-2) for name, m in models.items()}
    theirs = {name: adam(trained(models[name], middle=True), 5e-3) for name in lanes}
    losses = {name: [] for name in models}
    for step in range(max(len(b) for b in seen.batches.values())):
        weights = dict.fromkeys(lanes, 0)
        for lane, members in lanes.items():
            for name in members:
                if step >= len(seen.batches[name]):
                    continue
                weights[lane] += len(seen.batches[name][step].records)
                loss = loss_of(models[name], seen.batches[name][step])
                loss.backward()
                losses[name].append(float(loss.detach()))
                mine[name].step()
                theirs[lane].step()
                models[name].zero_grad()
                models[lane].zero_grad()
        pairs = zip(trained(models["alice"], middle=True), trained(models["carol"], middle=True), strict=True)
        with torch.no_grad():
            for left, right in pairs:  # By the sequences of this step.
                mean = (left * weights["alice"] + right * weights["carol"]) / sum(weights.values())
                left.copy_(mean)
                right.copy_(mean)
    for name in models:
        close(seen.losses[name], losses[name])
    close(server_values(seen), flat(models["alice"], "middle"), 1e-5)


# ---- one after another ----------------------------------------------------------------------------------------------------


def test_sequential_hands_a_and_c_over_from_client_to_client(house, tmp_path):
    job = job_of(house, mode="sequential", rounds=4)
    seen = train(house, job, tmp_path)
    whole = whole_of(job)
    theirs = adam(trained(whole, middle=True), 5e-3)
    losses = {name: [] for name in COUNTS}
    for name in ("alice", "bob", "carol", "alice"):
        mine = adam(trained(whole, middle=False), 1e-2)
        for batch in seen.batches[name]:
            loss = loss_of(whole, batch)
            loss.backward()
            losses[name].append(float(loss.detach()))
            for optimiser in (mine, theirs):
                optimiser.step()
            whole.zero_grad()
    for name in COUNTS:
        close(seen.losses[name], losses[name])
        for where in ("front", "back"):
            close(seen.parts[name][where], flat(whole, where), 1e-4)
            assert np.array_equal(seen.parts[name][where], seen.parts["alice"][where])
    close(server_values(seen), flat(whole, "middle"), 1e-4)


def test_in_the_rosters_order_two_runs_are_equal_bit_for_bit(house, tmp_path):
    job = job_of(house, mode="splitfed-v2", order="roster", rounds=2, straggler_seconds=20.0)
    runs = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        runs.append(train(house, job, tmp_path / str(number)))
    first, second = runs
    assert first.losses == second.losses
    assert np.array_equal(server_values(first), server_values(second))
    for name in COUNTS:
        for where in ("front", "back"):
            assert np.array_equal(first.parts[name][where], second.parts[name][where])


# ---- parts of each client's own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("personal", ["back", "front"])
def test_a_personal_part_is_never_summed(house, tmp_path, personal):
    job = job_of(house, mode="splitfed-v1", personal=[personal])
    seen = train(house, job, tmp_path)
    other = {"back": "front", "front": "back"}[personal]
    assert np.array_equal(seen.parts["alice"][other], seen.parts["bob"][other])
    assert not np.array_equal(seen.parts["alice"][personal], seen.parts["bob"][personal])
    assert seen.dims["alice"] == len(seen.parts["alice"][other])
    models = {name: whole_of(job) for name in sorted(COUNTS)}
    layer = {"back": ".layers.3.", "front": ".layers.0."}[personal]
    for name, model in models.items():
        held = [
            p for n, p in model.named_parameters()
            if ".lora_" in n and not is_middle(n) and (layer in n or ".lora_B." in n)
        ]  # fmt: skip
        mine, theirs = adam(held, 1e-2), adam(trained(model, middle=True), 5e-3)
        for batch in seen.batches[name]:
            loss_of(model, batch).backward()
            mine.step()
            theirs.step()
            model.zero_grad()
        close(seen.parts[name][personal], flat(model, personal), 1e-4)


def test_frozen_with_a_head_of_each_clients_own_needs_no_sums(house, tmp_path):
    """Regime frozen in mode splitfed-v3: each site's C learns by itself, and no update leaves at all."""
    job = job_of(house, roster=("alice",), epochs=2, mode="splitfed-v3", every=1)
    policy = policy_of(FROZEN)
    client, _, core = house.joined(job, policy, ledger=Ledger(tmp_path / "ledger"))
    before = client.snapshot()
    batches = batches_of(client, sentences(6, seed=1))
    log = AnswerLog(tmp_path / "log")
    Trainer(client, batches, batches, answers=log, progress=lambda *_: None).run()
    log.close()
    assert np.array_equal(client.snapshot()[0], before[0])
    assert not np.array_equal(client.snapshot()[1], before[1])
    assert core.sums.finished == 0
    assert {entry.channel for entry in client.ledger.summary()} == {"cut"}


# ---- what does not fit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "privacy"),
    [
        ({"mode": "sequential"}, FROZEN),
        ({"mode": "sequential"}, ROUND),
        ({"mode": "splitfed-v3", "every": 1}, ROUND),
        ({"mode": "splitfed-v1", "personal": ["back"]}, ROUND),
        ({"mode": "splitfed-v1"}, FROZEN),
        ({"mode": "client-batch"}, FROZEN),
        ({"mode": "hierarchical", "every": 2}, FROZEN),
        ({"personal": ["back"]}, FROZEN),
    ],
)
def test_a_mode_that_a_policy_cannot_protect_is_refused_by_name(house, training, privacy):
    with pytest.raises(PolicyDenied) as caught:
        admit(policy_of(privacy), job_of(house, **training), peer="gpu")
    assert caught.value.code == "SS-2001"
    assert any(line.startswith("privacy.regime.mode") for line in caught.value.details)
