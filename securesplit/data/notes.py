"""Synthetic ward notes: text that looks private, belongs to nobody, and says where its private parts are.

Every person, number and address is drawn by faker from a seed; the phone numbers lie in a range that is reserved for
fiction. Each note names a complaint and closes with a question whose answer follows from it, so that a small language
model has something to learn in a few steps.

What it is *not*: real notes are longer, messier and full of abbreviations. A figure measured on these notes says how an
attack works, not how much a hospital's own text would lose.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from faker import Faker

from securesplit.errors import InputError

__all__ = ["Note", "ward_notes", "write_notes"]

_MAX_COUNT = 1_000_000

# Complaint, treatment, ward. The treatment and the ward follow from the complaint alone: that is what can be learnt.
_CASES = (
    ("chest pain", "aspirin", "cardiac"),
    ("a broken wrist", "a plaster cast", "fracture"),
    ("pneumonia", "amoxicillin", "chest"),
    ("a severe migraine", "sumatriptan", "day"),
    ("an asthma attack", "salbutamol", "chest"),
    ("a kidney stone", "ibuprofen", "renal"),
    ("high blood sugar", "insulin", "diabetes"),
    ("a deep vein clot", "heparin", "vascular"),
    ("an infected wound", "flucloxacillin", "surgical"),
    ("atrial fibrillation", "bisoprolol", "cardiac"),
)

# How a person is introduced: the name and one further identifier.
_OPENINGS = (
    "{name}, born {born}, came in with {complaint}.",
    "Ward note: {name}, record number {record}, was admitted with {complaint}.",
    "Ward note: {name}, living at {address}, reported {complaint}.",
    "Patient {name}, phone {phone}, presented with {complaint}.",
)

# What was done: never an identifier.
_MIDDLES = (
    "We gave {treatment} and moved the patient to the {ward} ward.",
    "Treated with {treatment} and kept on the {ward} ward.",
    "The plan is {treatment}; now stable on the {ward} ward.",
)

# What can be answered from the note.
_TAILS = (
    "Question: what was given? Answer: {treatment}.",
    "Question: which ward? Answer: {ward}.",
    "Question: what was the problem? Answer: {complaint}.",
)


@dataclass(frozen=True, slots=True)
class Note:
    """One synthetic note.

    Attributes:
        text: a few short sentences; about 40 to 60 tokens of SmolLM2's tokenizer.
        pii: every identifying piece, exactly as it stands in ``text``; the name comes first.
    """

    text: str
    pii: tuple[str, ...]


def ward_notes(count: int, seed: int) -> list[Note]:
    """Draw notes, all different.

    Args:
        count: how many; at most a million.
        seed: equal seeds give equal notes under one release of faker. The notes are public, so this is no secret.

    Raises:
        InputError: SS-1210 when ``count`` is outside 1 to 1 000 000.
    """
    if not 1 <= count <= _MAX_COUNT:
        raise InputError("SS-1210", f"cannot write {count} notes", hint=f"Ask for 1 to {_MAX_COUNT} notes.")
    fake = Faker("en_GB")
    fake.seed_instance(seed)
    notes: dict[str, Note] = {}
    while len(notes) < count:
        note = _note(fake)
        notes.setdefault(note.text, note)
    return list(notes.values())


def write_notes(path: Path, notes: Iterable[Note]) -> None:
    """Write notes as JSON lines that :func:`securesplit.data.corpus.read_corpus` reads back, labels included."""
    lines = (json.dumps({"text": note.text, "pii": note.pii}, ensure_ascii=False) + "\n" for note in notes)
    path.write_text("".join(lines), encoding="utf-8")


def _note(fake: Faker) -> Note:
    complaint, treatment, ward = fake.random_element(_CASES)
    person = {
        "name": f"{fake.first_name()} {fake.last_name()}",
        # Fixed ends: ages counted from today would make the notes depend on the day they are drawn.
        "born": fake.date_between(date(1931, 1, 1), date(2006, 12, 31)).strftime("%d/%m/%Y"),
        "record": fake.numerify("WN-######"),
        "address": f"{fake.building_number()} {fake.street_name()}, {fake.city()}",
        # Ofcom keeps 01632 960000 to 960999 for drama; nobody owns them.
        "phone": fake.numerify("01632 960###"),
    }
    opening = fake.random_element(_OPENINGS)
    parts = (opening, fake.random_element(_MIDDLES), fake.random_element(_TAILS))
    text = " ".join(parts).format(**person, complaint=complaint, treatment=treatment, ward=ward)
    return Note(text=text, pii=tuple(value for key, value in person.items() if f"{{{key}}}" in opening))
