"""Where nothing can be known, no attack of the suite knows anything: noise of 50 times the rows, or answers to other texts.

A client of the product trains over the wire; its own recorder writes what crossed; the whole suite runs on the recording in
its own process, with every attack that fits, and is scored against the true texts or against shuffled ones.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from attacks.evaluate import Order, evaluate
from attacks.view import Key, public_facts, read_view
from securesplit.privacy.ledger import Ledger
from securesplit.protocol.transcript import Recorder, Transcript
from tests.e2e.house import LAB, ROUND, WORDS, batches_of, build_house, policy_of, sentences

PEER = "spiffe://house/alice"
COUNT = 24
# Both channels carry noise of more than 50 times a clipped row's or gradient's rms: sqrt(T D) * 2 / mu per release.
TINY = ROUND.replace("epsilon = 1000.0", "epsilon = 2.0")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return build_house(tmp_path_factory.mktemp("house") / "house")


def recorded(house, directory, privacy, *, ledger=None, shuffled=False):
    """One client trains a step over each of its batches; the truth beside the recording may be of other sequences."""
    policy, job = policy_of(privacy), house.job()
    client, spy, _ = house.joined(job, policy, ledger=ledger)
    client.train("both")
    batches = list(batches_of(client, sentences(COUNT, seed=5)))
    for batch in batches:
        client.step(batch)
    recorder = Recorder(directory, peer=PEER, number=0)
    for kept, direction in ((spy.sent, 0), (spy.received, 1)):
        for data in kept:
            recorder.record(direction, 0, data)
    recorder.close()
    facts = {"policy": policy.model_dump(mode="json"), "job": job.model_dump(mode="json"), "model": house.digest}
    (directory / "transcript.json").write_text(json.dumps({**facts, "version": "test"}))
    steps = sorted({seen.step for seen in Transcript.load(directory).observations()})
    rows = [
        (step, row, batch.tokens[row, :length].tolist())
        for step, batch in zip(steps, batches, strict=True)
        for row, length in enumerate(batch.lengths)
    ]
    texts = [tokens for *_, tokens in rows]
    texts = texts[7:] + texts[:7] if shuffled else texts
    truth = [
        {"peer": PEER, "step": step, "row": row, "tokens": ids, "text": " ".join(WORDS[i] for i in ids), "pii": []}
        for (step, row, _), ids in zip(rows, texts, strict=True)
    ]
    (directory / "truth.jsonl").write_text("".join(json.dumps(line) + "\n" for line in truth))
    return directory


def report_of(house, directory, tmp_path):
    aux = tmp_path / "aux.jsonl"
    aux.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(200, seed=77)))
    order = Order(
        transcript=directory,
        model=house.model,
        truth=directory / "truth.jsonl",
        aux=aux,
        profile="standard",
        examples=0,
    )
    return evaluate(order)


def above_the_guess(report):
    """Attacks on tokens whose whole interval lies above the best guess without looking, at 97.5 % each: few by chance."""
    guess = max(report.kappa, report.baselines.unigram)
    return {
        r.name: (r.value, r.value_ci95) for r in report.attacks if r.measure == "tokens" and r.value_ci95[0] > guess
    }


@pytest.mark.slow
def test_at_50_times_the_rms_the_whole_suite_is_at_its_prior(house, tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    try:
        directory = recorded(house, tmp_path / "seen", TINY, ledger=ledger)
    finally:
        ledger.close()
    transcript = Transcript.load(directory)
    facts = public_facts(transcript)
    seen = next(iter(transcript.observations()))
    view = read_view(transcript, [Key(PEER, seen.step, seen.row)])
    for noise in (view.noise, view.gradient_noise):
        assert noise.clip is not None
        assert noise.sigma >= 50 * noise.clip / math.sqrt(seen.hidden.size)
    assert facts.cut == (1, 1)

    report = report_of(house, directory, tmp_path)
    names = {r.name for r in report.attacks}
    assert {"ridge", "vocabulary-map", "inverter", "beam-lm", "bisr-sip", "mixture", "later-rows", "patched"} <= names
    assert {"labels-right-to-left", "labels-lm", "tag", "bisr-b", "completion"} <= names
    assert above_the_guess(report) == {}
    assert report.worst <= report.ceiling
    assert all(check.passed for check in report.checks)


@pytest.mark.slow
def test_against_other_texts_than_those_that_crossed_the_whole_suite_is_at_its_prior(house, tmp_path):
    """Nothing is protected here: the answers are right, and of other sequences."""
    directory = recorded(house, tmp_path / "seen", LAB, shuffled=True)
    report = report_of(house, directory, tmp_path)
    assert {"vocabulary-nn", "inverter", "labels-right-to-left", "bisr-sip"} <= {r.name for r in report.attacks}
    assert above_the_guess(report) == {}
    straight = report_of(house, recorded(house, tmp_path / "straight", LAB), tmp_path)
    assert straight.worst == 1.0, "the same traffic with its own texts"
    assert torch.is_grad_enabled()
