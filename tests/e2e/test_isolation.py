"""The split-learning attack on aggregation, from both sides: what it gives without the floors, and what is left with them.

The server here computes B as it should for its victim and answers the others with what suits it. Secure aggregation runs as
it is and is not broken; oracles are cosines between what the server opens and what the victim put in.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import securesplit.client.train as train_module
from securesplit.aggregate.client import ClientRound
from securesplit.client.plausible import ABSTAINED
from securesplit.client.train import Trainer
from securesplit.errors import AggregationAborted
from securesplit.model.descent import Descent, Recipe
from securesplit.privacy.ledger import Ledger
from securesplit.protocol.codec import decode
from securesplit.protocol.job import Job
from securesplit.protocol.messages import Failure
from securesplit.server.core import ServerCore
from securesplit.server.sums import Patience
from tests.e2e.house import ANY, CLIENTS, FROZEN, LAB, batches_of, build_house, policy_of, sentences
from tests.e2e.test_rounds import alike, sums_are_exact, train_all

VICTIM = "alice"
Answer = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(number of the step, what was sent, the honest answer) -> the hostile one"""


def honest(_step, _sent, true):
    return true


def zeros(_step, _sent, true):
    return torch.zeros_like(true)


def times(factor: float) -> Answer:
    return lambda _step, _sent, true: true * factor


def sized(ratio: Callable[[int], float]) -> Answer:
    """The honest direction at a norm of one's choice."""
    return lambda step, sent, true: true * (ratio(step) * sent.norm() / true.norm())


def common(jitter: float) -> Answer:
    """One direction for all rows, and as much of the honest ones as asked for."""

    def answer(_step, sent, true):
        one = torch.linspace(-1, 1, true.shape[-1])
        rows = one / one.norm() + jitter * torch.nn.functional.normalize(true, dim=-1)
        return rows * (5 * sent.norm() / rows.norm())

    return answer


class Starving:
    """The product's engine; all but the victim get what suits the server.

    Args:
        core: its engine is replaced.
        output, gradient: for the others.
        spared: who is answered honestly.
    """

    def __init__(self, core, output: Answer, gradient: Answer, spared: tuple[str, ...] = (VICTIM,)) -> None:
        self._engine = core._engine
        self._output, self._gradient, self._spared = output, gradient, spared
        self._sent: dict[int, torch.Tensor] = {}
        core._engine = self
        core.steps._engine = lambda: self

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def forward(self, batches, *, learn):
        out = []
        for sent, true in zip(batches, self._engine.forward(batches, learn=learn), strict=True):
            rows = sent.hidden.detach() * sent.gain
            out.append(true if sent.client in self._spared else self._output(sent.step, rows, true.detach()))
        return out

    def backward(self, gradients):
        out = []
        for brought, true in zip(gradients, self._engine.backward(gradients), strict=True):
            spared = brought.who in self._spared
            out.append(true if spared else self._gradient(brought.step, brought.values, true))
        return out


def cosine(one, other) -> float:
    one, other = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


# ---- in memory: the numbers ------------------------------------------------------------------------------------------


@dataclass
class Site:
    """One client of the laboratory: its update and its parts, or why it abstained."""

    update: np.ndarray
    sizes: tuple[int, ...]
    code: str | None = None


@pytest.fixture
def laboratory(house, monkeypatch):
    """``laboratory(output, gradient, ...)``: each client's local work of round 0 under this server, from one start."""

    def summed(link, folder, policy, update, **_):
        raise _Summed(update.vector)

    monkeypatch.setattr(train_module, "secure_sum", summed)

    def run(output=honest, gradient=honest, *, optimiser=None, epochs=2) -> dict[str, Site]:
        sites = {}
        for seed, name in enumerate(CLIENTS):
            job = house.job(epochs=epochs)
            client, _, core = house.joined(job, policy_of(), name=name)
            client.link.folder = house.folder(name)
            Starving(core, output, gradient)
            trainer = Trainer(
                client, batches_of(client, sentences(16, seed=seed)), (), answers=None, progress=lambda *_: None
            )
            if optimiser is not None:
                trainer._descent = lambda client=client: optimiser(client.parameters())
            start, sizes = client.read("B"), tuple(layout.size for layout in client.layouts("B"))
            client.link.close = lambda: None
            try:
                trainer._round(0)
            except _Summed as stopped:
                sites[name] = Site(stopped.update, sizes)
            except AggregationAborted as error:
                assert np.array_equal(client.read("B"), start), "it stands where it stood"
                sites[name] = Site(np.zeros(sum(sizes)), sizes, error.code)
        return sites

    return run


class _Summed(Exception):
    def __init__(self, update):
        self.update = update


@pytest.fixture
def careless(monkeypatch):
    """The product without the floors."""
    monkeypatch.setattr(train_module, "require_plausible", lambda *_, **__: None)


def shown(sites: dict[str, Site]) -> float:
    """How much of the victim's update the opened sum of all shows."""
    return cosine(sum(site.update for site in sites.values()), sites[VICTIM].update)


def sgd(parameters):
    descent = Descent(parameters, Recipe(0.05))
    descent._optimiser = torch.optim.SGD(parameters, lr=0.05)
    return descent


OPTIMISERS = pytest.mark.parametrize("optimiser", [None, sgd], ids=["adamw", "sgd"])


@OPTIMISERS
@pytest.mark.usefixtures("careless")
def test_without_floors_answers_of_zero_make_the_sum_one_clients_update(laboratory, optimiser):
    assert shown(laboratory(optimiser=optimiser)) < 0.9
    sites = laboratory(zeros, zeros, optimiser=optimiser)
    assert all(not sites[name].update.any() for name in CLIENTS if name != VICTIM), "to the last bit"
    assert shown(sites) > 0.999999


@pytest.mark.usefixtures("careless")
def test_adamw_makes_full_steps_of_gradients_near_zero_and_sgd_does_not(laboratory):
    """So against AdamW the server needs zeros, or gradients below its 1e-8; against SGD any small factor does."""

    def a_part(sites):
        size = sites["bob"].sizes[0]
        return np.linalg.norm(sites["bob"].update[:size]) / np.linalg.norm(sites[VICTIM].update[:size])

    assert a_part(laboratory(honest, times(1e-3))) > 0.5
    assert a_part(laboratory(honest, times(1e-14))) < 0.01
    assert a_part(laboratory(honest, times(1e-3), optimiser=sgd)) < 0.01


@pytest.mark.usefixtures("careless")
def test_huge_outputs_silence_c_as_well(laboratory):
    """The last norm divides by their length, and so does every gradient of C."""
    assert shown(laboratory(times(1e14), zeros)) > 0.999


@pytest.mark.parametrize(
    ("output", "gradient"),
    [
        (zeros, zeros),
        (honest, zeros),
        (zeros, honest),
        (honest, times(1e-12)),
        (zeros, times(1e-12)),
        (times(1e14), honest),
        (honest, times(1e14)),
        (common(0.0), honest),
        (common(1e-3), honest),
        (honest, common(0.0)),
        (sized(lambda t: 0.01 if t == 0 else 1e4), honest),
        (honest, sized(lambda t: 1e4 if t == 0 else 0.01)),
    ],
    ids=[
        "zeros", "no-gradient", "no-output", "nearly-no-gradient", "nearly-nothing", "huge-output", "huge-gradient",
        "constant-output", "nearly-constant", "constant-gradient", "quiet-output-first", "loud-gradient-first",
    ],
)  # fmt: skip
def test_with_floors_every_starved_client_abstains_and_keeps_its_start(laboratory, output, gradient):
    sites = laboratory(output, gradient)
    assert {name: site.code for name, site in sites.items()} == {VICTIM: None, "bob": ABSTAINED, "carol": ABSTAINED}


@pytest.mark.parametrize(
    ("output", "gradient", "most"),
    [
        (sized(lambda _: 1.9e4), sized(lambda _: 1.1e-3), 0.85),
        (sized(lambda _: 1.1e-3), sized(lambda _: 1.9e4), 0.85),
        (sized(lambda t: 0.15 if t == 0 else 5), sized(lambda t: 40 if t == 0 else 1), 0.9),
        (honest, lambda t, _, true: true * (1 if t % 2 else -1), 0.85),
        (common(0.06), sized(lambda _: 1.1e-3), 0.85),
    ],
    ids=["at-the-ends", "at-the-other-ends", "loud-first", "turning-signs", "nearly-common"],
)
def test_inside_the_floors_the_sum_alone_shows_little_more_than_an_honest_one(laboratory, output, gradient, most):
    """Nobody abstains; sixteen steps. What prediction adds to it is measured in docs/threat-model.md, not here."""
    sites = laboratory(output, gradient, epochs=4)
    assert [site.code for site in sites.values()] == [None] * 3
    assert shown(laboratory(epochs=4)) < 0.85
    assert shown(sites) < most


def test_a_server_that_was_told_the_text_needs_no_isolation(laboratory, house):
    """Under UnsafeNoPrivacy it has the text; then it computes any client's update itself. No floor and no sum can help."""
    truth = laboratory()["bob"].update
    client, _, _ = house.joined(house.job(), policy_of(), name="carol")
    client.link.folder = house.folder("carol")
    same = batches_of(client, sentences(16, seed=CLIENTS.index("bob")))
    with pytest.raises(_Summed) as caught:
        Trainer(client, same, (), answers=None, progress=lambda *_: None)._round(0)
    assert np.array_equal(caught.value.update, truth)


# ---- over TLS --------------------------------------------------------------------------------------------------------


def core_of(house, policy, *, roster=CLIENTS, blind=False):
    """One round. The server waits three seconds for the rest of the roster, because who abstains does not come back."""
    raw = house.job(rounds=1, blind=blind).model_dump(mode="json", exclude_none=True)
    raw["sums"] |= {"roster": list(roster), "threshold": len(roster) // 2 + 1}
    core = house.core(Job.model_validate(raw), policy)
    core.sums._patience = Patience(stage=10.0, gather=3.0, reconnect=0.5)
    core.sums._gathering._seconds = 3.0
    return core


@pytest.fixture
def given(monkeypatch):
    """What each client put into its sum, before the masks."""
    contributions, contribute, lock = {}, ClientRound.contribute, threading.Lock()

    def keep(self, update, weight):
        out = contribute(self, update, weight)
        with lock:
            contributions[self.name] = self.contribution.astype(np.int32)[:-1]
        return out

    monkeypatch.setattr(ClientRound, "contribute", keep)
    return contributions


@pytest.fixture
def heard(monkeypatch):
    """Every failure that a client told the server of, by name."""
    told, receive = {}, ServerCore.receive

    def spy(self, connection, data):
        peer = self._connections.get(connection)
        if peer is not None and isinstance(message := decode(data, ANY), Failure):
            told[peer.name] = (message.code, len(data))
        return receive(self, connection, data)

    monkeypatch.setattr(ServerCore, "receive", spy)
    return told


@pytest.mark.usefixtures("careless")
def test_without_floors_the_server_opens_its_victims_update(house, given):
    core = core_of(house, policy_of())
    Starving(core, zeros, zeros)
    assert train_all(house, core, policy_of()).errors == {}
    sums_are_exact_but_for_the_idle(house)
    opened = core.sums.last.aggregate.mean
    assert cosine(opened, given[VICTIM]) > 0.999999
    assert not given["bob"].any()
    assert not given["carol"].any()


@pytest.mark.usefixtures("careless")
def test_a_blind_sum_hides_it_from_the_server_and_not_from_a_client_that_sides_with_it(house, given):
    core = core_of(house, policy_of(FROZEN), blind=True)
    Starving(core, zeros, zeros)
    assert train_all(house, core, policy_of(FROZEN)).errors == {}
    assert abs(cosine(core.sums.last.ring_sum.astype(np.int32)[:-1], given[VICTIM])) < 0.15, (
        "uniform noise to the server"
    )
    opened = np.load(house.root / "bob" / "round-0.npz")["ring_sum"].astype(np.int32)[:-1]
    assert np.array_equal(opened, given[VICTIM]), "bit for bit"


def sums_are_exact_but_for_the_idle(house) -> None:
    files = [np.load(house.root / name / "round-0.npz") for name in CLIENTS]
    total = sum(f["contribution"].astype(np.uint64) for f in files) % (1 << 32)
    assert all(np.array_equal(f["ring_sum"], total.astype(np.uint32)) for f in files)


@pytest.mark.parametrize("privacy", [LAB, FROZEN], ids=["open", "frozen"])
def test_with_floors_nobody_opens_anything(house, given, heard, privacy, monkeypatch):
    """In regime frozen the sum is blind; the attack then needs one colluding client, and gets as little."""
    ends, single = {}, Trainer._round

    def watched(self, number):
        before = self._client.read()
        try:
            return single(self, number)
        finally:
            ends[self._client.link.name] = np.array_equal(self._client.read(), before)

    monkeypatch.setattr(Trainer, "_round", watched)
    policy = policy_of(privacy)
    core = core_of(house, policy, blind=privacy != LAB)
    Starving(core, zeros, zeros)
    outcome = train_all(house, core, policy)
    assert {name: error.code for name, error in outcome.errors.items()} == {
        VICTIM: "SS-6010", "bob": ABSTAINED, "carol": ABSTAINED,
    }  # fmt: skip
    assert all(isinstance(error, AggregationAborted) and error.exit_code == 5 for error in outcome.errors.values())
    assert (core.sums.finished, core.sums.aborted, core.sums.last, given) == (0, 1, None, {})
    # The server hears a code, the same from both, and nothing else.
    assert {name: code for name, (code, _) in heard.items()} == {"bob": ABSTAINED, "carol": ABSTAINED}
    assert len({size for _, size in heard.values()}) == 1
    assert ends["bob"]
    assert ends["carol"]
    for name in CLIENTS:
        assert not list((house.root / name).glob("round-*.npz"))
        assert not (house.root / name / "run.json").exists()
        if privacy != LAB:
            ledger = Ledger(house.keys / name / "ledger")
            ledger.verify()
            ledger.close()


@pytest.mark.usefixtures("given")
def test_a_server_that_gives_each_client_a_job_of_its_own_gets_no_sum(house, monkeypatch):
    """A learning rate of 1e-12 for all but one would silence them without a single crafted tensor."""
    core, offer = core_of(house, policy_of()), ServerCore._offer
    slow = core.job.model_copy(update={"optimiser": core.job.optimiser.model_copy(update={"client_lr": 1e-12})})
    true = core.job

    def offer_each(self, connection, peer):
        self.job = true if peer.name == VICTIM else slow
        return offer(self, connection, peer)

    monkeypatch.setattr(ServerCore, "_offer", offer_each)
    outcome = train_all(house, core, policy_of())
    assert core.sums.finished == 0
    assert len(outcome.errors) == 3


def test_an_abstained_run_can_be_run_again_with_an_honest_server_at_no_further_cost(house):
    policy = policy_of(FROZEN)
    bad = core_of(house, policy, blind=True)
    Starving(bad, zeros, zeros)
    assert set(train_all(house, bad, policy).errors) == set(CLIENTS)
    spent = {}
    for name in CLIENTS:
        (house.root / f"{name}.truth").unlink()
        shutil.rmtree(house.root / name / "state")  # It would be gone on with, and abstain once more.
        ledger = Ledger(house.keys / name / "ledger")
        spent[name] = ledger.mu()
        ledger.close()
    again = train_all(house, house.core(house.job(rounds=1), policy), policy)
    assert again.errors == {}
    assert {name: record.mu for name, record in again.records.items()} == spent
    alike(house)


def test_the_others_go_on_without_one_that_abstained(tmp_path, given):
    """Four clients and a quorum of three: the server starves one, which abstains; the sum of the others is exact."""
    house = build_house(tmp_path / "house", "dave")
    roster = (*CLIENTS, "dave")
    core = core_of(house, policy_of(), roster=roster)
    core.sums._gathering._seconds = 20.0
    Starving(core, zeros, zeros, spared=CLIENTS)
    outcome = train_all(house, core, policy_of(), names=roster)
    assert {name: error.code for name, error in outcome.errors.items()} == {"dave": ABSTAINED}
    assert set(given) == set(CLIENTS)
    assert {record.survivors for record in outcome.records.values()} == {(CLIENTS,)}
    sums_are_exact(house, 1)
    alike(house)
