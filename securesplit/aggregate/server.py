"""The server's side of one SSA-1 round, without sockets and clock.

Stage by stage it collects one message of every client that is still there, then tells all of them the outcome. A client
that does not answer in time is left behind, and the round goes on as long as enough remain; with fewer than
``max(threshold, min_clients)`` masked vectors, or fewer than ``threshold`` signatures or answers, it is aborted, and
nothing of a sum is kept. A fault in one client's message raises and leaves the round as it was.

The server is not trusted with anything here: secrecy rests on the clients' own checks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import cast

from securesplit.aggregate import wire
from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.encryption import SumWorker
from securesplit.aggregate.fixedpoint import Aggregate, Words, open_ring, vector_digest
from securesplit.aggregate.keys import bind, statement
from securesplit.aggregate.record import RoundRecord, record_round
from securesplit.aggregate.recover import Opening, Pairs, unmask
from securesplit.aggregate.roster import Peers, Verify, check_signature, peers_of, read_advert
from securesplit.aggregate.shamir import Share, is_field_element
from securesplit.aggregate.tally import Tally
from securesplit.aggregate.wire import Delivery, Vector, read
from securesplit.errors import AggregationAborted, RemoteProtocolError

__all__ = ["ServerResult", "ServerRound"]


@dataclass(frozen=True, slots=True, eq=False)
class ServerResult:
    """What the server ends with.

    Attributes:
        survivors: names whose updates are in the sum, sorted.
        ring_sum: (d + 1,) words; in blind rounds still under the survivors' blinds, uniform to the server; with homomorphic
            encryption the frame of the sum.
        aggregate: the opened sum, or None in blind rounds.
    """

    survivors: tuple[str, ...]
    ring_sum: Vector
    aggregate: Aggregate | None


class ServerRound:
    """One round at the server.

    Args:
        config: the round.
        verify: checks a client's certificate and signature on every message, so that a fault is attributable beyond the
            connection it came by; None relies on the mutually authenticated connection for ``name``. Signatures of stage 3
            are not checked in blind rounds: what they are over is known to clients alone.
        worker: adds ciphertexts, in rounds with homomorphic encryption.

    Attributes:
        stage: the stage whose messages are awaited.
        finished: whether the round is over, with ``result`` or with the code ``aborted``.
    """

    def __init__(self, config: RoundConfig, verify: Verify | None = None, *, worker: SumWorker | None = None) -> None:
        self.config, self.stage, self.finished = config, wire.ADVERTISE, False
        self.result: ServerResult | None = None
        self.aborted: str | None = None
        self._verify, self._tally = verify, Tally(config, worker)
        self._expected: tuple[str, ...] = config.roster
        self._gone: set[str] = set()
        self._seen: dict[tuple[str, int], bytes] = {}
        self._answers: dict[str, wire.Body] = {}
        self._adverts: dict[str, bytes] = {}
        self._peers = Peers((), b"")
        self._members: tuple[str, ...] = ()
        self._survivors: tuple[str, ...] = ()
        self._t2 = self._t3 = b""
        self._holders: frozenset[tuple[str, str]] = frozenset()
        self._masked: dict[str, wire.Masked] = {}
        self._signatures: tuple[tuple[str, bytes], ...] = ()
        self._last: dict[str, Delivery] = {}

    @property
    def waiting_for(self) -> tuple[str, ...]:
        """Names of the clients whose message of this stage is awaited."""
        return (
            () if self.finished else tuple(n for n in self._expected if n not in self._gone and n not in self._answers)
        )

    def receive(self, name: str, stage: int, body: bytes, vector: Vector | None = None) -> list[Delivery]:
        """Take one message of a client.

        Args:
            name: the sender, from its authenticated connection.
            stage, body: the message.
            vector: with stage 2, (d + 1,) words or the frame of encrypted ones; else None or empty.

        Returns:
            What to send now, and to whom. A byte-identical repetition, as after a lost connection, gives once more what
            followed it, if anything did; a client that was left behind gets an abort with SS-6013.

        Raises:
            RemoteProtocolError: the message is refused and the round stands as before; close that connection and call
                :meth:`leave`. SS-6002 to SS-6014 say why.
        """
        if name not in self.config.roster:
            raise RemoteProtocolError("SS-6003", "a message comes from a client outside the roster")
        if stage == wire.ABORT:
            read(wire.Abort, body, self.config)
            return self.leave(name)
        digest = hashlib.sha256(body).digest()
        if self._seen.get((name, stage)) == digest:
            last = self._last.get(name)
            return [last] if last is not None and last.stage in {stage, wire.ABORT} else []
        if self.finished or name in self._gone or name not in self._expected:
            return [self._abort_for(name, self.aborted or "SS-6013")]
        if stage != self.stage or name in self._answers:
            raise RemoteProtocolError(
                "SS-6005", f"a message of stage {stage} came from {name} while stage {self.stage} is open"
            )
        if stage != wire.MASKED and vector is not None and vector.size:
            raise RemoteProtocolError("SS-6014", f"a vector came with stage {stage}, which has none")
        self._take(name, body, vector)
        self._seen[name, stage] = digest
        return [] if self.waiting_for else self._advance()

    def leave(self, name: str) -> list[Delivery]:
        """Note that a client's connection is gone, so that nobody waits for it; what it sent already still counts.

        It cannot return to this round: a client that masked a vector and left is in the sum, but gets no result.
        """
        if self.finished or name in self._gone or name not in self._expected:
            return []
        self._gone.add(name)
        return [] if self.waiting_for else self._advance()

    def timeout(self) -> list[Delivery]:
        """End the stage without those who have not answered: they get an abort, and the round goes on or is aborted."""
        if self.finished:
            return []
        late = self.waiting_for
        self._gone.update(late)
        return [*(self._abort_for(name, "SS-6013") for name in late), *self._advance()]

    def abort(self, code: str) -> list[Delivery]:
        """Give the round up: all that was collected is dropped and every client that is still there is told the code."""
        there = self._there()
        self.finished, self.aborted = True, code
        self._answers.clear()
        self._last.clear()
        self._tally.drop()
        return [self._abort_for(name, code) for name in there]

    def record(self, made: int, *, maker: str) -> RoundRecord:
        """What may be shown of the round to whoever wants to verify it; not sealed, and in blind rounds without the sum.

        Args:
            made: the time, seconds since 1970.
            maker: this server's certificate name.
        """
        opened = self.result.aggregate if self.result is not None else None
        return record_round(
            self.config, self._peers, role="server", maker=maker, made=made, members=self._members,
            survivors=self._survivors, signatures=self._signatures,
            sum_digest=b"" if opened is None else vector_digest(opened.ring_sum), aborted=self.aborted,
        )  # fmt: skip

    def _take(self, name: str, body: bytes, vector: Vector | None) -> None:
        match self.stage:
            case wire.ADVERTISE:
                self._take_advert(name, body)
            case wire.SHARES:
                self._take_boxes(name, read(wire.Shares, body, self.config))
            case wire.MASKED:
                self._take_vector(name, read(wire.Masked, body, self.config), vector)
            case wire.CONSISTENT:
                signed = read(wire.Consistent, body, self.config)
                self._accept(name, signed, "consistent", self._t3, signed.signature)
            case _:
                self._take_shares(name, read(wire.Unmask, body, self.config))

    def _accept(self, name: str, body: wire.Body, label: str, transcript: bytes, signature: bytes) -> None:
        self._check(name, body, label, transcript, signature)
        self._answers[name] = body

    def _check(self, name: str, body: wire.Body, label: str, transcript: bytes, signature: bytes) -> None:
        if self._verify is not None and not (label == "consistent" and self.config.blind):
            said = statement(label, transcript, wire.unsigned(body))
            check_signature(self._verify, self._peers.of(name), said, signature)

    def _take_advert(self, name: str, body: bytes) -> None:
        advert = read_advert(self.config, body)
        if advert.name != name:
            raise RemoteProtocolError("SS-6003", f"{name} advertised under another name")
        taken = {
            key for a in self._answers.values() if isinstance(a, wire.Advertise) for key in (a.mask_key, a.share_key)
        }
        if advert.mask_key == advert.share_key or taken & {advert.mask_key, advert.share_key}:
            raise RemoteProtocolError("SS-6003", f"{name} advertised a key that is in use already")
        if self._verify is not None:
            said = statement("advertise", self.config.digest, wire.unsigned(advert))
            check_signature(self._verify, advert, said, advert.signature)
        self._answers[name] = advert
        self._adverts[name] = body

    def _take_boxes(self, name: str, shares: wire.Shares) -> None:
        c, others = self.config, [n for n in self._peers.names if n != name]
        receivers = [to for to, _ in shares.sealed]
        holders = [to for to, box in shares.sealed if len(box) >= wire.SHARED_BOX]
        wanted = min(c.degree, len(others)) if c.degree else len(others)
        everyone = not c.degree or c.blind
        if receivers != (others if everyone else sorted(set(receivers) & set(others))) or len(holders) != wanted:
            raise RemoteProtocolError("SS-6008", f"the boxes of {name} are not for the clients that they should be for")
        self._accept(name, shares, "shares", self._peers.t1, shares.signature)

    def _take_vector(self, name: str, masked: wire.Masked, vector: Vector | None) -> None:
        vector = self._tally.check(name, vector)
        if vector_digest(vector) != masked.vector_digest:
            raise RemoteProtocolError("SS-6002", f"the masked vector of {name} is not the one it signed")
        self._check(name, masked, "masked", self._t2, masked.signature)  # What was added cannot be taken out again.
        self._tally.add(vector, masked.public)
        self._answers[name] = masked

    def _take_shares(self, name: str, answer: wire.Unmask) -> None:
        if (
            tuple(n for n, _ in answer.self_shares) != self._held_by(name, self._survivors)
            or tuple(n for n, _ in answer.seed_shares) != self._held_by(name, self._dropped)
        ):  # fmt: skip
            raise RemoteProtocolError("SS-6008", f"the answer of {name} is not one share for every member")
        if not all(is_field_element(y) for _, y in (*answer.self_shares, *answer.seed_shares)):
            raise RemoteProtocolError("SS-6011", f"a share from {name} is not an element of the field")
        self._accept(name, answer, "unmask", self._t3, answer.signature)

    def _held_by(self, holder: str, owners: tuple[str, ...]) -> tuple[str, ...]:
        """Those of these members whose shares this client has: everybody's in the complete graph, its own always."""
        return tuple(n for n in owners if not self.config.degree or n == holder or (n, holder) in self._holders)

    @property
    def _dropped(self) -> tuple[str, ...]:
        return tuple(name for name in self._members if name not in self._survivors)

    def _advance(self) -> list[Delivery]:
        there = tuple(name for name in self._expected if name in self._answers)
        if len(there) < (self.config.quorum if self.stage <= wire.MASKED else self.config.threshold):
            return self.abort("SS-6010")
        answers, stage = self._answers, self.stage
        self._answers, self._expected, self.stage = {}, there, stage + 1
        match stage:
            case wire.ADVERTISE:
                adverts = tuple(self._adverts[name] for name in there)
                self._peers = peers_of(self.config, adverts)
                return self._to_all(stage, self._body(wire.Roster, adverts=adverts))
            case wire.SHARES:
                return self._route(there, answers)
            case wire.MASKED:
                self._masked = {name: a for name, a in answers.items() if isinstance(a, wire.Masked)}
                return self._name_survivors(there)
            case wire.CONSISTENT:
                self._signatures = tuple(
                    (name, a.signature) for name, a in sorted(answers.items()) if isinstance(a, wire.Consistent)
                )
                return self._to_all(stage, self._body(wire.Bundle, signatures=self._signatures))
            case _:
                return self._open({name: a for name, a in answers.items() if isinstance(a, wire.Unmask)})

    def _route(self, members: tuple[str, ...], answers: dict[str, wire.Body]) -> list[Delivery]:
        shares = {name: a for name, a in answers.items() if isinstance(a, wire.Shares)}
        self._members = members
        self._t2 = bind("ssa-1/u2", self._peers.t1, (name.encode() for name in members))
        boxes = {(sender, to): box for sender in members for to, box in shares[sender].sealed}
        if self.config.degree:
            self._holders = frozenset(pair for pair, box in boxes.items() if len(box) >= wire.SHARED_BOX)
        deliveries = []
        for to in members:
            sealed = tuple((sender, boxes[sender, to]) for sender in members if (sender, to) in boxes)
            body = self._body(wire.Routed, members=members, sealed=sealed)
            deliveries.append(self._deliver(to, wire.SHARES, body, None))
        return deliveries

    def _name_survivors(self, survivors: tuple[str, ...]) -> list[Delivery]:
        self._survivors = survivors
        self._t3 = bind("ssa-1/u3", self._t2, (name.encode() for name in survivors))
        deliveries = []
        for to in self._there():
            proofs = tuple(
                (n, wire.encode(self._masked[n]))
                for n in (self._held_by(to, survivors) if self.config.degree else ())
                if n != to
            )
            body = self._body(wire.Survivors, survivors=survivors, dropped=self._dropped, masked=proofs)
            deliveries.append(self._deliver(to, wire.MASKED, body, None))
        return deliveries

    def _open(self, answers: dict[str, wire.Unmask]) -> list[Delivery]:
        c, opened = self.config, None
        b = self._openings(self._survivors, {n: dict(a.self_shares) for n, a in answers.items()})
        s = self._openings(self._dropped, {n: dict(a.seed_shares) for n, a in answers.items()})
        pairs = Pairs(self._holders)

        def off(words: Words) -> None:
            unmask(words, c, self._peers, t2=self._t2, pairs=pairs, survivors=b, dropped=s)

        try:
            ring = self._tally.unmasked(off)
            if not c.blind:
                opened = open_ring(cast("Words", ring), self._survivors, scale=c.scale, clip=c.clip, w_max=c.w_max)
        except AggregationAborted as error:
            return self.abort(error.code)
        self.result = ServerResult(survivors=self._survivors, ring_sum=ring, aggregate=opened)
        self.finished = True
        return self._to_all(wire.UNMASK, self._body(wire.Result, survivors=self._survivors), ring)

    def _openings(self, owners: tuple[str, ...], told: dict[str, dict[str, bytes]]) -> list[Opening]:
        position = {name: self.config.position(name) for name in told}
        return [
            Opening(o, tuple(Share(position[n], shares[o]) for n, shares in told.items() if o in shares))
            for o in owners
        ]

    def _body(self, kind: type[wire.Body], **fields: object) -> bytes:
        c = self.config
        return wire.encode(kind.model_validate({"session": c.session_id, "round": c.round, "cfg": c.digest, **fields}))

    def _to_all(self, stage: int, body: bytes, vector: Vector | None = None) -> list[Delivery]:
        return [self._deliver(name, stage, body, vector) for name in self._there()]

    def _there(self) -> list[str]:
        return [name for name in self._expected if name not in self._gone]

    def _abort_for(self, name: str, code: str) -> Delivery:
        return self._deliver(name, wire.ABORT, self._body(wire.Abort, code=code), None)

    def _deliver(self, to: str, stage: int, body: bytes, vector: Vector | None) -> Delivery:
        """A delivery, remembered until the next one, for a client whose connection breaks on the way."""
        self._last[to] = Delivery(to, stage, body, vector)
        return self._last[to]
