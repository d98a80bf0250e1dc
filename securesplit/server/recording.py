"""What the server saw of each secure sum that it opened, as files of a recording beside the messages that it received.

A file ``sum-NNNN.safetensors`` holds one sum, NNNN counting them in the order in which they were opened: for each tensor of
the adapters the sum as the server has it, integers in steps of the ring, and as metadata what makes a mean of them, each
value as JSON: ``round``, ``peers``, ``weight``, ``scale``, ``clip``, and ``names`` in the order of the summed vector. The mean
update of a tensor is ``steps * clip / (scale * weight)``.
A blind sum stays closed to the server and leaves no file.

What this does not protect: whoever has a recording has the sums, as whoever has the server has them.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save
from torch import device

from securesplit.aggregate.fixedpoint import Words
from securesplit.aggregate.server import ServerRound
from securesplit.errors import SecureSplitError
from securesplit.learning import tune
from securesplit.model.architectures import architecture_of
from securesplit.model.lora import AdapterTensor, Layout, Learned, adapter_layout
from securesplit.model.manifest import read_manifest
from securesplit.model.plan import CutPlan
from securesplit.model.sketch import sketch_size
from securesplit.model.store import load_config
from securesplit.pki.files import write_atomically
from securesplit.protocol.adapters import Shared
from securesplit.protocol.job import Job

__all__ = ["SKETCH", "UNNAMED", "SumRecords", "layouts_of", "summed"]

_log = logging.getLogger(__name__)

FORMAT = "securesplit.sum.v1"
SKETCH = "sketch"
"""What stands behind the adapters under ``naive``; securesplit/model/sketch.py says what it is."""
UNNAMED = "unnamed"
"""The whole vector of clients that sum something else than this job's adapters."""


def summed(sharing: Shared, number: int) -> Learned:
    """Which factor a round's sum carries; tests hold it to what the clients do (securesplit/client/sharing.py)."""
    match sharing:
        case "frozen-a":
            return "B"
        case "share-a":
            return "A"
        case "core":
            return "core"
        case "naive":
            return "both"
        case "prefix":
            return "prefix"
    return "B" if number % 2 == 0 else "A"


def layouts_of(directory: Path, job: Job, factor: Learned) -> tuple[Layout, ...]:
    """What clients may sum: the adapters of A and C together, or of C alone, as in regime ``frozen``.

    Built from the public configuration, without a single weight.

    Args:
        directory: the model directory.
        job: names cut and adapters.
        factor: what of each adapter.

    Raises:
        InputError: SS-14xx when the configuration cannot be read or the job does not fit it.
    """
    config = load_config(directory)
    spans = CutPlan(front=job.cut.front, back=job.cut.back).spans(read_manifest(directory).layers)

    def held(part: Literal["front", "back"]) -> tuple[AdapterTensor, ...]:
        with device("meta"):
            model = architecture_of(config).causal_class()(config)
        tune(model, job.adapters, part)
        return tuple(tensor for tensor in adapter_layout(model, factor).tensors if tensor.layer in spans.of(part))

    front, back = held("front"), held("back")
    return Layout((*front, *back)), Layout(back)


@dataclass(slots=True)
class SumRecords:
    """Writes a file for every sum that was opened.

    Attributes:
        record: the recording's directory, which exists.
        directory: the model directory, for names and shapes.
        job: what is served.
    """

    record: Path
    directory: Path
    job: Job
    _numbers: count[int] = field(default_factory=count)
    _known: dict[Learned, tuple[Layout, ...]] = field(default_factory=dict)

    def __call__(self, ended: ServerRound) -> None:
        """Keep one. A full disk, or anything else that is wrong here, costs the file and not the round."""
        opened = ended.result.aggregate if ended.result is not None else None
        if opened is None:
            return
        config, name = ended.config, f"sum-{next(self._numbers):04d}.safetensors"
        about = {
            "format": FORMAT, "round": config.round, "peers": opened.survivors, "weight": opened.total_weight,
            "scale": opened.scale, "clip": opened.clip,
        }  # fmt: skip
        try:
            tensors = self._named(opened.ring_sum, config.round)
            said = {key: json.dumps(value) for key, value in (*about.items(), ("names", list(tensors)))}
            write_atomically(self.record / name, save(tensors, said), mode=0o600)
        except (SecureSplitError, MemoryError) as error:
            _log.warning("an opened sum could not be recorded: %s", error)

    def _named(self, ring_sum: Words, number: int) -> dict[str, npt.NDArray[np.int32 | np.int64]]:
        """The sum cut into the adapters' tensors, without the sum of weights behind it."""
        signed = ring_sum[:-1].view(ring_sum.dtype.str.replace("u", "i"))
        factor = summed(self.job.adapters.shared, number)
        if factor not in self._known:
            self._known[factor] = layouts_of(self.directory, self.job, factor)
        behind = sketch_size if self.job.adapters.sharing == "naive" else lambda _layout: 0
        layout = next((at for at in self._known[factor] if at.size + behind(at) == signed.size), Layout(()))
        found: dict[str, npt.NDArray[np.int32 | np.int64]] = {}
        start = 0
        for tensor in layout.tensors:
            rows, columns = tensor.shape
            found[tensor.name] = np.ascontiguousarray(signed[start : start + rows * columns].reshape(rows, columns))
            start += rows * columns
        if start < signed.size:
            found[SKETCH if layout.tensors else UNNAMED] = np.ascontiguousarray(signed[start:])
        return found
