"""The figures that the product promises, on the pre-trained model and its notes."""

from __future__ import annotations

import json

import pytest
import torch

from attacks.evaluate import Order, evaluate, require_below_ceiling
from securesplit.cli.model import default_cache
from securesplit.data.notes import ward_notes, write_notes
from securesplit.model.manifest import read_manifest
from securesplit.model.plan import CutPlan
from securesplit.model.resolve import resolve_model
from securesplit.model.store import load_front, load_tokenizer
from securesplit.privacy.clip import clip_sequence
from securesplit.privacy.plan import plan_for
from securesplit.protocol.codec import encode
from securesplit.protocol.messages import Hello
from securesplit.protocol.transcript import Recorder

pytestmark = pytest.mark.slow

LENGTH = 48


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """The model directory and public notes that are none of the private ones."""
    path = tmp_path_factory.mktemp("public") / "notes.jsonl"
    write_notes(path, ward_notes(1000, seed=99))
    return resolve_model("smollm2-135m", default_cache(), CutPlan(2, 2)), path


def recording(directory, model, policy, forward):
    front, tokenizer = load_front(model), load_tokenizer(model)
    notes = ward_notes(12, seed=7)
    ids = [tokenizer.encode(note.text, truncation=True, max_length=LENGTH) for note in notes]
    padding = tokenizer.pad_token_id
    with torch.inference_mode():
        hidden = front(torch.tensor([[*row, *[padding] * (LENGTH - len(row))] for row in ids]))
    if not policy.unsafe:
        plan = plan_for(policy.privacy).cut
        generator = torch.Generator().manual_seed(1)
        hidden = clip_sequence(hidden, plan.clip) + plan.sigma * torch.randn(hidden.shape, generator=generator)
    recorder = Recorder(directory, peer="spiffe://t/a", number=0)
    recorder.record(0, 0, encode(Hello(version=1, nonce=bytes(32), policy=policy.digest)))
    recorder.record(0, 1, forward(0, hidden))
    recorder.close()
    facts = {"policy": policy.model_dump(mode="json"), "job": None, "model": read_manifest(model).digest}
    (directory / "transcript.json").write_text(json.dumps(facts))
    lines = (
        {"peer": "spiffe://t/a", "step": 0, "row": i, "tokens": row, "text": note.text, "pii": note.pii}
        for i, (row, note) in enumerate(zip(ids, notes, strict=True))
    )
    (directory / "truth.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_unprotected_notes_are_read_and_protected_ones_are_not(tmp_path, public, unsafe, private, forward):
    model, aux = public
    bare = recording(tmp_path / "bare", model, unsafe, forward)
    report = evaluate(Order(transcript=bare, model=model, truth=bare / "truth.jsonl", aux=aux))
    assert report.worst >= 0.99
    assert report.attacks[1].pii_exact == 1.0

    noised = recording(tmp_path / "noised", model, private(8.0, 560.0), forward)
    report = evaluate(Order(transcript=noised, model=model, truth=noised / "truth.jsonl", aux=aux))
    assert report.worst <= report.attacks[0].prior + 0.10
    assert all(result.pii_exact == 0 for result in report.attacks)
    require_below_ceiling(report)
