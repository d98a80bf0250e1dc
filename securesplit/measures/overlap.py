"""Generated text against references: ROUGE-1, ROUGE-2, ROUGE-L of every sample, BLEU-4 of the whole set, perplexity.

English: the rouge-score package as it is (lower case, a-z and 0-9, Porter stems), so that figures compare with published
ones. Chinese: every Chinese character is a word, other scripts by words; no segmenter, whose dictionary would decide the
score. BLEU-4 is sacrebleu's corpus BLEU: counts are summed over all samples before anything is divided; tokenised ``zh``
for Chinese (characters) and ``13a`` else. All measures run from 0 to 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Language", "bleu", "bleu_row", "perplexity", "rouge", "words"]

Language = Literal["en", "zh"]

_Sums = npt.NDArray[np.float64]
_WORD = re.compile(
    r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af]|[^\W_\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af]+"
)
_ORDER = 4
_MOST_NATS = 700.0


def words(text: str) -> list[str]:
    """The units of Chinese ROUGE: each Chinese character, and words of any other script in lower case."""
    return _WORD.findall(text.lower())


class _Words:
    """The shape in which rouge-score takes a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def rouge(references: Sequence[str], given: str, language: Language) -> tuple[float, float, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F1 (Lin 2004) of one sample; of several references the best one for each.

    Args:
        references: at least one.
        given: the prediction; an empty one scores 0.
        language: decides how words are told.
    """
    scored = [_scorer(language).score(reference, given) for reference in references]
    one, two, long = (max(float(s[name].fmeasure) for s in scored) for name in ("rouge1", "rouge2", "rougeL"))
    return one, two, long


def bleu_row(references: Sequence[str], given: str, language: Language) -> tuple[float, ...]:
    """What one sample adds to the sums of BLEU-4, (10,): matches and n-grams of order 1 to 4, both lengths."""
    found = _bleu(language).corpus_score([given], [[reference] for reference in references])
    return (*map(float, found.counts), *map(float, found.totals), float(found.sys_len), float(found.ref_len))


def bleu(sums: _Sums) -> _Sums:
    """Corpus BLEU-4 with sacrebleu's exponential smoothing, (R, 10) to (R,), 0 to 1."""
    from sacrebleu.metrics.bleu import BLEU

    scores = [
        BLEU.compute_bleu(
            correct=[int(n) for n in row[:_ORDER]], total=[int(n) for n in row[_ORDER : 2 * _ORDER]],
            sys_len=int(row[-2]), ref_len=int(row[-1]), smooth_method="exp",
        ).score
        for row in sums
    ]  # fmt: skip
    # The geometric mean of ones is a rounding error above one.
    return np.minimum(np.asarray(scores, dtype=np.float64) / 100, 1.0)


def perplexity(sums: _Sums) -> _Sums:
    """exp of nats per token, from sums of ``(nats, tokens)``, (R, 2) to (R,); at most e to the 700th, which is a number still."""
    found: _Sums = np.exp(np.minimum(sums[:, 0] / sums[:, 1], _MOST_NATS))
    return found


@cache
def _scorer(language: Language) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    return (
        RougeScorer(names, use_stemmer=False, tokenizer=_Words())
        if language == "zh"
        else RougeScorer(names, use_stemmer=True)
    )


@cache
def _bleu(language: Language) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize="zh" if language == "zh" else "13a")
