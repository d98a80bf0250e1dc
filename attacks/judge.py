"""Score every attack of a run, whatever kind of answer it gave, and say what of it a reader should distrust."""

from __future__ import annotations

from collections.abc import Sequence

from attacks.config import config
from attacks.exchange import Answer, Bagged, Extracted, Labelled, Linked, Measured, Rated, Recovered
from attacks.outcomes import score_bags, score_labels, score_lengths, score_links, score_membership, score_pieces
from attacks.report import Result
from attacks.scoring import Scorer, score_tokens


def score(answers: Sequence[Answer], scorer: Scorer) -> list[Result]:
    """One result per attack, in the order in which they ran; the answers of several seeds are one result.

    Raises:
        CheckFailed: SS-1571 when a metric cannot be computed.
    """
    by_name: dict[str, list[Answer]] = {}
    for answer in answers:
        by_name.setdefault(answer.attack, []).append(answer)
    found = []
    for group in by_name.values():
        match group[0]:
            case Recovered():
                found.append(score_tokens([a for a in group if isinstance(a, Recovered)], scorer))
            case Bagged():
                found.append(score_bags([a for a in group if isinstance(a, Bagged)], scorer))
            case Rated():
                found.append(score_membership([a for a in group if isinstance(a, Rated)], scorer))
            case Labelled():
                found.append(score_labels([a for a in group if isinstance(a, Labelled)], scorer))
            case Linked():
                found.append(score_links([a for a in group if isinstance(a, Linked)], scorer))
            case Measured():
                found.append(score_lengths([a for a in group if isinstance(a, Measured)], scorer))
            case Extracted():
                found.append(score_pieces([a for a in group if isinstance(a, Extracted)], scorer))
    return found


def flags_of(results: Sequence[Result]) -> tuple[str, ...]:
    """What a reader should distrust: an attack that knows more and gets less, and a bound that excludes nothing."""
    by_name = {r.name: r for r in results}
    flags = []
    for result in results:
        for other in config().attacks[result.name].at_least:
            weaker = by_name.get(other)
            if weaker is not None and weaker.measure == result.measure and result.value < weaker.value:
                inside = "within" if weaker.value <= result.value_ci95[1] else "OUTSIDE"
                flags.append(
                    f"{result.name} got {result.value:.3f}, less than {other} with {weaker.value:.3f}, which knows less "
                    f"({inside} its interval); the larger figure counts"
                )
    return tuple(flags)
