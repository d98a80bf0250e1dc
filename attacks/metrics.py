"""How much of a text an attack got. Positional, over the true length, special tokens apart; nothing counted twice.

Not used, on purpose: overlaps of token *sets* or bags, matching by best overlap, values replaced when a metric fails.
A metric that cannot be computed raises SS-1571 and the run fails with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from securesplit.errors import CheckFailed

RESAMPLES = 2000
# Public, so that anybody gets the same interval from the same counts.
_SEED = 20261121
# Words, and each CJK character by itself; the package's own tokenizer drops everything but a-z and 0-9.
_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3400-\u9fff\uf900-\ufaff]+")

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class SequenceScore:
    """Counts of one sequence.

    Attributes:
        hits, total: positions named correctly, of those that count.
        content_hits, content_total: the same over tokens that are not among the 100 commonest.
        pii_hits, pii_total: labelled pieces with every token right, of those that lie within the sequence.
        rouge_1, rouge_2, rouge_l: F1 of words, of pairs of words, and of the longest common subsequence, 0 to 1.
        bleu: sentence BLEU-4 of sacrebleu with tokenisation 13a and exponential smoothing, 0 to 1.
        exact: every position right.
    """

    hits: int
    total: int
    content_hits: int
    content_total: int
    pii_hits: int
    pii_total: int
    rouge_1: float
    rouge_2: float
    rouge_l: float
    bleu: float
    exact: bool


def score_sequence(
    truth: Sequence[int],
    guess: Sequence[int],
    *,
    special: frozenset[int],
    common: frozenset[int],
    decode: Decode,
    pii: Sequence[str] = (),
    first: int = 0,
) -> SequenceScore:
    """Compare a recovered sequence with the true one.

    Args:
        truth: true ids, without padding.
        guess: recovered ids; may go on into the padding. Where it ends early, every missing position is a miss.
        special: ids that are constant and known, such as the start of a text: left out on both sides.
        common: ids that content recovery leaves out.
        decode: ids to text.
        pii: labelled pieces of the text.
        first: positions before this one are outside of the attack's reach, and count nowhere; a piece of the text that
            begins there cannot be got and is missed.

    Raises:
        CheckFailed: SS-1571 when no position counts.
    """
    padded = [*guess[: len(truth)], *([-1] * (len(truth) - len(guess)))]
    counted = [i for i, token in enumerate(truth) if token not in special and i >= first]
    if not counted:
        raise CheckFailed(
            "SS-1571", "a sequence of special tokens alone cannot be scored", hint="Leave it out of the truth."
        )
    hit = [truth[i] == padded[i] for i in range(len(truth))]
    content = [i for i in counted if truth[i] not in common]
    spans = [span for piece in pii if (span := span_of(piece, truth, decode)) is not None]
    reference = decode([truth[i] for i in counted])
    candidate = decode([padded[i] for i in counted if padded[i] >= 0])
    rouge = rouge_f1(reference, candidate)
    return SequenceScore(
        hits=sum(hit[i] for i in counted),
        total=len(counted),
        content_hits=sum(hit[i] for i in content),
        content_total=len(content),
        pii_hits=sum(all(hit[i] for i in span) for span in spans),
        pii_total=len(spans),
        rouge_1=rouge[0],
        rouge_2=rouge[1],
        rouge_l=rouge[2],
        bleu=bleu(reference, candidate),
        exact=all(hit[i] for i in counted),
    )


def span_of(piece: str, tokens: Sequence[int], decode: Decode) -> range | None:
    """The tokens that together hold a piece of text at its first occurrence; None when it is not (wholly) there.

    A token belongs to the span when it adds a character of the piece. Prefixes are decoded, never single tokens, because
    a character may be spread over several tokens.
    """
    text = decode(tokens)
    start = text.find(piece) if piece else -1
    if start < 0:
        return None
    ends = [len(decode(tokens[: i + 1])) for i in range(len(tokens))]
    begins = [0, *ends[:-1]]
    inside = [i for i in range(len(tokens)) if begins[i] < start + len(piece) and ends[i] > start]
    return range(inside[0], inside[-1] + 1) if inside else None


def words(text: str) -> list[str]:
    """The units of ROUGE: lower-case words; every CJK character is one."""
    return _WORD.findall(text.lower())


class _Words:
    """The shape in which rouge-score takes a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def rouge_f1(reference: str, candidate: str) -> tuple[float, float, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F1 (Lin 2004), by the rouge-score package.

    Texts without any word agree: 1. Texts without a pair of words have no ROUGE-2 to compare, and get their ROUGE-1.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if not words(reference) and not words(candidate):
        return 1.0, 1.0, 1.0
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False, tokenizer=_Words())
    found = scorer.score(reference, candidate)
    one, two, long = (float(found[name].fmeasure) for name in ("rouge1", "rouge2", "rougeL"))
    return one, one if len(words(reference)) < 2 else two, long


def rouge_l(reference: str, candidate: str) -> float:
    """ROUGE-L F1, the last of :func:`rouge_f1`."""
    return rouge_f1(reference, candidate)[2]


def bleu(reference: str, candidate: str) -> float:
    """Sentence BLEU-4, 0 to 1, by sacrebleu: tokenisation 13a (for Chinese: its own), exponential smoothing."""
    from sacrebleu.metrics.bleu import BLEU

    if not reference.strip() or not candidate.strip():
        return 1.0 if reference.strip() == candidate.strip() else 0.0
    chinese = any("\u3400" <= letter <= "\u9fff" for letter in reference)
    scorer = BLEU(effective_order=True, tokenize="zh" if chinese else "13a")
    return min(1.0, float(scorer.sentence_score(candidate, [reference]).score) / 100)


def wilson(hits: int, total: int, *, alarm: float = 0.05) -> tuple[float, float]:
    """Interval of Wilson (1927) for a share of independent pieces, 95 % or at another error; (0, 1) for none."""
    if not total:
        return 0.0, 1.0
    share = hits / total
    return _score(share, share * (1 - share) / total, total, alarm)


def _score(share: float, variance: float, total: float, alarm: float) -> tuple[float, float]:
    """Wilson's interval for a mean of so many parts between 0 and 1, whose own variance is given.

    It always holds ``share``, and has a width even when the variance is 0: parts that were not seen may be otherwise.
    """
    z = NormalDist().inv_cdf(1 - alarm / 2)
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * (variance + z * z / (4 * total * total)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def recovery(hits: Sequence[float], totals: Sequence[int]) -> float:
    """Share of all positions.

    Raises:
        CheckFailed: SS-1571 without a position.
    """
    if sum(totals) == 0:
        raise CheckFailed("SS-1571", "there is no position to score", hint="Give truth for sequences of the recording.")
    return sum(hits) / sum(totals)


def interval(
    hits: Sequence[float], totals: Sequence[int], *, resamples: int = RESAMPLES, alarm: float = 0.05
) -> tuple[float, float]:
    """95 % interval of :func:`recovery` over *sequences*: tokens of one sequence stand or fall together.

    It spans two: the percentile bootstrap, which is a point when all sequences agree, and Wilson's with the variance between
    sequences, at their effective number ``(sum n)^2 / sum n^2``, which is not. One sequence says little: (0.21, 1) at best.

    Args:
        hits, totals: of each sequence.
        resamples: of the bootstrap.
        alarm: its two-sided error.
    """
    share = recovery(hits, totals)
    got, of = np.asarray(hits, dtype=np.float64), np.asarray(totals, dtype=np.float64)
    draws = np.random.default_rng(_SEED).integers(0, len(got), size=(resamples, len(got)))
    h, n = got[draws].sum(1), of[draws].sum(1)
    low, high = np.quantile(h / np.maximum(n, 1), (alarm / 2, 1 - alarm / 2))
    # The ratio's variance by linearisation; with one sequence there is none to be had, and it is taken as the largest.
    count, apart = len(got), float(np.square(got - share * of).sum()) / float(of.sum()) ** 2
    variance = apart * count / (count - 1) if count > 1 else share * (1 - share)
    wide = _score(share, variance, float(of.sum()) ** 2 / float(np.square(of).sum()), alarm)
    return min(float(low), wide[0]), max(float(high), wide[1])
