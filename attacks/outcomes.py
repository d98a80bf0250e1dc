"""Scores of answers that are no tokens: bags, links, lengths, classes, memberships and pieces. The scorer's process only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from attacks.exchange import Bagged, Extracted, Labelled, Linked, Measured, Rated
from attacks.exposure import exposure
from attacks.metrics import interval, recovery, wilson
from attacks.rates import auc, auc_interval, extraction, length_errors, log_points, pairwise, roc, tpr_at
from attacks.report import Point, Result
from attacks.scoring import Scorer, note_of, verdict
from attacks.truth import Truth
from securesplit.errors import CheckFailed

__all__ = ["score_bags", "score_labels", "score_lengths", "score_links", "score_membership", "score_pieces"]

_RESAMPLES = 1000
_SEED = 20261122  # Public, so that anybody gets the same interval.


def score_bags(answers: Sequence[Bagged], scorer: Scorer) -> Result:
    """Which distinct tokens of the records in a sum were named, and how well whole sequences were put together.

    Claimed sequences are matched to true ones without replacement (Hungarian method), by tokens in the same place.
    """
    answer, special = answers[0], scorer.special
    hits, totals, right, claimed, placed, places, guess, distinct = [], [], 0, 0, 0, 0, 0, 0
    for peers, bag, made in zip(answer.peers, answer.bags, answer.sequences, strict=True):
        truths = _distinct(t for t in scorer.everything if _name(t.peer) in set(map(_name, peers)))
        inside = {token for t in truths for token in t.tokens} - special
        named = set(bag) - special
        right, claimed, distinct = right + len(named & inside), claimed + len(named), distinct + len(inside)
        guess += len(set(scorer.known.frequent[: len(named)]) & inside)
        for truth in truths:
            own = set(truth.tokens) - special
            hits.append(len(own & named))
            totals.append(len(own))
        good, all_ = _matched(made, [t.tokens for t in truths], special)
        placed, places = placed + good, places + all_
    share = recovery(hits, totals)
    prior = guess / distinct if distinct else 0.0
    note = note_of(answer.attack)
    return Result(
        name=answer.attack, threat=note.threat, channel=note.channel, measure="bag", value=share,
        value_ci95=interval(hits, totals), value_prior=prior, token_recovery=None, ci95=None, prior=prior,
        precision=right / claimed if claimed else None, seconds=answer.seconds, sequences=len(totals),
        tokens=sum(totals), ceiling=None,
        note=f"{placed} of {places} positions of the sums' sequences were put in place; the guess names as many of the commonest tokens",
    )  # fmt: skip


def _name(peer: str) -> str:
    """The certificate's name: sums name clients by it, transcripts by the whole identity."""
    return peer.rsplit("/", 1)[-1]


def _distinct(truths: Iterable[Truth]) -> list[Truth]:
    """Each record once, however often it was released."""
    found: dict[tuple[str, tuple[int, ...]], Truth] = {}
    for truth in truths:
        found.setdefault((truth.peer, truth.tokens), truth)
    return list(found.values())


def _matched(made: Sequence[Sequence[int]], true: Sequence[Sequence[int]], special: frozenset[int]) -> tuple[int, int]:
    """Positions in place under the best matching without replacement, and all positions that count."""
    from scipy.optimize import linear_sum_assignment

    places = sum(token not in special for sequence in true for token in sequence)
    if not made or not true:
        return 0, places
    agree = np.array(
        [[sum(a == b and a not in special for a, b in zip(m, t, strict=False)) for t in true] for m in made]
    )
    rows, columns = linear_sum_assignment(agree, maximize=True)
    return int(agree[rows, columns].sum()), places


def score_labels(answers: Sequence[Labelled], scorer: Scorer) -> Result:
    """Accuracy on records whose label, or attribute, the truth states.

    Raises:
        CheckFailed: SS-1571 when it states none.
    """
    answer, note = answers[0], note_of(answers[0].attack)
    names = scorer.classes if note.channel == "O3" else scorer.attributes
    wanted = {t.key: names.index(t.label) for t in scorer.everything if t.label in names}
    pairs = [(wanted.get(key), label) for key, label in zip(answer.keys, answer.labels, strict=True)]
    scored = [(true, guess) for true, guess in pairs if true is not None]
    if not scored:
        raise CheckFailed(
            "SS-1571",
            f"the truth states no classes for '{answer.attack}'",
            hint="Leave it out, or give truth with them.",
        )
    hits = [float(true == guess) for true, guess in scored]
    commonest = Counter(true for true, _ in scored).most_common(1)[0][1] / len(scored)
    return Result(
        name=answer.attack, threat=note.threat, channel=note.channel, measure="labels", value=sum(hits) / len(hits),
        value_ci95=wilson(round(sum(hits)), len(hits)), value_prior=commonest, token_recovery=None, ci95=None,
        prior=commonest, ceiling=scorer.bound(commonest), floor=wilson(round(sum(hits)), len(hits), alarm=verdict())[0],
        seconds=answer.seconds, sequences=len(hits), tokens=len(hits),
        note="the guess names the truth's commonest class",
    )  # fmt: skip


def score_lengths(answers: Sequence[Measured], scorer: Scorer) -> Result:
    """Share of lengths that are exactly right; the guess is the commonest length."""
    answer, note = answers[0], note_of(answers[0].attack)
    lengths = {t.key: len(t.tokens) for t in scorer.everything}
    pairs = [(lengths[k], n) for k, n in zip(answer.keys, answer.lengths, strict=True) if k in lengths]
    found = length_errors([true for true, _ in pairs], [claimed for _, claimed in pairs])
    commonest = Counter(true for true, _ in pairs).most_common(1)[0][1] / len(pairs)
    return Result(
        name=answer.attack, threat=note.threat, channel=note.channel, measure="lengths", value=found.exact,
        value_ci95=wilson(round(found.exact * found.count), found.count), value_prior=commonest, token_recovery=None,
        ci95=None, prior=commonest, ceiling=scorer.bound(commonest), seconds=answer.seconds, sequences=found.count,
        floor=wilson(round(found.exact * found.count), found.count, alarm=verdict())[0], tokens=found.count, note=f"off by {found.mean_error:.2f} tokens on average",
    )  # fmt: skip


def score_links(answers: Sequence[Linked], scorer: Scorer) -> Result:
    """F1 of claimed pairs of releases of one record; the guess links everything that one sender sent."""
    answer, note = answers[0], note_of(answers[0].attack)
    records: dict[tuple[str, tuple[int, ...]], int] = {}
    group = {t.key: records.setdefault((t.peer, t.tokens), len(records)) for t in scorer.everything}
    known = [(key, claimed) for key, claimed in zip(answer.keys, answer.groups, strict=True) if key in group]
    if not known:
        raise CheckFailed("SS-1571", "the truth names no linked sequence", hint="Give the truth of the same run.")
    true, claimed = [group[key] for key, _ in known], [c for _, c in known]
    senders: dict[str, int] = {}
    blind = [senders.setdefault(key.peer, len(senders)) for key, _ in known]
    pairs = pairwise(true, claimed)
    draws = np.random.default_rng(_SEED).integers(0, len(records), size=(_RESAMPLES, len(records)))
    return Result(
        name=answer.attack, threat=note.threat, channel=note.channel, measure="links", value=pairs.f1 or 0.0,
        value_ci95=_link_interval(true, claimed, draws), value_prior=pairwise(true, blind).f1 or 0.0, token_recovery=None,
        ci95=None, prior=pairwise(true, blind).f1 or 0.0, precision=pairs.precision, seconds=answer.seconds,
        sequences=len(known), tokens=len(known),
        note=f"{pairs.common} of {pairs.true} true pairs were linked, and {pairs.claimed - pairs.common} others"
        + ("" if pairs.true else "; every record was released once, so that there is nothing to link"),
    )  # fmt: skip


def _link_interval(true: Sequence[int], claimed: Sequence[int], draws: npt.NDArray[np.int64]) -> tuple[float, float]:
    """95 % bootstrap over records: pairs of one record stand or fall together."""
    count = max(true) + 1
    hit, of_true, wrong = np.zeros(count), np.zeros(count), np.zeros(count)
    for i, (a, x) in enumerate(zip(true, claimed, strict=True)):
        for b, y in zip(true[:i], claimed[:i], strict=True):
            if a == b:
                of_true[a] += 1
                hit[a] += x == y
            elif x == y:
                wrong[a] += 0.5
                wrong[b] += 0.5
    both = 2 * hit[draws].sum(1)
    all_ = of_true[draws].sum(1) + hit[draws].sum(1) + wrong[draws].sum(1)
    low, high = np.quantile(np.where(all_ > 0, both / np.maximum(all_, 1e-12), 0.0), (0.025, 0.975))
    return float(low), float(high)


def score_membership(answers: Sequence[Rated], scorer: Scorer) -> Result:
    """AUC, the share of members found at few false alarms, and, for planted secrets, their exposure."""
    answer, note = answers[0], note_of(answers[0].attack)
    asked = scorer.asked
    if len(answer.scores) != len(asked):
        raise CheckFailed("SS-1571", "not every candidate was rated", hint="This is a defect; report it.")
    mean = np.mean([a.scores for a in answers], axis=0).tolist()
    members = [s for s, c in zip(mean, asked, strict=True) if c.member]
    others = [s for s, c in zip(mean, asked, strict=True) if not c.member]
    one, tenth = tpr_at(members, others, 0.01), tpr_at(members, others, 0.001)
    curve = roc(members, others)
    bits = _exposures(mean, scorer)
    thin = "" if tenth.resolved else f"; {len(others)} non-members cannot tell 0.1 % from 0"
    secret = (
        "" if not bits else f"; {len(bits)} planted secrets are exposed by {sum(bits) / len(bits):.1f} bits on average"
    )
    return Result(
        name=answer.attack, threat=note.threat, channel=note.channel, measure="membership", value=auc(members, others),
        value_ci95=auc_interval(members, others), value_prior=0.5, token_recovery=None, ci95=None, prior=0.5,
        tpr_at_001=one.recall, tpr_at_0001=tenth.recall,
        roc=tuple(Point(fpr=f, tpr=t) for f, t in ((0.0, curve.true[0]), *log_points(curve))),
        exposure_bits=sum(bits) / len(bits) if bits else None, ceiling=scorer.membership_bound,
        floor=auc_interval(members, others, alarm=verdict())[0],
        seconds=answer.seconds, seeds=len(answers), sequences=len(asked), tokens=0,
        note=f"{len(members)} members, {len(others)} others" + thin + secret,
    )  # fmt: skip


def _exposures(scores: Sequence[float], scorer: Scorer) -> list[float]:
    found = []
    for place, candidate in enumerate(scorer.asked):
        if candidate.member and candidate.canary:
            siblings = [
                s for s, c in zip(scores, scorer.asked, strict=True) if c.canary == candidate.canary and not c.member
            ]
            found.append(exposure(scores[place], siblings, max(candidate.space, len(siblings) + 1)))
    return found


def score_pieces(answers: Sequence[Extracted], scorer: Scorer) -> Result:
    """Labelled pieces that the trained model gave away, whole."""
    answer, note = answers[0], note_of(answers[0].attack)
    found = extraction(answer.spans, [piece for t in scorer.everything for piece in t.pii])
    return Result(
        name=answer.attack, threat=note.threat, channel=note.channel, measure="pieces", value=found.recall,
        value_ci95=wilson(found.hits, found.pieces), value_prior=0.0, token_recovery=None, ci95=None, prior=0.0,
        pii_exact=found.recall, pii_ci95=wilson(found.hits, found.pieces), pii_total=found.pieces,
        precision=found.precision, seconds=answer.seconds, seeds=len(answers), sequences=len(scorer.everything),
        tokens=found.pieces, note=f"{found.hits} of {found.named} pieces that it named are true",
    )  # fmt: skip
