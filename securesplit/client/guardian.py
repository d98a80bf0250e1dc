"""Are the server's answers those of the model that it serves? On a random step in n the client computes them itself.

A hijacking server ignores the task and sends gradients that pull A to where its inverter reads best (Pasquini, Ateniese,
Bernaschi, CCS 2021, arXiv 2012.02670). Here the client holds labels and loss, and B is public, so the check is direct: run
the published B on the rows that were released, send the gradient that was released back through it, and compare.

An honest B learns, and its gradients turn away from the published ones: at a learning rate of 1e-3 to a cosine of 0.3
within twenty steps. Its outputs turn by a smaller angle in a fixed proportion. Both angles' squares grow with the same
drift, and measured over noise and learning rates

    1 - likeness of gradients  <=  10 (1 - likeness of outputs)

held, but for single steps, on the one model where it was measured, SmolLM2-135M (docs/benchmarks/hijack.md). So the
outputs, which C learns from, say how like the gradients
must be: ``allowed``. What is missing adds up over the watched steps, and what is there to spare is not saved (CUSUM: Page,
Biometrika 1954), so that it does not matter when a hijack begins. In regime ``frozen`` nothing drifts and no gradient
comes; there the outputs themselves must be those of the published B.

The verdict is a function of the released bytes and of the server's own answers: it costs no epsilon. Which steps are
watched is the client's secret.

What this does not protect against: a server whose B did drift, or that says so in its outputs. What is allowed then falls
to ``LEAST``, and a crafted gradient with a tenth of the public one in it passes; :attr:`Guardian.allowed` says how sharp
the watch was, and docs/benchmarks/hijack.md what such a server gains. A hijack of few steps, few records or a small share
is diluted as much as it is hidden. The guarantee against any server is the noise at the cut, whatever A is.
"""

from __future__ import annotations

import logging
import math
import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from securesplit.errors import RemoteProtocolError
from securesplit.model.code import CutCode
from securesplit.model.parts import Middle
from securesplit.privacy.released import Released
from securesplit.protocol.messages import Blob
from securesplit.transport.tensors import tensor_of

__all__ = ["FROZEN", "LEAST", "LIMIT", "Guardian", "Watched", "allowed", "require_like", "watched"]

_log = logging.getLogger(__name__)

HIJACKED = "SS-4024"

SLOPE = 10.0
"""Chosen on honest runs other than those of docs/benchmarks/hijack.md: five to six times was usual, ten the most but for
single records."""
ROUNDING = 0.03
"""Room for bf16 and int8 on the wire and in B; honest float32 at no drift is within 1e-6."""
LEAST = 0.1
"""Below it nothing is asked for: crafted gradients had a likeness of 0 within 0.05, and honest ones of a B that drifted far
0.2 to 0.3."""
LIMIT = 0.4
"""What may be missing in all; 0.17 at most in those runs. At no drift a hijack misses 0.97 in its first watched step, after a
long drift 0.1 in each."""
RANGE = 1e4
"""Factor by which a record's gradient may be longer or shorter than the published B's; honest ones were within 163."""
FROZEN = 0.97
"""Least likeness of outputs where B never learns."""

_ALIVE = 1e-6


@dataclass(frozen=True, slots=True)
class Watched:
    """A step of the server beside the published B's, over the records of a batch.

    Attributes:
        outputs: mean cosine of the rows of B's output; 1 where B has not moved.
        rows: mean cosine of the rows of the gradient at B's input; those without one, as behind the last scored token, are
            left out.
        records: the same of whole records.
        ratio: the norm of that gradient over the published B's: of the record that is farthest from 1.
    """

    outputs: float
    rows: float
    records: float
    ratio: float

    @property
    def gradients(self) -> float:
        """Likeness of gradients, 0 to 1: of rows, which is steady, and of records, or a hijack could stand in a few long rows.

        Below 0 counts as 0: a honest B that drifted turns a long row around now and then, a hijack has no need to.
        """
        both = (self.rows + self.records) / 2
        return 0.0 if both < 0 else both  # NaN stays what it is.


def watched(output: Tensor, gradient: Tensor, public_output: Tensor, public_gradient: Tensor) -> Watched:
    """Compare a step.

    Args:
        output, public_output: (B, T, D), of the server and of the published B.
        gradient, public_gradient: (B, T, k), the same.
    """
    # The first row is an attention sink in many models: as good as constant, whatever B has learnt.
    first = 1 if output.shape[1] > 1 else 0
    likeness = _cosines(output[:, first:], public_output[:, first:]).mean()
    norms = public_gradient.double().norm(dim=2)
    alive = norms > _ALIVE * norms.amax(dim=1, keepdim=True)
    cosines = _cosines(gradient, public_gradient)
    whole = _cosines(gradient.flatten(1)[None], public_gradient.flatten(1)[None])[0][alive.any(dim=1)]
    ratios = [_ratio(got, due) for got, due in zip(gradient, public_gradient, strict=True)]
    return Watched(
        outputs=float(likeness),
        rows=float(cosines[alive].mean()) if bool(alive.any()) else 1.0,
        records=float(whole.mean()) if bool(alive.any()) else 1.0,
        ratio=max(ratios, key=lambda ratio: abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf),
    )


def allowed(outputs: float) -> float:
    """The least likeness of gradients that an honest B whose outputs have this likeness is expected to have."""
    return max(LEAST, 1 - ROUNDING - SLOPE * (1 - outputs))


def require_like(outputs: Tensor, public: Tensor) -> None:
    """Where B never learns its outputs are the published one's, up to rounding; every record is looked at.

    Args:
        outputs, public: (B, T, D).

    Raises:
        RemoteProtocolError: SS-4024.
    """
    likeness = _cosines(outputs, public).mean(dim=1)
    ratios = outputs.double().flatten(1).norm(dim=1) / public.double().flatten(1).norm(dim=1)
    # Written so that NaN is unlike.
    if not bool((likeness >= FROZEN).all() and (ratios >= FROZEN).all() and (ratios <= 1 / FROZEN).all()):
        raise _hijacked("answers")


class Guardian:
    """Watches one server for one client. It holds a copy of the published B, without adapters.

    Args:
        middle: the published B; its parameters are frozen here.
        every: n; each step is watched with probability 1/n, by coins that nobody else sees.
        learns: whether the server's B learns in this job; where it does not, outputs are watched in place of gradients.
        code: what rows are coded with before they cross, or None.

    Attributes:
        missing: what honest gradients would have had, added up; above ``LIMIT`` the run ends.
        allowed: the mean likeness that was asked for in the watched steps: near 1 the watch is sharp, at ``LEAST`` blunt.
        steps: how many steps were watched.
    """

    def __init__(self, middle: Middle, *, every: int, learns: bool = True, code: CutCode | None = None) -> None:
        if every < 1:
            raise ValueError("one step in n, n at least 1")
        self._middle = middle
        middle.requires_grad_(requires_grad=False)
        self._every = every
        self._learns = learns
        self._code = code
        self._asked: tuple[Tensor, float, Tensor] | None = None
        self._blunt = False
        self.missing = 0.0
        self.allowed = 1.0
        self.steps = 0

    def answered(self, private: Released, output: Tensor, *, learn: bool) -> None:
        """Take note of B's output: a learning step's is kept until its gradient is back, a frozen B's is looked at now.

        Raises:
            RemoteProtocolError: SS-4024 when B never learns and this is not the published B's output.
        """
        self._asked = (_values(private), private.gain, output.detach()) if learn else None
        if self._learns or not self._drawn():
            return
        with torch.no_grad():
            require_like(output.detach(), self._run(_values(private) * private.gain))
        self.steps += 1

    def taught(self, released: Released, received: Tensor) -> None:
        """Look at the gradient that came back for the step that was asked last, before anybody uses it.

        Raises:
            RemoteProtocolError: SS-4024 when too much is missing by now.
        """
        asked, self._asked = self._asked, None
        if asked is not None and self._drawn():
            self.judge(*asked, gradient=_values(released), received=received)

    def judge(self, rows: Tensor, gain: float, output: Tensor, *, gradient: Tensor, received: Tensor) -> Watched:
        """Compute a step with the published B and add up what is missing.

        Args:
            rows: (B, T, D) or, under a code, (B, T, k), as they were sent.
            gain: public factor for them.
            output: (B, T, D), the server's.
            gradient: (B, T, D) at B's output, as it was sent.
            received: of the shape of ``rows``, the server's answer to it.

        Raises:
            RemoteProtocolError: SS-4024.
        """
        leaf = rows.detach().clone().requires_grad_()
        with torch.enable_grad():
            public = self._run(leaf * gain)
            (due,) = torch.autograd.grad(public, leaf, gradient.to(public.dtype))
        seen = watched(output, received, public.detach(), due)
        self.count(seen)
        return seen

    def count(self, seen: Watched) -> None:
        """Add up what is missing in a step.

        Raises:
            RemoteProtocolError: SS-4024.
        """
        least = allowed(seen.outputs)
        self.allowed += (least - self.allowed) / (self.steps + 1)
        self.steps += 1
        missing = self.missing + least - seen.gradients
        # Written so that NaN ends the run; Python's own max(0, NaN) would be 0.
        if not (missing <= LIMIT and 1 / RANGE <= seen.ratio <= RANGE and math.isfinite(seen.outputs)):
            raise _hijacked("gradients")
        self.missing = max(0.0, missing)
        if least == LEAST and not self._blunt:
            self._blunt = True
            _log.warning("the server's part has moved so far that watching it shows only the coarsest hijack")

    def _drawn(self) -> bool:
        return secrets.randbelow(self._every) == 0

    def _run(self, rows: Tensor) -> Tensor:
        """The published B, behind the decoder and the sentinel's row where there is a code; (B, T, k) to (B, T, D)."""
        hidden = rows if self._code is None else self._code.decode(rows)
        first = None if self._code is None else self._code.row
        if first is None:
            plain: Tensor = self._middle(hidden)
            return plain
        longer: Tensor = self._middle(torch.cat([first.to(hidden).expand(len(hidden), 1, -1), hidden], 1))
        return longer[:, 1:]


def _values(released: Released) -> Tensor:
    """What left, as the server decoded it: float32."""
    return tensor_of(Blob(dtype=released.codec, shape=released.shape, data=released.payload)).float()


def _cosines(rows: Tensor, others: Tensor) -> Tensor:
    """(B, T) cosines of rows, in float64; 0 where either is zero."""
    a, b = rows.double(), others.double()
    scale = a.norm(dim=2) * b.norm(dim=2)
    return torch.where(scale > 0, (a * b).sum(2) / scale.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def _ratio(got: Tensor, due: Tensor) -> float:
    """Of one record's norms; 1 where both are zero."""
    length, expected = float(got.double().norm()), float(due.double().norm())
    if expected == 0:
        return 1.0 if length == 0 else math.inf
    return length / expected


def _hijacked(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(
        HIJACKED,
        f"the server's {what} are not those of the model that it serves",
        hint="Nothing of them was used. Ask who runs the server, and train with another; what it learnt is bounded by the noise alone.",
    )
