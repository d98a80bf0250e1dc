"""Attack a recording in a process that never sees the truth, then score what came back.

    truth -> keys ---------------> attack process (recording, public files) -> answers
    truth ---------------------------------------------------------------> score <-'

The truth gives the attack process nothing but keys: places in the traffic, which the server knows anyway.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from attacks.asked import Asked, read_asked, shuffled
from attacks.baselines import baselines, forced
from attacks.bounds import capacity_bits, mu_of
from attacks.config import Observed, ProfileName, config
from attacks.examples import examples_of
from attacks.exchange import Known, Progress, Task, Told
from attacks.judge import flags_of, score
from attacks.overlap import refuse_overlap
from attacks.report import Bounds, Check, Report, Result, Setting, Untested, require_below_ceiling
from attacks.scoring import Scorer
from attacks.spawn import Heard, run_attack
from attacks.threat import Threat
from attacks.truth import Truth, read_truth, require_fitting
from attacks.view import Key, PublicFacts, noise_of, public_facts, sequences_of
from securesplit.data.corpus import read_corpus
from securesplit.errors import InputError
from securesplit.model.store import load_config, load_tokenizer, load_whole
from securesplit.policy.schema import Gaussian
from securesplit.protocol.transcript import Observation, Transcript

__all__ = ["Order", "Progress", "Report", "Result", "choose", "evaluate", "require_below_ceiling"]

_DECODED = Untested(
    name="decoded tokens (O8)",
    why="no attack reads tokens that are decoded one by one; what arrived of them is examined for its noise alone",
)


@dataclass(frozen=True, slots=True)
class Order:
    """What to attack, and what the attacker is given.

    Attributes:
        transcript: what ``serve --record`` wrote.
        model: a model directory with the cut of the run; its files are public.
        truth: ``truth.jsonl`` of the clients of that run.
        aux: public text of the same kind, as :func:`securesplit.data.corpus.read_corpus` reads it.
        adapter: a standard PEFT adapter of the trained model, for O6 and for weights beyond the pre-trained ones.
        candidates: texts whose membership is asked, as :mod:`attacks.asked` reads them.
        profile: smoke, standard or full.
        threat: the adversary.
        attacks: which; empty runs all that fit.
        examples: how many texts to put beside their recovery.
        seed: of everything random.
    """

    transcript: Path
    model: Path
    truth: Path
    aux: Path | None = None
    adapter: Path | None = None
    candidates: Path | None = None
    profile: ProfileName = "smoke"
    threat: Threat = field(default_factory=Threat)
    attacks: tuple[str, ...] = ()
    examples: int = 3
    seed: int = 0


def evaluate(order: Order, progress: Callable[[Progress], None] | None = None) -> Report:
    """Attack a recording and score the answer.

    Returns:
        The report, whatever it says; :func:`require_below_ceiling` judges it.

    Raises:
        InputError: SS-1301, SS-1404 to SS-1406, SS-1701 to SS-1712, and those of the corpus.
        CheckFailed: SS-1571 when a metric cannot be computed, SS-1572 when the attack process dies.
    """
    transcript = Transcript.load(order.transcript)
    transcript.require_whole()
    facts = public_facts(transcript)
    everything = read_truth(order.truth)
    _refuse_strangers(everything, transcript)
    sequences = sequences_of(transcript)
    seen = [Key(peer=s.peer, step=s.step, row=s.row) for s in sequences]
    lengths = {key: len(s.hidden) for key, s in zip(seen, sequences, strict=True)}
    require_fitting(everything, lengths, int(load_config(order.model).vocab_size))
    taught = {key for key, s in zip(seen, sequences, strict=True) if s.gradient is not None}
    victims, pairs = _collude(everything, order.threat)
    truths = choose(victims, seen, config().profiles[order.profile].sequences, taught=taught)
    asked = () if order.candidates is None else shuffled(read_asked(order.candidates), order.seed)
    if order.aux is not None:
        private = (*(t.text for t in everything), *(c.text for c in asked))
        refuse_overlap(private, [record.text for record in read_corpus(order.aux)])
    task = Task(
        transcript=str(order.transcript), model=str(order.model), aux=_path(order.aux), adapter=_path(order.adapter),
        profile=order.profile, attacks=order.attacks, keys=tuple(t.key for t in truths), threat=order.threat,
        pairs=tuple(Told(key=t.key, tokens=t.tokens) for t in pairs), candidates=tuple(c.text for c in asked),
        seed=order.seed,
    )  # fmt: skip
    known, heard = run_attack(task, progress)
    scorer = _scorer(order, facts, truths, everything, known, asked)
    results = tuple(score(heard.answers, scorer))
    wanted = set(task.keys)
    channels = _channels(order, [s for key, s in zip(seen, sequences, strict=True) if key in wanted])
    return _report(order, facts, scorer, results, heard, channels)


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _collude(truths: Sequence[Truth], threat: Threat) -> tuple[Sequence[Truth], Sequence[Truth]]:
    """The victims' sequences, and the colluding client's: the first client by name, if the threat model has one.

    Raises:
        InputError: SS-1711 when there is nobody else to attack.
    """
    if threat.text != "colluder":
        return truths, ()
    traitor = min(t.peer for t in truths)
    victims = [t for t in truths if t.peer != traitor]
    if not victims:
        raise InputError(
            "SS-1711", "the truth names one client, who cannot both collude and be attacked",
            hint="Give the truth of a run with two clients or more, or another --text.",
        )  # fmt: skip
    return victims, [t for t in truths if t.peer == traitor]


def choose(
    truths: Sequence[Truth], seen: Sequence[Key], most: int, *, taught: Collection[Key] = ()
) -> tuple[Truth, ...]:
    """Which sequences to attack: the first sighting of each record, earliest first, senders in turn.

    Records that were trained on come before those that were only evaluated, because of them more is seen (O3).

    Adapters start as the identity and drift while they are trained, so that the first sighting is the dearest.

    Args:
        truths: all that is known.
        seen: keys of the recording; truth of other sequences is left out.
        most: how many; 0 for all.
        taught: keys whose gradient crossed.

    Raises:
        InputError: SS-1702 when the recording holds none of the sequences that the truth names.
    """
    present = set(seen)
    queues: dict[str, list[Truth]] = {}
    known: set[tuple[str, tuple[int, ...]]] = set()
    order = sorted((t for t in truths if t.key in present), key=lambda t: (t.key not in taught, t.step, t.row, t.peer))
    for truth in order:
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


def _refuse_strangers(truths: Sequence[Truth], transcript: Transcript) -> None:
    """Refuse a recording without a client whom the truth names: files of it are lost, and a verdict would leave its text out.

    Raises:
        InputError: SS-1301. Where it holds none of them it is another run's, which :func:`choose` tells (SS-1702).
    """
    named, held = {t.peer for t in truths}, {peer for _, peer in transcript.peers}
    if (lost := named - held) and named & held:
        raise InputError(
            "SS-1301", f"{transcript.directory} lacks {len(lost)} client(s) whom the truth names",
            hint="Give the whole recording, and the truth of its clients alone.", details=tuple(sorted(lost)[:20]),
        )  # fmt: skip


def _scorer(
    order: Order, facts: PublicFacts, truths: tuple[Truth, ...], everything: tuple[Truth, ...], known: Known,
    asked: Sequence[Asked],
) -> Scorer:  # fmt: skip
    tokenizer = load_tokenizer(order.model)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    special = frozenset(tokenizer.all_special_ids)
    tokens = [t.tokens for t in truths]
    public = () if order.aux is None else read_corpus(order.aux)
    texts = [tokenizer.encode(r.text, truncation=True, max_length=1024) for r in public]
    whole = load_whole(order.model)
    sentinel = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    told = forced(whole, tokens, special, sentinel)
    privacy, task = facts.policy.privacy, None if facts.job is None else facts.job.task
    return Scorer(
        truths=truths, everything=everything, known=known, special=special, decode=decode, told=told,
        mu=mu_of(facts.policy), classes=() if task is None else task.labels,
        attributes=tuple(sorted({r.label for r in public if r.label is not None})),
        baselines=baselines(tokens, known, special, int(whole.config.vocab_size), texts, told),
        by_token=isinstance(privacy, Gaussian) and privacy.unit == "token", asked=tuple(asked),
    )  # fmt: skip


def transcript_digest(directory: Path) -> str:
    """SHA-256 over a recording: names and contents of its files, the truth apart, in order of their names."""
    whole = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name != "truth.jsonl":
            with path.open("rb") as file:
                whole.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _channels(order: Order, attacked: Sequence[Observation]) -> tuple[Observed, ...]:
    """What there was to attack."""
    there: dict[Observed, bool] = {
        "O1": bool(attacked), "O2": any(s.output is not None for s in attacked),
        "O3": any(s.gradient is not None for s in attacked), "O5": any(order.transcript.glob("sum-*.safetensors")),
        "O6": order.adapter is not None, "O7": bool(attacked),
    }  # fmt: skip
    return tuple(name for name, found in there.items() if found)


def _report(
    order: Order, facts: PublicFacts, scorer: Scorer, results: tuple[Result, ...], heard: Heard,
    channels: tuple[Observed, ...],
) -> Report:  # fmt: skip
    policy, mu = facts.policy, scorer.mu
    private = policy.privacy if isinstance(policy.privacy, Gaussian) else None
    noise = noise_of(policy, 1 if facts.cut is None else facts.cut[0])
    read = [r for r in results if r.token_recovery is not None]
    worst = max(read, key=lambda r: r.value, default=None)
    kappa = max([scorer.kappa, *(r.prior for r in read)])
    width = _width(order.model)
    limit = scorer.bound(kappa)
    limit = 1.0 if limit is None else limit
    rms = None if noise.clip is None else noise.clip / (width * max(len(t.tokens) for t in scorer.truths)) ** 0.5
    return Report(
        attacks=results,
        worst=0.0 if worst is None else worst.value,
        worst_attack="" if worst is None else worst.name,
        kappa=kappa,
        ceiling=limit,
        epsilon=private.epsilon if private else None,
        delta=private.delta if private else None,
        mu=mu,
        unit=private.unit if private else None,
        relation=private.relation if private else None,
        policy=policy.name,
        policy_digest=policy.digest,
        profile=order.profile,
        setting=Setting(
            transcript=transcript_digest(order.transcript), model=facts.model, policy=policy.name,
            policy_digest=policy.digest, mechanism=policy.mechanism_digest, cut=facts.cut,
            codec="f32" if facts.job is None else facts.job.codec, channels=channels, classes=len(scorer.classes),
            code=None if facts.job is None or facts.job.code is None else facts.job.code.digest, sigma=noise.sigma, clip=noise.clip,
            releases=scorer.known.releases, profile=order.profile, threat=order.threat, seed=order.seed, asked=order.attacks,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
        baselines=scorer.baselines,
        bounds=Bounds(
            kappa=kappa, ceiling=limit, membership_ceiling=scorer.membership_bound or 1.0,
            certified_floor=None if noise.sigma else 1.0,
            capacity_bits=None if rms is None or not noise.sigma else capacity_bits(width, rms, noise.sigma),
            token_bits=-math.log2(scorer.baselines.uniform),
        ),
        untested=(*(Untested(name=s.attack, why=s.why) for s in heard.skipped), _DECODED),
        checks=tuple(
            Check(name=e.name, statistic=e.statistic, threshold=e.threshold, passed=e.passed) for e in heard.examined
        ),
        flags=(*flags_of(results), *_unlinked(facts, scorer.known)),
        examples=() if worst is None else examples_of(heard.answers, worst.name, scorer, order.examples),
    )  # fmt: skip


def _unlinked(facts: PublicFacts, known: Known) -> tuple[str, ...]:
    """A flag where the schedule releases records several times and none could be linked: averaging was not tested then."""
    if facts.passes < 2 or known.releases > 1:
        return ()
    return (
        f"none of a record's {facts.passes} fresh releases were linked (a recording cut short?): no average was attacked",
    )


def _width(model: Path) -> int:
    return int(load_config(model).hidden_size)
