"""What a release costs under one policy, and the paying for it, from one site's ledger.

The gate decides what leaves and how it is noised; a purse decides at whose expense, how often, and under which name the
bytes are kept so that they can be sent again free of charge. Noise and tensors never come here, payloads pass through.

What a purse cannot see: the ledgers of other sites. So what their clients may spend on this site's records is paid here in
advance (:meth:`Purse.reserve_for_peers`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.lattice import step_for
from securesplit.privacy.ledger import ALL, Charge, Ledger
from securesplit.privacy.plan import At, ChannelPlan, LabelPlan, Plan

__all__ = ["BARE", "PEERS", "Purse"]

PEERS = "peers"
BARE = "bare"
_UNLIMITED = 1 << 62


class Purse:
    """One site's ledger, under one private policy.

    Args:
        ledger: the site's.
        policy: the client's own; its digest stands beside every charge.
        plan: of that policy.
        roster: all clients that will hold the same trained C, sorted.
    """

    def __init__(self, ledger: Ledger, policy: Policy, plan: Plan, roster: tuple[str, ...]) -> None:
        assert isinstance(policy.privacy, Gaussian)
        self.ledger = ledger
        self.unit: str = policy.privacy.unit
        self._digest = policy.digest
        self._plan = plan
        self._roster = roster

    def priced(self, record: str, at: At, channel: ChannelPlan, *, version: str = "", payload: bytes = b"") -> Charge:
        """One release at one record's expense, not yet paid; see :class:`securesplit.privacy.ledger.Charge`."""
        return self._priced(record, at, channel, units=channel.units, version=version, payload=payload)

    def pay(self, charges: Sequence[Charge], at: At, channel: ChannelPlan) -> tuple[bytes, ...]:
        """Charge them, all or none. Per charge the bytes that may leave. Raises as :meth:`Ledger.charge`."""
        return self.ledger.charge(charges, budget=self._plan.budget, caps=[self._cap(at, channel)] * len(charges))

    def recall(self, record: str, at: At, version: str) -> bytes | None:
        """What was paid for before under this name, or None. Raises as :meth:`Ledger.recall`."""
        return self.ledger.recall(record, at, version)

    def require(self, count: int, at: At, channel: ChannelPlan) -> None:
        """Check, without charging, that ``count`` releases at the expense of all records can be paid.

        Raises:
            BudgetExhausted: SS-5001, SS-5002.
        """
        charge = self.priced(ALL, at, channel)
        self.ledger.require(charge, count=count, budget=self._plan.budget, cap=self._cap(at, channel))

    def pay_answers(
        self, answers: Sequence[int], labels: LabelPlan, *, records: Sequence[str], contents: Sequence[str]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Charge the answers of randomised response, once per record; what was answered before is answered again.

        Returns:
            Per record the answer that counts, and the units of those that are new.
        """
        charges = [
            Charge(
                record=record, channel="labels", units=labels.units, clip=1.0, sigma=labels.epsilon, step=1.0,
                version=f"v2:{self.unit}:{labels.epsilon!r}:{labels.classes}:{content}", policy=self._digest, unit=self.unit,
                payload=answer.to_bytes(4, "little"),
            )
            for answer, record, content in zip(answers, records, contents, strict=True)
        ]  # fmt: skip
        fresh = tuple(c.units for c in charges if self.ledger.recall(c.record, c.channel, c.version) is None)
        stored = self.ledger.charge(charges, budget=self._plan.budget, caps=[_UNLIMITED] * len(charges))
        return tuple(int.from_bytes(answer, "little") for answer in stored), fresh

    def name(self, once: str, about: str, content: bytes) -> str:
        """A name for one release of one run, under the site's key: the ledger must not tell what was in it."""
        return "once:" + self.ledger.key(f"securesplit.once.v1|{once}|{about}|".encode() + content)

    def reserve_for_peers(self) -> None:
        """Charge, once per roster, what the other clients may generate with a C that learnt from this site's records.

        Where updates are noised, peers hold a function of what was charged for already, and nothing is reserved.

        Raises:
            BudgetExhausted: SS-5001.
        """
        channel = self._plan.decode
        if channel is None or self._plan.update is not None or len(self._roster) < 2:
            return
        if (count := (len(self._roster) - 1) * (channel.releases // len(self._roster))) == 0:
            return
        version = f"{self._digest}:{json.dumps(self._roster)}"
        whole = self._priced(ALL, PEERS, channel, units=count * channel.units, version=version)
        self.ledger.charge([whole], budget=self._plan.budget, caps=[_UNLIMITED])

    def note_bare_update(self) -> None:
        """Leave an entry of the smallest cost, once per policy: from here on no epsilon holds against the other clients."""
        marker = Charge(
            record=ALL, channel=BARE, units=1, clip=1.0, sigma=1.0, version=self._digest, policy=self._digest, unit=self.unit
        )  # fmt: skip
        self.ledger.charge([marker], budget=_UNLIMITED, caps=[_UNLIMITED])

    def _cap(self, at: At, channel: ChannelPlan) -> int:
        """Releases of one record on a channel; of ``decode`` this site has the part of the largest roster it trained in.

        The server chooses the roster of a job; a smaller one later must not enlarge the part that peers reserved for.
        """
        if at != "decode":
            return channel.releases
        rosters = (len(json.loads(version.partition(":")[2])) for version in self.ledger.versions(ALL, PEERS))
        return channel.releases // max(1, len(self._roster), *rosters)

    def _priced(
        self, record: str, at: str, channel: ChannelPlan, *, units: int, version: str, payload: bytes = b""
    ) -> Charge:
        return Charge(
            record=record, channel=at, units=units, clip=channel.clip, sigma=channel.sigma, step=step_for(channel.part),
            version=version, payload=payload, policy=self._digest, unit=self.unit,
        )  # fmt: skip
