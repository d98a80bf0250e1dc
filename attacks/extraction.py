"""Letting a trained model write, and finding in what it writes pieces that identify somebody.

Patterns, not an entity tagger: they know numbers, dates, addresses and capitalised names of Latin scripts, as synthetic
ward notes have them (securesplit/data/notes.py). What they miss, this attack does not find: other scripts, free text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attacks.metrics import Decode, span_of
from attacks.perplexity import likelihoods

__all__ = ["Sampling", "ordinary_words", "pieces_of", "prompts_of", "ranked", "write"]

# Every repetition starts with a sign of its own, so that no text makes the search try exponentially many ways.
_NAME = r"(?:[A-Z]')?[A-Z][a-z]+(?:['-][A-Z]?[a-z]+|[A-Z][a-z]+)*"
_NAMES = re.compile(rf"\b{_NAME}(?: {_NAME}){{1,3}}\b")
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",  # E-mail.
        r"(?<![\w/-])\+?\d(?:[ ().-]?\d){8,14}(?![\w/])",  # Phone: nine digits or more, single separators between.
        r"(?<![\d/])\d{1,2}[/.-]\d{1,2}[/.-](?:\d{4}|\d{2})(?![\d/])",  # Date, day or month first.
        r"(?<!\d)\d{4}-\d{2}-\d{2}(?!\d)",  # Date, year first.
        r"\b[A-Z]{1,4}-?\d{4,}\b",  # Record number with letters.
        r"(?<![\w/.-])\d{5,}(?![\w/])",  # Any other long number.
        # Address: number, street of one to three words, place of one to three.
        rf"\b\d{{1,4}}[A-Za-z]? {_NAME}(?: [A-Za-z'-]+){{0,2}}, {_NAME}(?: {_NAME}){{0,2}}",
    )
)
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_TOGETHER = 32


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a model is let write.

    Attributes:
        count: sampled texts per prompt, beside the greedy one. tokens: new tokens of each.
        top: sampling is among the likeliest so many. temperature: of sampling.
        seed: of the draws; an attack's own, and no secret.
    """

    count: int
    tokens: int
    top: int
    temperature: float
    seed: int


def prompts_of(
    texts: Sequence[Sequence[int]], most: int, length: int, more: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Prompts: the commonest openings of public text, then others; different ones, none of them empty."""
    openings = Counter(tuple(text[:length]) for text in texts if len(text) >= length)
    common = sorted(openings, key=lambda ids: (-openings[ids], ids))[:most]
    return tuple(dict.fromkeys(tuple(ids) for ids in (*common, *more) if len(ids)))


def write(model: Any, prompt: Sequence[int], sampling: Sampling, number: int) -> list[tuple[int, ...]]:
    """Texts that a model writes behind one prompt, prompt included: the greedy one first, then sampled ones.

    Args:
        model: a causal model of the library.
        number: of the prompt, so that each draws for itself.
    """
    generator = torch.Generator().manual_seed(sampling.seed * 100_003 + number)
    found: list[tuple[int, ...]] = []
    while len(found) < sampling.count + 1:
        rows = min(_TOGETHER, sampling.count + 1 - len(found))
        found += _batch(model, prompt, rows, sampling, generator, greedy=not found)
    return found


def _batch(
    model: Any, prompt: Sequence[int], rows: int, sampling: Sampling, generator: torch.Generator, *, greedy: bool
) -> list[tuple[int, ...]]:
    ids = torch.tensor([list(prompt)] * rows)
    written, past = [ids], None
    with torch.inference_mode():
        for _ in range(sampling.tokens):
            out = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, logits = out.past_key_values, out.logits[:, -1].float()
            best, names = logits.topk(min(sampling.top, logits.shape[-1]), dim=-1)
            drawn = torch.multinomial(torch.softmax(best / sampling.temperature, -1), 1, generator=generator)
            if greedy:
                drawn[0] = 0
            ids = names.gather(-1, drawn)
            written.append(ids)
    return [tuple(row) for row in torch.cat(written, dim=1).tolist()]


def ordinary_words(texts: Sequence[str]) -> frozenset[str]:
    """Words that public text writes in small letters: at the start of a sentence they are no names."""
    return frozenset(word for text in texts for word in _WORD.findall(text) if word.islower())


def pieces_of(text: str, ordinary: frozenset[str]) -> tuple[str, ...]:
    """Pieces that look as if they identified somebody, by place, each once; of overlapping ones the longest.

    A run of capitalised words loses ordinary ones in front while two are left, and is none when all are ordinary:
    "Patient Ann Lee" is "Ann Lee", "Ward Note" is nothing. What touches the end of a text may have been cut, and is left.
    """
    found = [match.span() for pattern in _PATTERNS for match in pattern.finditer(text)]
    for match in _NAMES.finditer(text):
        words, start = match.group().split(" "), match.start()
        while len(words) > 2 and words[0].lower() in ordinary:
            start += len(words.pop(0)) + 1
        if any(word.lower() not in ordinary for word in words):
            found.append((start, match.end()))
    taken: list[tuple[int, int]] = []
    for start, end in sorted(set(found), key=lambda span: (span[0] - span[1], span)):
        if all(end <= a or start >= b for a, b in taken):
            taken.append((start, end))
    return tuple(dict.fromkeys(text[start:end] for start, end in sorted(taken) if end < len(text)))


def ranked(
    trained: Any,
    public: Any,
    written: Sequence[Sequence[int]],
    decode: Decode,
    known: Sequence[str],
    ordinary: frozenset[str],
) -> tuple[str, ...]:
    """Every piece in written texts that public text does not hold, most certain first.

    Certainty is the mean gain of its tokens' log-probability by training, added up over the texts that hold it: what was
    memorised is likely to the trained model alone, and is written again and again.

    Args:
        trained, public: causal models. written: ids, different ones. decode: ids to text.
        known: public texts. ordinary: of :func:`ordinary_words`.
    """
    library = "\n".join(known)
    texts = [decode(ids) for ids in written]
    pieces = [[p for p in pieces_of(text, ordinary) if p not in library] for text in texts]
    holding = [i for i in range(len(written)) if pieces[i]]
    after, before = (likelihoods(model, [written[i] for i in holding]) for model in (trained, public))
    certainty: dict[str, float] = {}
    for place, index in enumerate(holding):
        gain = after[place].log_probability - before[place].log_probability
        for piece in pieces[index]:
            span = span_of(piece, written[index], decode)
            # The first token of a text has no probability; a piece that starts there is judged by the others.
            inside = [] if span is None else [i - 1 for i in span if i > 0]
            certainty[piece] = certainty.get(piece, 0.0) + (float(gain[inside].mean()) if inside else 0.0)
    return tuple(sorted(certainty, key=lambda piece: (-certainty[piece], piece)))
