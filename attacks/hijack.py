"""The hijacking server (Pasquini, Ateniese, Bernaschi, CCS 2021): gradients that serve its inverter and not the task.

    public text -> copy of A, its adapters learn -> clip + noise -> inverter -> tokens      (the trap, at the server)
    client's rows -> inverter or critic -> d/d rows -> answered as "dL/d rows"              (the answer to a backward)

The client's A takes its steps along the crafted gradient and follows the server's copy of it, to where one affine map
reads tokens. It cannot go where clip and noise do not let it: the ceiling of attacks/bounds.py holds whatever A computes,
because both come after A, and a client adds them itself.

A server that knows that it is watched hides: :class:`Evasion`. How much that leaves of the attack, and what the client's
watch (securesplit/client/guardian.py) sees of it, is measured by scripts/bench-hijack; docs/benchmarks/hijack.md.

A pure object: no sockets, no client's code, no truth. It can stand wherever B stands and is asked for a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.exchange import Answer
from attacks.knowledge import Knowledge
from attacks.threat import Threat
from attacks.trap import Trap
from attacks.view import ServerView

__all__ = ["ATTACKS", "Evasion", "HijackingServer"]

_TINY = 1e-200

Honest = Callable[[Tensor, Tensor], Tensor]
"""(rows (N,T,D), gradient at B's output (N,T,D)) -> gradient at the rows, as some B computes it."""


@dataclass(frozen=True, slots=True)
class Evasion:
    """How a hijacking server hides. Lengths are always those of the honest gradient, record by record, unless ``bare``.

    Attributes:
        share: of the crafted gradient in a mixture with the honest one, 0 to 1; 1 is the whole hijack.
        bare: send the crafted gradient at the length that it has by itself; only with a share of 1.
        every: hijack every so manieth step, and be honest in between.
        after: honest steps before the first hijacked one.
        replay: instead of a crafted gradient, repeat the honest one of so many steps ago; 0 does not.
        likeness: mix so that every *row* has this cosine with the honest gradient, the crafted part across it; None does
            not. This is what a server does that knows what its client asks for.
    """

    share: float = 1.0
    bare: bool = False
    every: int = 1
    after: int = 0
    replay: int = 0
    likeness: float | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and self.every >= 1 and self.after >= 0 and self.replay >= 0):
            raise ValueError("share lies in 0..1, every is at least 1, after and replay are not negative")
        if self.likeness is not None and not -1 <= self.likeness <= 1:
            raise ValueError("likeness is a cosine")


class HijackingServer:
    """Answers backward passes in B's place.

    Args:
        trap: what crafts; None where nothing is crafted (``replay``, or another model's honest gradients).
        honest: B, or any other model that shall pass for it.
        evasion: how to hide.

    Attributes:
        hijacked: whether the last answer was not B's.
    """

    def __init__(self, trap: Trap | None, honest: Honest, evasion: Evasion | None = None) -> None:
        self._trap, self._honest = trap, honest
        self._evasion = evasion or Evasion()
        self._step = 0
        self._past: list[Tensor] = []
        self.hijacked = False

    def answer(self, rows: Tensor, gradient: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The answer to a backward pass.

        Args:
            rows: (N, T, D) as received. gradient: (N, T, D) at B's output, as received.
            tokens: (N, T), of a colluding client; see :meth:`Trap.gradient`.

        Returns:
            (N, T, D), what is passed off as dL/d rows.
        """
        way, step = self._evasion, self._step
        self._step += 1
        due = self._honest(rows, gradient)
        self.hijacked = step >= way.after and (step - way.after) % way.every == 0
        if way.replay:
            return self._replayed(due, step)
        if self._trap is None or not self.hijacked:
            return due
        self._trap.learn()
        crafted = self._trap.gradient(rows, tokens)
        if way.likeness is not None:
            return _across(crafted, due, way.likeness)
        if way.bare:
            return crafted
        return _as_long(way.share * _as_long(crafted, due) + (1 - way.share) * due, due)

    def _replayed(self, due: Tensor, step: int) -> Tensor:
        self._past.append(due)
        old = self._past.pop(0) if len(self._past) > self._evasion.replay else None
        self.hijacked = self.hijacked and step > 0 and old is not None and old.shape == due.shape
        return _as_long(old, due) if old is not None and self.hijacked else due


def _as_long(crafted: Tensor, due: Tensor) -> Tensor:
    """Each record at the length of the honest one. In float64, because a sure inverter's gradient is far below 1e-20."""
    wide = crafted.double()
    own = wide.flatten(1).norm(dim=1).clamp_min(_TINY)
    longer: Tensor = wide * (due.double().flatten(1).norm(dim=1) / own)[:, None, None]
    return longer.to(due)


def _across(crafted: Tensor, due: Tensor, likeness: float) -> Tensor:
    """Each row at the length of the honest one and at this cosine with it; the rest is crafted, at right angles."""
    length = due.double().norm(dim=2, keepdim=True)
    along = due.double() / length.clamp_min(_TINY)
    wide = crafted.double() / crafted.double().norm(dim=2, keepdim=True).clamp_min(_TINY)
    aside = wide - (wide * along).sum(2, keepdim=True) * along
    aside = aside / aside.norm(dim=2, keepdim=True).clamp_min(_TINY)
    mixed: Tensor = length * (likeness * along + math.sqrt(1 - likeness**2) * aside)
    return mixed.to(due)


def _needs_clients(view: ServerView, threat: Threat) -> str:
    del view, threat
    return "it answers clients while they train, and a recording cannot be answered; scripts/bench-hijack plays it"


def _unplayable(view: ServerView, known: Knowledge, tick: Tick) -> Answer:
    del view, known, tick
    raise AssertionError("blocked on every recording")


ATTACKS = (Attack("hijack", _needs_clients, _unplayable),)
