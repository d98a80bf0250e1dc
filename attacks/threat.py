"""What the adversary of a run is given, as data. An attack says what it needs; a run says what there is.

Default: a curious server with the public pre-trained weights, the policy, public text if the user has some, and
everything that it received. Secret are coins, keys and the text.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Weights = Literal["none", "pre-trained", "round-start", "exact"]
Text = Literal["none", "other-domain", "same-domain", "fifty", "colluder"]
Conduct = Literal["passive", "active"]


class Threat(BaseModel):
    """The adversary's knowledge and conduct.

    Attributes:
        weights: of the clients' parts. ``none``: architecture and tokenizer alone; ``pre-trained``: what the publisher
            gave to everybody; ``round-start``: with the adapters that the last secure sum made public; ``exact``: the
            client's own, an upper bound.
        text: ``none``; public text of another or of the same domain; ``fifty`` samples of the victims' own domain;
            ``colluder``: what a client who sides with the server sent, beside its text. The victims' own text never.
        releases: at most so many fresh releases of one record are used, K.
        conduct: ``passive`` reads; ``active`` answers with what it likes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    weights: Weights = "pre-trained"
    text: Text = "same-domain"
    releases: Annotated[int, Field(ge=1)] = 1_000_000
    conduct: Conduct = "passive"

    def words(self) -> str:
        """In words, for a report."""
        text = {
            "none": "no auxiliary text", "other-domain": "public text of another domain",
            "same-domain": "public text of the same domain", "fifty": "fifty samples of the victims' domain",
            "colluder": "a colluding client's text and traffic",
        }[self.text]  # fmt: skip
        weights = {
            "none": "no weights", "pre-trained": "public pre-trained weights", "round-start": "weights of the round's start",
            "exact": "the client's exact weights",
        }[self.weights]  # fmt: skip
        return f"{self.conduct} server; {weights}; {text}"


def enough(have: Weights, need: Weights) -> bool:
    """Whether weights of one kind serve an attack that needs another; the kinds are ordered by knowledge."""
    order = ("none", "pre-trained", "round-start", "exact")
    return order.index(have) >= order.index(need)
