"""The hijacking server: what it crafts, how it hides, what it gains, what it never gains, and whether its victim sees it.

Oracles: NumPy, finite differences, an honest twin of each run, the ceiling, and the guess without looking.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.bounds import ceiling
from attacks.config import config, settings_of
from attacks.hijack import ATTACKS, Evasion, HijackingServer
from attacks.trap import Settings
from scripts.hijack.study import WORTH, Worth, alarms, detection, watch, worth
from scripts.hijack.world import Parts, Setting, trap_for
from securesplit.client.guardian import LIMIT, allowed
from securesplit.model.store import load_back, load_front, load_middle

SMALL = Settings(inverter_rate=3e-3, critic_rate=3e-3, batch=16, warm=20, tokens=200, critic=16)


@pytest.fixture(scope="module")
def parts(model_dirs):
    where = model_dirs(2)
    return Parts(
        lambda: load_front(where),
        lambda: load_middle(where),
        lambda: load_back(where),
        ("q_proj", "v_proj", "down_proj"),
    )


@pytest.fixture(scope="module")
def texts(draw):
    """Private, public, and victims' sequences: of one distribution, and no two alike."""
    return draw(40, 8, seed=21), draw(150, 8, seed=22), draw(150, 8, seed=23)


def trap(parts, texts, mu=0.0, clip=20.0, **options):
    return trap_for(parts, Setting(mu=mu, clip=clip, client_rate=1e-2), texts[1], settings=SMALL, **options)


def rows_of(seed: int, shape=(2, 8, 32)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the craft --------------------------------------------------------------------------------------------------------


def test_its_settings_and_its_note_are_shipped():
    assert settings_of("hijack", Settings).batch >= 1
    note = config().attacks["hijack"]
    assert note.conduct == "active"
    assert ATTACKS[0].name == "hijack"
    assert "bench-hijack" in ATTACKS[0].blocked(None, None)


def test_the_crafted_gradient_is_that_of_the_inverters_loss(parts, texts):
    made = trap(parts, texts)
    tokens = texts[0][:2]
    with torch.no_grad():
        rows = parts.front()(tokens)
    crafted = made.gradient(rows, tokens)
    names = made.reader.candidates.tolist()
    labels = np.array([names.index(t) for t in tokens.flatten().tolist()])

    def loss(at):
        with torch.no_grad():
            scores = made.reader(at).flatten(0, 1).double().numpy()
        top = scores.max(1, keepdims=True)
        logs = scores - top - np.log(np.exp(scores - top).sum(1, keepdims=True))
        return -logs[np.arange(len(labels)), labels].mean()

    for seed in range(3):
        aside = rows_of(seed, rows.shape)
        slope = (loss(rows + 1e-2 * aside) - loss(rows - 1e-2 * aside)) / 2e-2
        assert slope == pytest.approx(float((crafted * aside).sum()), rel=0.02, abs=1e-5)


def test_without_labels_it_takes_its_own_guess_for_true(parts, texts):
    made = trap(parts, texts)
    with torch.no_grad():
        rows = parts.front()(texts[0][:4])
    guessed = made.read(rows)
    assert torch.equal(made.gradient(rows), made.gradient(rows, guessed))


def test_learning_moves_its_copy_of_a_and_reads_better_through_noise(parts, texts):
    made = trap(parts, texts, mu=60.0)
    losses = [made.learn() for _ in range(120)]
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.05
    moved = [p for n, p in made._front.named_parameters() if "lora_B" in n]
    assert any(float(p.detach().abs().max()) > 0 for p in moved)


def test_the_critic_pulls_a_clients_rows_towards_its_own(parts, texts):
    made = trap(parts, texts, craft="discriminator")
    with torch.no_grad():
        rows = parts.front()(texts[0][:16]) + 3.0
    for _ in range(60):
        crafted = made.gradient(rows)
    # Against the shift, on average over coordinates.
    assert float((rows - 1e3 * crafted).mean()) < float(rows.mean())
    assert crafted.shape == rows.shape


# ---- the ways to hide -------------------------------------------------------------------------------------------------


class Crafts:
    def __init__(self, crafted):
        self.crafted = crafted

    def learn(self):
        return 0.0

    def gradient(self, rows, tokens=None):
        return self.crafted


DUE, CRAFTED = rows_of(1), 1e-25 * rows_of(2)


def answers(steps: int, trap=None, **way):
    server = HijackingServer(trap or Crafts(CRAFTED), lambda rows, _: rows * DUE, Evasion(**way))
    # The honest answer to step k is (k + 1) times DUE.
    return [(server.answer(torch.full(DUE.shape, k + 1.0), DUE), server.hijacked) for k in range(steps)]


def lengths(rows):
    return np.linalg.norm(rows.double().numpy().reshape(len(rows), -1), axis=1)


def test_a_whole_hijack_points_where_the_trap_says_and_is_as_long_as_the_honest_answer():
    (answer, hijacked), *_ = answers(1)
    assert hijacked
    unit = CRAFTED.double().numpy() / lengths(CRAFTED)[:, None, None]
    assert np.allclose(answer.numpy(), unit * lengths(DUE)[:, None, None], atol=1e-5)
    assert torch.equal(answers(1, bare=True)[0][0], CRAFTED)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_mixture_is_one_of_directions(share):
    answer = answers(1, share=share)[0][0].double().numpy()
    crafted = CRAFTED.double().numpy() * (lengths(DUE) / lengths(CRAFTED))[:, None, None]
    mixed = share * crafted + (1 - share) * DUE.double().numpy()
    for got, want in zip(answer, mixed, strict=True):
        assert np.sum(got * want) / np.linalg.norm(got) / np.linalg.norm(want) == pytest.approx(1, abs=1e-6)
    assert lengths(torch.from_numpy(answer)) == pytest.approx(lengths(DUE), rel=1e-5)
    if not share:
        assert np.allclose(answer, DUE.numpy(), atol=1e-6)


def test_it_waits_and_takes_turns():
    made = answers(9, after=2, every=3)
    assert [hijacked for _, hijacked in made] == [False, False, True, False, False, True, False, False, True]
    assert torch.equal(made[0][0], DUE)
    assert torch.equal(made[4][0], 5 * DUE)
    assert not torch.allclose(made[5][0], 6 * DUE)


def test_a_replay_is_an_old_answer_at_the_new_length():
    server = HijackingServer(None, lambda rows, _: rows, Evasion(replay=2))
    given = [rows_of(seed) for seed in range(5)]
    made = [(server.answer(rows, DUE), server.hijacked) for rows in given]
    assert [hijacked for _, hijacked in made] == [False, False, True, True, True]
    assert torch.equal(made[1][0], given[1])
    unit = given[1].double().numpy() / lengths(given[1])[:, None, None]
    assert np.allclose(made[3][0].numpy(), unit * lengths(given[3])[:, None, None], atol=1e-5)
    # Another length of text cannot be answered with an old one.
    assert torch.equal(server.answer(rows_of(1, (2, 5, 32)), DUE), rows_of(1, (2, 5, 32)))
    assert not server.hijacked


@given(st.floats(-1, 1), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_stated_likeness_is_met_in_every_row(likeness, seed):
    server = HijackingServer(Crafts(1e-22 * rows_of(seed)), lambda rows, _: rows, Evasion(likeness=likeness))
    due = rows_of(seed + 1)
    answer = server.answer(due, due).double().numpy()
    wide = due.double().numpy()
    cosines = (answer * wide).sum(2) / np.linalg.norm(answer, axis=2) / np.linalg.norm(wide, axis=2)
    assert np.allclose(cosines, likeness, atol=1e-5)
    assert np.allclose(np.linalg.norm(answer, axis=2), np.linalg.norm(wide, axis=2), rtol=1e-5)


@pytest.mark.parametrize(
    "way", [{"share": 1.1}, {"share": -0.1}, {"every": 0}, {"after": -1}, {"replay": -1}, {"likeness": 1.01}]
)
def test_ways_that_are_none_are_refused(way):
    with pytest.raises(ValueError, match=r"\.\.|cosine"):
        Evasion(**way)


# ---- what it is worth, and what it never is --------------------------------------------------------------------------


_KNOWN: dict[tuple[str, float, int], Worth] = {}


def gained(parts, texts, variant, mu, steps=60) -> Worth:
    """Computed once for all tests."""
    if (variant, mu, steps) not in _KNOWN:
        setting = Setting(mu=mu, clip=20.0, client_rate=1e-2, batch=8)
        _KNOWN[variant, mu, steps] = worth(variant, parts, setting, *texts, steps, lambda *_: None)
    return _KNOWN[variant, mu, steps]


@pytest.mark.parametrize("mu", [0.0, 60.0])
def test_a_hijacked_a_is_read_better_than_an_honest_one(parts, texts, mu):
    """Without noise exact search gives the server the text, so that its craft has no wrong label."""
    honest, blind = gained(parts, texts, "honest", mu), gained(parts, texts, "full", mu)
    hijacked = gained(parts, texts, "known text", mu, steps=120)
    assert hijacked.recovery > honest.recovery + 0.1
    assert hijacked.recovery > hijacked.kappa + 0.2
    assert hijacked.recovery >= blind.recovery >= honest.recovery - 0.03


@pytest.mark.parametrize("variant", ["honest", "full", "known text"])
@pytest.mark.parametrize("mu", [0.3, 1.7])
def test_clip_and_noise_hold_the_ceiling_whatever_a_became(parts, texts, mu, variant):
    """The formal bound of a sequence, at the lower end of the interval over sequences."""
    found = gained(parts, texts, variant, mu, steps=0 if variant == "honest" else 40)
    hits = np.array(found.hits)
    error = hits.std(ddof=1) / math.sqrt(len(hits)) / 8
    assert found.bound == pytest.approx(ceiling(found.kappa, mu))
    assert found.recovery - 2 * error <= found.bound
    # Far below it, in truth: one sequence's mu is shared by all of its positions.
    assert found.recovery <= ceiling(found.kappa, mu / 2) + 2 * error


def test_at_endless_noise_it_names_the_commonest_token(parts, texts):
    found = gained(parts, texts, "known text", 1e-3, steps=20)
    error = np.std(found.hits) / math.sqrt(len(found.hits)) / 8
    assert found.recovery <= found.kappa + 3 * error


def test_where_the_noise_is_missing_the_bound_is_broken(parts, texts):
    """The check above can fail: the same hijack, read through no noise, against the ceiling of the noise that was due."""
    found = gained(parts, texts, "known text", 0.0, steps=120)
    assert found.recovery > ceiling(found.kappa, 0.3) + 0.1


# ---- whether its victim sees it --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched_run(parts, texts):
    setting = Setting(server_rate=1e-3, client_rate=2e-3, batch=4)
    return watch(parts, setting, texts[0], texts[1], 200, lambda *_: None)


def test_over_200_honest_steps_hijacks_are_seen_and_honest_work_is_not(watched_run):
    found = detection(watched_run)
    assert found["watched"] == 200
    assert found["false_alarms"] <= 0.01 * 200
    for name in ("full", "rescaled", "discriminator", "replay"):
        assert found["caught"][name]["rate"] >= 0.95, name
    # What is diluted is seen as long as B has not moved far.
    assert detection(watched_run[:60])["caught"]["half"]["rate"] >= 0.95
    assert found["caught"]["tenth"]["rate"] <= found["caught"]["half"]["rate"]
    sampled = detection(watched_run, every=4)
    assert sampled["false_alarms"] == 0
    assert sampled["caught"]["rescaled"]["rate"] >= 0.95


def test_who_knows_the_watch_passes_right_above_what_it_asks_for(watched_run):
    """No secret is in the threshold: what it lets pass is measured in docs/benchmarks/hijack.md, not denied."""
    found = detection(watched_run)
    assert found["caught"]["edge"]["rate"] == 0


def test_alarms_are_counted_as_the_guardian_counts():
    outputs, answers = [1.0] * 6, [(1, 1, 1), (0.7, 0.7, 1), (0.8, 0.6, 1), (1, 1, 1), (1, 1, 1e5), (1, 1, 1)]
    missing, want = 0.0, []
    for i, (rows, records, ratio) in enumerate(answers):
        missing = max(0, missing + allowed(1.0) - (rows + records) / 2)
        if missing > LIMIT or ratio > 1e4:
            want.append(i)
            missing = 0.0
    assert alarms(outputs, answers) == want == [2, 4]


def test_every_variant_of_worth_can_be_built():
    assert all(Evasion(**way) for way in WORTH.values())


@pytest.mark.slow
def test_on_the_pretrained_model():
    from scripts.hijack.smollm import cell

    found = cell("detect:1e-3:none", steps=200, progress=lambda *_: None)["detection"]
    assert found["watched"] == 200
    assert found["false_alarms"] <= 0.01 * 200
    for name in ("full", "rescaled", "discriminator", "replay"):
        assert found["caught"][name]["rate"] >= 0.95, name
