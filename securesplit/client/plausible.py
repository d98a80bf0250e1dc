"""Could this be honest work of B? When it could not, this client stays out of the round's sum.

In split learning the server computes what clients learn from: B's output, on which C learns, and the gradient at B's input,
on which A learns. A server that answers all clients but one with zeros leaves the others' updates at zero, and the secure
sum then *is* that one's update. No mask helps. So each client looks at what it was answered, by floors of its own policy.

Norms and directions of what was released and of what came back are compared, never the text's own values: under a private
policy the server could compute the verdict itself, so it tells nothing. Under UnsafeNoPrivacy, where nothing is protected,
and wherever a policy sets ``min_update``, a look at the update is added; it tells the server one bit a round about the text.

What this does not protect against: a server that stays within the floors. It cannot be told from a strange model, and makes
the others' updates predictable or small as far as docs/threat-model.md, section 6, measures. Noise is the answer to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from securesplit.errors import AggregationAborted, SecureSplitError
from securesplit.model.lora import Learned
from securesplit.policy.schema import Plausible
from securesplit.privacy.released import Released
from securesplit.protocol.messages import Blob, Failure
from securesplit.transport.tensors import tensor_of

if TYPE_CHECKING:
    from securesplit.client.client import Client

__all__ = ["ABSTAINED", "FLOORS", "LEAST_MOVE", "Look", "Witness", "fault_of", "look", "require_plausible", "still"]

ABSTAINED = "SS-6040"

FLOORS = Plausible(output=(1e-3, 2e4), gradient=(1e-3, 2e4), spread=1e-3, steadiness=50.0)
"""Measured on honest training of eleven families and SmolLM2-135M in all regimes (docs/threat-model.md, section 6): ratios
0.98 to 360, spread 0.029 and more, steadiness up to 10.4. A model of random biases alone came down to a spread of 1.2e-5."""

LEAST_MOVE = 0.05
"""Of a learning rate, root mean square; honest parts moved by 0.5 and more of it."""


@dataclass(frozen=True, slots=True)
class Look:
    """One answer of the server beside what was sent.

    Attributes:
        ratio: Frobenius norm of the answer over that of what was sent; not finite when the answer is not.
        spread: ``1 - |mean of the rows' directions|^2`` over the same of what was sent: 0 when all rows point one way. 1 where
            there are fewer than two rows to compare.
        blank: whether a row is zero where what was sent is not; judged of outputs only.
    """

    ratio: float
    spread: float
    blank: bool = False


def look(sent: Tensor, received: Tensor, *, gain: float = 1.0, alive: Tensor | None = None) -> Look | None:
    """Compare an answer with what was sent.

    Args:
        sent: (B, T, k), as it left.
        received: (B, T, D) or (B, T, k).
        gain: public factor that B multiplies what was sent by.
        alive: (B T,), rows to compare; all of them when absent.

    Returns:
        None where nothing was sent but zeros, or numbers that float32 loses on the way, to which every answer is honest.
    """
    before, after = _measure(sent, alive), _measure(received, alive)
    size = before.norm * gain
    if not size > _LOST:
        return None
    # Rows that were alike when they left may be alike when they come back.
    own, other = before.spread, after.spread
    spread = 1.0 if own is None or other is None or own < _ALIKE else other / own
    blank = bool(((after.rows == 0) & (before.rows > 0)).any())
    finite = bool(received.isfinite().all())
    return Look(ratio=after.norm / size if finite else math.nan, spread=spread, blank=blank)


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """A batch's norm, spread (None for fewer than two rows) and norms of its rows, (rows,), in float64."""

    norm: float
    spread: float | None
    rows: Tensor


def _measure(batch: Tensor, alive: Tensor | None) -> _Measured:
    """One sequence after the other, because a whole batch in float64 would be the largest thing in memory."""
    length, total, directions, norms = batch.shape[1], torch.zeros(batch.shape[2], dtype=torch.float64), 0, []
    for i, sequence in enumerate(batch):
        rows = sequence if alive is None else sequence[alive[i * length : (i + 1) * length]]
        wide = rows.double()
        norms.append(wide.norm(dim=1))
        kept = norms[-1] > 0
        total += (wide[kept] / norms[-1][kept, None]).sum(0)
        directions += int(kept.sum())
    each = torch.cat(norms) if norms else torch.zeros(0, dtype=torch.float64)
    spread = None if directions < 2 else float(1 - (total / directions).square().sum())
    return _Measured(float(each.norm()), spread, each)


_ALIKE = 1e-9  # Below it only rounding is left.
_LOST = 1e-20
_DEAD = 1e-4


class Witness:
    """Keeps how every answer of a round looked.

    Attributes:
        outputs: of B's outputs.
        gradients: of the gradients at B's input.
    """

    def __init__(self) -> None:
        self.outputs: list[Look] = []
        self.gradients: list[Look] = []
        self._gain = 1.0
        self._alive: Tensor | None = None

    def answered(self, private: Released, mixed: Tensor) -> None:
        """Take note of B's output for these rows."""
        sent = _sent(private)
        norms = sent.flatten(0, 1).norm(dim=1)
        # A padding token of zeros stays near zero up to the cut, where a norm blows its gradient up a million times.
        self._gain, self._alive = private.gain, norms > _DEAD * norms.max()
        if (seen := look(sent, mixed.detach(), gain=private.gain, alive=self._alive)) is not None:
            self.outputs.append(seen)

    def taught(self, released: Released, received: Tensor) -> None:
        """Take note of the gradient at B's input for this gradient at B's output."""
        if (seen := look(_sent(released), received, gain=self._gain, alive=self._alive)) is not None:
            # Rows behind the last scored token have no gradient in honest work either.
            self.gradients.append(Look(seen.ratio, seen.spread))

    def clear(self) -> None:
        """Begin a new round."""
        self.outputs.clear()
        self.gradients.clear()


def _sent(released: Released) -> Tensor:
    return tensor_of(Blob(dtype=released.codec, shape=released.shape, data=released.payload)).float()


def fault_of(outputs: Iterable[Look], gradients: Iterable[Look], floors: Plausible) -> str | None:
    """Which floor a round's answers break, in a word; None when each could be honest. One step is enough."""
    for looks, (least, most) in ((tuple(outputs), floors.output), (tuple(gradients), floors.gradient)):
        if not all(least <= seen.ratio <= most for seen in looks):  # NaN is in no range.
            return "size"
        if any(seen.blank for seen in looks) or not all(seen.spread >= floors.spread for seen in looks):
            return "spread"
        if looks:
            ratios = [seen.ratio for seen in looks]
            middle = median(ratios)
            if max(ratios) > floors.steadiness * middle or middle > floors.steadiness * min(ratios):
                return "steadiness"
    return None


def still(moved: npt.NDArray[np.float64], sizes: Iterable[int], least: float) -> bool:
    """Whether a part of an update is smaller than it should be, or not finite.

    Args:
        moved: (d,), A's part and then C's.
        sizes: numbers in each part.
        least: root mean square, model units.
    """
    start = 0
    for size in sizes:
        part = moved[start : start + size]
        if size and not float(np.sqrt(np.mean(np.square(part)))) >= least:
            return True
        start += size
    return False


def require_plausible(
    client: Client,
    factor: Learned,
    start: npt.NDArray[np.float32],
    before: Sequence[npt.NDArray[np.float32]],
    *,
    rate: float | None = None,
) -> None:
    """Stay out of a round's sum when what was learnt in it cannot come from honest answers.

    A and C then stand where they stood before the round, the server is told the code and nothing else, and the run is over:
    this client has no sum to go on with. The others' sum has one update less, or, below their quorum, does not come about.

    Args:
        client: after its local work.
        factor: what the sum would carry.
        start: its values before the round, (d,).
        before: values of all adapters before the round, as :meth:`Client.snapshot` gives them.
        rate: the highest learning rate that the round's steps had, the job's when absent; where it is 0, because the
            schedule has ended or this client has stopped, standing still is no fault of the server's.

    Raises:
        AggregationAborted: SS-6040.
    """
    rules, witness = client.policy.aggregation, client.remote.witness
    fault = fault_of(witness.outputs, witness.gradients, rules.plausible or FLOORS)
    if fault is None and _still(client, factor, start, client.job.optimiser.client_lr if rate is None else rate):
        fault = "update"
    witness.clear()
    if fault is None:
        return
    client.install(tuple(before))
    with suppress(SecureSplitError):  # A courtesy; a server that is gone needs no word.
        client.link.tell(Failure(code=ABSTAINED))
    raise AggregationAborted(
        ABSTAINED,
        f"abstained from the round's sum: the server's answers broke this client's floor on their {_WORDS[fault]}",
        hint="Ask who runs the server; policies/README.md, [aggregation.plausible], has the floors.",
    )


_WORDS = {"size": "size", "spread": "variety", "steadiness": "steadiness", "update": "effect on an update"}


def _still(client: Client, factor: Learned, start: npt.NDArray[np.float32], rate: float) -> bool:
    if rate == 0:
        return False
    least = client.policy.aggregation.min_update
    if least is None:
        # One step from a factor of zeros moves nothing: share-a learns A so.
        if not client.policy.unsafe or len(client.remote.witness.gradients) < 2:
            return False
        least = LEAST_MOVE * rate
    if client.regime == "round":  # Nothing moves before the sum there, and what enters it is noised.
        return False
    sizes = [layout.size for layout in client.layouts(factor)]
    return still(client.read(factor).astype(np.float64) - start, sizes, least)
