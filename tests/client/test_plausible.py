"""Floors on what a server answers: what they see, what they let pass, and that a server could compute the verdict itself.

The oracles are NumPy and the bytes of a spied wire.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import securesplit.client.train as train_module
from securesplit.client.client import Client
from securesplit.client.plausible import FLOORS, LEAST_MOVE, Look, fault_of, look, still
from securesplit.client.train import Trainer
from securesplit.errors import AggregationAborted, InputError
from securesplit.model.descent import Descent, Recipe
from securesplit.model.plan import CutPlan
from securesplit.model.split import split_model
from securesplit.model.store import load_tokenizer
from securesplit.policy.load import parse_policy
from securesplit.policy.schema import Plausible, Policy
from securesplit.protocol.codec import decode
from securesplit.protocol.messages import Backward, Forward, Gradient, Hidden
from securesplit.server.build import build_core
from securesplit.transport.memory import MemoryServer
from tests.client.test_code import SENTINEL, code_of
from tests.client.test_code import joined as coded
from tests.e2e.house import ANY, FROZEN, LAB, ROUND, WORDS, batches_of, policy_of, policy_text, sentences
from tests.model.conftest import CONFIGS

STEP = ROUND.replace('"round"', '"step"')
SHAPE = (2, 5, 6)
TABLE = "\n[aggregation.plausible]\noutput = [0.5, 40.0]\ngradient = [0.1, 300.0]\nspread = 0.05\nsteadiness = 8.0\n"


def rows_of(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread_of(rows: torch.Tensor) -> float:
    """One minus the mean cosine over all pairs of rows, each with itself too."""
    flat = rows.reshape(-1, rows.shape[-1]).double().numpy()
    flat = flat[np.abs(flat).max(1) > 0]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in flat for b in flat]
    return 1 - float(np.mean(cosines))


def verdict(sent: torch.Tensor, received: torch.Tensor, floors: Plausible = FLOORS) -> str | None:
    seen = look(sent, received)
    assert seen is not None
    return fault_of([seen], [], floors)


# ---- one look --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.floats(1e-3, 1e3), st.floats(1e-3, 1.0))
@settings(max_examples=60, deadline=None)
def test_a_look_is_norms_and_pairwise_cosines_and_knows_no_scale(seed, scale, gain):
    sent, received = rows_of(seed), rows_of(seed + 1) + 2
    seen = look(sent, received * scale, gain=gain)
    want = np.linalg.norm(received.double()) * scale / np.linalg.norm(sent.double()) / gain
    assert seen.ratio == pytest.approx(want, rel=1e-5)
    assert seen.spread == pytest.approx(spread_of(received) / spread_of(sent), rel=1e-4)
    assert not seen.blank
    both = look(sent * scale, received * scale, gain=gain)
    assert both.ratio == pytest.approx(seen.ratio / scale, rel=1e-5)
    assert both.spread == pytest.approx(seen.spread, rel=1e-4)


@given(
    st.integers(0, 10_000),
    st.integers(0, math.prod(SHAPE) - 1),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.floats(1e-300, 1e-3),
    st.floats(1e3, 1e300),
)
@settings(max_examples=60, deadline=None)
def test_nan_and_infinity_never_pass_however_wide_the_floors(seed, place, value, least, most):
    received = rows_of(seed)
    received.view(-1)[place] = value
    wide = Plausible(output=(least, most), gradient=(least, most), spread=0.0, steadiness=1e300)
    seen = look(rows_of(seed + 1), received)
    assert fault_of([seen], [], wide) is not None
    assert fault_of([], [seen], wide) is not None
    assert fault_of([Look(math.nan, 1.0)], [], wide) == "size"
    assert fault_of([Look(1.0, math.nan)], [], wide) == "spread"


@pytest.mark.parametrize(
    ("received", "fault"),
    [
        (torch.zeros(SHAPE), "size"),
        (rows_of(1) * 1e-12, "size"),
        (rows_of(1) * 1e12, "size"),
        (torch.ones(SHAPE), "spread"),
        (torch.ones(SHAPE) * torch.arange(1.0, 11).reshape(2, 5, 1), "spread"),
        (torch.ones(SHAPE) + 1e-4 * rows_of(1), "spread"),
        (rows_of(1) * (torch.arange(5) > 0)[None, :, None], "spread"),
        (rows_of(1), None),
        (rows_of(1) * 300, None),
        (rows_of(1) + 3, None),
    ],
    ids=[
        "zeros",
        "nearly",
        "huge",
        "constant",
        "one-direction",
        "nearly-constant",
        "blank-rows",
        "honest",
        "long",
        "common",
    ],
)
def test_what_is_no_honest_output_is_named(received, fault):
    assert verdict(rows_of(0), received) == fault


def test_gradients_may_be_blank_behind_the_last_scored_token_and_what_was_zero_says_nothing():
    received = rows_of(1) * (torch.arange(5) < 4)[None, :, None]
    seen = look(rows_of(0), received)
    assert seen.blank
    assert fault_of([], [Look(seen.ratio, seen.spread)], FLOORS) is None
    assert look(torch.zeros(SHAPE), rows_of(1)) is None
    assert look(torch.full(SHAPE, math.nan), rows_of(1)) is None, "the gate lets none leave"


def test_dead_rows_are_left_out_and_still_hide_no_nan():
    """Padding of zeros: its gradient, a million times too long in honest work, says nothing."""
    alive = torch.arange(10) % 5 > 1
    sent, received = rows_of(0), rows_of(1)
    received[:, :2] *= 1e6
    assert fault_of([], [look(sent, received)], FLOORS) == "size"
    seen = look(sent, received, alive=alive)
    assert seen.ratio == pytest.approx(float(received[:, 2:].norm() / sent[:, 2:].norm()), rel=1e-6)
    assert fault_of([], [seen], FLOORS) is None
    received[0, 0, 0] = math.nan
    assert fault_of([], [look(sent, received, alive=alive)], FLOORS) == "size"
    assert look(1e-30 * sent, torch.zeros(SHAPE)) is None, "float32 loses it on the way"


def test_rows_that_left_alike_may_come_back_alike():
    sent = torch.ones(SHAPE)
    assert verdict(sent, torch.ones(SHAPE)) is None
    assert verdict(rows_of(0)[:1, :1], rows_of(1)[:1, :1]) is None, "one row has nothing to be compared with"


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=9), st.floats(1.0, 100.0), st.floats(0.01, 100.0))
@settings(max_examples=60, deadline=None)
def test_steadiness_is_about_the_median_either_way_and_knows_no_scale(ratios, factor, scale):
    floors = FLOORS.model_copy(update={"steadiness": factor, "output": (1e-9, 1e9), "gradient": (1e-9, 1e9)})
    middle = float(np.median(ratios))
    broken = max(max(ratios) / middle, middle / min(ratios))
    if abs(broken - factor) < 1e-9:
        return
    looks = [Look(scale * ratio, 1.0) for ratio in ratios]
    want = "steadiness" if broken > factor else None
    assert fault_of(looks, [], floors) == fault_of([], looks, floors) == want


@given(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=12), st.integers(0, 4), st.floats(1e-6, 1e2))
@settings(max_examples=60, deadline=None)
def test_a_part_stands_still_below_its_root_mean_square(values, cut, least):
    moved, parts = np.array(values), [np.array(values)[:cut], np.array(values)[cut:]]
    sizes = [math.sqrt(sum(v * v for v in part) / len(part)) for part in parts if len(part)]
    if any(math.isclose(size, least, rel_tol=1e-9) for size in sizes):
        return
    assert still(moved, (cut, len(moved) - cut), least) == any(size < least for size in sizes)
    moved[0] = math.nan
    assert still(moved, (cut, len(moved) - cut), least)


# ---- the policy ------------------------------------------------------------------------------------------------------


def with_floors(extra: str, privacy: str = LAB) -> str:
    return policy_text(privacy).replace("[limits]", extra + "\n[limits]")


def test_a_policy_without_the_keys_is_the_policy_that_it_was():
    plain, full = policy_of(), parse_policy(with_floors("min_update = 1e-6" + TABLE))
    assert b"plausible" not in plain.canonical()
    assert b"min_update" not in plain.canonical()
    assert plain.aggregation.plausible is plain.aggregation.min_update is None
    assert full.digest != plain.digest
    assert Policy.model_validate_json(full.canonical()) == full
    assert full.aggregation.plausible.output == (0.5, 40.0)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[0.5, 40.0]", "[0.0, 40.0]", "aggregation.plausible.output"),
        ("[0.5, 40.0]", "[40.0, 0.5]", "output: the first number must be below"),
        ("[0.5, 40.0]", "[0.5, inf]", "aggregation.plausible.output"),
        ("[0.5, 40.0]", "[0.5]", "aggregation.plausible.output"),
        ("[0.1, 300.0]", "[0.1, nan]", "aggregation.plausible.gradient"),
        ("spread = 0.05", "spread = 1.0", "aggregation.plausible.spread"),
        ("spread = 0.05", "", "aggregation.plausible.spread: Field required"),
        ("steadiness = 8.0", "steadiness = 0.5", "aggregation.plausible.steadiness"),
        ("steadiness = 8.0", "steadiness = 8.0\noff = true", "aggregation.plausible.off: unknown key"),
        ("min_update = 1e-6", "min_update = 0.0", "aggregation.min_update"),
    ],
)
def test_floors_that_are_none_are_refused(old, new, said):
    with pytest.raises(InputError) as caught:
        parse_policy(with_floors("min_update = 1e-6" + TABLE).replace(old, new))
    assert any(said in line for line in caught.value.details), caught.value.details


# ---- honest work, every architecture and regime ----------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    """A sum of one; and all looks of each round, which are forgotten when it is judged."""
    looks = []
    judge = train_module.require_plausible

    def kept(client, factor, start, before, **options):
        looks.append((list(client.remote.witness.outputs), list(client.remote.witness.gradients)))
        judge(client, factor, start, before, **options)

    def one(link, folder, policy, update, **_):
        words = np.zeros(1, dtype=np.uint32)
        opened = SimpleNamespace(mean=update.vector, total_weight=1, survivors=(link.name,), ring_sum=words)
        return SimpleNamespace(aggregate=opened, contribution=words, heard=b"")

    monkeypatch.setattr(train_module, "secure_sum", one)
    monkeypatch.setattr(train_module, "require_plausible", kept)
    return looks


class Standing(Descent):
    """Says that it moves, and does not."""

    def step(self):
        self.rate = 1e-2
        for parameter in self._parameters:
            parameter.grad = None
        return True


def model_of(family: str) -> transformers.PreTrainedModel:
    """A random one with the norms and biases that training starts from, and weights four times the usual."""
    kind, sizes = CONFIGS[family]
    config = kind(**{**sizes, "vocab_size": len(WORDS), "tie_word_embeddings": False})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data * (4 if parameter.ndim == 2 else 1)
    return model


def many(privacy: str) -> str:
    """The same policy for as many releases as a test makes."""
    return privacy if privacy == LAB else privacy.replace("= 3\n", "= 60\n").replace("= 2\n", "= 60\n")


def site(house, family, privacy, ledger, **schedule):
    job = house.job(rounds=2, epochs=1 if privacy == ROUND else 2)
    job = job.model_copy(update={"adapters": job.adapters.model_copy(update={"targets": ()})})
    policy = policy_of(many(privacy))
    parts = split_model(model_of(family), CutPlan(front=1, back=1))
    core = build_core(job, policy, parts.middle, "0" * 64)
    link, spy = house.link(MemoryServer(core), policy)
    link.folder = house.folder("alice")
    client = Client(
        parts.front, parts.back, load_tokenizer(house.model), model="0" * 64, policy=policy, link=link, ledger=ledger
    )
    return client, spy


@pytest.mark.parametrize("privacy", [LAB, FROZEN, ROUND, STEP], ids=["open", "frozen", "round", "step"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.filterwarnings("ignore:.*loss_type.*")
def test_honest_training_never_abstains(house, open_ledger, alone, family, privacy):
    client, _ = site(house, family, privacy, None if privacy == LAB else open_ledger())
    trained = Trainer(
        client, batches_of(client, sentences(8, seed=1)), batches_of(client, sentences(2, seed=2)), answers=None,
        progress=lambda *_: None,
    ).run()  # fmt: skip
    assert len(trained.rounds) == len(alone) == 2
    seen = [look for outputs, gradients in alone for look in (*outputs, *gradients)]
    assert len(seen) >= (4 if privacy == FROZEN else 2 * 6)
    # With a margin of at least five on every floor.
    assert all(5 * FLOORS.output[0] < s.ratio < FLOORS.output[1] / 5 for s in seen)
    assert all(s.spread > 5 * FLOORS.spread for s in seen)
    for looks in (looks for both in alone for looks in both if looks):
        ratios = [s.ratio for s in looks]
        assert max(ratios) < FLOORS.steadiness / 5 * np.median(ratios) < FLOORS.steadiness**2 / 25 * min(ratios)


@pytest.mark.parametrize("privacy", [LAB, STEP, FROZEN], ids=["open", "step", "frozen"])
@pytest.mark.parametrize("sentinel", [SENTINEL, None])
def test_behind_a_code_honest_training_does_not_abstain_either(house, open_ledger, alone, sentinel, privacy):
    """What is sent has k columns there, and what comes back D; the public gain and the code's own scale are in between."""
    ledger = None if privacy == LAB else open_ledger()
    client, _, _ = coded(house, policy_of(many(privacy)), code_of(house, sentinel=sentinel), ledger=ledger)
    client.link.folder = house.folder("alice")
    Trainer(client, batches_of(client, sentences(6, seed=1)), (), answers=None, progress=lambda *_: None)._round(0)
    assert len(alone[-1][0]) >= 1
    assert all(5 * FLOORS.output[0] < s.ratio < FLOORS.output[1] / 5 for both in alone[-1] for s in both)


# ---- who could know the verdict --------------------------------------------------------------------------------------


@pytest.mark.parametrize("privacy", [FROZEN, STEP], ids=["frozen", "step"])
def test_under_a_private_policy_the_server_could_compute_every_look_itself(house, open_ledger, alone, privacy):
    """From the messages alone, with its own reading of the bytes: abstaining tells it nothing that it does not have."""
    client, spy = site(house, "llama", privacy, open_ledger())
    trainer = Trainer(client, batches_of(client, sentences(8, seed=1)), (), answers=None, progress=lambda *_: None)
    trainer._round(0)
    outputs, gradients, gain = [], [], 1.0

    def values(blob):
        return np.frombuffer(blob.data, dtype="<f4").reshape(blob.shape).astype(np.float64)

    received = [m for m in (decode(data, ANY) for data in spy.received) if isinstance(m, Hidden | Gradient)]
    asked = [m for m in spy.messages() if isinstance(m, Forward | Backward)]
    for request, answer in zip(asked, received, strict=True):
        gain = request.gain if isinstance(request, Forward) else gain
        sent = values(request.hidden if isinstance(request, Forward) else request.gradient)
        came = values(answer.hidden if isinstance(answer, Hidden) else answer.gradient)
        kind = outputs if isinstance(request, Forward) else gradients
        spread = spread_of(torch.from_numpy(came)) / spread_of(torch.from_numpy(sent))
        kind.append((np.linalg.norm(came) / np.linalg.norm(sent) / gain, spread))
    for mine, theirs in zip(alone[0], (outputs, gradients), strict=True):
        assert [(s.ratio, s.spread) for s in mine] == [pytest.approx(pair, rel=1e-5) for pair in theirs]
    assert (len(outputs), len(gradients)) == ((3, 0) if privacy == FROZEN else (6, 6))


def test_only_an_unsafe_policy_or_one_that_says_so_looks_at_the_update(house, open_ledger, alone):
    moved = LEAST_MOVE * house.job().optimiser.client_lr
    for privacy, extra, abstains in (
        (LAB, "", True),
        (FROZEN, "", False),
        (FROZEN, f"min_update = {moved}", True),
    ):
        client, _ = site(house, "llama", privacy, None if privacy == LAB else open_ledger())
        object.__setattr__(client, "policy", parse_policy(with_floors(extra, privacy)))
        trainer = Trainer(client, batches_of(client, sentences(8, seed=1)), (), answers=None, progress=lambda *_: None)
        trainer._descent = lambda c=client: Standing(c.parameters(), Recipe(1e-2))
        if abstains:
            with pytest.raises(AggregationAborted) as caught:
                trainer._round(0)
            assert caught.value.code == "SS-6040"
        else:
            trainer._round(0)
