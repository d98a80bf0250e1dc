"""All attacks, which of them fit a view, and how one is run. A new attack is a file, its config, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from attacks.attack import Attack
from attacks.config import AttackNote, Profile, config
from attacks.exchange import Answer, Progress, Skipped
from attacks.knowledge import Knowledge
from attacks.threat import Threat, enough
from attacks.view import ServerView
from securesplit.errors import InputError

# In the order in which they run: cheap ones first, so that an interrupted run has said most.
_MODULES = (
    "attacks.matching",
    "attacks.permuted",
    "attacks.metadata",
    "attacks.completion",
    "attacks.labels",
    "attacks.leftward",
    "attacks.label_class",
    "attacks.frequency",
    "attacks.attribute",
    "attacks.membership",
    "attacks.canary",
    "attacks.span",
    "attacks.update_bag",
    "attacks.written",
    "attacks.inverter",
    "attacks.beam",
    "attacks.later",
    "attacks.mixture",
    "attacks.colluder",
    "attacks.sip",
    "attacks.tag",
    "attacks.patched",
    "attacks.hijack",
)


def all_attacks() -> tuple[Attack, ...]:
    """Every attack of this release."""
    return tuple(attack for module in _MODULES for attack in import_module(module).ATTACKS)


@dataclass(frozen=True, slots=True)
class Given:
    """What the user gave besides text.

    Attributes:
        candidates: whether there are texts whose membership is asked. labels: whether auxiliary texts have labels.
    """

    candidates: bool = False
    labels: bool = False


def fitting(
    view: ServerView, wanted: Sequence[str], threat: Threat, profile: Profile, given: Given | None = None
) -> tuple[tuple[Attack, ...], tuple[Skipped, ...]]:
    """The attacks to run, and why the others are not run.

    Args:
        view: what there is to attack.
        wanted: names; empty for all that fit the view, the threat model and the profile. What is asked for by name runs
            under every profile.

    Raises:
        InputError: SS-1704 when one that is asked for by name cannot run.
    """
    notes, chosen, skipped = config().attacks, [], []
    for attack in all_attacks():
        if wanted and attack.name not in wanted:
            continue
        why = _unfit(notes[attack.name], threat, given or Given()) or attack.blocked(view, threat)
        if why is None and not wanted and notes[attack.name].slow and not profile.slow:
            why = "it takes too long for this profile"
        if why is None:
            chosen.append(attack)
        elif wanted:
            raise InputError(
                "SS-1704", f"attack '{attack.name}' cannot run on this recording: {why}", hint="Leave it out."
            )
        else:
            skipped.append(Skipped(attack=attack.name, why=why))
    return tuple(chosen), tuple(skipped)


def _unfit(note: AttackNote, threat: Threat, given: Given) -> str | None:
    if not enough(threat.weights, note.weights):
        return f"the threat model grants '{threat.weights}' weights, and it needs '{note.weights}'"
    if note.conduct == "active" and threat.conduct == "passive":
        return "the threat model is passive, and it must send"
    if note.measure == "membership" and not given.candidates:
        return "no texts were given whose membership is asked (--candidates)"
    if note.measure == "labels" and note.channel != "O3" and not given.labels:
        return "the auxiliary text has no labels to learn from"
    return None


def run(attack: Attack, view: ServerView, known: Knowledge, report: Callable[[Progress], None]) -> Answer:
    """Run one attack, with its progress."""
    return attack.run(view, known, lambda done, total: report(Progress(attack=attack.name, done=done, total=total)))
