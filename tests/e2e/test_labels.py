"""Three clients learn to classify over TLS, with answers instead of labels; and a site that cannot take part is told why.

The oracle for what they learnt is the same model without a wire: the trained adapters in A, B and C, joined directly.
"""

from __future__ import annotations

import json

import pytest
import torch

from securesplit.client.run import RunRecord
from securesplit.model.export import read_part_adapters, restore_adapters
from securesplit.model.lora import add_adapters
from securesplit.model.store import load_back, load_front, load_middle
from securesplit.privacy.ledger import Ledger
from securesplit.protocol.job import Job
from tests.e2e.house import CLIENTS, LAB, WORDS, build_house, policy_of
from tests.e2e.test_rounds import alike, sums_are_exact, train_all
from tests.e2e.ward import NAMES, Ward, labels_policy, records, with_task

COUNT, HELD_OUT = 26, 2


@pytest.fixture
def ward(tmp_path) -> Ward:
    house = build_house(tmp_path / "house")
    return Ward(house.root, house.keys, house.model)


def job_of(ward: Ward, names=NAMES, *, blind=True, **schedule) -> Job:
    job = with_task(ward.job(blind=blind), names, **schedule)
    faster = job.optimiser.model_copy(update={"client_lr": 0.03, "server_lr": 0.02})
    return job.model_copy(update={"optimiser": faster})


def share_right(parts, found) -> float:
    """How often the class's own word is likelier than the other's behind a text that is padded in front to three words."""
    front, middle, back = parts
    words = [record.text.split() for record in found]
    tokens = torch.tensor([[0] * (3 - len(row)) + [WORDS.index(word) for word in row] + [0] for row in words])
    with torch.no_grad():
        behind = back(middle(front(tokens)))[:, -2, [WORDS.index(name) for name in NAMES]]
    right = behind.argmax(1) == torch.tensor([NAMES.index(record.label) for record in found])
    return float(right.float().mean())


def trained_parts(ward, core):
    parts = load_front(ward.model), load_back(ward.model)
    for part in parts:
        add_adapters(part, 2, 4.0, ("q_proj", "v_proj", "down_proj"), seed=99)
        restore_adapters(part, read_part_adapters(ward.root / "bob" / f"adapter-{part.role}.safetensors"))
    return parts[0], core._engine.middle, parts[1]


@pytest.mark.parametrize(("regime", "rounds", "epochs"), [("round", 6, 1), ("step", 2, 3)], ids=["round", "step"])
def test_three_clients_learn_from_answers_and_each_record_is_asked_once(ward, regime, rounds, epochs):
    policy = policy_of(labels_policy(regime, activations=9, updates=9), buckets=[4])
    core = ward.core(job_of(ward, rounds=rounds, epochs=epochs), policy)
    outcome = train_all(ward, core, policy, count=COUNT)
    assert outcome.errors == {}
    sums_are_exact(ward, rounds)
    alike(ward)
    unseen = records(60, seed=99)
    before = share_right((load_front(ward.model), load_middle(ward.model), load_back(ward.model)), unseen)
    after = share_right(trained_parts(ward, core), unseen)
    print("MEASURED", regime, before, after, [r.accuracy for r in outcome.records.values()])
    assert after > 0.7 > before + 0.2
    trained, states = COUNT - HELD_OUT, rounds * epochs
    for name in CLIENTS:
        record = outcome.records[name]
        assert record == RunRecord.model_validate_json((ward.root / name / "run.json").read_text())
        assert record.accuracy in {0.0, 0.5, 1.0}
        assert {c.channel: c.releases for c in record.channels} == {
            "cut": trained * states + HELD_OUT * (rounds + 1), "labels": trained, "update": trained * states,
        }  # fmt: skip
        assert record.epsilon <= 1000
        ledger = Ledger(ward.keys / name / "ledger")
        answers = [entry for entry in ledger.entries() if entry.channel == "labels"]
        assert len({entry.record for entry in answers}) == len(answers) == trained
        ledger.verify()
        ledger.close()


def test_a_run_without_protection_has_an_accuracy_and_one_of_texts_has_none(ward):
    policy = policy_of(LAB, buckets=[4])
    core = ward.core(job_of(ward, blind=False, rounds=1, epochs=2), policy)
    outcome = train_all(ward, core, policy, count=6)
    assert outcome.errors == {}
    assert all(record.accuracy is not None for record in outcome.records.values())
    # The truth file has what crossed, row by row: the whole of it, with the padding in front, and no class.
    lines = [json.loads(line) for line in (ward.root / "alice.truth").read_text().splitlines()]
    assert {len(line["tokens"]) for line in lines} == {4}
    assert not {WORDS.index(name) for name in NAMES} & {token for line in lines for token in line["tokens"]}


@pytest.mark.parametrize(
    ("names", "change", "code"),
    [
        (NAMES, lambda line: {"text": line["text"]}, "SS-1235"),
        (NAMES, lambda line: {**line, "label": "w62"}, "SS-1235"),
        (("never seen", "unknown word"), lambda line: line, "SS-1233"),
    ],
    ids=["no label", "another label", "labels that begin alike"],
)
def test_labels_that_do_not_fit_the_job_stop_a_site_before_it_sends(ward, monkeypatch, names, change, code):
    written = Ward.data

    def changed(self, name, count, *, seed):
        path = written(self, name, count, seed=seed)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:-1], change(lines[-1])]))
        return path

    monkeypatch.setattr(Ward, "data", changed)
    policy = policy_of(labels_policy("round", activations=9, updates=9), buckets=[4])
    outcome = train_all(ward, ward.core(job_of(ward, names, rounds=1, epochs=1), policy), policy, names=("alice",))
    assert outcome.errors["alice"].code == code
    assert (ward.root / "alice.truth").read_text() == "", "nothing was sent"
    ledger = Ledger(ward.keys / "alice" / "ledger")
    assert list(ledger.entries()) == []
    ledger.close()
