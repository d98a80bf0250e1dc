"""Attack a recording in a process that never sees the truth, then score what came back.

    truth -> keys ---------------> attack process (recording, public files) -> tokens
    truth ---------------------------------------------------------------> score <-'

The truth gives the attack process nothing but keys: places in the traffic, which the server knows anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from attacks.bounds import best_guess, ceiling, mu_of, unigram_share
from attacks.config import AttackName, Config, ProfileName, config
from attacks.exchange import Known, Progress, Recovered, Task
from attacks.metrics import Decode, SequenceScore, interval, recovery, score_sequence
from attacks.report import Example, Report, Result, require_below_ceiling
from attacks.spawn import run_attack
from attacks.truth import Truth, read_truth
from attacks.view import Key, public_facts, sequences_of
from securesplit.data.corpus import read_corpus
from securesplit.errors import CheckFailed, InputError
from securesplit.model.store import load_tokenizer
from securesplit.policy.schema import Gaussian, Policy
from securesplit.protocol.transcript import Transcript

__all__ = ["Example", "Progress", "Report", "Result", "choose", "evaluate", "refuse_overlap", "require_below_ceiling"]

_OVERLAP_WORDS = 6


@dataclass(frozen=True, slots=True)
class Scorer:
    """What answers are compared with; it exists in the scorer's process only.

    Attributes:
        truths: the sequences that were attacked.
        known: what the attacker guesses without looking.
        special: ids that do not count.
        decode: ids to text.
        settings: the family's configuration.
    """

    truths: tuple[Truth, ...]
    known: Known
    special: frozenset[int]
    decode: Decode
    settings: Config


def evaluate(
    transcript_dir: Path,
    model_dir: Path,
    truth: Path,
    aux_texts_file: Path | None = None,
    profile: ProfileName = "smoke",
    progress: Callable[[Progress], None] | None = None,
    *,
    attacks: Sequence[AttackName] = (),
    examples: int = 3,
) -> Report:
    """Attack a recording and score the answer.

    Args:
        transcript_dir: what ``serve --record`` wrote.
        model_dir: a model directory with the cut of the run; its front and tokenizer are read, which are public.
        truth: ``truth.jsonl`` of the clients of that run.
        aux_texts_file: public text of the same kind, as :func:`securesplit.data.corpus.read_corpus` reads it.
        profile: smoke, standard or full.
        progress: told how far each attack is.
        attacks: which; empty runs all that fit the policy.
        examples: how many texts to put beside their recovery in the report.

    Returns:
        The report, whatever it says; :func:`require_below_ceiling` judges it.

    Raises:
        InputError: SS-1301, SS-1404 to SS-1406, SS-1701 to SS-1707, and those of the corpus.
        CheckFailed: SS-1571 when a metric cannot be computed, SS-1572 when the attack process dies.
    """
    settings = config()
    transcript = Transcript.load(transcript_dir)
    policy = public_facts(transcript).policy
    truths = choose(
        read_truth(truth),
        [Key(peer=s.peer, step=s.step, row=s.row) for s in sequences_of(transcript)],
        settings.profiles[profile].sequences,
    )
    if aux_texts_file is not None:
        refuse_overlap(truths, [record.text for record in read_corpus(aux_texts_file)])
    task = Task(
        transcript=str(transcript_dir), model=str(model_dir), aux=None if aux_texts_file is None else str(aux_texts_file),
        profile=profile, attacks=tuple(attacks), keys=tuple(t.key for t in truths),
    )  # fmt: skip
    known, recovered = run_attack(task, progress)
    tokenizer = load_tokenizer(model_dir)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    scorer = Scorer(truths, known, frozenset(tokenizer.all_special_ids), decode, settings)
    results = tuple(score(answer, scorer) for answer in recovered)
    return _report(results, recovered, scorer, policy, profile=profile, examples=examples)


def choose(truths: Sequence[Truth], seen: Sequence[Key], most: int) -> tuple[Truth, ...]:
    """Which sequences to attack: the first sighting of each record, earliest first, senders in turn.

    Adapters start as the identity and drift while they are trained, so that the first sighting is the dearest.

    Args:
        truths: all that is known.
        seen: keys of the recording; truth of other sequences is left out.
        most: how many; 0 for all.

    Raises:
        InputError: SS-1702 when the recording holds none of the sequences that the truth names.
    """
    present = set(seen)
    queues: dict[str, list[Truth]] = {}
    known: set[tuple[str, tuple[int, ...]]] = set()
    for truth in sorted((t for t in truths if t.key in present), key=lambda t: (t.step, t.row, t.peer)):
        if (truth.peer, truth.tokens) not in known:
            known.add((truth.peer, truth.tokens))
            queues.setdefault(truth.peer, []).append(truth)
    if not queues:
        raise InputError(
            "SS-1702", "the truth names no sequence of this recording", hint="Give the truth.jsonl of the same run."
        )
    turns = [
        queue[turn] for turn in range(max(map(len, queues.values()))) for queue in queues.values() if turn < len(queue)
    ]
    return tuple(turns[:most] if most else turns)


def refuse_overlap(truths: Sequence[Truth], texts: Sequence[str]) -> None:
    """An attacker who has the very text attacks nothing: no record may stand in the auxiliary text, or the reverse.

    Texts of fewer than six words may coincide by chance and are let through.

    Raises:
        InputError: SS-1703.
    """
    whole = "\n".join(" ".join(text.split()) for text in texts)
    long = {flat for text in texts if len(flat := " ".join(text.split())) and len(text.split()) >= _OVERLAP_WORDS}
    for truth in truths:
        flat = " ".join(truth.text.split())
        if len(flat.split()) >= _OVERLAP_WORDS and (flat in whole or any(text in flat for text in long)):
            raise InputError(
                "SS-1703",
                "the auxiliary text holds a record that is attacked",
                hint="Give public text that is disjoint from the private one.",
            )


def score(answer: Recovered, scorer: Scorer) -> Result:
    """Score one attack's answer.

    Raises:
        CheckFailed: SS-1571 when a metric cannot be computed or the answer lacks a sequence.
    """
    truths, known, special = scorer.truths, scorer.known, scorer.special
    guesses = dict(zip(answer.keys, answer.tokens, strict=True))
    if missing := [t for t in truths if t.key not in guesses]:
        raise CheckFailed(
            "SS-1571", f"{len(missing)} sequence(s) were not attacked", hint="This is a defect; report it."
        )
    scores: list[SequenceScore] = [
        score_sequence(
            t.tokens, guesses[t.key], special=special, common=frozenset(known.common), decode=scorer.decode, pii=t.pii
        )
        for t in truths
    ]
    hits, totals = [s.hits for s in scores], [s.total for s in scores]
    content, pii = sum(s.content_total for s in scores), sum(s.pii_total for s in scores)
    commonest = known.common[0] if known.informed else None
    return Result(
        name=answer.attack,
        threat=scorer.settings.attacks[answer.attack].threat,
        token_recovery=recovery(hits, totals),
        ci95=interval(hits, totals),
        prior=unigram_share([t.tokens for t in truths], special, commonest),
        content_recovery=sum(s.content_hits for s in scores) / content if content else None,
        pii_exact=sum(s.pii_hits for s in scores) / pii if pii else None,
        pii_total=pii,
        rouge_l=sum(s.rouge_l for s in scores) / len(scores),
        exact_match=sum(s.exact for s in scores) / len(scores),
        seconds=answer.seconds,
        sequences=len(scores),
        tokens=sum(totals),
        unresolved=answer.unresolved,
    )


def _report(
    results: tuple[Result, ...],
    answers: tuple[Recovered, ...],
    scorer: Scorer,
    policy: Policy,
    *,
    profile: str,
    examples: int,
) -> Report:
    privacy, mu = policy.privacy, mu_of(policy)
    private = privacy if isinstance(privacy, Gaussian) else None
    tokens = [t.tokens for t in scorer.truths]
    kappa = max(best_guess(tokens, scorer.known.positional, scorer.special), *(r.prior for r in results))
    worst = max(range(len(results)), key=lambda i: results[i].token_recovery)
    guesses = dict(zip(answers[worst].keys, answers[worst].tokens, strict=True))
    shown = tuple(
        Example(scorer.decode(t.tokens), scorer.decode(guesses[t.key][: len(t.tokens)]))
        for t in scorer.truths[:examples]
    )
    return Report(
        attacks=results,
        worst=results[worst].token_recovery,
        worst_attack=results[worst].name,
        kappa=kappa,
        ceiling=1.0 if mu is None else ceiling(kappa, mu),
        epsilon=private.epsilon if private else None,
        delta=private.delta if private else None,
        mu=mu,
        unit=private.unit if private else None,
        relation=private.relation if private else None,
        policy=policy.name,
        policy_digest=policy.digest,
        profile=profile,
        examples=shown,
    )
