"""What the ledger must hold at least: who had to pay, on which channel, how often and how much.

Computed from what the client's gate was asked for and handed over, and from the policy's text; not from the gate's plan nor
from its charges. A distinct block of bytes is a release, because noise is never the same twice; a block that left again is
free. Too high a charge is dear and breaks no claim, so only what is missing counts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from securesplit.audit.bench import claims_of
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.clipped_sum import ClippedSum
from securesplit.privacy.gate import Gate
from securesplit.privacy.ledger import ALL, Ledger
from securesplit.privacy.plan import UNITS, enforced_mu
from securesplit.privacy.purse import PEERS
from securesplit.privacy.released import Released, ReleasedUpdate, Responded

_ROUNDING = 1e-6  # Of a charge: shares are rounded down to whole units, and mu is a float.


@dataclass(slots=True)
class Watch:
    """What one client's gate was asked for and handed over.

    Attributes:
        rows: channel and release, in order.
        updates: released sums and differences, in order.
        paid_by: the payer that the caller had to have charged, the channel, and what tells this release from another.
        shared: whether an update left without noise, so that peers hold a C that learnt from these records.
    """

    rows: list[tuple[str, Released]] = field(default_factory=list)
    updates: list[ReleasedUpdate] = field(default_factory=list)
    paid_by: set[tuple[str, str, str]] = field(default_factory=set)
    shared: bool = False

    def observe(self, gate: Gate) -> None:
        """Keep what this gate hands over, beside handing it over."""
        release, release_update, respond = gate.release, gate.release_update, gate.respond

        def released(*args: object, **named: object) -> Released:
            out = release(*args, **named)  # type: ignore[arg-type]
            self._rows(str(named["at"]), named.get("records"), out, answered=named.get("responded") is not None)
            return out

        def updated(update: object) -> ReleasedUpdate:
            # Before the gate has seen it, which may not change who is in the sum.
            payers = tuple(update.records) if isinstance(update, ClippedSum) else None
            out = release_update(update)  # type: ignore[arg-type]
            self._update(payers, out, gate.policy)
            return out

        def responded(*args: object, **named: object) -> Responded:
            out = respond(*args, **named)  # type: ignore[arg-type]
            contents: Sequence[str] = named["contents"]  # type: ignore[assignment]
            self.paid_by.update((r, "labels", c) for r, c in zip(out.records, contents, strict=True))
            return out

        gate.release, gate.release_update, gate.respond = released, updated, responded  # type: ignore[method-assign]

    def _rows(self, at: str, records: object, released: Released, *, answered: bool) -> None:
        self.rows.append((at, released))
        if at == "gradient" and answered:
            return  # A function of the answers, which were paid for as labels.
        named = records if isinstance(records, (list, tuple)) and at != "decode" else [ALL] * released.shape[0]
        size = len(released.payload) // max(1, released.shape[0])
        for i, payer in enumerate(named):
            block = released.payload[i * size : (i + 1) * size]
            self.paid_by.add((payer, at, hashlib.sha256(block).hexdigest()))

    def _update(self, payers: tuple[str, ...] | None, released: ReleasedUpdate, policy: Policy) -> None:
        self.updates.append(released)
        privacy = policy.privacy
        assert isinstance(privacy, Gaussian)
        if payers is None and privacy.regime == "frozen":
            payers, self.shared = ((ALL,), False) if privacy.updates is not None else ((), True)
        number = str(len(self.updates))
        self.paid_by.update((payer, "update", number) for payer in payers or ())


def undercharged(policy: Policy, ledger: Ledger, watch: Watch, *, clients: int, trained: Iterable[str]) -> int:
    """For how many payers and channels the ledger holds too few entries or too little.

    Args:
        policy: whose text says what a release costs.
        ledger: after the run.
        watch: of the run.
        clients: in the roster.
        trained: the keys of all records that a whole training took in; none when training was stopped.
    """
    privacy = policy.privacy
    assert isinstance(privacy, Gaussian)
    prices: dict[str, float] = {claim.at: claim.mu**2 * UNITS for claim in claims_of(policy)}
    if privacy.labels is not None:
        prices["labels"] = enforced_mu(privacy.epsilon, privacy.delta) ** 2 * privacy.labels.share * UNITS
    counts = Counter((payer, at) for payer, at, _ in watch.paid_by)
    for record in trained:  # Whoever the client named: these records did train.
        for at in _must_pay(privacy):
            counts[record, at] = max(counts[record, at], 1)
    wanted = {(payer, at): (n, n * prices[at]) for (payer, at), n in counts.items()}
    if watch.shared and privacy.generation is not None:
        parts = (clients - 1) * (privacy.generation.releases // clients)
        if parts:
            wanted[ALL, PEERS] = (1, parts * prices["decode"])
    entries: Counter[tuple[str, str]] = Counter()
    units: Counter[tuple[str, str]] = Counter()
    for entry in ledger.entries():
        entries[entry.record, entry.channel] += 1
        units[entry.record, entry.channel] += entry.units
    short = sum(
        entries[who] < n or units[who] < cost * (1 - _ROUNDING) - n for who, (n, cost) in wanted.items()
    )  # fmt: skip
    totals: Counter[str] = Counter()
    for (payer, _), paid in units.items():
        totals[payer] += paid
    return short + sum(
        ledger.spent_units(payer) < totals[payer] + (0 if payer == ALL else totals[ALL]) for payer, _ in wanted
    )


def _must_pay(privacy: Gaussian) -> tuple[str, ...]:
    if privacy.regime == "frozen":
        return ("cut",)
    return ("cut", "update", "labels" if privacy.labels is not None else "gradient")
