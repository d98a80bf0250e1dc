"""What a job names, found and loaded before a server listens: the model's middle part, and the public code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from securesplit.admit import require_proof
from securesplit.model.code import CutCode, read_code
from securesplit.model.device import device_named
from securesplit.model.manifest import read_manifest
from securesplit.model.parts import Middle
from securesplit.model.plan import CutPlan
from securesplit.model.resolve import resolve_model
from securesplit.model.store import load_middle
from securesplit.policy.leakage import Proof
from securesplit.policy.schema import Policy
from securesplit.protocol.job import Job

__all__ = ["Named", "load_named"]


@dataclass(frozen=True, slots=True)
class Named:
    """What the job names, from disk.

    Attributes:
        directory, digest: the model's, and its manifest's.
        middle: B.
        code: the public code, where the job has one.
    """

    directory: Path
    digest: str
    middle: Middle
    code: CutCode | None


def load_named(
    job: Job,
    policy: Policy,
    model: str | Path | None,
    cache: Path | None,
    code: Path | None,
    proofs: Sequence[Proof],
    progress: Callable[[str, float], None],
    device: str = "cpu",
) -> Named:
    """Find the model, make it where it has to be made, and load B once the policy is satisfied with what is proven of it.

    Args:
        job, policy: what is served, and the server's own rules.
        model: a model directory that replaces the job's name for it.
        cache: where pulled models lie; by default under the home directory.
        code: file of the public code that the job names.
        proofs: reports of the attack suite.
        progress: told of each phase when the model has to be made first.
        device: where B computes.

    Raises:
        PolicyDenied: SS-2027. LeakageExceeded: SS-7002. InputError, ConnectionFailed: when files cannot be had or used.
    """
    placed = device_named(device)
    known = None if code is None else read_code(code)
    plan = CutPlan(front=job.cut.front, back=job.cut.back)
    directory = resolve_model(
        str(model or job.model), cache or Path.home() / ".cache" / "securesplit" / "models", plan, progress=progress
    )
    digest = read_manifest(directory).digest
    require_proof(policy, job, model=digest, proofs=proofs)
    return Named(directory, digest, load_middle(directory).to(placed), known)
