"""What an attack may read: released rows, public facts, public weights. The truth has no field here.

An attack gets a :class:`ServerView` and a :class:`PublicModel` and nothing else. Which sequences to attack is named by
where they stood in the traffic, which the server knows anyway.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attacks.link import link_releases
from securesplit.errors import InputError
from securesplit.model.parts import PartCache
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.plan import plan_for, rows_moved
from securesplit.protocol.job import Job
from securesplit.protocol.messages import Hello
from securesplit.protocol.transcript import Observation, Transcript


class Front(Protocol):
    """Partition A with public weights; what the attacks use of :class:`securesplit.model.parts.Front`."""

    def __call__(self, input_ids: Tensor, *, cache: PartCache | None = None) -> Tensor:
        """(B, T) ids to (B, T, D) states, each after the positions that the cache holds; extends the cache."""
        ...

    def new_cache(self) -> PartCache:
        """An empty decoding cache."""
        ...


@dataclass(frozen=True, slots=True)
class PublicModel:
    """What the model's publisher gave to everybody.

    Attributes:
        front: partition A with its pre-trained weights, and with the adapters that the threat model grants.
        embedding: (V, E), the input embedding, which is part of A.
        middle: loads partition B when it is needed; None where only A is at hand.
        back: loads partition C.
        whole: loads the unsplit causal model, which is a language model for priors as well.
        trained: loads the causal model as it stands after training (O6), in the attacker's hands; None when it is not.
        sentinel: the public token that stands before every text; None where there is none.
        padding: the public token that clients fill up with; None where the tokenizer does not say.
        encode, decode: the public tokenizer, without special tokens; None where there is none.
    """

    front: Front
    embedding: Tensor
    middle: Callable[[], Any] | None = None
    back: Callable[[], Any] | None = None
    whole: Callable[[], Any] | None = None
    trained: Callable[[], Any] | None = None
    sentinel: int | None = None
    padding: int | None = None
    encode: Callable[[str], list[int]] | None = None
    decode: Callable[[Sequence[int]], str] | None = None


def fork(cache: PartCache, rows: Tensor) -> PartCache:
    """A cache whose batch is ``rows`` of the given one, which is left as it is.

    transformers' dynamic caches replace their tensors and never write into them: a copy of the shells is enough.
    """
    past = cache.past
    if past is not None:
        past = copy.copy(past)
        past.layers = [copy.copy(layer) for layer in past.layers]
        past.batch_select_indices(rows)
    return PartCache(past, cache.length)


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """Where a sequence stood in the traffic: the sender's certificate identity, its step, the row in the message."""

    peer: str
    step: int
    row: int


@dataclass(frozen=True, slots=True)
class Noise:
    """The mechanism, as the policy states it to everybody.

    Attributes:
        sigma: standard deviation per coordinate; 0 where the policy is UnsafeNoPrivacy.
        clip: C, Frobenius bound on a sequence's rows before the noise; None where a sequence is not clipped as a whole.
        row_clip: bound on each row's norm before the noise (unit token); None where rows are not clipped one by one.
            The public model's front applies it already (attacks/rowclip.py).
    """

    sigma: float
    clip: float | None
    row_clip: float | None = None

    def averaged(self, releases: int) -> Noise:
        """The noise that is left in the mean of so many fresh releases."""
        return replace(self, sigma=self.sigma / releases**0.5)


@dataclass(frozen=True, slots=True)
class Sighting:
    """One sequence as the server received it.

    Attributes:
        key: where.
        rows: (T, D) float32; T is the public bucket length, so the last rows may be padding.
        linked: (T, D), the mean over the record's fresh releases as far as they can be linked; ``rows`` itself when K = 1.
        releases: K.
        output: (T, D) float32, B's own answer (O2); None where the server did not answer.
        gradient: (T, D) float32, the released gradient at B's output (O3); None where no gradient crossed.
        gain: public factor that B multiplied the rows by before its first layer.
    """

    key: Key
    rows: npt.NDArray[np.float32]
    linked: npt.NDArray[np.float32]
    releases: int
    output: npt.NDArray[np.float32] | None = None
    gradient: npt.NDArray[np.float32] | None = None
    gain: float = 1.0


@dataclass(frozen=True, slots=True)
class Passage:
    """One sequence of the whole traffic, attacked or not, in the order of arrival (O7).

    Attributes:
        key: where it stood.
        time_ns: the server's clock when it arrived.
        rows: (T, D) float32, as released.
        size: bytes of the message that brought it.
        learn: whether the sender said that a gradient would follow: records of training come so, held-out ones do not.
        gradient: (T, D) float32, the gradient that was released at the same step (O3); None where none crossed.
    """

    key: Key
    time_ns: int
    rows: npt.NDArray[np.float32]
    size: int
    learn: bool = False
    gradient: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class OpenedSum:
    """One secure sum that the server opened (O5); blind rounds leave none.

    Attributes:
        round: its number. peers: certificate identities that it sums over. weight: the total weight.
        names: of the adapters' tensors, in order, under the whole model's names; tensors: the *mean* update of each.
        sigma: standard deviation of the noise in one coordinate of the mean, as the policy states it; 0 for none.
    """

    round: int
    peers: tuple[str, ...]
    weight: int
    names: tuple[str, ...]
    tensors: tuple[npt.NDArray[np.float32], ...]
    sigma: float


@dataclass(frozen=True, slots=True)
class ServerView:
    """Everything an attack gets from the traffic.

    Attributes:
        sightings: the sequences to attack.
        noise: the mechanism on O1. gradient_noise: the mechanism on O3; sigma 0 where gradients cross bare.
        cut: decoder layers of A and of C; None when the recording names no job.
        codec: how numbers cross: f32, bf16 or int8.
        responded: whether labels were answered at random, so that O3 carries no true label.
        classes: how many labels a classification task has; 0 where text itself is learnt.
        traffic: every sequence of the recording, in the order of arrival.
        decoded: the tokens that extended a decoding cache, one row or few each (O8): examined for their noise, not attacked.
        decode_noise: the mechanism on O8; sigma 0 where the policy pays for none.
        sums: what secure aggregation opened to the server.
        trained: whether a trained model is at hand (O6).
        permuted: what a secret permutation of a defence shuffled: nothing, "rows", "columns" or "both". The shipped
            protocol permutes nothing; benchmarks of other defences do.
    """

    sightings: tuple[Sighting, ...]
    noise: Noise
    gradient_noise: Noise = field(default_factory=lambda: Noise(0.0, None))
    cut: tuple[int, int] | None = None
    codec: str = "f32"
    responded: bool = False
    classes: int = 0
    traffic: tuple[Passage, ...] = ()
    decoded: tuple[Passage, ...] = ()
    decode_noise: Noise = field(default_factory=lambda: Noise(0.0, None))
    sums: tuple[OpenedSum, ...] = ()
    trained: bool = False
    permuted: str = ""


@dataclass(frozen=True, slots=True)
class PublicFacts:
    """The facts a server writes beside its recording.

    Attributes:
        policy: the clients' policy.
        model: the model manifest's digest.
        passes: how many *fresh* releases of one record of the training data the schedule makes: one per state of partition A
            that it is trained at. A held-out record has one before the first round and one after each.
        job: what the server offered; None when the facts hold no job.
    """

    policy: Policy
    model: str
    passes: int
    job: Job | None

    def passes_of(self, *, learn: bool) -> int:
        """Fresh releases of a record that is trained on, or of one that is held out for evaluation."""
        if learn or self.passes == 1 or self.job is None:
            return self.passes
        return self.job.schedule.rounds + 1

    @property
    def cut(self) -> tuple[int, int] | None:
        """Decoder layers of A and of C."""
        return None if self.job is None else (self.job.cut.front, self.job.cut.back)


def public_facts(transcript: Transcript) -> PublicFacts:
    """Read the public facts of a recording.

    Raises:
        InputError: SS-1707 when they are not what `serve --record` writes, SS-1708 when a client used another policy.
    """
    try:
        facts = json.loads(transcript.public)
        policy = Policy.model_validate_json(json.dumps(facts["policy"]))
        text = facts.get("job")
        job = Job.model_validate_json(text if isinstance(text, str) else json.dumps(text)) if text else None
        model = str(facts["model"])
    except (ValueError, KeyError, TypeError):
        raise InputError(
            "SS-1707",
            "the transcript's public facts cannot be read",
            hint="Name a directory that `serve --record` wrote.",
        ) from None
    _require_one_policy(transcript, policy)
    return PublicFacts(policy=policy, model=model, passes=_passes(policy, job), job=job)


def _passes(policy: Policy, job: Job | None) -> int:
    """Regime ``round`` repeats the bytes of a record while A stands still; ``step`` moves A with every step."""
    if job is None or not isinstance(policy.privacy, Gaussian) or policy.privacy.regime == "frozen":
        return 1
    return job.schedule.rounds * (job.schedule.epochs if policy.privacy.regime == "step" else 1)


def _require_one_policy(transcript: Transcript, policy: Policy) -> None:
    """Refuse a recording whose clients used another policy than the server wrote down: sigma and epsilon would be wrong."""
    for number, _ in transcript.peers:
        for _, message in transcript.messages(number):
            if isinstance(message, Hello):
                if message.policy != policy.digest:
                    raise InputError(
                        "SS-1708",
                        "a client in this recording used another policy than the server wrote down",
                        hint="Record again with the clients' policy at the server, too.",
                    )
                break


def noise_of(policy: Policy, front: int = 1) -> Noise:
    """The noise on O1 that a policy makes its clients add behind ``front`` layers; anybody who has read both knows it."""
    if not isinstance(policy.privacy, Gaussian):
        return Noise(sigma=0.0, clip=None)
    cut = plan_for(policy.privacy, rows=rows_moved(front, policy.limits.buckets)).cut
    return Noise(sigma=cut.sigma, clip=None if cut.per_row else cut.clip, row_clip=cut.clip if cut.per_row else None)


def gradient_noise_of(policy: Policy, front: int = 1) -> Noise:
    """The noise on O3; none where the policy leaves gradients bare, or releases labels in their place."""
    if not isinstance(policy.privacy, Gaussian):
        return Noise(sigma=0.0, clip=None)
    gradient = plan_for(policy.privacy, rows=rows_moved(front, policy.limits.buckets)).gradient
    return Noise(sigma=0.0, clip=None) if gradient is None else Noise(sigma=gradient.sigma, clip=gradient.clip)


def decode_noise_of(policy: Policy, front: int = 1) -> Noise:
    """The noise on O8, decoded tokens; none where the policy has no channel for them, so that none may cross."""
    if not isinstance(policy.privacy, Gaussian):
        return Noise(sigma=0.0, clip=None)
    decode = plan_for(policy.privacy, rows=rows_moved(front, policy.limits.buckets)).decode
    return Noise(sigma=0.0, clip=None) if decode is None else Noise(sigma=decode.sigma, clip=decode.clip)


def sequences_of(transcript: Transcript) -> list[Observation]:
    """Released sequences from their first token on: whole batches, and the prompts that open a decoding cache.

    Tokens decoded later (O8) extend a cache by separately clipped rows: :func:`_parted` has them.
    """
    return _parted(transcript)[0]


def _parted(transcript: Transcript) -> tuple[list[Observation], list[Observation]]:
    """Whole sequences, and what extended a decoding cache."""
    opened: dict[tuple[int, int], int] = {}
    whole: list[Observation] = []
    decoded: list[Observation] = []
    for seen in transcript.observations():
        opening = opened.setdefault((seen.connection, seen.cache), seen.step) == seen.step
        (whole if not seen.cache or opening else decoded).append(seen)
    return whole, decoded


def read_view(transcript: Transcript, wanted: Sequence[Key], *, most: int = 1_000_000) -> ServerView:
    """The server's view of the wanted sequences, in the order asked for; unknown keys are left out.

    Args:
        transcript: the recording.
        wanted: which sequences are attacked.
        most: at most so many fresh releases of a record are used, K of the threat model.
    """
    facts = public_facts(transcript)
    sigma = noise_of(facts.policy, 1 if facts.cut is None else facts.cut[0]).sigma
    everything, decoded = _parted(transcript)
    # Held-out records are released once more than those of training, and would shift every pass by their number.
    groups: dict[tuple[str, bool], list[Observation]] = {}
    for seen in everything:
        groups.setdefault((seen.peer, seen.learn), []).append(seen)
    sightings: dict[Key, Sighting] = {}
    targets = set(wanted)
    for (peer, learn), seen_here in groups.items():
        links = link_releases([s.hidden for s in seen_here], facts.passes_of(learn=learn), sigma=sigma)
        for seen, linked in zip(seen_here, links, strict=True):
            key = Key(peer=peer, step=seen.step, row=seen.row)
            if key in targets and key not in sightings:
                sightings[key] = _sighting(key, seen, [seen_here[i].hidden for i in linked[:most]])
    return _view_of(facts, tuple(sightings[k] for k in wanted if k in sightings), everything, decoded)


def _sighting(key: Key, seen: Observation, same: Sequence[npt.NDArray[np.float32]]) -> Sighting:
    alike = all(rows.shape == seen.hidden.shape for rows in same)
    mean = np.stack(same).mean(axis=0, dtype=np.float64).astype(np.float32) if alike else seen.hidden
    return Sighting(
        key=key, rows=seen.hidden, linked=mean, releases=len(same) if alike else 1, output=seen.output,
        gradient=seen.gradient, gain=seen.gain,
    )  # fmt: skip


def _view_of(
    facts: PublicFacts, sightings: tuple[Sighting, ...], everything: Sequence[Observation], decoded: Sequence[Observation]
) -> ServerView:  # fmt: skip
    front = 1 if facts.cut is None else facts.cut[0]
    return ServerView(
        sightings=sightings,
        noise=noise_of(facts.policy, front),
        gradient_noise=gradient_noise_of(facts.policy, front),
        cut=facts.cut,
        codec="f32" if facts.job is None else facts.job.codec,
        responded=isinstance(facts.policy.privacy, Gaussian) and facts.policy.privacy.labels is not None,
        classes=0 if facts.job is None or facts.job.task is None else len(facts.job.task.labels),
        traffic=_passages(everything),
        decoded=_passages(decoded),
        decode_noise=decode_noise_of(facts.policy, front),
    )


def _passages(seen: Sequence[Observation]) -> tuple[Passage, ...]:
    """In the order of arrival."""
    arrived = sorted(seen, key=lambda one: (one.time_ns, one.connection, one.step, one.row))
    return tuple(
        Passage(Key(one.peer, one.step, one.row), one.time_ns, one.hidden, one.size, one.learn, one.gradient)
        for one in arrived
    )


def batches(view: ServerView, *, linked: bool, most: int = 64) -> list[tuple[list[int], Tensor]]:
    """Group sightings by length, at most ``most`` together: their indices in the view and a (N, T, D) tensor."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, seen in enumerate(view.sightings):
        groups.setdefault((len(seen.rows), seen.releases if linked else 1), []).append(index)
    found = []
    for indices in groups.values():
        for start in range(0, len(indices), most):
            part = indices[start : start + most]
            rows = [view.sightings[i].linked if linked else view.sightings[i].rows for i in part]
            found.append((part, torch.from_numpy(np.stack(rows))))
    return found
