"""What every attack of a run may start from: the public model, public text, the threat model, and what is fitted once.

Whatever several attacks share is fitted lazily and once; whatever one attack alone needs stands in that attack's file.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from attacks.config import Profile, Search, config, settings_of
from attacks.prior import Prior, public_sequences
from attacks.ridge import Inverter, Layer, fit
from attacks.threat import Threat
from attacks.view import Key, Noise, PublicModel, ServerView

__all__ = ["Knowledge", "Pair", "learn"]

_PUBLIC_LENGTH = 48


@dataclass(frozen=True, slots=True)
class Pair:
    """A sequence of a colluding client, who tells the server its text.

    Attributes:
        key: where it stood in the traffic.
        tokens: (T,) its true ids, without padding.
    """

    key: Key
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Knowledge:
    """What is known before the victims' traffic is looked at.

    Attributes:
        model: the public model; its front is A, with the adapters that the threat model grants.
        prior: public text.
        noise: the mechanism on O1, from the policy.
        length: positions of the public sequences that things are fitted on; the traffic's median length.
        profile, threat: of the run.
        colluder: sequences of a client who sides with the server; empty unless the threat model says so.
        seed: of everything random that an attack does; a repeated run has another.
        candidates: texts whose membership in the training data is asked (O6), in an order that says nothing.
        attributes: a public label for each of ``prior.texts``, such as a ward; -1 for unknown. Empty for none.
    """

    model: PublicModel
    prior: Prior
    noise: Noise
    length: int
    profile: Profile
    threat: Threat = field(default_factory=Threat)
    colluder: tuple[Pair, ...] = ()
    seed: int = 0
    candidates: tuple[str, ...] = ()
    attributes: tuple[int, ...] = ()

    def reseeded(self, seed: int) -> Knowledge:
        """The same with another seed; what is fitted already is kept."""
        other = copy.copy(self)
        object.__setattr__(other, "seed", seed)
        return other

    @property
    def vocabulary(self) -> int:
        """V."""
        return len(self.model.embedding)

    @cached_property
    def search(self) -> Search:
        """The vocabulary family's tolerances."""
        return settings_of("vocabulary", Search)

    @cached_property
    def public(self) -> Tensor:
        """(N, length) public token ids to simulate the clients with; about ``profile.rows`` rows in all."""
        return public_sequences(self.prior, self.profile.rows, self.length)

    @cached_property
    def _fitted(self) -> tuple[Inverter, Layer]:
        # An attack may run under inference mode; what is kept for others must not be of that kind only.
        return fit(self.model.front, self.model.embedding, self.public, self.noise, held_out=self.search.held_out)

    @property
    def inverter(self) -> Inverter:
        """The ridge inverter at the run's noise."""
        return self._fitted[0]

    @property
    def layer(self) -> Layer:
        """Public statistics of the cut."""
        return self._fitted[1]


def learn(
    model: PublicModel,
    prior: Prior,
    view: ServerView,
    profile: Profile,
    threat: Threat | None = None,
    *,
    colluder: Sequence[Pair] = (),
    seed: int = 0,
    candidates: Sequence[str] = (),
    attributes: Sequence[int] = (),
) -> Knowledge:
    """Knowledge for a view: public sequences as long as those that were released, at the view's noise."""
    lengths = sorted(len(seen.rows) for seen in view.sightings)
    return Knowledge(
        model=model, prior=prior, noise=view.noise, length=lengths[len(lengths) // 2] if lengths else _PUBLIC_LENGTH,
        profile=profile, threat=threat or Threat(), colluder=tuple(colluder), seed=seed, candidates=tuple(candidates),
        attributes=tuple(attributes),
    )  # fmt: skip


def profile_named(name: str) -> Profile:
    """A shipped profile.

    Raises:
        KeyError: when there is none; names are checked where they enter.
    """
    return next(profile for known, profile in config().profiles.items() if known == name)
