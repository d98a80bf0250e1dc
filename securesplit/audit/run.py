"""``securesplit privacy audit``: all tests of one policy on the production send path, and one verdict.

An audit gives lower bounds. Red means that the code breaks its claim, but for one run in a thousand; green means that
these tests did not find how, and is no proof. The error of 10^-3 is divided: two-point 5, distribution 2, completeness 1,
joint 1, one-run 1, in 10^-4. Beside it stands the chance that right noise is called *dear* (a bound under 0.6 of the
claim), which the number of trials keeps below about 10^-4 a direction.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from securesplit.audit.bench import Bench
from securesplit.audit.completeness import CompletenessVerdict, audit_completeness
from securesplit.audit.distribution import DistributionVerdict, audit_distribution
from securesplit.audit.joint import JointVerdict, audit_joint
from securesplit.audit.onerun import OneRunVerdict, audit_one_run
from securesplit.audit.tiny import TinySite, trainable
from securesplit.audit.twopoint import ChannelVerdict, audit_channels
from securesplit.errors import InputError
from securesplit.policy.schema import Policy
from securesplit.privacy.released import Codec

Profile = Literal["smoke", "standard"]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much a profile does.

    Attributes:
        trials: two-point trials in one world and direction, at most; as many as the claim needs are made.
        messages: of the distribution test, by channel.
        jobs: of the joint test, in each world.
        canaries: of the one-run test.
    """

    trials: int
    messages: int
    jobs: int
    canaries: int


EFFORTS: dict[Profile, Effort] = {
    "smoke": Effort(trials=4_000, messages=8, jobs=100, canaries=2_000),
    "standard": Effort(trials=20_000, messages=64, jobs=500, canaries=10_000),
}


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Everything that one audit found.

    Attributes:
        policy, digest: what was audited.
        codec: of the wire that was audited.
        profile: how hard.
        channels, distribution, completeness, joint, one_run: see each test's file.
        red: which of the five tests failed.
        seconds: wall time.
    """

    policy: str
    digest: str
    codec: Codec
    profile: Profile
    channels: tuple[ChannelVerdict, ...]
    distribution: tuple[DistributionVerdict, ...]
    completeness: CompletenessVerdict
    joint: JointVerdict
    one_run: OneRunVerdict
    seconds: float

    @property
    def red(self) -> tuple[str, ...]:
        """Names of what failed, channel by channel."""
        names = [f"{v.channel}: two-point" for v in self.channels if not v.ok]
        names += [f"{v.channel}: distribution" for v in self.distribution if not v.ok]
        parts = (("completeness", self.completeness.ok), ("joint", self.joint.ok), ("one-run", self.one_run.ok))
        return (*names, *(name for name, ok in parts if not ok))

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.red

    def as_json(self) -> dict[str, Any]:
        """The object that ``--output json`` prints."""
        return {
            "policy": self.policy, "digest": self.digest, "codec": self.codec, "profile": self.profile,
            "channels": [asdict(v) for v in self.channels],
            "distribution": {"ok": all(v.ok for v in self.distribution), "channels": [asdict(v) for v in self.distribution]},
            "completeness": asdict(self.completeness), "joint": asdict(self.joint), "one_run": asdict(self.one_run),
            "red": list(self.red), "ok": self.ok, "seconds": self.seconds,
        }  # fmt: skip


def run_audit(
    policy: Policy,
    *,
    profile: Profile = "standard",
    codec: Codec = "f32",
    progress: Callable[[str], None] = lambda _test: None,
) -> AuditReport:
    """Audit a policy on this machine, in a temporary folder; no ledger of the user's is touched.

    Args:
        policy: private.
        profile: ``smoke`` takes seconds, ``standard`` about a minute.
        codec: how rows cross; the job's. Under ``bf16`` and ``int8`` the lattice of the noise cannot be seen and is not
            looked at, because it is rounded away before anything leaves.
        progress: told which test begins.

    Raises:
        InputError: SS-1551 when the policy is UnsafeNoPrivacy and claims nothing.
    """
    if policy.unsafe:
        raise InputError(
            "SS-1551",
            f"policy '{policy.name}' claims nothing that an audit could refute",
            hint="Name a private policy.",
        )
    effort, begun = EFFORTS[profile], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="securesplit-audit-") as name:
        folders = (Path(name) / str(i) for i in count())

        def bench_of(audited: Policy) -> Bench:
            return Bench(audited, next(folders), codec=codec)

        progress("two-point")
        channels = audit_channels(policy, bench_of, most=effort.trials, error=5e-4)
        progress("distribution")
        bench = bench_of(policy)
        distribution = audit_distribution(policy, bench, messages=effort.messages, error=2e-4)
        progress("one-run")
        one_run = audit_one_run(policy, bench, canaries=effort.canaries, error=1e-4)
        bench.close()
        progress("joint")
        bench = bench_of(policy)
        joint = audit_joint(policy, bench, jobs=effort.jobs, error=1e-4)
        bench.close()
        progress("completeness")
        site = TinySite(trainable(policy), next(folders), codec=codec)
        completeness = audit_completeness(policy, site, error=1e-4)
        site.close()
    return AuditReport(
        policy=policy.name, digest=policy.digest, codec=codec, profile=profile, channels=channels, distribution=distribution,
        completeness=completeness, joint=joint, one_run=one_run, seconds=time.monotonic() - begun,
    )  # fmt: skip
