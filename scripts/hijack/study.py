"""What the client's watch sees of a hijack, and what the hijack is worth: cells of docs/benchmarks/hijack.md.

Detection. One honest run: client and B learn from honest answers, and at every step each variant of the hijack says what it
*would* have answered. So every step is the first of a possible hijack, and false alarms and detections come from the same
steps. Worth. A run that is hijacked from its first step, and then the attacker's inverters on sequences that nobody trained
on, through the very A that came out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from attacks.hijack import Evasion, HijackingServer
from scripts.hijack.world import Parts, Setting, Step, World, read, trap_for
from securesplit.client.guardian import LEAST, LIMIT, RANGE, Watched, allowed

WITHIN = 10
"""Watched steps within which a detection counts."""
MARGIN = 0.02
LEARNS = 4

Progress = Callable[[int, int], None]
Likeness = tuple[float, float, float]
"""Rows, records, ratio: as in :class:`securesplit.client.guardian.Watched`."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One step of an honest run.

    Attributes:
        outputs: likeness of B's outputs with the published B's.
        honest: of its gradients by row and by record, and their ratio.
        hijacked: the same of each variant's answer; None where it would have been honest in this step.
    """

    outputs: float
    honest: Likeness
    hijacked: dict[str, Likeness | None]


class _Given:
    """A trap whose answer is at hand, so that variants do not compute it again."""

    def __init__(self) -> None:
        self.crafted = torch.zeros(0)

    def learn(self) -> float:
        return 0.0

    def gradient(self, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        del rows, tokens
        return self.crafted


class _Variants:
    """Every way to hijack, asked at each step for what it would answer."""

    def __init__(self, parts: Parts, setting: Setting, public: Tensor, *, other: bool) -> None:
        self.inverter = trap_for(parts, setting, public)
        self.critic = trap_for(parts, setting, public, craft="discriminator")
        self._given, self._judged = _Given(), _Given()
        self._now: Step | None = None
        self._asked = 0
        self._gain = setting.gain
        self._other = _other_model(parts) if other else None

        def due(rows: Tensor, gradient: Tensor) -> Tensor:
            del rows, gradient
            assert self._now is not None
            return self._now.due

        def server(trap: Any, **way: Any) -> HijackingServer:
            return HijackingServer(trap, due, Evasion(**way))

        self._servers = {
            "full": server(self._given, bare=True), "rescaled": server(self._given),
            "discriminator": server(self._judged),
            "half": server(self._given, share=0.5), "quarter": server(self._given, share=0.25),
            "tenth": server(self._given, share=0.1), "every 4th": server(self._given, every=4),
            "replay": server(None, replay=1),
        }  # fmt: skip
        if other:
            self._servers["other model"] = HijackingServer(None, self._elsewhere)

    def ask(self, now: Step) -> dict[str, tuple[Tensor, bool]]:
        """Each variant's answer, and whether it is a hijacked one."""
        self._now = now
        if self._asked % LEARNS == 0:  # The craft changes slowly, and learning is most of what it costs.
            self.inverter.learn()
        self._asked += 1
        self._given.crafted = self.inverter.gradient(now.rows)
        self._judged.crafted = self.critic.gradient(now.rows)
        answers = {name: (s.answer(now.rows, now.gradient), s.hijacked) for name, s in self._servers.items()}
        # The server knows the published B and the watch, and aims right above what is asked for.
        least = allowed(now.beside(now.due).outputs) + MARGIN
        edge = HijackingServer(self._given, lambda _rows, _gradient: now.public_due, Evasion(likeness=min(1.0, least)))
        return {**answers, "edge": (edge.answer(now.rows, now.gradient), True)}

    def _elsewhere(self, rows: Tensor, gradient: Tensor) -> Tensor:
        leaf = rows.clone().requires_grad_()
        (due,) = torch.autograd.grad(self._other(leaf * self._gain(rows[0].numel())), leaf, gradient)
        return due


def _other_model(parts: Parts) -> Any:
    """B with every weight off by a tenth of its matrix's own size: somebody else's model of the same shape."""
    other = parts.middle()
    other.requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(3)
    for parameter in other.parameters():
        if parameter.ndim == 2:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + 0.1 * parameter.data.std() * noise
    return other


def watch(
    parts: Parts,
    setting: Setting,
    private: Tensor,
    public: Tensor,
    steps: int,
    progress: Progress,
    *,
    other: bool = True,
) -> list[Seen]:
    """An honest run of so many steps under watch, and what each variant would have answered.

    Args:
        other: whether to compute another model's answers as well, which costs a third of all.
    """
    world, variants = World(parts, setting, private), _Variants(parts, setting, public, other=other)
    seen: list[Seen] = []
    for number in range(steps):
        now = world.step(lambda step: step.due)
        honest = now.beside(now.due)
        told = {
            name: _three(now.beside(answer)) if hijacked else None
            for name, (answer, hijacked) in variants.ask(now).items()
        }
        seen.append(Seen(round(honest.outputs, 6), _three(honest), told))
        progress(number + 1, steps)
    return seen


def _three(seen: Watched) -> Likeness:
    return round(seen.rows, 3), round(seen.records, 3), float(f"{seen.ratio:.3g}")


def alarms(outputs: Iterable[float], answers: Iterable[Likeness]) -> list[int]:
    """After which watched steps the watch would have ended a run; it begins anew after each."""
    missing, found = 0.0, []
    for number, (output, answer) in enumerate(zip(outputs, answers, strict=True)):
        seen = Watched(output, *answer)
        missing = max(0.0, missing + allowed(output) - seen.gradients)
        if not (missing <= LIMIT and 1 / RANGE <= seen.ratio <= RANGE):
            found.append(number)
            missing = 0.0
    return found


@dataclass(frozen=True, slots=True)
class Caught:
    """How one variant fares.

    Attributes:
        rate: share of hijacks, begun at every tenth step, that were found within ``WITHIN`` watched steps.
        watched: median of the watched steps it took; infinite where half were never found.
    """

    rate: float
    watched: float


def detection(seen: Sequence[Seen], every: int = 1, seed: int = 0) -> dict[str, Any]:
    """False alarms over the honest steps, and detections of each variant.

    Args:
        seen: of :func:`watch`.
        every: the watch looks at one step in so many, by coins of this seed.
    """
    coins = random.Random(seed)  # noqa: S311 - a simulation of the client's coins
    looked = [i for i in range(len(seen)) if coins.randrange(every) == 0]
    outputs = [seen[i].outputs for i in looked]
    false = alarms(outputs, [seen[i].honest for i in looked])
    caught = {}
    for name in seen[0].hijacked:
        answers = [seen[i].hijacked[name] or seen[i].honest for i in looked]
        took = []
        for start in range(0, max(1, len(looked) - 2 * WITHIN), 10):
            found = alarms(outputs[start:], answers[start:])
            took.append(found[0] + 1 if found else math.inf)
        caught[name] = asdict(Caught(sum(t <= WITHIN for t in took) / len(took), median(took)))
    blunt = sum(allowed(o) <= LEAST for o in outputs) / len(outputs)
    return {"watched": len(looked), "false_alarms": len(false), "blunt": blunt, "caught": caught}


@dataclass(frozen=True, slots=True)
class Worth:
    """What a hijack that ran from the first step is worth.

    Attributes:
        recovery: of the best inverter on fresh sequences; ridge and trap: of each.
        kappa: the best guess without looking. bound: the ceiling at this mu; 1 without noise.
        hits: by sequence, for intervals.
    """

    variant: str
    recovery: float
    ridge: float
    trap: float
    kappa: float
    bound: float
    hits: tuple[int, ...]


WORTH: dict[str, dict[str, Any]] = {
    "published": {"share": 0.0},
    "honest": {"share": 0.0},
    "full": {"bare": True},
    "known text": {"bare": True},
    "discriminator": {"bare": True},
    "half": {"share": 0.5},
    "quarter": {"share": 0.25},
    "every 4th": {"every": 4},
    "edge": {"likeness": LEAST + MARGIN},
}
"""Variants by their ways. ``published``: A as it was published, before any step. ``known text``: the server knows the text of
the steps that it hijacks, from a colluding client or, without noise, by exact search, so that its craft has no wrong label; so
do those that hide. ``full`` and ``discriminator`` know nothing and guess."""
GUESSING = {"full", "discriminator"}


def worth(
    variant: str, parts: Parts, setting: Setting, private: Tensor, public: Tensor, victims: Tensor, steps: int,
    progress: Progress,
) -> Worth:  # fmt: skip
    """Hijack a run from its first step, then read."""
    way = Evasion(**WORTH[variant])
    steps = 0 if variant == "published" else steps
    alone = way.bare or not steps  # Nothing of B is used, so that it is not computed.
    world = World(parts, setting, private, watch=way.likeness is not None, alone=alone)
    craft = "discriminator" if variant == "discriminator" else "inverter"
    trap = None if not way.share else trap_for(parts, setting, public, craft=craft)
    made: list[Step] = []
    server = HijackingServer(
        trap, lambda _rows, _gradient: made[-1].due if way.likeness is None else made[-1].public_due, way
    )

    def answer(step: Step) -> Tensor:
        made[:] = [step]
        return server.answer(step.rows, step.gradient, None if variant in GUESSING else step.tokens)

    for number in range(steps):
        world.step(answer)
        progress(number + 1, steps)
    found = read(world, victims, public, trap)
    return Worth(variant, found.recovery, found.ridge, found.trap, found.kappa, found.bound, found.hits)
