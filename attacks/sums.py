"""The secure sums of a recording, as the server opened them (O5), and what everybody may know of how they came about.

The files are those of ``serve --record`` (securesplit/server/recording.py). They are read through Python's own ``open``, so
that attacks/guard.py sees it, and checked as a whole before anything of them is used.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load

from attacks.view import OpenedSum, PublicFacts
from securesplit.errors import InputError
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.plan import plan_for, rows_moved
from securesplit.protocol.job import Job

__all__ = ["BEHIND", "RecordedSum", "Sent", "read_sums", "sigma_of"]

FORMAT = "securesplit.sum.v1"
BEHIND = frozenset({"sketch", "unnamed"})
"""Names of what is no tensor of an adapter: a sketch of products under ``naive``, and vectors of another layout."""

Sent = Literal["steps", "gradients"]
"""What a client puts in: how far AdamW moved its adapters, or in regime ``round`` a sum of clipped gradients."""


@dataclass(frozen=True, slots=True)
class RecordedSum(OpenedSum):
    """An opened sum with the public facts of its making.

    Attributes:
        sent: what clients put in.
        grid: distance of two neighbouring values of a coordinate of the mean.
        job: learning rate, schedule, and the start of the adapters.
    """

    sent: Sent
    grid: float
    job: Job


class _About(BaseModel):
    """The metadata of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
    format: Literal["securesplit.sum.v1"]
    round: Annotated[int, Field(ge=0, lt=1 << 53)]
    peers: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=512)], ...], Field(min_length=1)]
    weight: Annotated[int, Field(ge=1, lt=1 << 53)]
    scale: Annotated[int, Field(ge=1, lt=1 << 53)]
    clip: Annotated[float, Field(gt=0, lt=1e12)]
    names: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=512)], ...], Field(min_length=1)]


def read_sums(directory: Path, facts: PublicFacts) -> tuple[OpenedSum, ...]:
    """All sums of a recording, in the order in which the server opened them; none where every sum was blind.

    Args:
        directory: the recording.
        facts: its public facts.

    Returns:
        :class:`RecordedSum` each.

    Raises:
        InputError: SS-1720 when a file is torn, is not what ``serve --record`` writes, or does not fit the facts; nothing
            of the others is returned then.
    """
    paths = sorted(directory.glob("sum-*.safetensors"), key=lambda path: (len(path.name), path.name))
    return tuple(_read(path, facts) for path in paths)


def sigma_of(policy: Policy, job: Job, clients: int) -> float:
    """Standard deviation of the noise in one coordinate of the mean, as policy and job state it to everybody.

    Every one of n clients adds its part of the policy's noise, and the mean of n parts has a part's deviation over
    ``sqrt(n)``. Where updates are weighted by numbers of records the server knows their total alone, so that this is the
    least that there can be. In regime ``step`` noise enters gradients and passes AdamW, which moves a coordinate that
    noise drives by about the learning rate: that is given, and only its order of magnitude is right.

    Returns:
        In the units of the sum; 0 where there is no noise.
    """
    privacy = policy.privacy
    if not isinstance(privacy, Gaussian):
        return 0.0
    channel = plan_for(privacy, rows=rows_moved(job.cut.front, policy.limits.buckets)).update
    if channel is None:
        return 0.0
    part = job.optimiser.client_lr if privacy.regime == "step" else channel.part
    return part / math.sqrt(clients)


def _read(path: Path, facts: PublicFacts) -> RecordedSum:
    about, tensors = _parse(path)
    if facts.job is None:
        raise _foreign(path, "the recording names no job that it could belong to")
    if set(tensors) != set(about.names) or len(set(about.names)) < len(about.names):
        raise _foreign(path, "its tensors are not those that it names")
    if not set(about.peers) <= set(facts.job.sums.roster):
        raise _foreign(path, "it sums over clients outside the job's roster")
    grid = about.clip / (about.scale * about.weight)
    regime = facts.policy.privacy.regime if isinstance(facts.policy.privacy, Gaussian) else "open"
    return RecordedSum(
        round=about.round, peers=about.peers, weight=about.weight, names=about.names,
        tensors=tuple((tensors[name] * grid).astype(np.float32) for name in about.names),
        sigma=sigma_of(facts.policy, facts.job, len(about.peers)), sent="gradients" if regime == "round" else "steps",
        grid=grid, job=facts.job,
    )  # fmt: skip


def _parse(path: Path) -> tuple[_About, dict[str, npt.NDArray[Any]]]:
    """Metadata and tensors of one file; both are whole, or nothing is returned."""
    try:
        data = path.read_bytes()
        tensors: dict[str, npt.NDArray[Any]] = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        said = {key: json.loads(value) for key, value in header["__metadata__"].items()}
        about = _About.model_validate_json(json.dumps(said))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, ValidationError):
        raise _foreign(path, "it is torn, or no such file") from None
    for name, tensor in tensors.items():
        adapter = name not in BEHIND
        if tensor.dtype not in (np.int32, np.int64) or tensor.ndim != (2 if adapter else 1) or not tensor.size:
            raise _foreign(path, "a tensor has another type or shape than a sum of adapters has")
    return about, tensors


def _foreign(path: Path, why: str) -> InputError:
    return InputError(
        "SS-1720", f"{path.name} is not a sum that `serve --record` wrote: {why}",
        hint="Name a whole recording, made with this release; delete a file that was damaged.",
    )  # fmt: skip
