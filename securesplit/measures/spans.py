"""Short answers against gold ones: exact match and F1 of words, as SQuAD, ReCoRD and CoQA define them.

Before the comparison a text is brought to lower case, ASCII punctuation and English articles are taken out, and white
space is made one blank (Rajpurkar et al. 2016). Of several gold answers the best one counts. CoQA (Reddy et al. 2019)
differs in two things: where people gave several answers, each of them is left out once and the mean over that is taken,
so that a model is not compared with more answers than a person could be; and an answer that is empty after normalisation
agrees with an empty one.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Short", "best", "exact", "f1", "leave_one_out", "normalised"]

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_DROPPED = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Short:
    """Scores of one answer, each from 0 to 1.

    Attributes:
        exact: exact match.
        f1: of words.
    """

    exact: float
    f1: float


def normalised(text: str) -> str:
    """The text as it is compared."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_DROPPED)).split())


def exact(gold: str, given: str) -> float:
    """1 when both are the same after normalisation, else 0."""
    return float(normalised(gold) == normalised(given))


def f1(gold: str, given: str) -> float:
    """Harmonic mean of precision and recall of words, each counted as often as it stands there.

    Where one side has no word left, 1 when neither has and else 0 (CoQA's and SQuAD 2.0's rule; SQuAD 1.1 never meets it).
    """
    wanted, got = normalised(gold).split(), normalised(given).split()
    if not wanted or not got:
        return float(wanted == got)
    same = sum((Counter(wanted) & Counter(got)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(got), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def best(golds: Sequence[str], given: str) -> Short:
    """The best scores over all gold answers, each by itself; as SQuAD and ReCoRD.

    Args:
        golds: at least one.
        given: the prediction.
    """
    return Short(_most(exact, golds, given), _most(f1, golds, given))


def leave_one_out(golds: Sequence[str], given: str) -> Short:
    """CoQA's score of a turn: the mean, over each gold answer left out, of the best over the others."""
    if len(golds) < 2:
        return best(golds, given)
    rest = [[*golds[:i], *golds[i + 1 :]] for i in range(len(golds))]
    scores = [best(others, given) for others in rest]
    return Short(sum(s.exact for s in scores) / len(scores), sum(s.f1 for s in scores) / len(scores))


def _most(score: Callable[[str, str], float], golds: Sequence[str], given: str) -> float:
    return max(score(gold, given) for gold in golds)
