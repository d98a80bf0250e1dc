"""An attack sees released rows and public facts, whatever else lies about, and however the recording ends."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.exchange import Task
from attacks.forensics import examine
from attacks.link import link_by_order
from attacks.view import Key, Passage, ServerView, Sighting, batches, noise_of, public_facts, read_view
from attacks.view import sequences_of as _sequences
from securesplit.errors import InputError
from securesplit.policy.load import load_policy
from securesplit.policy.schema import Policy
from securesplit.privacy.plan import enforced_mu, plan_for
from securesplit.protocol.codec import encode
from securesplit.protocol.messages import Hello
from securesplit.protocol.transcript import Recorder, Transcript

ROOT = Path(__file__).parents[2]


def keys_of(directory):
    return [Key(peer=s.peer, step=s.step, row=s.row) for s in _sequences(Transcript.load(directory))]


CHANNEL = {"clip": 1.0, "share": 0.3, "releases": 2}
PRIVATE = {
    "mechanism": "gaussian", "unit": "sequence", "relation": "replace-one", "epsilon": 8.0, "delta": 1e-5, "regime": "round",
    "activations": CHANNEL, "gradients": CHANNEL, "updates": CHANNEL,
}  # fmt: skip
ROUNDS = {
    "name": "tiny", "purpose": "a policy for the tests of the attacks", "cost": "nothing, since nobody uses it",
    "privacy": PRIVATE, "transport": {"loopback_only": True},
    "aggregation": {"min_clients": 3, "min_threshold": 2, "blind": False, "max_update": 1.0},
    "limits": {"min_front": 0, "min_back": 0, "max_sequences": 8, "buckets": [4], "max_message_bytes": 1 << 20},
}  # fmt: skip
TWO_ROUNDS = {
    "name": "two-rounds", "model": "m", "cut": {"front": 2, "back": 1},
    "adapters": {"rank": 1, "alpha": 1.0, "seed": 0}, "optimiser": {"client_lr": 0.1, "server_lr": 0.1},
    "schedule": {"rounds": 2, "epochs": 1, "batch": 1}, "sums": {"roster": ["a", "b", "c"], "threshold": 2, "clip": 1.0, "blind": False},
}  # fmt: skip


def test_nothing_an_attack_is_given_can_hold_the_truth():
    view = {
        "sightings",
        "noise",
        "gradient_noise",
        "cut",
        "codec",
        "responded",
        "classes",
        "traffic",
        "decoded",
        "decode_noise",
        "sums",
        "trained",
        "permuted",
    }
    assert {f.name for f in dataclasses.fields(ServerView)} == view
    seen = {"key", "rows", "linked", "releases", "output", "gradient", "gain"}
    assert {f.name for f in dataclasses.fields(Sighting)} == seen
    assert {f.name for f in dataclasses.fields(Passage)} == {"key", "time_ns", "rows", "size", "learn", "gradient"}
    # Candidates are members and others mixed; pairs are a colluding client's own words.
    task = {
        "transcript",
        "model",
        "aux",
        "adapter",
        "profile",
        "attacks",
        "keys",
        "threat",
        "pairs",
        "candidates",
        "seed",
    }
    assert set(Task.model_fields) == task
    assert {f.name for f in dataclasses.fields(Key)} == {"peer", "step", "row"}


def test_the_view_holds_the_wanted_rows_in_the_wanted_order(tmp_path, record, unsafe, draw, fronts):
    tokens = draw(7, 8, seed=1)
    directory = record(tmp_path / "t", tokens, unsafe)
    # Two sequences a step: client 0 holds 0 and 3, then 6; client 1 holds 1 and 4.
    wanted = [Key("spiffe://test/client1", 0, 1), Key("nobody", 0, 0), Key("spiffe://test/client0", 1, 0)]
    view = read_view(Transcript.load(directory), wanted)
    assert [s.key for s in view.sightings] == [wanted[0], wanted[2]]
    front, _ = fronts(2)
    with torch.inference_mode():
        expected = front(tokens)
    for seen, index in zip(view.sightings, (4, 6), strict=True):
        assert torch.allclose(torch.from_numpy(seen.rows.copy()), expected[index], atol=1e-5)
        assert seen.releases == 1


def test_the_noise_is_the_policys(private, unsafe):
    policy = private(8.0, 5.0)
    assert noise_of(policy).sigma == pytest.approx(10.0 / enforced_mu(8.0, 1e-5), rel=1e-9)
    assert noise_of(policy).clip == 5.0
    assert noise_of(unsafe).sigma == 0.0


def test_a_recording_torn_in_a_record_loses_that_record_alone(tmp_path, record, unsafe, draw):
    directory = record(tmp_path / "t", draw(12, 8, seed=1), unsafe)
    before = keys_of(directory)
    path = directory / "0002.bin"
    path.write_bytes(path.read_bytes()[:-7])
    left = keys_of(directory)
    assert left == [k for k in before if k.peer != "spiffe://test/client2" or k.step == 0]
    path.write_bytes(path.read_bytes()[:5])  # Torn in the head of its first record.
    assert Transcript.load(directory).faults(), "read it may be, judged it may not"
    assert [k for k in keys_of(directory) if k.peer == "spiffe://test/client2"] == []


def test_of_a_decoding_cache_only_the_prompt_is_attacked(tmp_path, unsafe, forward):
    recorder = Recorder(tmp_path, peer="p", number=0)
    for step, rows in enumerate((8, 1, 1)):
        recorder.record(0, step, forward(step, torch.zeros(1, rows, 4), cache=9))
    recorder.record(0, 9, forward(9, torch.zeros(2, 8, 4)))
    recorder.close()
    facts = {"policy": unsafe.model_dump(mode="json"), "job": None, "model": "0" * 64}
    (tmp_path / "transcript.json").write_text(json.dumps(facts))
    assert [(k.step, k.row) for k in keys_of(tmp_path)] == [(0, 0), (9, 0), (9, 1)]


@pytest.mark.parametrize("generation", [None, {"clip": 1.0, "share": 0.1, "releases": 50}])
def test_decoded_tokens_that_cross_bare_are_found(tmp_path, forward, generation):
    """Six prompts with their noise, and behind each four tokens without any."""
    rules = load_policy_of(generation)
    sigma, generator = plan_for(rules.privacy).cut.sigma, torch.Generator().manual_seed(1)
    recorder = Recorder(tmp_path, peer="p", number=0)
    for step in range(30):
        bare = step % 5 > 0
        rows = torch.zeros(1, 1, 16) if bare else sigma * torch.randn(1, 4, 16, generator=generator)
        recorder.record(0, step, forward(step, rows, cache=1 + step // 5))
    recorder.close()
    facts = {"policy": rules.model_dump(mode="json"), "job": None, "model": "0" * 64}
    (tmp_path / "transcript.json").write_text(json.dumps(facts))
    view = read_view(Transcript.load(tmp_path), [Key("p", 0, 0)])
    assert [p.key.step % 5 > 0 for p in (*view.traffic, *view.decoded)] == [False] * 6 + [True] * 24
    assert view.decode_noise.sigma == (0.0 if generation is None else plan_for(rules.privacy).decode.sigma)
    failed = {f.name for f in examine(view) if not f.passed}
    assert ("O8 unpaid" if generation is None else "O8 energy") in failed
    assert {name[:2] for name in failed} == {"O8"}


def load_policy_of(generation):
    privacy = {key: value for key, value in PRIVATE.items() if key != "gradients"}
    stated = {**ROUNDS, "privacy": privacy | {"regime": "frozen", "generation": generation}}
    return Policy.model_validate_json(json.dumps(stated))


@pytest.mark.parametrize(
    "facts", ["{}", "[]", '{"policy": {}, "model": "x"}', '{"policy": null, "model": 1, "job": "{}"}']
)
def test_public_facts_that_are_none_are_refused(tmp_path, facts):
    (tmp_path / "transcript.json").write_text(facts)
    with pytest.raises(InputError) as caught:
        public_facts(Transcript.load(tmp_path))
    assert caught.value.code == "SS-1707"


def test_memoised_releases_are_one_and_fresh_ones_are_linked():
    assert link_by_order(["a", "b", "a", "b"], 1) == [[0], [1], [0], [1]]
    assert link_by_order(["a", "b", "c", "d"], 1) == [[0], [1], [2], [3]]
    assert link_by_order(["a", "b", "c", "d"], 2) == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert link_by_order(["a", "b", "a", "c", "d", "c"], 2) == [[0, 3], [1, 4], [0, 3], [0, 3], [1, 4], [0, 3]]
    assert link_by_order(["a", "b", "c"], 2) == [[0], [1], [2]], "no whole number of passes: nothing is linked"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5).map(str), max_size=12), st.integers(1, 4))
def test_linked_releases_have_different_bytes(digests, passes):
    links = link_by_order(digests, passes)
    assert len(links) == len(digests)
    for digest, linked in zip(digests, links, strict=True):
        assert len(linked) in {1, passes}
        assert len({digests[i] for i in linked}) == len(linked)
        assert digest in {digests[i] for i in linked}


def test_batches_hold_one_length_each(tmp_path, record, unsafe, draw):
    directory = record(tmp_path / "t", draw(6, 8, seed=1), unsafe)
    long = record(tmp_path / "u", draw(3, 12, seed=1), unsafe)
    view = read_view(Transcript.load(directory), keys_of(directory))
    other = read_view(Transcript.load(long), keys_of(long))
    mixed = ServerView(view.sightings + other.sightings, view.noise)
    groups = batches(mixed, linked=False, most=4)
    assert [tuple(rows.shape) for _, rows in groups] == [(4, 8, 32), (2, 8, 32), (3, 12, 32)]
    assert sorted(i for indices, _ in groups for i in indices) == list(range(9))


def test_fresh_releases_of_two_rounds_are_averaged(tmp_path, forward):
    recorder = Recorder(tmp_path, peer="p", number=0)
    for step, value in enumerate((1.0, 5.0, 3.0, 9.0)):  # Two records, two rounds.
        recorder.record(0, step, forward(step, torch.full((1, 4, 2), value), learn=True))
    recorder.close()
    (tmp_path / "transcript.json").write_text(json.dumps({"policy": ROUNDS, "job": TWO_ROUNDS, "model": "0" * 64}))
    transcript = Transcript.load(tmp_path)
    assert (public_facts(transcript).passes, public_facts(transcript).cut) == (2, (2, 1))
    view = read_view(transcript, [Key("p", 0, 0), Key("p", 3, 0)])
    assert [s.releases for s in view.sightings] == [2, 2]
    assert [float(s.rows[0, 0]) for s in view.sightings] == [1.0, 9.0]
    assert [float(s.linked[0, 0]) for s in view.sightings] == [2.0, 7.0]


def test_releases_are_linked_though_the_client_shuffles_every_round(tmp_path, forward):
    """The same rounds as above with twelve records in another order in the second; their content tells."""
    records = 20 * torch.randn(12, 4, 2, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4)).tolist()
    recorder = Recorder(tmp_path, peer="p", number=0)
    for step, i in enumerate([*range(12), *order]):
        recorder.record(0, step, forward(step, records[i : i + 1] + 0.01 * step, learn=True))
    recorder.close()
    (tmp_path / "transcript.json").write_text(json.dumps({"policy": ROUNDS, "job": TWO_ROUNDS, "model": "0" * 64}))
    view = read_view(Transcript.load(tmp_path), [Key("p", i, 0) for i in range(12)])
    for i, seen in enumerate(view.sightings):
        both = records[i] + 0.01 * (i + 12 + order.index(i)) / 2
        assert (seen.releases, float((torch.from_numpy(seen.linked) - both).abs().max())) == (
            2,
            pytest.approx(0, abs=1e-4),
        )


def test_a_recording_under_another_policy_than_the_one_written_down_is_refused(tmp_path):
    lab = load_policy(ROOT / "policies" / "lab.toml")
    (tmp_path / "transcript.json").write_text(json.dumps({"policy": lab.model_dump(mode="json"), "model": "0" * 64}))
    for number, digest in ((0, lab.digest), (1, "1" * 64)):
        recorder = Recorder(tmp_path, peer="p", number=number)
        recorder.record(0, 0, encode(Hello(version=1, nonce=bytes(32), policy=digest)))
        recorder.close()
        if number == 0:
            assert public_facts(Transcript.load(tmp_path)).policy == lab
    with pytest.raises(InputError) as caught:
        public_facts(Transcript.load(tmp_path))
    assert caught.value.code == "SS-1708"
