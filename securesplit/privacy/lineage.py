"""Which states of A and C may shape a release: the public start, and what noised values made of it.

A release of record j is a function of j *and of the weights that made it*. If record i moved those weights without noise,
every later release of every other record tells of i, and accounting record by record counts none of it (the theta-leak,
docs/threat-model.md 3). So a gate releases only from states in its lineage, and a state enters the lineage in two ways:
it is the one the job started from, or a noised value that this gate released moved a state of the lineage to it.

What this does not do: it does not look into the step from one state to the next. Code on this site that moves weights by
clean gradients *and then* presents a noised value as the reason is not caught here; `privacy audit` catches it, by comparing
where the training loop takes the adapters with where the noised values alone lead.
"""

from __future__ import annotations

from securesplit.errors import PolicyDenied


class Lineage:
    """The states one gate may release from.

    Args:
        start: names the public state that the job started from.
    """

    def __init__(self, start: str) -> None:
        self._sound = {start}

    def require(self, state: str) -> None:
        """Raises PolicyDenied SS-2014 when private records may have moved A or C to this state without noise."""
        if state not in self._sound:
            raise PolicyDenied(
                "SS-2014",
                "A or C changed by something other than noised updates, so releases from it would leak what changed it",
                hint="Nothing was sent. Let only released updates move partitions under a private policy.",
            )

    def extend(self, state: str) -> None:
        """Take in a state that only public and noised values shaped."""
        self._sound.add(state)
