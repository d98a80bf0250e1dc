"""The client's watch on its server: what it computes, what it asks for, whom it stops, and that it stays silent.

The oracles are NumPy's cosines, the server's own engine, finite differences, and the bytes of a spied wire.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import securesplit.client.run as run_module
from attacks.hijack import Evasion, HijackingServer
from securesplit.cli.main import app
from securesplit.client.client import Client
from securesplit.client.guardian import (
    FROZEN,
    LEAST,
    LIMIT,
    RANGE,
    Guardian,
    Watched,
    allowed,
    require_like,
    watched,
)
from securesplit.client.middle import RemoteMiddle
from securesplit.errors import InputError, RemoteProtocolError
from securesplit.model.lora import add_adapters
from securesplit.model.plan import CutPlan
from securesplit.model.store import load_middle
from securesplit.server.engine import Batch as Sent
from securesplit.server.engine import Engine
from securesplit.server.learner import Rows
from tests.client.test_code import SENTINEL, code_of
from tests.client.test_code import joined as coded
from tests.e2e.house import FROZEN as FROZEN_POLICY
from tests.e2e.house import LAB, PLAN, ROUND, batches_of, policy_of, policy_text, sentences

STEP = ROUND.replace('"round"', '"step"')
SHAPE = (2, 5, 6)


def rows_of(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


# ---- one look --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.floats(0.05, 20), st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_step_is_seen_by_cosines_and_lengths(seed, scale, moved):
    output, gradient = rows_of(seed), rows_of(seed + 1)
    public_output, public = output + moved * rows_of(seed + 2), gradient + moved * rows_of(seed + 3)
    seen = watched(output, gradient * scale, public_output, public)
    by_row = [cosine(a, b) for x, y in zip(gradient, public, strict=True) for a, b in zip(x, y, strict=True)]
    by_record = [cosine(x, y) for x, y in zip(gradient, public, strict=True)]
    assert seen.rows == pytest.approx(np.mean(by_row), abs=1e-6)
    assert seen.records == pytest.approx(np.mean(by_record), abs=1e-6)
    assert seen.gradients == pytest.approx(max(0, (np.mean(by_row) + np.mean(by_record)) / 2), abs=1e-6)
    later = [
        cosine(a, b) for x, y in zip(output, public_output, strict=True) for a, b in zip(x[1:], y[1:], strict=True)
    ]
    assert seen.outputs == pytest.approx(np.mean(later), abs=1e-6)
    lengths = [scale * float(x.norm() / y.norm()) for x, y in zip(gradient, public, strict=True)]
    assert seen.ratio == pytest.approx(max(lengths, key=lambda r: abs(math.log(r))), rel=1e-5)


def test_rows_without_a_gradient_do_not_count_and_neither_do_records_without_one():
    public, output = rows_of(1), rows_of(2)
    public[0, 3:] = 0
    public[1] = 0
    assert watched(output, public, output, public) == Watched(1.0, *[pytest.approx(1.0)] * 3)
    # A gradient where there should be none is infinitely too long.
    assert watched(output, public + 1, output, public).ratio == math.inf
    nothing = torch.zeros(SHAPE)
    assert watched(output, nothing, output, nothing) == Watched(1.0, 1.0, 1.0, 1.0)
    assert watched(output, nothing, output, rows_of(1)).gradients == 0


def test_a_hijack_of_one_long_row_is_seen_and_so_is_one_of_all_short_ones():
    public, output = rows_of(1), rows_of(2)
    public[:, 2] *= 1e3
    for turned in ([2], [0, 1, 3, 4]):
        received = public.clone()
        received[:, turned] *= -1
        assert watched(output, received, output, public).gradients < 0.4


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_more_is_asked_for_the_more_alike_the_outputs_are(a, b):
    assert LEAST <= allowed(a) < 1
    assert a > b or allowed(a) <= allowed(b)
    assert allowed(1.0) > 0.95
    assert allowed(0.5) == LEAST


# ---- the sum of what is missing ---------------------------------------------------------------------------------------


class Unused(torch.nn.Module):
    pass


def silent() -> Guardian:
    return Guardian(Unused(), every=1)


@pytest.mark.parametrize("place", range(4))
def test_nan_never_passes(place):
    with pytest.raises(RemoteProtocolError) as caught:
        silent().count(Watched(*[math.nan if i == place else 1.0 for i in range(4)]))
    assert caught.value.code == "SS-4024"


@pytest.mark.parametrize("ratio", [0.0, RANGE * 1.01, 0.99 / RANGE, math.inf])
def test_lengths_out_of_range_do_not_pass(ratio):
    with pytest.raises(RemoteProtocolError):
        silent().count(Watched(1.0, 1.0, 1.0, ratio))
    silent().count(Watched(1.0, 1.0, 1.0, RANGE * 0.99))


def test_what_is_to_spare_is_not_saved_for_a_later_hijack():
    guardian = silent()
    for _ in range(100):
        guardian.count(Watched(0.8, 0.9, 0.9, 1.0))
    assert guardian.missing == 0
    for _ in range(math.floor(LIMIT / LEAST + 1e-9)):
        guardian.count(Watched(0.8, 0.001, 0.001, 1.0))
    assert guardian.allowed == pytest.approx(LEAST)
    with pytest.raises(RemoteProtocolError):
        guardian.count(Watched(0.8, 0.001, 0.001, 1.0))
    with pytest.raises(RemoteProtocolError):  # An unmoved B is caught at once.
        silent().count(Watched(1.0, 0.0, 0.0, 1.0))


def test_an_honest_row_that_turned_around_counts_no_more_than_one_that_turned_aside():
    guardian = silent()
    guardian.count(Watched(0.5, 0.1, -0.9, 1.0))
    assert guardian.missing == pytest.approx(LEAST)


def test_a_blunt_watch_says_so_once(caplog):
    guardian = silent()
    for _ in range(3):
        guardian.count(Watched(0.3, 0.3, 0.3, 1.0))
    assert len(caplog.records) == 1
    assert "coarsest" in caplog.text


# ---- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sentinel", ["plain", None, SENTINEL], ids=["no-code", "code", "sentinel"])
@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_it_computes_what_an_honest_server_computes(house, gain, sentinel):
    code = None if sentinel == "plain" else code_of(house, sentinel=sentinel)
    middle = load_middle(house.model)
    add_adapters(middle, 2, 4.0, ("q_proj", "v_proj"), seed=7)
    engine = Engine(middle, learning_rate=1e-3, code=code)
    width = 32 if code is None else code.width
    rows, gradient = rows_of(1, (3, 6, width)), rows_of(2, (3, 6, 32))
    (output,) = engine.forward([Sent("alice", 0, (6, 6, 6), rows.reshape(18, -1), gain)], learn=True)
    (received,) = engine.backward([Rows("alice", 0, gradient.reshape(18, -1))])
    seen = Guardian(load_middle(house.model), every=1, code=code).judge(
        rows, gain, output.reshape(3, 6, -1), gradient=gradient, received=received.reshape(3, 6, -1)
    )
    assert seen.outputs == pytest.approx(1, abs=1e-6)
    assert seen.gradients == pytest.approx(1, abs=1e-6)
    assert seen.ratio == pytest.approx(1, abs=1e-5)


def test_it_leaves_no_gradients_behind(house):
    middle = load_middle(house.model)
    guardian = Guardian(middle, every=1)
    rows, gradient = rows_of(1, (1, 4, 32)), rows_of(2, (1, 4, 32))
    with torch.no_grad():
        output = middle(rows)
    with pytest.raises(RemoteProtocolError):
        guardian.judge(rows, 1.0, output, gradient=gradient, received=-gradient)
    assert not any(p.requires_grad or p.grad is not None for p in middle.parameters())


# ---- a whole client ---------------------------------------------------------------------------------------------------


def guarded(client: Client, house, every: int = 1) -> Client:
    client.remote.guardian = Guardian(
        load_middle(house.model), every=every, learns=client.regime != "frozen", code=client.code
    )
    return client


def many(privacy: str) -> str:
    """The same policy for as many releases as a test makes."""
    return privacy if privacy == LAB else privacy.replace("= 3\n", "= 60\n").replace("= 2\n", "= 60\n")


def slower(job, rate):
    return job.model_copy(update={"optimiser": job.optimiser.model_copy(update={"server_lr": rate})})


def learn(client: Client, steps: int, factor: str = "B") -> list[float]:
    batches = batches_of(client, sentences(12, seed=1))
    client.train(factor)
    optimiser = torch.optim.AdamW(client.parameters(), lr=client.job.optimiser.client_lr, weight_decay=0.0)
    losses = []
    for number in range(steps):
        losses.append(client.step(batches[number % len(batches)]))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return losses


@pytest.mark.parametrize(("rate", "steps"), [(1e-3, 200), (5e-3, 60)])
def test_two_hundred_honest_steps_raise_no_alarm(house, rate, steps):
    client, _, _ = house.joined(slower(house.job(), rate), policy_of(LAB))
    losses = learn(guarded(client, house), steps)
    assert client.remote.guardian.steps == steps
    assert np.mean(losses[-20:]) < np.mean(losses[:20])


@pytest.mark.parametrize("privacy", [ROUND, STEP], ids=["round", "step"])
def test_honest_steps_through_noise_raise_no_alarm(house, open_ledger, privacy):
    policy = policy_of(many(privacy))
    client, _, _ = house.joined(slower(house.job(), 1e-3), policy, ledger=open_ledger())
    batches = batches_of(guarded(client, house), sentences(8, seed=1))
    client.train("B")
    for batch in batches * 5:
        client.step(batch)  # A and C stand still; B learns.
    assert client.remote.guardian.steps == 5 * len(batches)


@pytest.mark.parametrize("sentinel", [SENTINEL, None])
def test_behind_a_code_too(house, sentinel):
    client, _, _ = coded(house, policy_of(LAB), code_of(house, sentinel=sentinel))
    learn(guarded(client, house), 20)
    assert client.remote.guardian.steps == 20


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_rounding_on_the_wire_is_no_hijack(house, codec):
    client, _, _ = house.joined(slower(house.job(), 1e-5).model_copy(update={"codec": codec}), policy_of(LAB))
    learn(guarded(client, house), 12)
    assert client.remote.guardian.steps == 12
    assert client.remote.guardian.missing < LIMIT / 2


class Hijacked(Engine):
    """B, whose answers to a backward another object gives."""

    server: HijackingServer
    due: torch.Tensor

    def forward(self, batches, *, learn):
        (sent,) = batches
        self.rows, self.lengths = sent.hidden.detach().clone(), sent.lengths
        return super().forward(batches, learn=learn)

    def backward(self, gradients):
        (brought,) = gradients
        (due,) = super().backward(gradients)
        self.due = due.clone()
        shape = (len(self.lengths), self.lengths[0], -1)
        return (self.server.answer(self.rows.reshape(shape), brought.values.reshape(shape)).reshape(self.due.shape),)


class Crafts:
    """A trap that has learnt nothing: a fixed direction for every row."""

    def learn(self) -> float:
        return 0.0

    def gradient(self, rows, tokens=None):
        return rows_of(3, rows.shape[-1:]).expand_as(rows)


def hijack(core, way: Evasion, trap=None) -> Hijacked:
    engine = core._engine
    engine.__class__ = Hijacked
    honest: Callable = lambda rows, _: engine.due.reshape(rows.shape)  # noqa: E731
    engine.server = HijackingServer(trap or Crafts(), honest, way)
    return engine


@pytest.mark.parametrize(
    "way",
    [Evasion(), Evasion(bare=True), Evasion(share=0.5), Evasion(after=10), Evasion(every=3), Evasion(replay=1)],
    ids=["whole", "bare", "half", "late", "every-third", "replay"],
)
def test_a_hijacked_gradient_ends_the_run_before_it_is_used(house, way):
    client, _, core = house.joined(slower(house.job(), 1e-4), policy_of(LAB))
    hijack(core, way)
    guarded(client, house)
    with pytest.raises(RemoteProtocolError) as caught:
        learn(client, 40)
    assert caught.value.code == "SS-4024"
    assert caught.value.exit_code == 5
    assert "gradients" in str(caught.value)
    assert client.remote.guardian.steps <= way.after + 3 * way.every + 3 * way.replay
    # The step's gradient reached nothing of A.
    assert all(p.grad is None for p in client.front.parameters())


def test_nothing_stops_it_without_the_watch(house):
    client, _, core = house.joined(house.job(), policy_of(LAB))
    hijack(core, Evasion())
    learn(client, 5)


def test_the_server_cannot_tell_that_it_is_watched(house):
    """The same bytes leave, whoever watches."""

    def sent(every: int) -> list[bytes]:
        client, spy, _ = house.joined(house.job(), policy_of(LAB))
        if every:
            guarded(client, house, every)
        learn(client, 4)
        return spy.sent[2:]  # Without the handshake's fresh numbers.

    assert sent(1) == sent(0)


def test_coins_choose_one_step_in_n(house, monkeypatch):
    client, _, _ = house.joined(house.job(), policy_of(LAB))
    guarded(client, house, every=4)
    asked = []

    def coin(n):
        asked.append(n)
        return (0, 1, 2, 3)[len(asked) % 4]

    monkeypatch.setattr(secrets, "randbelow", coin)
    learn(client, 16)
    assert asked == [4] * 16
    assert client.remote.guardian.steps == 4
    with pytest.raises(ValueError, match="one step in n"):
        Guardian(load_middle(house.model), every=0)


def test_evaluation_of_a_b_that_learns_is_not_watched(house):
    client, _, _ = house.joined(house.job(), policy_of(LAB))
    guarded(client, house)
    learn(client, 2)
    client.train(None)
    client.evaluate(batches_of(client, sentences(4, seed=2)))
    assert client.remote.guardian.steps == 2


# ---- a frozen B -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "passes"),
    [
        (lambda rows: rows, True),
        (lambda rows: rows.bfloat16().float(), True),
        (torch.zeros_like, False),
        (torch.ones_like, False),
        (lambda rows: rows * 1.1, False),
        (lambda rows: rows + 0.5 * rows.std() * rows_of(1, rows.shape), False),
        (lambda rows: rows.roll(1, 0), False),
    ],
    ids=["honest", "rounded", "zeros", "constant", "longer", "noised", "shifted"],
)
def test_a_frozen_b_must_answer_what_the_published_one_answers(house, open_ledger, monkeypatch, wrong, passes):
    forward = Engine.forward
    monkeypatch.setattr(Engine, "forward", lambda self, *a, **k: tuple(wrong(x) for x in forward(self, *a, **k)))
    client, _, _ = house.joined(house.job(), policy_of(FROZEN_POLICY), ledger=open_ledger())
    guarded(client, house)
    if passes:
        learn(client, 6)
        assert client.remote.guardian.steps == len(batches_of(client, sentences(12, seed=1)))  # Each crosses once.
        return
    with pytest.raises(RemoteProtocolError) as caught:
        learn(client, 1)
    assert caught.value.code == "SS-4024"
    assert "answers" in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_output_that_is_no_number_passes(value):
    with pytest.raises(RemoteProtocolError):
        require_like(torch.full(SHAPE, value), rows_of(1))
    require_like(rows_of(1), rows_of(1))
    assert FROZEN > 0.9


# ---- wiring -----------------------------------------------------------------------------------------------------------


def test_a_client_from_a_model_directory_watches_when_told_to(house, tmp_path):
    def site(model, watch):
        link = house.joined(house.job(), policy_of(LAB))[0].link
        return Client.from_pretrained(model, PLAN, policy_of(LAB), link, watch=watch)

    assert site(house.model, 0).remote.guardian is None
    remote: RemoteMiddle = site(house.model, 3).remote
    assert remote.guardian is not None
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in house.model.iterdir():
        if file.name != "middle.safetensors":
            (mine / file.name).write_bytes(file.read_bytes())
    site(mine, 0)
    with pytest.raises(InputError) as caught:
        site(mine, 3)
    assert caught.value.code == "SS-1405"
    assert CutPlan(front=1, back=1) == PLAN


def test_the_command_passes_it_on(tmp_path, monkeypatch):
    told = []

    def stop(run, progress):
        told.append(run.watch)
        raise InputError("SS-1230", "that is enough")

    monkeypatch.setattr(run_module, "run_training", stop)
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_text())
    argv = [
        "train", "--policy", policy, "--keys", tmp_path, "--server", "wss://localhost:1", "--data", policy, "--out", tmp_path / "out",
        "--progress", "none",
    ]  # fmt: skip
    for extra in ([], ["--watch-server", "5"], ["--watch-server", "-1"]):
        CliRunner().invoke(app, [*map(str, argv), *extra])
    assert told == [0, 5]
