"""Every key has a direction, and each direction is true: of admission, of noise, and of what a negotiation makes of it."""

from __future__ import annotations

import typing
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from securesplit.admit import broken_rules
from securesplit.agree import agree, compare, strictest
from securesplit.client.plausible import FLOORS
from securesplit.errors import InputError, PolicyDenied
from securesplit.policy.compare import changes, verdict
from securesplit.policy.directions import CHANNELS, DIRECTIONS, UNSTATED
from securesplit.policy.load import load_policy
from securesplit.policy.negotiate import negotiate
from securesplit.policy.rules import FITS
from securesplit.policy.schema import Policy
from securesplit.privacy import plan as plan_module
from securesplit.privacy.plan import plan_for, rows_moved
from securesplit.protocol.job import Job, load_job

ROOT = Path(__file__).parents[2]
SHIPPED = {name: load_policy(ROOT / f"policies/{name}.toml") for name in ("strict", "balanced", "lab")}
JOB = load_job(ROOT / "examples/job.toml")


@pytest.fixture(scope="module", autouse=True)
def _computed_once():
    """Random policies share a few budgets, and each takes milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "enforced_mu", cache(plan_module.enforced_mu))
        yield


# ---- the table is whole ----------------------------------------------------------------------------------------------


def models_in(kind: object) -> list[type[BaseModel]]:
    """The tables that an annotation may hold."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [model for inner in typing.get_args(kind) for model in models_in(inner)]


def keys_of(model: type[BaseModel], path: str = "") -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        here = f"{path}{name}"
        tables = models_in(field.annotation)
        inner = set().union(*(keys_of(table, f"{here}.") for table in tables)) if tables else set()
        found |= inner | ({here} if not tables or path else set())
    return found


def test_every_key_of_the_schema_has_exactly_one_direction_and_a_reason():
    # A table on the first level is no key of its own, but [leakage] may be absent.
    wanted = keys_of(Policy) | {"leakage"}
    assert wanted == {direction.path for direction in DIRECTIONS}
    assert len(DIRECTIONS) == len(wanted)
    assert {"privacy.updates.honest", "privacy.generation", "aggregation.plausible.output"} <= wanted
    assert all(len(direction.why) > 10 for direction in DIRECTIONS)


def test_what_holds_where_the_floors_are_not_stated_is_what_the_client_keeps():
    assert {f"aggregation.plausible.{name}": value for name, value in FLOORS.model_dump().items()} == UNSTATED


# ---- what a change is called -----------------------------------------------------------------------------------------


def with_keys(base: Policy, **keys: object) -> Policy:
    """A policy with some keys set, ``None`` removing one; double underscores stand for dots."""
    raw = base.model_dump(mode="python", exclude_none=True)
    for path, value in keys.items():
        *tables, key = path.split("__")
        place = raw
        for name in tables:
            place = place.setdefault(name, {})
        place.pop(key, None)
        if value is not None:
            place[key] = value
    return Policy.model_validate(raw)


CHANNEL = {"clip": 1.0, "share": 0.1, "releases": 2}
WIDE = with_keys(
    SHIPPED["balanced"], privacy__regime="round", privacy__gradients=CHANNEL, privacy__updates=CHANNEL,
    privacy__generation={"clip": 1.0, "share": 0.1, "releases": 8}, aggregation__blind=False,
    privacy__activations={"clip": 600.0, "share": 0.5, "releases": 4}, aggregation__min_colluders=1,
    leakage={"token_recovery": 0.2, "pii_exact": 0.2, "membership_auc": 0.6, "max_age_days": 9, "profile": "standard"},
    aggregation__plausible={"output": (0.1, 10.0), "gradient": (0.1, 10.0), "spread": 0.1, "steadiness": 9.0},
)  # fmt: skip
LOOSER = {  # From WIDE; each of these alone loosens, and taking it back tightens.
    "privacy__epsilon": 9.0, "privacy__delta": 2e-5, "privacy__unit": "token", "privacy__activations__share": 0.6,
    "privacy__gradients__share": 0.2, "privacy__updates__share": 0.2, "privacy__generation__share": 0.2,
    "privacy__updates__honest": 2, "aggregation__min_threshold": 2, "aggregation__max_update": 2.0, "aggregation__min_colluders": None,
    "limits__min_front": 1, "limits__min_back": 1, "limits__max_sequences": 65, "limits__max_message_bytes": 1 << 30,
    "limits__buckets": (8, 16, 32, 48, 64, 128, 256, 512), "leakage__token_recovery": 0.3, "leakage__pii_exact": None,
    "leakage__membership_auc": 0.7, "leakage__max_age_days": 10, "leakage__profile": "smoke",
    "aggregation__plausible__output": (0.1, 11.0), "aggregation__plausible__gradient": (0.05, 10.0),
    "aggregation__plausible__spread": 0.05, "aggregation__plausible__steadiness": 10.0, "leakage": None,
    "aggregation__plausible": None,
}  # fmt: skip
BASE = with_keys(WIDE, aggregation__min_threshold=3)


@pytest.mark.parametrize("path", LOOSER)
def test_a_looser_key_loosens_and_the_way_back_tightens(path):
    loose = with_keys(BASE, **{path: LOOSER[path]})
    there, back = changes(BASE, loose), changes(loose, BASE)
    assert {c.effect for c in there} == {"loosens"}
    assert {c.effect for c in back} == {"tightens"}
    if path not in ("leakage", "aggregation__plausible"):
        assert [c.path for c in there] == [path.replace("__", ".")]
    assert (compare(BASE, loose).effect, compare(loose, BASE).effect) == ("loosens", "tightens")
    with pytest.raises(PolicyDenied, match="SS-2060") as caught:
        agree(BASE, loose, peer="gpu")
    assert caught.value.exit_code == 3
    assert [line.split(":")[0] for line in caught.value.details] == [c.path for c in there]


@pytest.mark.parametrize(("base", "path", "value"), [
    ("balanced", "privacy__generation", None), ("wide", "aggregation__blind", True), ("wide", "transport__loopback_only", True),
    ("balanced", "aggregation__min_clients", 4), ("balanced", "aggregation__roster", ["alice", "bob", "carol"]),
    ("balanced", "privacy__updates", {"clip": 1.0, "share": 1e-9, "releases": 1}), ("lab", "aggregation__blind", True),
])  # fmt: skip
def test_a_tighter_key_tightens_and_the_way_back_loosens(base, path, value):
    policy = WIDE if base == "wide" else SHIPPED[base]
    tight = with_keys(policy, **{path: value})
    assert [(c.path, c.effect) for c in changes(policy, tight)] == [(path.replace("__", "."), "tightens")]
    assert [(c.path, c.effect) for c in changes(tight, policy)] == [(path.replace("__", "."), "loosens")]


@pytest.mark.parametrize(("path", "value"), [
    ("name", "other"), ("purpose", "Other words for the same people."), ("cost", "Other words for the same price."),
    ("privacy__activations__clip", 100.0), ("privacy__activations__releases", 7), ("aggregation__min_colluders", 0),
])  # fmt: skip
def test_neutral_keys(path, value):
    base = with_keys(BASE, aggregation__min_colluders=None)
    assert verdict(changes(base, with_keys(base, **{path: value}))) == "neutral"


@pytest.mark.parametrize(("path", "one", "two"), [
    ("limits__buckets", (16, 32), (16, 64)), ("aggregation__roster", ["a", "b", "c"], ["a", "b", "d"]),
    ("privacy__regime", "round", "step"), ("aggregation__min_update", None, 0.1),
])  # fmt: skip
def test_what_has_no_order_counts_as_loosening_both_ways(path, one, two):
    a, b = with_keys(WIDE, **{path: one}), with_keys(WIDE, **{path: two})
    assert [c.effect for c in changes(a, b)] == [c.effect for c in changes(b, a)] == ["loosens"]


def test_without_a_mechanism_one_change_stands_for_the_whole_table():
    found = {c.path: c.effect for c in changes(SHIPPED["strict"], SHIPPED["lab"])}
    assert found["privacy.mechanism"] == "loosens"
    assert not [path for path in found if path.startswith("privacy.") and path != "privacy.mechanism"]
    assert {c.path: c.effect for c in changes(SHIPPED["lab"], SHIPPED["strict"])}["privacy.mechanism"] == "tightens"
    assert compare(SHIPPED["lab"], SHIPPED["strict"]).budget.mu[0] is None


def test_a_share_counts_as_what_it_costs():
    # 1 of a budget of 2 is less than 0.6 of one of 8.
    there = {c.path: c.effect for c in compare(SHIPPED["balanced"], SHIPPED["strict"]).changes}
    assert there["privacy.activations.share"] == "neutral"
    assert compare(SHIPPED["balanced"], SHIPPED["strict"]).effect == "tightens"
    back = compare(SHIPPED["strict"], SHIPPED["balanced"])
    assert {c.path: c.effect for c in back.changes}["privacy.activations.share"] == "neutral"
    assert back.effect == "loosens"
    (channel,) = [c for c in back.budget.channels if c.channel == "activations"]
    assert channel.mu[1] > channel.mu[0]
    assert channel.sigma_over_clip[1] < channel.sigma_over_clip[0]


# ---- random policies -------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d", "e", "f", "g")
channel_values = st.fixed_dictionaries({
    "clip": st.sampled_from([0.5, 1.0, 600.0]), "share": st.integers(1, 16).map(lambda n: n / 64), "releases": st.integers(1, 9),
})  # fmt: skip
unit_values = st.sampled_from([0.1, 0.2, 0.5])
optional = st.none() | unit_values


@st.composite
def policies(draw, *, private: bool | None = None) -> Policy:
    private = draw(st.booleans()) if private is None else private
    regime = draw(st.sampled_from(["frozen", "round", "step"]))
    raw: dict = {
        "name": draw(st.sampled_from(["one", "two"])), "purpose": "x" * 20, "cost": "y" * 20, "privacy": {"mechanism": "UnsafeNoPrivacy"},
        "aggregation": {
            "min_clients": draw(st.integers(3, 7)), "min_threshold": draw(st.integers(2, 7)), "blind": draw(st.booleans()),
            "max_update": draw(unit_values), "min_colluders": draw(st.none() | st.integers(0, 3)),
            "roster": draw(st.none() | st.sampled_from([("a", "b", "c"), NAMES])), "min_update": draw(st.none() | unit_values),
        },
        "limits": {
            "min_front": draw(st.integers(0, 3)), "min_back": draw(st.integers(0, 3)), "max_sequences": draw(st.integers(1, 9)),
            "buckets": tuple(sorted(draw(st.sets(st.sampled_from([8, 16, 32, 64]), min_size=1)))),
            "max_message_bytes": draw(st.sampled_from([1 << 16, 1 << 20])),
        },
        "transport": {"loopback_only": not private or draw(st.booleans())},
    }  # fmt: skip
    if draw(st.booleans()):
        ends = st.tuples(st.sampled_from([0.1, 0.5, 2.0]), st.sampled_from([1.0, 5.0, 9.0])).filter(
            lambda e: e[0] < e[1]
        )
        raw["aggregation"]["plausible"] = {"output": draw(ends), "gradient": draw(ends), "spread": draw(unit_values), "steadiness": 1 + draw(unit_values)}  # fmt: skip
    if draw(st.booleans()):
        raw["leakage"] = {
            "token_recovery": draw(optional), "pii_exact": draw(optional), "membership_auc": draw(unit_values),
            "max_age_days": draw(st.integers(1, 9)), "profile": draw(st.sampled_from(["smoke", "standard", "full"])),
        }  # fmt: skip
    if private:
        raw["privacy"] = {
            "mechanism": "gaussian", "unit": draw(st.sampled_from(["sequence", "sequence", "user", "token"])), "relation": "replace-one",
            "epsilon": draw(st.sampled_from([0.5, 2.0, 8.0, 30.0])), "delta": draw(st.sampled_from([1e-6, 1e-5])), "regime": regime,
            "activations": draw(channel_values), "generation": draw(st.none() | channel_values),
        }  # fmt: skip
        learns = regime != "frozen"
        if learns and draw(st.booleans()):
            raw["privacy"]["labels"] = {"share": 0.125, "classes": draw(st.sampled_from([2, 2, 3]))}
        elif learns:
            raw["privacy"]["gradients"] = draw(channel_values)
        if learns or draw(st.booleans()):
            raw["privacy"]["updates"] = draw(channel_values)
            if regime != "step" and draw(st.booleans()):
                raw["privacy"]["updates"]["honest"] = draw(st.integers(2, raw["aggregation"]["min_clients"] - 1))
        if "updates" not in raw["privacy"]:
            raw["aggregation"]["blind"] = True
    return Policy.model_validate(raw)


jobs = st.builds(
    lambda front, back, batch, n, threshold, least, clip, blind, sharing, labels: Job.model_validate({
        **JOB.model_dump(), "cut": {"front": front, "back": back}, "schedule": {"rounds": 1, "epochs": 1, "batch": batch},
        "adapters": {**JOB.adapters.model_dump(), "sharing": sharing, "inexact": sharing == "naive"},
        "sums": {**JOB.sums.model_dump(), "roster": NAMES[:n], "threshold": threshold, "min_clients": least, "clip": clip, "blind": blind, "ring_bits": 64},
        "task": labels and {"labels": labels},
    }),
    st.integers(0, 4), st.integers(0, 4), st.integers(1, 9), st.sampled_from([3, 7]), st.integers(2, 7), st.integers(3, 7),
    unit_values, st.booleans(), st.sampled_from(["alternating", "naive", "share-a"]), st.none() | st.just(("x", "y")),
)  # fmt: skip


def floors(policy: Policy, job: Job) -> set[str]:
    """The rules that the job breaks, but those by which the policy's own mechanism would not work with it."""
    return {breach.rule for breach in broken_rules(policy, job)} - FITS.keys()


@st.composite
def pairs(draw) -> tuple[Policy, Policy]:
    """Two policies that have much in common."""
    one, two = draw(policies()), draw(policies())
    raw, other = (p.model_dump(mode="python", exclude_none=True) for p in (one, two))
    for table in draw(st.sets(st.sampled_from(["privacy", "aggregation", "limits", "transport", "leakage"]))):
        other.pop(table, None)
        if table in raw:
            other[table] = raw[table]
    try:
        return one, Policy.model_validate(other)
    except ValidationError:
        return one, two


@given(pairs(), st.lists(jobs, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_what_a_tighter_policy_admits_the_looser_one_admits_as_well(pair, asked):
    one, two = pair
    for loose, tight in ((one, two), (two, one)):
        if verdict(changes(loose, tight)) == "loosens":
            continue
        for job in asked:
            if "aggregation.sums" in {b.rule for b in broken_rules(tight, job)}:
                continue  # Not a job that anybody can run.
            assert floors(loose, job) <= floors(tight, job) or floors(tight, job), (changes(loose, tight), job.sums)


@given(
    policies(private=True), st.sampled_from([d.path for d in DIRECTIONS if d.parent not in ("", "leakage")]), st.data()
)
@settings(max_examples=80, deadline=None)
def test_one_key_at_a_time_admission_follows_its_direction(policy, path, data):
    other = data.draw(policies(private=True))
    raw, donor = (p.model_dump(mode="python", exclude_none=True) for p in (policy, other))
    *tables, key = path.split(".")
    here, there = raw, donor
    for name in tables:
        here, there = here.get(name, {}), there.get(name, {})
    if key not in there:
        return
    here[key] = there[key]
    try:
        changed = Policy.model_validate(raw)
    except ValidationError:
        return
    job = data.draw(jobs)
    effect = verdict(changes(policy, changed))
    if "aggregation.sums" in {b.rule for p in (policy, changed) for b in broken_rules(p, job)}:
        return
    if effect != "loosens":
        assert not (floors(policy, job) and not floors(changed, job))


UNORDERED = {
    "privacy.unit", "privacy.regime", "privacy.labels.classes", "aggregation.roster", "aggregation.min_update", "limits.buckets",
    "aggregation.plausible.output", "aggregation.plausible.gradient", "privacy", "policy",
}  # fmt: skip
"""Keys of which two values may have no common one, and the rules between keys."""


def attempt(call) -> tuple[Policy | None, PolicyDenied | None]:
    try:
        return call(), None
    except PolicyDenied as error:
        return None, error


def noise(policy: Policy):
    """By channel: mu^2 in the ledger's units, of one release and of all, and how many there are. Labels have one."""
    plan = plan_for(policy.privacy, rows=rows_moved(policy.limits.min_front, policy.limits.buckets))
    found = {
        at: (c.units, c.units * c.releases, c.releases, c.sigma / c.sensitivity)
        for at in ("cut", "gradient", "decode", "update")
        if (c := plan.channel(at))
    }
    if plan.labels:
        found["labels"] = (plan.labels.units, plan.labels.units, 1, 1.0)
    return plan.budget, found


@given(pairs())
@settings(max_examples=80, deadline=None)
def test_a_negotiated_policy_is_never_weaker_than_either(pair):
    one, two = pair
    for make in (strictest, negotiate):
        made, refused = attempt(lambda make=make: make(one, two))
        if made is None:
            assert refused.code == "SS-2061"
            assert {line.split(":")[0] for line in refused.details} <= UNORDERED
            assert refused.details
            continue
        for side in pair:
            assert compare(side, made).effect != "loosens", compare(side, made).loosened
            if side.unsafe:
                continue
            assert not made.unsafe
            (budget, channels), (most, theirs) = noise(made), noise(side)
            assert budget <= most
            assert set(channels) - {"update"} <= set(theirs)
            for at, (each, whole, count, sigma) in channels.items():
                if at not in theirs:
                    continue
                # A share of sums above 1 by rounding may grow by its last bits when another shrinks.
                assert each <= theirs[at][0] * (1 + 1e-9) + 1
                assert whole <= theirs[at][1] * (1 + 1e-9) + count
                assert count <= theirs[at][2]
                assert sigma >= theirs[at][3] * (1 - 1e-6)
        assert make(made, made) == made
        assert compare(made, make(two, one)).effect == "neutral" or make is strictest
    assert strictest(one, one) is one


@given(pairs())
@settings(max_examples=60, deadline=None)
def test_a_session_binds_the_client_at_least_to_its_own_policy(pair):
    own, offer = pair
    looser = compare(own, offer).loosened
    bound, refused = attempt(lambda: agree(own, offer, peer="gpu"))
    if bound is None:
        assert refused.code == ("SS-2060" if looser else "SS-2061")
        assert refused.exit_code == 3
        return
    assert not looser, "a looser offer is refused, whatever else it tightens"
    assert compare(own, bound).effect != "loosens"
    assert compare(offer, bound).effect != "loosens"
    for name in CHANNELS:  # A server has no say in the measure of noise.
        ours, theirs = getattr(own.privacy, name, None), getattr(bound.privacy, name, None)
        assert ours is None or theirs is None or ours.clip == theirs.clip


def test_the_stricter_of_two_shipped_policies_binds():
    strict, balanced = SHIPPED["strict"], SHIPPED["balanced"]
    assert agree(balanced, strict, peer="gpu") == strict
    assert agree(strict, strict, peer="gpu") is strict
    with pytest.raises(PolicyDenied, match="SS-2060") as caught:
        agree(strict, balanced, peer="gpu")
    assert [line.split(":")[0] for line in caught.value.details] == [
        "privacy.epsilon",
        "privacy.delta",
        "privacy.generation",
    ]
    with pytest.raises(PolicyDenied, match="SS-2060"):
        agree(balanced, SHIPPED["lab"], peer="gpu")


def test_a_server_keeps_its_hands_off_the_clip():
    offer = with_keys(SHIPPED["strict"], privacy__activations__clip=1e-6)
    bound = agree(SHIPPED["balanced"], offer, peer="gpu")
    assert bound.privacy.activations.clip == 600.0
    assert bound.privacy.epsilon == 2.0


def test_no_common_ground_names_every_rule():
    one = with_keys(SHIPPED["balanced"], limits__buckets=(16,), aggregation__roster=["a", "b", "c"])
    two = with_keys(
        SHIPPED["balanced"], limits__buckets=(32,), aggregation__roster=["a", "b", "d"], privacy__unit="user"
    )
    with pytest.raises(PolicyDenied, match="SS-2061") as caught:
        strictest(one, two)
    assert [line.split(":")[0] for line in caught.value.details] == [
        "privacy.unit",
        "aggregation.roster",
        "limits.buckets",
    ]


def test_values_that_fit_alone_and_not_together_are_refused_too():
    one = with_keys(WIDE, privacy__gradients=None, privacy__labels={"share": 0.1, "classes": 2})
    with pytest.raises(PolicyDenied, match="SS-2061") as caught:
        strictest(one, WIDE)
    assert any("exactly one of [privacy.gradients]" in line for line in caught.value.details)


def test_a_budget_that_cannot_be_divided_is_no_offer():
    offer = with_keys(SHIPPED["balanced"], privacy__generation__releases=1_000_000, privacy__generation__share=1e-9)
    with pytest.raises(InputError, match="SS-1533"):
        compare(SHIPPED["balanced"], offer)
    with pytest.raises(PolicyDenied, match="SS-2061"):
        agree(SHIPPED["balanced"], offer, peer="gpu")


@given(pairs())
@settings(max_examples=60, deadline=None)
def test_policies_that_differ_in_ordered_keys_alone_always_have_common_ground(pair):
    one, two = pair
    raw, other = (p.model_dump(mode="python", exclude_none=True) for p in (one, two))
    other["privacy"] = {**raw["privacy"]} | ({"epsilon": 3.0, "delta": 3e-6} if not one.unsafe else {})
    for table, key in (
        ("aggregation", "roster"),
        ("aggregation", "min_update"),
        ("aggregation", "plausible"),
        ("limits", "buckets"),
    ):
        other[table].pop(key, None)
        if key in raw[table]:
            other[table][key] = raw[table][key]
    other["transport"] = raw["transport"]
    two, _ = attempt(
        lambda: Policy.model_validate(
            {**other, "aggregation": {**other["aggregation"], "min_clients": 7, "blind": True}}
        )
    )
    assert two is not None
    made, refused = attempt(lambda: negotiate(one, two))
    assert refused is None
    assert made.leakage is None or one.leakage is not None or two.leakage is not None
    assert made.aggregation.min_clients == 7
