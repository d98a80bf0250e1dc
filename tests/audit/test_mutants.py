"""The auditor audited: every fault that is put into the product, in one place each, turns it red, and no fault leaves it green.

The table at the end of the run says which check caught which fault, with its numbers.
"""

from __future__ import annotations

import dataclasses
from itertools import count

import numpy as np
import pytest
import torch

import securesplit.privacy.clipped_sum as sums
import securesplit.privacy.gate as gates
from securesplit.audit import joint as joints
from securesplit.audit.builtin import builtin_policy
from securesplit.audit.completeness import audit_completeness
from securesplit.audit.distribution import audit_distribution
from securesplit.audit.joint import audit_joint
from securesplit.audit.tiny import TinySite, trainable
from securesplit.audit.twopoint import audit_channels
from securesplit.client import answers, train
from securesplit.client import client as clients
from securesplit.client.link import Link
from securesplit.client.train import Trainer
from securesplit.data.batches import Batch
from securesplit.policy.schema import Channel
from securesplit.privacy import mechanism
from securesplit.privacy.gate import Gate
from securesplit.privacy.ledger import Ledger
from securesplit.privacy.lineage import Lineage
from securesplit.privacy.purse import Purse
from securesplit.protocol.messages import Blob, Forward, Hidden
from tests.audit.conftest import labelled_policy

REAL_NOISE, REAL_PLAN, REAL_QUANTISE = gates.discrete_gaussian, gates.plan_for, mechanism.quantise_like
REAL_INIT, REAL_RELEASE, REAL_UPDATE = Gate.__init__, Gate.release, Gate.release_update
ROWS = ("cut", "decode", "gradient")
ALL = (*ROWS, "update")


class Checks:
    """Runs the audit's tests in their fast form and keeps what each said."""

    def __init__(self, bench_of, folder, record_property) -> None:
        self.red: dict[str, bool] = {}
        self.mutant = "none"
        self._runs = count()
        self._bench_of, self._folder, self._record = bench_of, folder, record_property

    def _say(self, check, red, numbers):
        self.red[check] = red
        self._record("mutant", [self.mutant, check, red, numbers])

    def twopoint(self, *channels, policy=None, most=1000):
        for v in audit_channels(policy or builtin_policy(), self._bench_of, most=most, error=5e-4, only=channels):
            self._say(f"two-point {v.channel}", not v.ok, f"mu >= {v.mu_lower:.2f}, claimed {v.claimed_mu:.2f}")

    def distribution(self, *channels):
        bench = self._bench_of(builtin_policy())
        for v in audit_distribution(builtin_policy(), bench, messages=4, error=2e-4, only=channels):
            off = f"; {v.off_lattice} off the lattice" if v.off_lattice else ""
            self._say(
                f"distribution {v.channel}", not v.ok,
                f"{v.worst}: z {v.worst_z:.1f} of {v.limit:.1f}; sigma x {v.sigma_ratio:.3f}{off}",
            )  # fmt: skip
        bench.close()

    def completeness(self, policy=None, *, raised=True):
        policy = policy or builtin_policy()
        site = TinySite(trainable(policy) if raised else policy, self._folder / f"tiny{next(self._runs)}")
        v = audit_completeness(policy, site, error=1e-4)
        site.close()
        told = f"{v.undercharged} undercharged, failed probes {v.probes}, {v.unknown} of {v.blocks} blocks unknown, {v.silent} silent, learnt from noise alone: {v.learnt}, resent alike: {v.resent}"
        self._say("completeness", not v.ok, told + (f", stopped by {v.stopped}" if v.stopped else ""))
        return v

    def joint(self):
        bench = self._bench_of(builtin_policy())
        v = audit_joint(builtin_policy(), bench, jobs=60, error=1e-4)
        bench.close()
        self._say("joint", not v.ok, f"mu >= {v.mu_lower:.2f}, by path {v.mu_path:.2f}, claimed {v.claimed_mu:.2f}")


@pytest.fixture
def checks(bench_of, tmp_path, record_property, fixed_noise):
    return Checks(bench_of, tmp_path, record_property)


@pytest.fixture
def mutate(monkeypatch, checks):
    """Name the mutant and put it in."""

    def put(name, *patches):
        checks.mutant = name
        for target, attribute, value in patches:
            monkeypatch.setattr(target, attribute, value)

    return put


class Now:
    """Which release is being made; for faults that strike on one channel or at one time only."""

    at = ""
    resumed = False

    @classmethod
    def patches(cls):
        def release(self, tensor, *, at, **named):
            cls.at, cls.resumed = at, getattr(self, "stood_before", False)
            try:
                return REAL_RELEASE(self, tensor, at=at, **named)
            finally:
                cls.at, cls.resumed = "", False

        def release_update(self, update):
            cls.at, cls.resumed = "update", getattr(self, "stood_before", False)
            try:
                return REAL_UPDATE(self, update)
            finally:
                cls.at, cls.resumed = "", False

        def made(self, policy, ledger, **named):
            REAL_INIT(self, policy, ledger, **named)
            self.stood_before = ledger is not None and next(ledger.entries(), None) is not None

        return ((Gate, "release", release), (Gate, "release_update", release_update), (Gate, "__init__", made))


def noise(draw):
    """Another law in place of the gate's, for rows and for sums."""
    return (
        (gates, "discrete_gaussian", draw),
        (mechanism, "discrete_gaussian_like", lambda like: torch.from_numpy(draw(tuple(like.shape)))),
    )


def silent_when(quiet):
    return noise(lambda shape: np.zeros(shape, np.int32) if quiet() else REAL_NOISE(shape))


def varied(**privacy):
    policy = builtin_policy()
    return policy.model_copy(update={"privacy": policy.privacy.model_copy(update=privacy)})


FROZEN = varied(regime="frozen", gradients=None, updates=None)


def unbounded(values, step, bound):
    return torch.trunc(values.double() / step).to(torch.int64)


def test_without_a_fault_every_check_is_green(checks):
    checks.twopoint(*ALL)
    checks.twopoint("labels", policy=labelled_policy(), most=2000)
    checks.distribution(*ALL)
    checks.joint()
    checks.completeness()
    assert not any(checks.red.values()), checks.red
    assert len(checks.red) == 4 + 1 + 4 + 1 + 1


@pytest.mark.parametrize("at", ALL)
def test_noise_forgotten_on_one_channel(checks, mutate, at):
    mutate(f"no noise on '{at}'", *Now.patches(), *silent_when(lambda: Now.at == at))
    checks.twopoint(at)
    checks.distribution(at)
    assert all(checks.red.values()), checks.red
    others = [channel for channel in ALL if channel != at][:1]
    checks.distribution(*others)  # The test points at the channel.
    assert not checks.red[f"distribution {others[0]}"]


def planned(change):
    def plan(privacy, **named):
        whole = REAL_PLAN(privacy, **named)
        fields = ("cut", "gradient", "decode", "update")
        return dataclasses.replace(
            whole, **{f: dataclasses.replace(getattr(whole, f), sigma=change(getattr(whole, f).sigma)) for f in fields}
        )

    return (gates, "plan_for", plan)


def test_sensitivity_of_c_in_place_of_2c(checks, mutate):
    mutate("C for 2C in the plan", planned(lambda sigma: sigma / 2))
    checks.twopoint("cut")
    checks.distribution("cut", "update")
    assert all(checks.red.values()), checks.red


@pytest.mark.parametrize(
    ("name", "change"),
    [("sigma^2 used for sigma", lambda s: s**2), ("variance halved for deviation", lambda s: s / 2**0.5)],
)
def test_variance_and_deviation_mixed_up(checks, mutate, name, change):
    mutate(name, planned(change))
    checks.twopoint("cut", most=2000)
    checks.distribution("cut", "decode")
    assert all(checks.red.values()), checks.red


def test_clip_skipped_on_rows(checks, mutate):
    # The lattice bounds a record once more, so both have to go; with the first alone gone nothing leaks.
    mutate(
        "clip skipped on rows",
        (mechanism, "clip_sequence", lambda hidden, bound: hidden.float()),
        (mechanism, "quantise_like", unbounded),
    )
    checks.twopoint("cut")
    checks.distribution("cut")
    assert all(checks.red.values()), checks.red


def test_clip_skipped_in_sums(checks, mutate):
    mutate(
        "clip skipped in sums",
        (sums, "clip_tokens", lambda hidden, bound: hidden.float()),
        (sums, "quantise", lambda values, step, bound: np.trunc(values / step).astype(np.int64)),
    )
    checks.twopoint("update")
    checks.distribution("update")
    assert all(checks.red.values()), checks.red


def test_the_first_clip_alone_gone_is_still_bounded_by_the_lattice(checks, mutate):
    mutate("first of two clips gone (harmless)", (mechanism, "clip_sequence", lambda hidden, bound: hidden.float()))
    checks.twopoint("cut")
    assert not any(checks.red.values())


def test_clip_at_twice_the_bound(checks, mutate):
    real = mechanism.clip_sequence
    mutate(
        "clip at 2C",
        (mechanism, "clip_sequence", lambda hidden, bound: real(hidden, 2 * bound)),
        (mechanism, "quantise_like", lambda values, step, bound: REAL_QUANTISE(values, step, 2 * bound)),
    )
    checks.twopoint("cut")
    assert checks.red["two-point cut"]


def test_the_same_noise_for_every_release(checks, mutate):
    kept = {}
    mutate("same noise reused", *noise(lambda shape: kept.setdefault(shape, REAL_NOISE(shape))))
    checks.twopoint("cut")  # Blind to it where a message holds many records, whose noises differ: hence the other test.
    checks.distribution("cut", "update")
    assert checks.red["distribution cut"], checks.red
    assert checks.red["distribution update"], checks.red


def test_noise_of_the_message_before_once_more(checks, mutate):
    def twice(shape, state={"n": 0, "last": None}):  # noqa: B006
        state["n"] += 1
        if state["n"] % 2 or state["last"].shape != shape:
            state["last"] = REAL_NOISE(shape)
        return state["last"]

    mutate("each noise used twice", *noise(twice))
    checks.distribution("cut")
    assert all(checks.red.values()), checks.red


def test_releases_averaged(checks, mutate):
    mutate(
        "four draws averaged",
        *noise(lambda shape: sum(REAL_NOISE(shape).astype(np.int64) for _ in range(4)) // 4),
    )
    checks.twopoint("gradient")
    checks.distribution("cut", "update")
    assert all(checks.red.values()), checks.red


def test_noise_off_in_evaluation(checks, mutate):
    mutate("no noise in evaluation", *silent_when(lambda: not torch.is_grad_enabled()))
    checks.twopoint("cut")
    checks.distribution("cut")
    checks.completeness()
    assert all(checks.red.values()), checks.red


def test_noise_off_after_a_restart(checks, mutate):
    mutate("no noise after a restart", *Now.patches(), *silent_when(lambda: Now.resumed))
    checks.twopoint("cut", "update")
    checks.distribution("cut")
    assert all(checks.red.values()), checks.red


def test_padding_rows_without_noise(checks, mutate):
    def partial(shape):
        noise = REAL_NOISE(shape)
        if len(shape) > 1 and shape[-2] > 2:
            noise[..., -2:, :] = 0
        return noise

    mutate("padding rows without noise", *noise(partial))
    checks.twopoint("cut")
    checks.distribution("cut")
    assert not checks.red["two-point cut"], "two worlds do not differ in padding, so this test is blind to it"
    assert checks.red["distribution cut"]


def test_continuous_noise_off_the_lattice(checks, mutate):
    rng = np.random.default_rng(3)
    mutate("noise off the lattice", *noise(lambda shape: rng.standard_normal(shape) * 2.0**20))
    checks.distribution("cut")
    assert checks.red["distribution cut"]


def test_fresh_noise_on_retry(checks, mutate):
    def forgetful(self, tensor, **named):
        return REAL_RELEASE(self, tensor, **{**named, "memoise": False})

    mutate("fresh noise on retry", (Gate, "release", forgetful))
    assert not checks.completeness().resent


def test_a_ledger_that_writes_nothing(checks, mutate):
    mutate("released, not charged", (Ledger, "charge", lambda self, charges, **_: tuple(c.payload for c in charges)))
    assert checks.completeness().unknown > 0


def test_a_sum_that_is_paid_for_once_and_drawn_anew_every_time(checks, mutate):
    """What a name for the release in the ledger did: the second sum was taken for the first one resent, and was not."""
    real = Purse.priced

    def named(self, record, at, channel, **options):
        return real(self, record, at, channel, **({"version": "a sum"} if at == "update" else {}) | options)

    mutate("a sum paid once", (Purse, "priced", named))
    assert checks.completeness().undercharged > 0


def raw_of(released):
    b, t, d = released.shape
    return Blob(dtype="f32", shape=(b * t, d), data=released.graph.detach().float().numpy().astype("<f4").tobytes())


def test_a_second_way_out(checks, mutate):
    real = Link.forward

    def leaky(self, released, *, learn, cache=0):
        out = real(self, released, learn=learn, cache=cache)
        if (
            not learn and not cache
        ):  # As telemetry, a debug hook or a plug-in would: well-formed, and not from the gate.
            b, t, _ = released.shape
            self.step += 1
            self.tell(Forward(step=self.step, lengths=(t,) * b, learn=False, hidden=raw_of(released)))
            self.expect(Hidden)
        return out

    mutate("an unlogged second way out", (Link, "forward", leaky))
    v = checks.completeness()
    assert v.unknown > 0
    assert v.silent == 0


def test_clean_rows_in_place_of_released_ones(checks, mutate):
    def leaky(self, released, *, learn, cache=0):
        b, t, _ = released.shape
        self.step += 1
        self.tell(Forward(step=self.step, lengths=(t,) * b, cache=cache, learn=learn, hidden=raw_of(released)))
        return torch.frombuffer(bytearray(self.expect(Hidden).hidden.data), dtype=torch.float32).reshape(b, t, -1)

    mutate("clean rows in place of released ones", (Link, "forward", leaky))
    assert checks.completeness().unknown > 0


def test_a_toy_that_learns_from_clean_gradients(checks, mutate):
    mutate("theta-leak in a linear A", (joints, "learn", lambda bias, noised, clean, rate: bias - rate * clean))
    checks.joint()
    assert checks.red["joint"]


def test_the_products_loop_learning_from_clean_gradients(checks, mutate):
    real, kept = Trainer._gradients, []

    def gradients(self, batch):
        out = real(self, batch)
        kept.append(out[0].sum(0).double().numpy())
        return out

    descend = Trainer._descend
    mutate(
        "theta-leak in the training loop",
        (Trainer, "_gradients", gradients),
        (Trainer, "_descend", lambda self, optimiser, gradient: descend(self, optimiser, gradient + kept[-1])),
    )
    v = checks.completeness()
    assert not v.learnt
    assert (v.unknown, v.silent) == (0, 0), "no single release shows it"


def test_labels_answered_truly(checks, mutate):
    mutate("labels answered truly", (gates, "respond", lambda label, classes, epsilon: label))
    checks.twopoint("labels", policy=labelled_policy(), most=2000)
    assert checks.red["two-point labels"]


def test_labels_with_the_epsilon_of_the_other_scale(checks, mutate):
    real = gates.respond
    mutate(
        "labels at 1.5 epsilon", (gates, "respond", lambda label, classes, epsilon: real(label, classes, 1.5 * epsilon))
    )
    checks.twopoint("labels", policy=labelled_policy(), most=4000)
    assert checks.red["two-point labels"]


REAL_PRICED, REAL_SUM = Purse.priced, Gate._release_sum


def test_every_kind_of_run_is_complete_without_a_fault(checks):
    for policy in (
        FROZEN,
        varied(unit="user"),
        varied(unit="user", regime="step"),
        labelled_policy(),
        varied(regime="step"),
    ):
        v = checks.completeness(policy)
        assert v.ok, v
        assert v.learnt is True


def test_every_charge_of_one_unit(checks, mutate):
    def priced(self, *args, **named):
        return dataclasses.replace(REAL_PRICED(self, *args, **named), units=1)

    mutate("every charge costs one unit", (Purse, "priced", priced))
    assert checks.completeness().undercharged > 0


def test_generated_tokens_charged_to_nobody(checks, mutate):
    def priced(self, record, at, channel, **named):
        return REAL_PRICED(self, "nobody" if at == "decode" else record, at, channel, **named)

    mutate("generated tokens charged to nobody", (Purse, "priced", priced))
    assert checks.completeness().undercharged == 1
    assert checks.red["completeness"]


@pytest.mark.parametrize("regime", ["round", "step"])
def test_a_sum_charged_to_one_of_its_records(checks, mutate, regime):
    def first(self, update):
        update.records = update.records[:1]
        return REAL_SUM(self, update)

    mutate(f"a sum charged to its first record, {regime}", (Gate, "_release_sum", first))
    assert checks.completeness(varied(regime=regime)).undercharged > 0


def test_a_sum_that_forgets_who_is_in_it(checks, mutate):
    real = sums.ClippedSum.add

    def add(self, gradient, record):
        real(self, gradient, record)
        self.records = self.records[:1]

    mutate("a sum names its first record", (sums.ClippedSum, "add", add))
    assert checks.completeness().undercharged > 0


def test_no_reserve_for_what_peers_generate(checks, mutate):
    mutate("no reserve for peers", (Gate, "reserve_for_peers", lambda self: None))
    assert checks.completeness(FROZEN).undercharged == 1
    assert checks.red["completeness"]


@pytest.mark.parametrize("regime", ["frozen", "round", "step"])
def test_releases_from_any_state(checks, mutate, regime):
    mutate(f"lineage asks nothing, {regime}", (Lineage, "require", lambda self, state: None))
    policy = FROZEN if regime == "frozen" else varied(regime=regime)
    assert checks.completeness(policy).probes == ("lineage",)
    assert checks.red["completeness"]


@pytest.mark.parametrize("regime", ["round", "step"])
def test_the_records_of_a_user_clipped_one_by_one(checks, mutate, regime):
    def add(self, gradients, keys):
        for gradient, key in zip(gradients, keys, strict=True):
            self.total._seen.discard(key)
            self.total.add(gradient, key)

    mutate(f"a user's records clipped one by one, {regime}", (train.Units, "add", add))
    assert "units" in checks.completeness(varied(unit="user", regime=regime)).probes


def test_a_user_named_once_and_clipped_record_by_record(checks, mutate):
    def add(self, gradients, keys):
        for gradient, key in zip(gradients, keys, strict=True):
            known = key in self.total._seen
            self.total._seen.discard(key)
            self.total.add(gradient, key)
            if known:
                self.total.records.remove(key)

    mutate("a user named once and clipped record by record", (train.Units, "add", add))
    assert "units" in checks.completeness(varied(unit="user")).probes


def test_gradients_divided_by_a_private_count(checks, mutate):
    mutate("loss divided by the batch's own tokens", (Batch, "most_scored", property(lambda self: self.scored)))
    assert checks.completeness().probes == ("neighbours",)
    assert checks.red["completeness"]


def test_a_budget_that_stops_training_hides_no_leak(checks, mutate):
    real, kept, descend = Trainer._gradients, [], Trainer._descend

    def gradients(self, batch):
        out = real(self, batch)
        kept.append(out[0].sum(0).double().numpy())
        return out

    mutate(
        "theta-leak under a policy of one release",
        (Trainer, "_gradients", gradients),
        (Trainer, "_descend", lambda self, optimiser, gradient: descend(self, optimiser, gradient + 1000 * kept[-1])),
    )
    policy = varied(activations=Channel(clip=8.0, share=0.3, releases=1))
    v = checks.completeness(policy)
    assert (v.learnt, v.stopped, v.raised) == (False, None, ("activations",))
    assert checks.red["completeness"]
    v = checks.completeness(policy, raised=False)
    assert (v.learnt, v.stopped) == (None, "SS-5002")
    assert checks.red["completeness"], "what was not tested is not green"


def test_true_labels_with_the_proof_of_answers(checks, mutate):
    real = answers.answered
    mutate(
        "true labels, with the proof of answers",
        (clients, "answered", lambda batch, gate: (batch, real(batch, gate)[1])),
    )
    assert checks.completeness(labelled_policy()).probes == ("answers",)
    assert checks.red["completeness"]
