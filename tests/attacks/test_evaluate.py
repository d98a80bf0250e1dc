"""The whole road: a recording, an attack in a process that cannot see the truth, a score."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from attacks.asked import read_asked, shuffled
from attacks.evaluate import Order, _channels, evaluate, require_below_ceiling
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
    assert (best.exact_match, best.pii_exact, best.rouge_l) == (1.0, 1.0, 1.0)
    assert best.ci95 == (pytest.approx(9 / (9 + 1.96**2), abs=1e-3), 1.0), "nine sequences of nine are no certainty"
    assert (best.sequences, best.tokens, best.unresolved) == (9, 90, 0), "padding is recovered and not scored"
    assert (report.ceiling, report.epsilon, report.mu) == (1.0, None, None)
    assert best.certified is not None
    assert (best.certified.tried, best.certified.proven) == (1, 1)
    assert best.certified.radius is not None
    assert best.certified.radius > 0
    assert report.attacks[0].certified is None, "ridge proves nothing"
    assert all(example.truth == example.recovered for example in report.examples)
    assert {event.attack for event in told} == {"public text", "ridge", "vocabulary-nn"}
    assert report.setting.channels == ("O1", "O7"), "nothing was answered, learnt, summed or trained in this recording"
    assert (report.setting.code, report.setting.classes) == (None, 0)
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
    assert {check.name for check in report.checks} == {
        *(f"O1 energy{of}" for of in ("", " of all", " of a column", " of a place")), "O1 reuse", "O1 reuse within", "O1 clip",
        "O1 clip of one",
    }  # fmt: skip
    assert [u.name for u in report.untested] == ["decoded tokens (O8)"]
    require_noise(report)
    require_below_ceiling(report)


def test_a_tenth_of_the_noise_is_no_protection_whatever_the_attacks_get(home, record, private, draw, model_dirs):
    directory = record(home / "cheat", draw(12, 10, seed=1), private(1.0, 10.0), cheat=0.1)
    report = evaluate(
        Order(transcript=directory, model=model_dirs(2), truth=directory / "truth.jsonl", attacks=("frequency",))
    )
    assert {check.name for check in report.checks if not check.passed} >= {"O1 energy", "O1 reuse", "O1 reuse within"}
    with pytest.raises(CheckFailed) as caught:
        require_noise(report)
    assert (caught.value.code, caught.value.exit_code) == ("SS-1573", 1)


def test_without_truth_or_text(home, record, unsafe, draw, model_dirs):
    """The truth is deleted before the attack starts, and there is no auxiliary text."""
    directory = record(home / "alone", draw(12, 10, seed=1), unsafe)
    truths = read_truth(directory / "truth.jsonl")
    (directory / "truth.jsonl").unlink()
    known, heard = run_attack(task(directory, model_dirs(2), truths))
    (answer,) = heard.answers
    assert not known.informed
    assert dict(zip(answer.keys, answer.tokens, strict=True)) == {t.key: t.tokens for t in truths}


def task(directory, model, truths):
    return Task(
        transcript=str(directory), model=str(model), aux=None, profile="smoke", attacks=("vocabulary-nn",),
        keys=tuple(t.key for t in truths),
    )  # fmt: skip


def _cut(directory):
    path = directory / "0000.bin"
    path.write_bytes(path.read_bytes()[:-100])


def _lose_both(directory):
    for ending in ("bin", "peer"):
        (directory / f"0002.{ending}").unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_cut, "0000.bin"),
        (lambda d: (d / "0001.bin").write_bytes(bytes(range(7, 250)) * 9), "0001.bin"),
        (lambda d: (d / "0001.bin").write_bytes(b""), "0001.bin"),
        (lambda d: (d / "0001.peer").unlink(), "0001.bin"),
        (lambda d: (d / "0001.bin").unlink(), "0001.peer"),
        (_lose_both, "spiffe://test/client2"),
    ],
)  # fmt: skip
def test_a_damaged_recording_is_not_judged(tmp_path, bare, model_dirs, damage, named):
    directory = tmp_path / "t"
    shutil.copytree(bare, directory)
    damage(directory)
    with pytest.raises(InputError) as caught:
        evaluate(Order(transcript=directory, model=model_dirs(2), truth=bare / "truth.jsonl"))
    assert (caught.value.code, caught.value.exit_code) == ("SS-1301", 2)
    assert len(caught.value.details) == 1
    assert named in caught.value.details[0]


def test_the_attack_process_refuses_a_torn_recording_by_itself(tmp_path, bare, model_dirs):
    directory = tmp_path / "t"
    shutil.copytree(bare, directory)
    _cut(directory)
    with pytest.raises(InputError) as caught:
        run_attack(task(directory, model_dirs(2), read_truth(bare / "truth.jsonl")))
    assert caught.value.code == "SS-1301"


@pytest.mark.parametrize("tokens", [[120], [1] * 13], ids=["vocabulary", "length"])
def test_truth_that_cannot_be_this_recordings_is_refused(tmp_path, bare, model_dirs, tokens):
    lines = [json.loads(line) for line in (bare / "truth.jsonl").read_text().splitlines()]
    lines[-1]["tokens"] = tokens
    path = tmp_path / "truth.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError) as caught:
        evaluate(Order(transcript=bare, model=model_dirs(2), truth=path))
    assert (caught.value.code, caught.value.exit_code) == ("SS-1701", 2)


def test_records_beyond_the_chosen_and_candidates_count_as_overlap(tmp_path, bare, model_dirs, aux, monkeypatch):
    monkeypatch.setattr("attacks.evaluate.choose", lambda truths, *_, **__: tuple(truths[:1]))
    last = json.loads((bare / "truth.jsonl").read_text().splitlines()[-1])["text"]
    (tmp_path / "aux.txt").write_text(last + "\n\n")
    asked = [json.loads(aux.read_text().splitlines()[3])["text"], "quite another text that was never seen"]
    lines = ({"text": text, "member": member} for text, member in zip(asked, (True, False), strict=True))
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    truth = bare / "truth.jsonl"
    for order in (
        Order(transcript=bare, model=model_dirs(2), truth=truth, aux=tmp_path / "aux.txt"),
        Order(transcript=bare, model=model_dirs(2), truth=truth, aux=aux, candidates=tmp_path / "asked.jsonl"),
    ):
        with pytest.raises(InputError) as caught:
            evaluate(order)
        assert caught.value.code == "SS-1703"


def test_candidates_reach_the_attack_in_an_order_that_says_nothing(tmp_path, bare, model_dirs, monkeypatch):
    """Members first in the file; the attack process sees the order of digests, and the scorer keeps who is who."""
    texts = [f"w{i} w{i + 1} w{i + 2}" for i in range(1, 41)]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"text": t, "member": i < 20}) + "\n" for i, t in enumerate(texts)))
    seen = []

    class Stop(Exception):
        pass

    def catch(task, progress):
        seen.append(task.candidates)
        raise Stop

    monkeypatch.setattr("attacks.evaluate.run_attack", catch)
    for seed in (0, 0, 1):
        with pytest.raises(Stop):
            evaluate(
                Order(transcript=bare, model=model_dirs(2), truth=bare / "truth.jsonl", candidates=path, seed=seed)
            )
    assert seen[0] == seen[1] != seen[2]
    assert sorted(seen[0]) == sorted(texts) != list(seen[0])
    assert 5 <= sum(text in texts[:20] for text in seen[0][:20]) <= 15
    mixed = shuffled(read_asked(path), 0)
    assert tuple(c.text for c in mixed) == seen[0]
    assert all(c.member == (texts.index(c.text) < 20) for c in mixed)
    assert shuffled(tuple(reversed(mixed)), 0) == mixed, "it depends on the texts alone"


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


def test_a_report_says_which_channels_the_attacked_sequences_crossed(tmp_path):
    order = Order(transcript=tmp_path, model=tmp_path, truth=tmp_path)
    read, learnt = SimpleNamespace(output=1, gradient=None), SimpleNamespace(output=1, gradient=1)
    assert _channels(order, [read]) == ("O1", "O2", "O7"), "generation proves nothing of training"
    assert _channels(order, [read, learnt]) == ("O1", "O2", "O3", "O7")
    (tmp_path / "sum-1.safetensors").touch()
    assert _channels(replace(order, adapter=tmp_path), [read]) == ("O1", "O2", "O5", "O6", "O7")
    assert _channels(order, []) == ("O5",)
