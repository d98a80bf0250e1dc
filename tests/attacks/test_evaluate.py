"""The whole road: a recording, an attack in a process that cannot see the truth, a score."""

from __future__ import annotations

import json
import sys

import pytest

from attacks.evaluate import Order, evaluate, require_below_ceiling
from attacks.exchange import Task
from attacks.report import require_noise
from attacks.spawn import _cause, run_attack
from attacks.truth import read_truth
from securesplit.errors import CheckFailed, InputError

FAMILY = ("ridge", "vocabulary-nn", "vocabulary-map")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def aux(home, draw):
    path = home / "aux.jsonl"
    texts = (" ".join(f"w{i}" for i in row) for row in draw(150, 12, seed=77).tolist())
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def bare(home, record, unsafe, draw):
    """A recording of nine unprotected sequences of ten tokens, padded to twelve."""
    return record(home / "bare", draw(9, 10, seed=1), unsafe, padded=2)


@pytest.fixture(scope="module")
def unprotected(bare, model_dirs, aux):
    told = []
    return evaluate(
        Order(transcript=bare, model=model_dirs(2), truth=bare / "truth.jsonl", aux=aux, attacks=FAMILY[:2]),
        told.append,
    ), told


def test_an_unprotected_recording_gives_everything_away(unprotected):
    report, told = unprotected
    assert [r.name for r in report.attacks] == ["ridge", "vocabulary-nn"]
    best = report.attacks[1]
    assert best.token_recovery == report.worst == 1.0
    assert (best.ci95, best.exact_match, best.pii_exact, best.rouge_l) == ((1.0, 1.0), 1.0, 1.0, 1.0)
    assert (best.sequences, best.tokens, best.unresolved) == (9, 90, 0), "padding is recovered and not scored"
    assert (report.ceiling, report.epsilon, report.mu) == (1.0, None, None)
    assert best.certified is not None
    assert (best.certified.tried, best.certified.proven) == (1, 1)
    assert best.certified.radius is not None
    assert best.certified.radius > 0
    assert report.attacks[0].certified is None, "ridge proves nothing"
    assert all(example.truth == example.recovered for example in report.examples)
    assert {event.attack for event in told} == {"public text", "ridge", "vocabulary-nn"}
    require_below_ceiling(report)


def test_the_json_has_the_contracts_keys_and_no_text(unprotected):
    report, _ = unprotected
    value = json.loads(report.to_json())
    assert {"attacks", "worst", "ceiling", "epsilon"} <= value.keys()
    wanted = {"name", "threat", "token_recovery", "ci95", "prior", "pii_exact", "rouge_l", "seconds"}
    assert all(wanted <= attack.keys() for attack in value["attacks"])
    assert report.examples[0].truth not in report.to_json()


def test_a_protected_recording_gives_the_prior_away(home, record, private, draw, model_dirs, aux):
    directory = record(home / "private", draw(12, 10, seed=1), private(1.0, 10.0))
    report = evaluate(
        Order(transcript=directory, model=model_dirs(2), truth=directory / "truth.jsonl", aux=aux, attacks=FAMILY)
    )
    assert [r.name for r in report.attacks] == ["ridge", "vocabulary-nn", "vocabulary-map"]
    assert report.worst <= report.attacks[0].prior + 0.1
    assert report.epsilon == 1.0
    assert report.kappa < report.ceiling < 0.6
    assert all(check.passed for check in report.checks)
    assert {check.name for check in report.checks} == {"O1 energy", "O1 reuse", "O1 reuse within", "O1 clip"}
    require_noise(report)
    require_below_ceiling(report)


def test_a_tenth_of_the_noise_is_no_protection_whatever_the_attacks_get(home, record, private, draw, model_dirs):
    directory = record(home / "cheat", draw(12, 10, seed=1), private(1.0, 10.0), cheat=0.1)
    report = evaluate(
        Order(transcript=directory, model=model_dirs(2), truth=directory / "truth.jsonl", attacks=("frequency",))
    )
    assert {check.name for check in report.checks if not check.passed} == {"O1 energy", "O1 reuse", "O1 reuse within"}
    with pytest.raises(CheckFailed) as caught:
        require_noise(report)
    assert (caught.value.code, caught.value.exit_code) == ("SS-1573", 1)


def test_without_truth_or_text_and_on_a_torn_recording(home, record, unsafe, draw, model_dirs):
    """The truth is deleted before the attack starts, there is no auxiliary text, and the last record is torn."""
    directory = record(home / "torn", draw(12, 10, seed=1), unsafe)
    truths = read_truth(directory / "truth.jsonl")
    (directory / "truth.jsonl").unlink()
    path = directory / "0000.bin"
    path.write_bytes(path.read_bytes()[:-100])
    task = Task(
        transcript=str(directory), model=str(model_dirs(2)), aux=None, profile="smoke", attacks=("vocabulary-nn",),
        keys=tuple(t.key for t in truths),
    )  # fmt: skip
    known, heard = run_attack(task)
    (answer,) = heard.answers
    assert not known.informed
    left = {t.key: t for t in truths if t.peer != "spiffe://test/client0" or t.step == 0}
    assert set(answer.keys) == set(left)
    assert all(left[k].tokens == tokens for k, tokens in zip(answer.keys, answer.tokens, strict=True))


def test_errors_of_the_attack_process_arrive_as_they_were(bare, model_dirs):
    with pytest.raises(InputError) as caught:
        evaluate(Order(transcript=bare, model=model_dirs(1), truth=bare / "truth.jsonl"))
    assert (caught.value.code, caught.value.exit_code) == ("SS-1706", 2)
    assert "same cut" in caught.value.hint


def test_a_process_that_dies_is_an_error(bare, model_dirs, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CheckFailed) as caught:
        evaluate(Order(transcript=bare, model=model_dirs(2), truth=bare / "truth.jsonl"))
    assert caught.value.code == "SS-1572"


def test_of_a_dead_process_only_the_exceptions_name_is_told():
    assert _cause(b"Traceback\nValueError: private words") == "ValueError"
    assert _cause(b"private words") == "no cause given"
    assert _cause(b"") == "no cause given"
