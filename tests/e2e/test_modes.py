"""Every way to share adapters, over TLS on loopback with three clients in threads.

The oracles share no code with the product: factors are read out of each client before and after its secure sum, and
products and means are made of them in float64; generated text is PEFT's own, from the exported adapter.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from peft import PeftModel

import securesplit.client.train as train_module
from securesplit.client.run import Run, RunRecord, open_client, run_training
from securesplit.client.train import Trainer
from securesplit.errors import AggregationAborted, PolicyDenied
from securesplit.model.export import collect_adapters, export_adapter, read_part_adapters
from securesplit.privacy.ledger import Ledger
from securesplit.protocol.job import Job
from tests.e2e.house import CLIENTS, FROZEN, LAB, ROUND, Loopback, build_model, policy_of

COUNTS = {"alice": 5, "bob": 6, "carol": 8}
HELD_OUT = 2
STEP = ROUND.replace('"round"', '"step"').replace("releases = 3", "releases = 9").replace("= 2\n", "= 8\n")
ROUNDING = 1e-6
"""Twice half a step of three clients' grid, 2^-21, and float32's own rounding of numbers below 1."""


@dataclass
class Seen:
    """Factors by (client, round): {layer's name: (A, B, R or None)}, before local work, after it, and after the sum."""

    start: dict = field(default_factory=dict)
    local: dict = field(default_factory=dict)
    after: dict = field(default_factory=dict)
    records: dict[str, RunRecord] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def factors(client):
    """Every layer's factors, float64, under its name in the whole model."""
    held: dict[str, dict[str, np.ndarray]] = {}
    for part in client.trained:
        for local, parameter in part.module.named_parameters():
            if ".lora_" in local and ".lora_embedding_" not in local:
                layer, _, kind = local.partition(".lora_")
                key = "R" if ".core." in kind else kind[0]
                held.setdefault(f"{part.role}.{layer}", {})[key] = parameter.detach().double().numpy().copy()
    return {name: (f["A"], f["B"], f.get("R")) for name, f in held.items()}


def product(a, b, r):
    return b @ a if r is None else b @ r @ a


def job_of(house, sharing, **options) -> Job:
    raw = house.job(**options).model_dump(mode="json")
    raw["adapters"] |= {"sharing": sharing} | ({"inexact": True} if sharing == "naive" else {})
    return Job.model_validate(raw)


def train_all(house, job, privacy, monkeypatch, then=lambda *_: None, server=None) -> Seen:
    """All clients' runs, each in a thread; ``then(core, url)`` while the server still runs."""
    seen, lock, policy = Seen(), threading.Lock(), policy_of(privacy)
    core = house.core(job, policy if server is None else policy_of(server))
    one_round = Trainer._round
    secure_sum = train_module.secure_sum
    clients = {}

    def spy_round(self, number):
        name = self._client.link.name
        with lock:
            clients[name] = self._client
            seen.start[name, number] = factors(self._client)
        record = one_round(self, number)
        with lock:
            seen.after[name, number] = factors(self._client)
        return record

    def spy_sum(link, *args, number, **options):
        with lock:
            seen.local[link.name, number] = factors(clients[link.name])
        return secure_sum(link, *args, number=number, **options)

    monkeypatch.setattr(Trainer, "_round", spy_round)
    monkeypatch.setattr(train_module, "secure_sum", spy_sum)
    with Loopback(core, house.keys) as loop:

        def one(name: str, seed: int) -> None:
            run = Run(
                policy=policy, keys=house.keys / name, server=loop.url, out=house.root / name, held_out=HELD_OUT, limit=None,
                data=house.data(f"{name}.jsonl", COUNTS[name], seed=seed), max_tokens=16, truth=None, alone=False,
                model=str(house.model), cache=house.root / "cache",
            )  # fmt: skip
            try:
                seen.records[name] = run_training(run, lambda what, *_: seen.lines.append(what))
            except BaseException as error:  # noqa: BLE001 (handed to the test's thread)
                seen.errors[name] = error

        threads = [threading.Thread(target=one, args=(name, 50 + i), daemon=True) for i, name in enumerate(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        then(core, loop.url)
    return seen


def weighted(seen, number, of, *, equal=False):
    """The plain float64 mean over clients of something of each layer's local factors, weighted by training records."""
    weights = {name: 1 if equal else COUNTS[name] - HELD_OUT for name in CLIENTS}
    layers = seen.local["alice", number]
    return {
        layer: sum(weights[c] * of(*seen.local[c, number][layer]) for c in CLIENTS) / sum(weights.values())
        for layer in layers
    }


def worst(found, wanted):
    assert found.keys() == wanted.keys()
    return max(np.abs(found[layer] - wanted[layer]).max() for layer in wanted)


def products(held):
    return {layer: product(*of) for layer, of in held.items()}


def same_at_all(seen, number, *, but=()):
    for name in CLIENTS[1:]:
        for layer, mine in seen.after["alice", number].items():
            for i, value in enumerate(mine):
                if value is not None and "ABR"[i] not in but:
                    assert np.array_equal(value, seen.after[name, number][layer][i])


@pytest.mark.parametrize("sharing", ["alternating", "frozen-a", "core"])
@pytest.mark.parametrize("privacy", [LAB, FROZEN], ids=["open", "frozen"])
def test_an_exact_mode_gives_the_mean_of_the_products(house, monkeypatch, sharing, privacy):
    seen = train_all(house, job_of(house, sharing), privacy, monkeypatch)
    assert seen.errors == {}
    for number in (0, 1):
        same_at_all(seen, number)
        means = weighted(seen, number, product)
        assert max(np.abs(mean).max() for mean in means.values()) > 1e-3, "the clients learnt something"
        spread = worst(products(seen.local["bob", number]), means)
        off = worst(products(seen.after["alice", number]), means)
        # The other factor, at most 1 by its start and its few steps, carries the rounding of two ranks.
        assert off < 2 * ROUNDING < 0.1 * spread
    first, last = seen.start["alice", 0], seen.after["alice", 1]
    moved = {
        f"{'ABR'[i]}" for x in first for i in range(3) if last[x][i] is not None and (first[x][i] != last[x][i]).any()
    }
    assert moved == {"alternating": {"A", "B"}, "frozen-a": {"B"}, "core": {"R"}}[sharing]
    for record in seen.records.values():
        assert (record.sharing, record.exact, record.residuals) == (sharing, True, ())


@pytest.mark.parametrize("privacy", [LAB, FROZEN, STEP], ids=["open", "frozen", "step"])
def test_share_a_averages_a_and_leaves_b_at_its_site(house, monkeypatch, privacy):
    seen = train_all(house, job_of(house, "share-a"), privacy, monkeypatch)
    assert seen.errors == {}
    for number in (0, 1):
        same_at_all(seen, number, but="B")
        mean = weighted(seen, number, lambda a, *_: a)
        assert worst({k: v[0] for k, v in seen.after["carol", number].items()}, mean) < ROUNDING
        assert any((seen.start["bob", 0][k][0] != a).any() for k, (a, *_) in seen.after["bob", 1].items())
        for name in CLIENTS:
            for layer, (_, b, _) in seen.after[name, number].items():
                assert np.array_equal(b, seen.local[name, number][layer][1]), "B is what the site's own steps made it"
                assert not np.array_equal(b, seen.start[name, number][layer][1])
    assert any(not np.array_equal(b, seen.after["bob", 1][k][1]) for k, (_, b, _) in seen.after["alice", 1].items())


@pytest.mark.parametrize("privacy", [LAB, FROZEN], ids=["open", "frozen"])
def test_naive_reports_what_it_got_wrong(house, monkeypatch, privacy):
    seen = train_all(house, job_of(house, "naive"), privacy, monkeypatch)
    assert seen.errors == {}
    reported = seen.records["alice"].residuals
    assert len(reported) == 2
    for number, told in enumerate(reported):
        same_at_all(seen, number)
        means, after = weighted(seen, number, product), products(seen.after["alice", number])
        missed = sum(((means[k] - after[k]) ** 2).sum() for k in means) ** 0.5
        truth = missed / sum((m**2).sum() for m in means.values()) ** 0.5
        assert truth > 1e-3
        assert told == pytest.approx(truth, rel=0.35), "32 by 32 directions of three or six small layers"
        assert any(f"round {number + 1}: A and B averaged apart missed {told:.2%}" in line for line in seen.lines)
    for record in seen.records.values():
        assert (record.sharing, record.exact, record.residuals) == ("naive", False, reported)
        assert record.residuals_clipped == (0, 0)


@pytest.mark.parametrize("sharing", ["frozen-a", "core"])
@pytest.mark.parametrize("privacy", [ROUND, STEP], ids=["round", "step"])
def test_noised_sums_move_what_the_mode_says_and_nothing_else(house, monkeypatch, sharing, privacy):
    one = 1 if privacy == ROUND else 2
    seen = train_all(house, job_of(house, sharing, epochs=one), privacy, monkeypatch)
    assert seen.errors == {}
    learns = {"frozen-a": 1, "core": 2}[sharing]
    for number in (0, 1):
        same_at_all(seen, number)
        if privacy == STEP:
            means = weighted(seen, number, product)
            assert worst(products(seen.after["alice", number]), means) < 2 * ROUNDING
        for layer, held in seen.after["bob", number].items():
            for i, value in enumerate(held):
                if value is not None:
                    assert np.array_equal(value, seen.start["bob", 0][layer][i]) == (i != learns)
    for record in seen.records.values():
        assert record.epsilon <= 1000
        assert {channel.channel for channel in record.channels} == {"cut", "gradient", "update"}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("sharing", ["frozen-a", "share-a", "core", "naive"])
def test_what_was_trained_generates_and_exports(house, monkeypatch, tmp_path, sharing):
    """Greedy text from the saved adapters, through the split, is PEFT's own text from the exported one."""
    given, logits = {}, {}

    def generate(core, url):
        policy, ids = policy_of(), torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(0))
        with open_client(
            policy,
            house.keys / "bob",
            url,
            model=str(house.model),
            cache=house.root / "cache",
            adapters=house.root / "bob",
        ) as client:
            given["restored"] = factors(client)
            given["text"] = client.generate("w5 w6 w7 w8", max_new_tokens=6).tokens
            middle = core._engine.middle
            with torch.no_grad():
                logits["split"] = client.back(middle(client.front(ids)))
        files = [read_part_adapters(house.root / "bob" / f"adapter-{part}.safetensors") for part in ("front", "back")]
        done = export_adapter(
            [files[0], collect_adapters(middle, model=house.digest), files[1]], tmp_path / "peft", "tiny"
        )
        whole = PeftModel.from_pretrained(build_model(), done.directory)
        prompt = torch.tensor([client.tokenizer.encode("w5 w6 w7 w8")])
        with torch.no_grad():
            logits["peft"], logits["base"] = whole(ids).logits, build_model()(ids).logits
            for _ in range(6):
                prompt = torch.cat([prompt, whole(prompt).logits[:, -1:].argmax(-1)], 1)
        given["peft"] = tuple(prompt[0, 4:].tolist())

    seen = train_all(house, job_of(house, sharing, rounds=1), LAB, monkeypatch, generate)
    assert seen.errors == {}
    for layer, held in seen.after["bob", 0].items():
        for mine, restored in zip(held, given["restored"][layer], strict=True):
            assert (mine is None and restored is None) or np.array_equal(mine, restored)
    assert (logits["split"] - logits["base"]).abs().max() > 1e-3
    if sharing == "core":  # The export multiplies the core into factor B.
        torch.testing.assert_close(logits["split"], logits["peft"], atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(logits["split"], logits["peft"])
    stop = given["peft"].index(1) if 1 in given["peft"] else 6
    assert given["text"] == given["peft"][:stop]


@pytest.mark.parametrize("threshold", [2, 3])
@pytest.mark.parametrize("sharing", ["alternating", "core"])
def test_a_client_that_holds_other_values_is_found_although_the_server_reads_none(
    house, monkeypatch, sharing, threshold
):
    """In regime frozen what learns is in no digest that the server sees; one client's differs by a quarter in one number.

    Nobody opens the sum that its update is in, also where two of three would be enough to agree.
    """
    one_round = Trainer._round

    def other_start(self, number):
        if self._client.link.name == "carol":
            values = self._client.read()
            values[-1] += np.float32(0.25)  # Of a core, or of factor B: neither is a public constant here.
            self._client.write(values)
        return one_round(self, number)

    monkeypatch.setattr(Trainer, "_round", other_start)
    job = job_of(house, sharing, rounds=1)
    job = job.model_copy(update={"sums": job.sums.model_copy(update={"threshold": threshold})})
    seen = train_all(house, job, FROZEN, monkeypatch)
    assert set(seen.errors) == set(CLIENTS)
    assert all(isinstance(error, AggregationAborted) for error in seen.errors.values())
    codes = {error.code for error in seen.errors.values()}
    assert codes <= {"SS-6004", "SS-6010"}
    assert threshold == 3 or "SS-6004" in codes
    assert not list(house.root.glob("*/run.json"))


@pytest.mark.parametrize(("sharing", "privacy"), [("share-a", ROUND), ("naive", ROUND), ("naive", STEP)])
def test_what_a_regime_cannot_do_is_refused_before_anything_is_sent(house, monkeypatch, sharing, privacy):
    seen = train_all(house, job_of(house, sharing, epochs=1), privacy, monkeypatch, server=LAB)
    assert set(seen.errors) == set(CLIENTS)
    for error in seen.errors.values():
        assert isinstance(error, PolicyDenied)
        assert (error.code, error.exit_code) == ("SS-2001", 3)
        assert any(sharing in detail for detail in error.details)
    for name in CLIENTS:
        ledger = Ledger(house.keys / name / "ledger")
        assert ledger.summary() == ()
        ledger.close()
