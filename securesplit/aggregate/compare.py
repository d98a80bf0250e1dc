"""Several records side by side: did the server tell everybody the same, and do two sums show one client?

Records of one session and round must agree. Each can be faultless alone while a server that told clients different
things, or a client that signed two sets of survivors, shows only here. A record that fails alone, or that nobody stands
behind, is not compared: otherwise anybody could cast doubt on good records with a file of their own.

What this does not protect: it sees the records that it is given. A client that left before a set was announced knows
nothing of it, and a session of which no record is given does not exist here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from securesplit.aggregate.findings import Check, Report, printable, shown

__all__ = ["compare"]

_Labelled = tuple[str, Report]
_Groups = dict[tuple[bytes, int], list[_Labelled]]


def compare(reports: Sequence[_Labelled]) -> tuple[Report, ...]:
    """The reports with what their comparison adds, in the same order.

    Args:
        reports: each with what to call it, such as the name of its file.

    Returns:
        For records of one session and round the checks ``same configuration``, ``same adverts``, ``same members``, ``same
        keys``, ``same survivors``, ``same values`` and ``same sum``, failed at all of them when two differ, with who says
        what in the detail; and ``one signature``, failed when a client signed two sets of survivors. The warning
        ``differencing`` comes at every record of a round whose survivors differ from those of the round before, or of
        another try of the same round, by exactly one client.
    """
    everything = _grouped(reports)
    reliable = _grouped([(label, r) for label, r in reports if r.valid and (r.sealed or r.agreed)])
    results = []
    for _, report in reports:
        key = _key(report)
        group = [] if key is None else reliable.get(key, [])
        found: list[Check] = []
        if key is not None and any(member is report for _, member in group):
            found += [*_sameness(group), *_differencing(key, reliable)]
        if key is not None and len(everything[key]) > 1:
            found.append(_one_signature(everything[key]))
        results.append(report.also(*found))
    return tuple(results)


def _key(report: Report) -> tuple[bytes, int] | None:
    return None if report.config is None else (report.config.session_id, report.config.round)


def _grouped(reports: Sequence[_Labelled]) -> _Groups:
    groups: _Groups = {}
    for label, report in reports:
        if (key := _key(report)) is not None:
            groups.setdefault(key, []).append((label, report))
    return groups


def _sameness(group: Sequence[_Labelled]) -> list[Check]:
    if len(group) < 2:
        return []
    questions: list[tuple[str, Callable[[Report], object], Callable[[Report], str]]] = [
        ("same configuration", lambda r: r.record.config, lambda r: _short(r.record.config)),
        ("same adverts", lambda r: r.record.adverts, lambda r: f"{shown(r.clients)} ({_short(*r.record.adverts)})"),
        ("same members", lambda r: r.record.members, lambda r: shown(r.record.members)),
        ("same survivors", lambda r: r.record.survivors, lambda r: shown(r.record.survivors)),
        ("same values", lambda r: r.record.alike, lambda r: r.record.alike.hex()[:16]),
        # No signature of the round covers the sum, so only a sealed record says what it was.
        ("same sum", lambda r: r.sealed and r.record.sum_digest, lambda r: r.record.sum_digest.hex()[:16]),
    ]
    return [_same(name, group, key, words) for name, key, words in questions]


def _short(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _same(
    name: str, group: Sequence[_Labelled], key: Callable[[Report], object], words: Callable[[Report], str]
) -> Check:
    said: dict[object, list[str]] = {}
    in_words: dict[object, str] = {}
    for label, report in group:
        value = key(report)
        if value:  # Who left early, or is not to see the sum, says nothing.
            said.setdefault(value, []).append(f"{report.record.maker} ({label})")
            in_words.setdefault(value, words(report))
    if len(said) < 2:
        return Check(name, ok=True, detail=f"{sum(map(len, said.values()))} of {len(group)} records say so")
    largest_first = sorted(said, key=lambda value: -len(said[value]))
    parts = [f"{', '.join(said[value])}: {in_words[value]}" for value in largest_first]
    return Check(name, ok=False, detail=printable("the records differ; " + " | ".join(parts)))


def _one_signature(group: Sequence[_Labelled]) -> Check:
    """A server may begin a broken-off session anew under its old name; other adverts are other rounds, and its own doing."""
    signed: dict[tuple[str, tuple[bytes, ...]], set[bytes]] = {}
    for _, report in group:
        for name in report.signers:
            signed.setdefault((name, report.record.adverts), set()).add(report.t3)
    if twice := sorted(name for (name, _), statements in signed.items() if len(statements) > 1):
        return Check("one signature", ok=False, detail=f"signed two sets of survivors: {shown(twice)}")
    return Check("one signature", ok=True, detail="nobody signed two sets of survivors")


def _differencing(key: tuple[bytes, int], together: _Groups) -> list[Check]:
    """A warning of sums that differ by one client; an aborted try counts, for the server may have opened it all the same."""
    _, number = key
    mine, notes = _signed_sets(together[key]), set()
    for other, group in together.items():
        # Sessions have no order, so two tries of one round are compared both ways.
        if other == key or other[1] not in {number, number - 1}:
            continue
        for roster, survivors in _signed_sets(group):
            for now in (ours for its_roster, ours in mine if its_roster == roster and len(ours ^ survivors) == 1):
                notes.add(f"{shown(sorted(now ^ survivors))} (round {other[1]}, session {other[0].hex()[:8]})")
    if not notes:
        return []
    what = "this sum and another differ by one client, whose update they show unless it is noised: "
    return [Check("differencing", ok=True, detail=printable(what + "; ".join(sorted(notes))), warning=True)]


_Signed = tuple[tuple[str, ...], frozenset[str]]


def _signed_sets(group: Sequence[_Labelled]) -> set[_Signed]:
    """Roster and survivors of the records whose survivors enough clients signed."""
    return {(r.config.roster, frozenset(r.record.survivors)) for _, r in group if r.config is not None and r.agreed}
