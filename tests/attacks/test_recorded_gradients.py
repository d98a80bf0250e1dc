"""A training step over the wire, recorded by the product's own recorder, attacked from the recording."""

from __future__ import annotations

import json

import pytest
import torch

from attacks.completion import ATTACKS as COMPLETION
from attacks.knowledge import learn
from attacks.leftward import ATTACKS as LEFTWARD
from attacks.view import Key, PublicModel, read_view
from securesplit.model.store import load_back, load_front, load_middle
from securesplit.privacy.ledger import Ledger
from securesplit.protocol.transcript import Recorder, Transcript
from tests.attacks.lesson import prior_of, profile, run
from tests.e2e.house import LAB, ROUND, WORDS, batches_of, build_house, policy_of, sentences

PEER = "spiffe://house/alice"


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return build_house(tmp_path_factory.mktemp("house") / "house")


def lived(house, directory, privacy, *, ledger=None, rate=0.0):
    """One client trains; what crossed is recorded. Returns the view, and the tokens by sighting."""
    policy, job = policy_of(privacy), house.job()
    client, spy, _ = house.joined(job, policy, ledger=ledger)
    client.train("both")
    optimiser = torch.optim.AdamW(client.parameters(), lr=rate)
    truth, padding = [], []
    for batch in batches_of(client, sentences(12, seed=5)):
        client.step(batch)
        if rate:
            optimiser.step()
        truth.append(batch)
    recorder = Recorder(directory, peer=PEER, number=0)
    for kept, direction in ((spy.sent, 0), (spy.received, 1)):
        for data in kept:
            recorder.record(direction, 0, data)
    recorder.close()
    facts = {"policy": policy.model_dump(mode="json"), "job": job.model_dump(mode="json"), "model": house.digest}
    (directory / "transcript.json").write_text(json.dumps({**facts, "version": "test"}))
    transcript = Transcript.load(directory)
    steps = sorted({seen.step for seen in transcript.observations()})
    keys, tokens = [], []
    for step, batch in zip(steps, truth, strict=True):
        for row, length in enumerate(batch.lengths):
            keys.append(Key(PEER, step, row))
            tokens.append(batch.tokens[row, :length])
            padding.append(batch.bucket - length)
    assert any(padding), "some rows are padded"
    return read_view(transcript, keys), tokens


def known_of(house, view):
    front = load_front(house.model)
    model = PublicModel(
        front, front.base.get_input_embeddings().weight.detach(), middle=lambda: load_middle(house.model),
        back=lambda: load_back(house.model),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(3, len(WORDS), (40, 16), generator=generator)
    return learn(model, prior_of(texts, len(WORDS)), view, profile())


def found(attack, house, view, tokens):
    answer = run(attack, view, known_of(house, view))
    hits = total = 0
    for got, want in zip(answer.tokens, tokens, strict=True):
        hits += sum(g == w for g, w in zip(got[1 : len(want)], want[1:].tolist(), strict=True))
        total += len(want) - 1
    return hits / total


def test_every_token_but_the_first_is_in_an_open_recording(house, tmp_path):
    view, tokens = lived(house, tmp_path, LAB)
    assert view.cut == (1, 1)
    assert all(seen.gradient is not None and seen.output is not None for seen in view.sightings)
    assert found(LEFTWARD[0], house, view, tokens) == 1.0


def test_a_few_steps_of_training_do_not_hide_them(house, tmp_path):
    """C learns between the steps, at ten times the job's rate; the attack has the weights of the start alone."""
    view, tokens = lived(house, tmp_path, LAB, rate=0.03)
    assert found(LEFTWARD[0], house, view, tokens) >= 0.9


def test_the_noised_gradients_of_a_private_policy_give_next_to_nothing(house, tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    try:
        view, tokens = lived(house, tmp_path / "seen", ROUND, ledger=ledger)
    finally:
        ledger.close()
    assert view.gradient_noise.sigma > 0
    assert view.gradient_noise.clip == 1.0
    # 61 words as good as each other: a guess is right once in 61, and 90 labels have a standard error of 0.02 or so.
    assert found(LEFTWARD[0], house, view, tokens) <= 0.2
    assert found(COMPLETION[0], house, view, tokens) <= 0.12
