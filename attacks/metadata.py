"""What the traffic says beside its contents (O7): true lengths inside public buckets, and which releases are one record's.

What they do not do: read sizes or timing, which within a bucket are equal for all; link records of one person; see tokens
decoded one by one, whose number is plain to see and is stated in the threat model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.exchange import Linked, Measured
from attacks.knowledge import Knowledge
from attacks.lengths import Frame, from_gradients, from_rows, length_prior, moments_of
from attacks.link import link_by_order
from attacks.linkage import compare, group, match_passes, spread_of
from attacks.simulated import clean_rows, framed, padding_of, public_texts
from attacks.threat import Threat
from attacks.view import Passage, ServerView, Sighting

__all__ = ["ATTACKS"]

_FEWEST = 2
"""Texts of fewer tokens are never sent: there is nothing to predict in them."""


class Settings(BaseModel):
    """configs/metadata.toml, which explains each value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    simulated: Annotated[int, Field(ge=8)]
    most: Annotated[int, Field(ge=2)]
    own_mean: Annotated[int, Field(ge=2)]
    odds: Annotated[float, Field(ge=1)]


def _settings() -> Settings:
    return settings_of("metadata", Settings)


def _any(view: ServerView, _: Threat) -> str | None:
    return None if view.sightings else "the recording holds none of the wanted sequences"


def _gradients(view: ServerView, threat: Threat) -> str | None:
    if view.classes:
        return "the one label stands at a public place"
    if not any(seen.gradient is not None for seen in view.sightings):
        return "no gradient crossed"
    return _any(view, threat)


def _traffic(view: ServerView, _: Threat) -> str | None:
    if len(view.traffic) < 2:
        return "the recording holds fewer than two sequences"
    return "rows or columns are permuted in secret" if view.permuted else None


def _ordered(view: ServerView, threat: Threat) -> str | None:
    if _passes(view) < 2 and len({p.rows.tobytes() for p in view.traffic}) == len(view.traffic):
        return "every record was released once"
    return _traffic(view, threat)


# --- lengths --------------------------------------------------------------------------------------------------------


def frame_of(view: ServerView, bucket: int) -> Frame:
    """The possible lengths in a bucket: more tokens than the next smaller public length that was seen holds."""
    classes = view.classes > 0
    smaller = [len(p.rows) for p in view.traffic if len(p.rows) < bucket]
    smaller += [len(s.rows) for s in view.sightings if len(s.rows) < bucket]
    room = bucket - 1 if classes else bucket
    return Frame(bucket, min(room, max([_FEWEST, *(n + 1 - classes for n in smaller)])), room, classes)


def _lengths(name: str, view: ServerView, known: Knowledge, tick: Tick) -> Measured:
    start = time.perf_counter()
    settings = _settings()
    by_bucket: dict[int, list[int]] = {}
    for index, seen in enumerate(view.sightings):
        by_bucket.setdefault(len(seen.rows), []).append(index)
    found: dict[int, int] = {}
    with torch.no_grad():
        for number, (bucket, indices) in enumerate(sorted(by_bucket.items())):
            frame = frame_of(view, bucket)
            seen_here = [view.sightings[i] for i in indices]
            posterior = length_prior(known, frame).expand(len(indices), -1)
            if name != "lengths-bucket":
                posterior = posterior + _spoken(seen_here, known, frame, settings.simulated)
            if name == "lengths-gradient":
                posterior = posterior + _spoken_back(seen_here, view, frame)
            best = posterior.argmax(1).tolist()
            found.update({i: frame.lengths[b] for i, b in zip(indices, best, strict=True)})
            tick(number + 1, len(by_bucket))
    return Measured(
        attack=name, keys=tuple(seen.key for seen in view.sightings),
        lengths=tuple(found[i] for i in range(len(view.sightings))), seconds=time.perf_counter() - start,
    )  # fmt: skip


def _spoken(seen: Sequence[Sighting], known: Knowledge, frame: Frame, simulated: int) -> Tensor:
    """(N, lengths) from the mean of each record's linked releases, at the noise that is left in it."""
    moments = moments_of(known, frame, simulated)
    found = torch.zeros(len(seen), len(frame.lengths), dtype=torch.float64)
    for releases in sorted({one.releases for one in seen}):
        same = [i for i, one in enumerate(seen) if one.releases == releases]
        rows = torch.stack([torch.tensor(seen[i].linked) for i in same])
        found[same] = from_rows(rows, moments, frame, known.noise.averaged(releases).sigma)
    return found


def _spoken_back(seen: Sequence[Sighting], view: ServerView, frame: Frame) -> Tensor:
    """(N, lengths) from the gradients; zeros for sequences that have none."""
    found = torch.zeros(len(seen), len(frame.lengths), dtype=torch.float64)
    having = [i for i, one in enumerate(seen) if one.gradient is not None]
    if having:
        gradients = torch.stack([torch.tensor(seen[i].gradient) for i in having])
        found[having] = from_gradients(gradients, frame, view.gradient_noise.sigma)
    return found


# --- links ----------------------------------------------------------------------------------------------------------


def _passes(view: ServerView) -> int:
    """How many fresh releases each record has, by the schedule, as far as the threat model lets the attack use them."""
    return max((seen.releases for seen in view.sightings), default=1)


def _passes_of(view: ServerView, traffic: Sequence[Passage], *, learn: bool) -> int:
    """The same for records of training, or for held-out ones, which are released once more where both are there."""
    passes, both = _passes(view), len({passage.learn for passage in traffic}) > 1
    return passes + 1 if both and passes > 1 and not learn else passes


def _link(name: str, view: ServerView, known: Knowledge, tick: Tick) -> Linked:
    start = time.perf_counter()
    traffic = list({passage.key: passage for passage in reversed(view.traffic)}.values())[::-1]
    groups = [-1] * len(traffic)
    peers = sorted({passage.key.peer for passage in traffic})
    fresh = 0
    with torch.no_grad():
        for number, peer in enumerate(peers):
            indices = [i for i, passage in enumerate(traffic) if passage.key.peer == peer]
            of_bytes: dict[bytes, int] = {}
            for i in indices:
                of_bytes.setdefault(traffic[i].rows.tobytes(), i)
            distinct = list(of_bytes.values())
            chosen = _by_order if name == "linkage-order" else _by_content
            home: dict[int, int] = {}
            for learn in (False, True):
                alike = [i for i in distinct if traffic[i].learn == learn]
                found = chosen([traffic[i] for i in alike], view, known, _passes_of(view, traffic, learn=learn))
                home.update({i: fresh + group for i, group in zip(alike, found, strict=True)})
                fresh += len(alike)
            for i in indices:
                groups[i] = home[of_bytes[traffic[i].rows.tobytes()]]
            tick(number + 1, len(peers))
    return Linked(
        attack=name, keys=tuple(p.key for p in traffic), groups=tuple(groups), seconds=time.perf_counter() - start
    )


def _by_order(seen: Sequence[Passage], _view: ServerView, _: Knowledge, passes: int) -> list[int]:
    links = link_by_order([str(i) for i in range(len(seen))], passes)
    return [link[0] for link in links]


def _by_content(seen: Sequence[Passage], view: ServerView, known: Knowledge, passes: int) -> list[int]:
    """Groups of one client's distinct releases: only those of one public length are compared."""
    per_pass = len(seen) // passes
    known_passes = passes > 1 and len(seen) == per_pass * passes
    home = [0] * len(seen)
    fresh = 0
    for bucket in sorted({len(p.rows) for p in seen}):
        indices = [i for i, p in enumerate(seen) if len(p.rows) == bucket]
        most = _settings().most
        in_pass = [[n for n, i in enumerate(indices) if i // max(1, per_pass) == k] for k in range(passes)]
        even = known_passes and len({len(part) for part in in_pass}) == 1 and len(in_pass[0]) <= most
        blocks = [indices] if even else [indices[i : i + most] for i in range(0, len(indices), most)]
        for block in blocks:
            groups = _grouped([seen[i] for i in block], view, known, in_pass if even else None)
            for i, found in zip(block, groups, strict=True):
                home[i] = fresh + found
            fresh += len(block)
    return home


def _grouped(
    seen: Sequence[Passage], view: ServerView, known: Knowledge, passes: Sequence[Sequence[int]] | None
) -> list[int]:
    """Groups of distinct releases of one length, by passes where these are known."""
    if len(seen) < 2:
        return [0] * len(seen)
    settings, bucket = _settings(), len(seen[0].rows)
    generator = torch.Generator().manual_seed(known.seed)
    texts = public_texts(known, settings.simulated, bucket - (view.classes > 0), generator)
    clean = clean_rows(known, framed(texts, bucket, padding_of(known), classes=view.classes > 0))
    first = spread_of(clean[:, 0], known.noise.sigma)
    behind = (clean - clean.mean(0))[:, 1:].flatten(0, 1)
    later = spread_of(behind, known.noise.sigma) if bucket > 1 else first
    rows = torch.stack([torch.from_numpy(p.rows.copy()) for p in seen])
    rows = rows - (rows if len(rows) >= settings.own_mean else clean).mean(0)
    if passes is not None:
        return match_passes(rows, passes, first, later)
    verdicts = compare(rows, first, later, [1.0] * len(rows))
    return group(verdicts, math.log(len(rows) * settings.odds))


_Run = Callable[[str, ServerView, Knowledge, Tick], Measured | Linked]


def _attack(name: str, blocked: Callable[[ServerView, Threat], str | None], run: _Run) -> Attack:
    return Attack(name, blocked, lambda view, known, tick: run(name, view, known, tick))


ATTACKS = (
    _attack("lengths-bucket", _any, _lengths),
    _attack("lengths", _any, _lengths),
    _attack("lengths-gradient", _gradients, _lengths),
    _attack("linkage-order", _ordered, _link),
    _attack("linkage", _traffic, _link),
)
