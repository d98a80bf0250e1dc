"""What an attack is to the suite: a name, what keeps it from running, and a function from a view to an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attacks.exchange import Answer
from attacks.knowledge import Knowledge
from attacks.threat import Threat
from attacks.view import ServerView

Tick = Callable[[int, int], None]
"""Told (done, total) in whatever unit the attack counts, as work goes on."""


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack.

    Attributes:
        name: as in its file of configs/, which says the rest of what can be said without running it.
        blocked: why it cannot run on this view under this threat model, in words for a report's "not tested"; None when
            it can. It is cheap, and never looks at values of tensors.
        run: plays it. It reads the view and public knowledge, and nothing else.
    """

    name: str
    blocked: Callable[[ServerView, Threat], str | None]
    run: Callable[[ServerView, Knowledge, Tick], Answer]
