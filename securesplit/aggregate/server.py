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

import numpy as np

from securesplit.aggregate import wire
from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.fixedpoint import Aggregate, Words, open_ring, vector_digest
from securesplit.aggregate.keys import bind, statement
from securesplit.aggregate.recover import Opening, unmask
from securesplit.aggregate.roster import Peers, Verify, check_signature, peers_of, read_advert
from securesplit.aggregate.shamir import Share, is_field_element
from securesplit.aggregate.wire import Delivery, read
from securesplit.errors import AggregationAborted, LocalProtocolError, RemoteProtocolError

__all__ = ["ServerResult", "ServerRound"]


@dataclass(frozen=True, slots=True, eq=False)
class ServerResult:
    """What the server ends with.

    Attributes:
        survivors: names whose updates are in the sum, sorted.
        ring_sum: (d + 1,) uint32; in blind rounds still under the survivors' blinds, uniform to the server.
        aggregate: the opened sum, or None in blind rounds.
    """

    survivors: tuple[str, ...]
    ring_sum: Words
    aggregate: Aggregate | None


class ServerRound:
    """One round at the server.

    Args:
        config: the round.
        verify: checks a client's certificate and signature on every message, so that a fault is attributable beyond the
            connection it came by; None relies on the mutually authenticated connection for ``name``.

    Attributes:
        stage: the stage whose messages are awaited.
        finished: whether the round is over, with ``result`` or with the code ``aborted``.
    """

    def __init__(self, config: RoundConfig, verify: Verify | None = None) -> None:
        self.config, self.stage, self.finished = config, wire.ADVERTISE, False
        self.result: ServerResult | None = None
        self.aborted: str | None = None
        self._verify = verify
        self._expected: tuple[str, ...] = config.roster
        self._gone: set[str] = set()
        self._seen: dict[tuple[str, int], bytes] = {}
        self._answers: dict[str, wire.Body] = {}
        self._adverts: dict[str, bytes] = {}
        self._peers = Peers((), b"")
        self._members: tuple[str, ...] = ()
        self._survivors: tuple[str, ...] = ()
        self._t2 = self._t3 = b""
        self._sum: Words | None = None

    @property
    def waiting_for(self) -> tuple[str, ...]:
        """Names of the clients whose message of this stage is awaited."""
        return (
            () if self.finished else tuple(n for n in self._expected if n not in self._gone and n not in self._answers)
        )

    def receive(self, name: str, stage: int, body: bytes, vector: Words | None = None) -> list[Delivery]:
        """Take one message of a client.

        Args:
            name: the sender, from its authenticated connection.
            stage, body: the message.
            vector: (d + 1,) uint32 with stage 2, else None or empty.

        Returns:
            What to send now, and to whom. A byte-identical repetition gives nothing; a client that was left behind gets
            an abort with SS-6013.

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
            return []
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
        there = [name for name in self._expected if name not in self._gone]
        self.finished, self.aborted, self._sum = True, code, None
        self._answers.clear()
        return [self._abort_for(name, code) for name in there]

    def _take(self, name: str, body: bytes, vector: Words | None) -> None:
        match self.stage:
            case wire.ADVERTISE:
                self._take_advert(name, body)
            case wire.SHARES:
                shares = read(wire.Shares, body, self.config)
                if [to for to, _ in shares.sealed] != [n for n in self._peers.names if n != name]:
                    raise RemoteProtocolError("SS-6008", f"the boxes of {name} are not one for every other client")
                self._accept(name, shares, "shares", self._peers.t1, shares.signature)
            case wire.MASKED:
                self._take_vector(name, read(wire.Masked, body, self.config), vector)
            case wire.CONSISTENT:
                signed = read(wire.Consistent, body, self.config)
                self._accept(name, signed, "consistent", self._t3, signed.signature)
            case _:
                self._take_shares(name, read(wire.Unmask, body, self.config))

    def _accept(self, name: str, body: wire.Body, label: str, transcript: bytes, signature: bytes) -> None:
        if self._verify is not None:
            said = statement(label, transcript, wire.unsigned(body))
            check_signature(self._verify, self._peers.of(name), said, signature)
        self._answers[name] = body

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

    def _take_vector(self, name: str, masked: wire.Masked, vector: Words | None) -> None:
        if vector is None or vector.shape != (self.config.dim + 1,) or vector.dtype != np.uint32:
            raise RemoteProtocolError("SS-6014", f"the masked vector of {name} has a wrong type or length")
        if vector_digest(vector) != masked.vector_digest:
            raise RemoteProtocolError("SS-6002", f"the masked vector of {name} is not the one it signed")
        self._accept(name, masked, "masked", self._t2, masked.signature)
        if self._sum is None:
            self._sum = np.zeros(self.config.dim + 1, dtype=np.uint32)
        self._sum += vector

    def _take_shares(self, name: str, answer: wire.Unmask) -> None:
        if (
            tuple(n for n, _ in answer.self_shares) != self._survivors
            or tuple(n for n, _ in answer.seed_shares) != self._dropped
        ):
            raise RemoteProtocolError("SS-6008", f"the answer of {name} is not one share for every member")
        if not all(is_field_element(y) for _, y in (*answer.self_shares, *answer.seed_shares)):
            raise RemoteProtocolError("SS-6011", f"a share from {name} is not an element of the field")
        self._accept(name, answer, "unmask", self._t3, answer.signature)

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
                self._survivors = there
                self._t3 = bind("ssa-1/u3", self._t2, (name.encode() for name in there))
                return self._to_all(stage, self._body(wire.Survivors, survivors=there, dropped=self._dropped))
            case wire.CONSISTENT:
                signatures = tuple(
                    (name, a.signature) for name, a in sorted(answers.items()) if isinstance(a, wire.Consistent)
                )
                return self._to_all(stage, self._body(wire.Bundle, signatures=signatures))
            case _:
                return self._open({name: a for name, a in answers.items() if isinstance(a, wire.Unmask)})

    def _route(self, members: tuple[str, ...], answers: dict[str, wire.Body]) -> list[Delivery]:
        self._members = members
        self._t2 = bind("ssa-1/u2", self._peers.t1, (name.encode() for name in members))
        boxes = {name: dict(a.sealed) for name, a in answers.items() if isinstance(a, wire.Shares)}
        deliveries = []
        for to in members:
            sealed = tuple((sender, boxes[sender][to]) for sender in members if sender != to)
            deliveries.append(Delivery(to, wire.SHARES, self._body(wire.Routed, members=members, sealed=sealed), None))
        return deliveries

    def _open(self, answers: dict[str, wire.Unmask]) -> list[Delivery]:
        if self._sum is None:
            raise LocalProtocolError("SS-6005", "stage 4 without a sum")
        c, position = self.config, {name: self.config.position(name) for name in answers}
        b = [
            Opening(o, tuple(Share(position[n], dict(a.self_shares)[o]) for n, a in answers.items()))
            for o in self._survivors
        ]
        s = [
            Opening(o, tuple(Share(position[n], dict(a.seed_shares)[o]) for n, a in answers.items()))
            for o in self._dropped
        ]
        try:
            unmask(self._sum, c, self._peers, t2=self._t2, survivors=b, dropped=s)
            opened = (
                None if c.blind else open_ring(self._sum, self._survivors, scale=c.scale, clip=c.clip, w_max=c.w_max)
            )
        except AggregationAborted as error:
            return self.abort(error.code)
        self.result = ServerResult(survivors=self._survivors, ring_sum=self._sum, aggregate=opened)
        self.finished = True
        return self._to_all(wire.UNMASK, self._body(wire.Result, survivors=self._survivors), self._sum)

    def _body(self, kind: type[wire.Body], **fields: object) -> bytes:
        c = self.config
        return wire.encode(kind.model_validate({"session": c.session_id, "round": c.round, "cfg": c.digest, **fields}))

    def _to_all(self, stage: int, body: bytes, vector: Words | None = None) -> list[Delivery]:
        return [Delivery(name, stage, body, vector) for name in self._expected if name not in self._gone]

    def _abort_for(self, name: str, code: str) -> Delivery:
        return Delivery(name, wire.ABORT, self._body(wire.Abort, code=code), None)
