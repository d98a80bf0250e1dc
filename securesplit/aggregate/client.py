"""One client's side of one SSA-1 round, without sockets, clock or files.

    IDLE -> ADVERTISED -> SHARED -> MASKED -> SIGNED -> UNMASKED -> DONE, or ABORTED from anywhere

Every message is accepted in one state only, each state is passed once, and any fault ends the round for good. So a
client masks one vector, signs one set of survivors and answers stage 4 once, whatever the server sends.

What this does not protect: t clients colluding with the server open any update, and one client with the server opens a
blind sum. The server may leave out clients (down to the floors), may refuse service, and may send a wrong *result*
inside the possible range: secrecy holds against a malicious server, correctness of what it returns does not. Who took
part, when, and how long it took is visible. Two sums over cohorts that differ by one client show that client's update,
unless the updates carry differential privacy.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import Enum

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from securesplit.aggregate import wire
from securesplit.aggregate.agreement import HOSTILE, check_quorum, check_set, check_survivors
from securesplit.aggregate.answered import record_of
from securesplit.aggregate.boxes import Held, mask_keys, open_shares, seal_shares
from securesplit.aggregate.config import Floors, RoundConfig, check_floors
from securesplit.aggregate.fixedpoint import Aggregate, Floats, Words, open_ring, quantise, vector_digest
from securesplit.aggregate.keys import (
    RoundSecrets,
    bind,
    blind_key,
    commit,
    group_key,
    mask_private,
    raw_public,
    statement,
)
from securesplit.aggregate.masks import add_streams
from securesplit.aggregate.roster import Peers, Verify, read_roster
from securesplit.aggregate.wire import Outgoing, read
from securesplit.errors import AggregationAborted, LocalProtocolError, RemoteProtocolError

__all__ = ["ClientRound", "State"]


class State(Enum):
    """Where a client stands in the round."""

    IDLE = "idle"
    ADVERTISED = "advertised"
    SHARED = "shared"
    MASKED = "masked"
    SIGNED = "signed"
    UNMASKED = "unmasked"
    DONE = "done"
    ABORTED = "aborted"


class ClientRound:
    """One client in one round; make a new one, which draws new keys, for every round and every retry.

    Args:
        config: the round, built from what this client holds itself; its hash is compared with the others'.
        name: this client's certificate name, in the roster.
        certificate_der: its certificate.
        sign: signs bytes with the certificate's key.
        verify: see :data:`securesplit.aggregate.roster.Verify`.
        floors: what this client insists on.
        persist: called with the record of this round (answered.py) before stage 4 is answered. It must make the record
            durable, and raise when the same session and round are on record or when it cannot; then no share leaves.
        randomness: bytes by length from a CSPRNG; tests alone pass another.

    Raises:
        AggregationAborted: SS-6001 when the round is below the floors, SS-6003 when the name is not in the roster.
    """

    def __init__(
        self,
        config: RoundConfig,
        name: str,
        certificate_der: bytes,
        *,
        sign: Callable[[bytes], bytes],
        verify: Verify,
        floors: Floors,
        persist: Callable[[bytes], None],
        randomness: Callable[[int], bytes] = os.urandom,
    ) -> None:
        check_floors(config, name, floors)
        self.config, self.name, self.state = config, name, State.IDLE
        self.contribution: Words | None = None
        self.result: Aggregate | None = None
        self._certificate, self._randomness = certificate_der, randomness
        self._sign, self._verify, self._persist = sign, verify, persist
        self._secrets: RoundSecrets | None = None
        self._advert = b""
        self._peers = Peers((), b"")
        self._held: dict[str, Held] = {}
        self._members: tuple[str, ...] = ()
        self._survivors: tuple[str, ...] = ()
        self._t2 = self._t3 = self._group = b""

    def advertise(self) -> bytes:
        """The body of stage 0, with fresh keys.

        Raises:
            LocalProtocolError: SS-6005 when called twice.
        """
        if self.state is not State.IDLE:
            raise LocalProtocolError(
                "SS-6005", "this round was advertised already", hint="Make a new ClientRound for every round and retry."
            )
        secrets = self._secrets = RoundSecrets.draw(self._randomness, blind=self.config.blind)
        self._advert = self._signed(
            wire.Advertise, "advertise", self.config.digest, name=self.name, certificate=self._certificate,
            mask_key=raw_public(mask_private(secrets.seed, self.config.digest)),
            share_key=raw_public(X25519PrivateKey.from_private_bytes(secrets.channel)),
            commit_self=commit("cb", secrets.self_mask), commit_group=commit("cg", secrets.group) if self.config.blind else b"",
        )  # fmt: skip
        self.state = State.ADVERTISED
        return self._advert

    def contribute(self, update: Floats, weight: int) -> int:
        """Give the update that this client adds to the sum; once, before the server's stage-1 message.

        Args:
            update: (d,) float64, model units; coordinates beyond the round's ``clip`` are clipped.
            weight: 1..w_max; hidden in the sum as the update is.

        Returns:
            How many coordinates were clipped.

        Raises:
            LocalProtocolError: SS-6005 when it is too late or done already, SS-6011 when the values cannot be used.
        """
        if self.contribution is not None or self.state not in {State.IDLE, State.ADVERTISED, State.SHARED}:
            raise LocalProtocolError(
                "SS-6005", "an update can be given once, before masking", hint="Make a new ClientRound for every round."
            )
        if update.shape != (self.config.dim,):
            raise LocalProtocolError(
                "SS-6011", f"the update has shape {update.shape}, the round wants ({self.config.dim},)"
            )
        c = self.config
        self.contribution, clipped = quantise(update, weight, scale=c.scale, clip=c.clip, w_max=c.w_max)
        return clipped

    def receive(self, stage: int, body: bytes, vector: Words | None = None) -> list[Outgoing]:
        """Take one message of the server and give what to send next; after stage 4, ``result`` is set.

        Args:
            stage: the message's stage.
            body: its body.
            vector: (d + 1,) uint32 with stage 4, else None or empty.

        Raises:
            RemoteProtocolError: the message is malformed, out of order or not of this round.
            AggregationAborted: the round cannot go on safely, or the server gave it up (its code).
            LocalProtocolError: no update was given in time, or the round is over.
            Whatever is raised, the state is ABORTED and the secrets are dropped. ``abort`` makes the farewell.
        """
        if self.state in {State.ABORTED, State.DONE}:
            raise LocalProtocolError("SS-6005", f"the round is over ({self.state.value})")
        try:
            return self._step(stage, body, vector)
        except BaseException:
            self._drop(State.ABORTED)
            raise

    def abort(self, code: str) -> Outgoing:
        """Give the round up and tell the server: ``code`` if it is one of SS-60xx, else SS-6005."""
        self._drop(State.ABORTED)
        known = code if code.startswith("SS-60") else "SS-6005"
        c = self.config
        return Outgoing(
            wire.ABORT, wire.encode(wire.Abort(session=c.session_id, round=c.round, cfg=c.digest, code=known)), None
        )

    def _step(self, stage: int, body: bytes, vector: Words | None) -> list[Outgoing]:
        if stage != wire.UNMASK and vector is not None and vector.size:
            raise RemoteProtocolError("SS-6014", f"a vector came with stage {stage}, which has none")
        match stage, self.state:
            case wire.ADVERTISE, State.ADVERTISED:
                return [self._share(body)]
            case wire.SHARES, State.SHARED:
                return [self._mask(body)]
            case wire.MASKED, State.MASKED:
                return [self._agree(body)]
            case wire.CONSISTENT, State.SIGNED:
                return [self._answer(body)]
            case wire.UNMASK, State.UNMASKED:
                return self._finish(body, vector)
            case wire.ABORT, _:
                code = read(wire.Abort, body, self.config).code
                raise AggregationAborted(
                    code,
                    "the server gave the round up",
                    hint="`securesplit explain` tells what the code means; the next round uses fresh keys.",
                )
            case _:
                raise RemoteProtocolError(
                    "SS-6005", f"a message of stage {stage} came while {self.state.value}", hint=HOSTILE
                )

    def _share(self, body: bytes) -> Outgoing:
        c = self.config
        peers = self._peers = read_roster(c, body, name=self.name, own=self._advert, verify=self._verify)
        own, sealed = seal_shares(c, self._fresh(), peers, self.name, randomness=self._randomness)
        self._held[self.name] = own
        self.state = State.SHARED
        return Outgoing(wire.SHARES, self._signed(wire.Shares, "shares", peers.t1, sealed=sealed), None)

    def _mask(self, body: bytes) -> Outgoing:
        if self.contribution is None:
            raise LocalProtocolError("SS-6005", "no update was given before stage 2", hint="Call contribute() first.")
        routed, secrets, peers = read(wire.Routed, body, self.config), self._fresh(), self._peers
        members = self._members = routed.members
        check_set(self.config, self.name, members, within=peers.names)
        if [name for name, _ in routed.sealed] != [name for name in members if name != self.name]:
            raise AggregationAborted("SS-6008", "the boxes do not match the members", hint=HOSTILE)
        for sender, box in routed.sealed:
            self._held[sender] = open_shares(self.config, secrets, peers, self.name, sender=sender, box=box)
        t2 = self._t2 = bind("ssa-1/u2", peers.t1, (name.encode() for name in members))
        keys = mask_keys(self.config, secrets, peers, self.name, members=members, t2=t2)
        masked = self.contribution.copy()
        add_streams(masked, keys.plus, keys.minus)
        if self.config.blind:
            self._group = group_key((self._held[name].group for name in members), t2)
            add_streams(masked, [blind_key(self._group, t2, self.name)])
        self._secrets = None
        self.state = State.MASKED
        digest = vector_digest(masked)
        return Outgoing(wire.MASKED, self._signed(wire.Masked, "masked", t2, vector_digest=digest), masked)

    def _agree(self, body: bytes) -> Outgoing:
        told = read(wire.Survivors, body, self.config)
        check_survivors(self.config, self.name, told, members=self._members)
        self._survivors = told.survivors
        self._t3 = bind("ssa-1/u3", self._t2, (name.encode() for name in told.survivors))
        self.state = State.SIGNED
        return Outgoing(wire.CONSISTENT, self._signed(wire.Consistent, "consistent", self._t3), None)

    def _answer(self, body: bytes) -> Outgoing:
        signatures, c = read(wire.Bundle, body, self.config).signatures, self.config
        draft = wire.Consistent(session=c.session_id, round=c.round, cfg=c.digest, signature=bytes(8))
        said = statement("consistent", self._t3, wire.unsigned(draft))
        check_quorum(c, self._peers, signatures, survivors=self._survivors, said=said, verify=self._verify)
        self._persist(record_of(c.session_id, c.round, self._t3))
        b = tuple((name, self._held[name].self_share) for name in self._survivors)
        s = tuple((name, self._held[name].seed_share) for name in self._members if name not in self._survivors)
        self._held.clear()
        self.state = State.UNMASKED
        answer = self._signed(wire.Unmask, "unmask", self._t3, self_shares=b, seed_shares=s)
        return Outgoing(wire.UNMASK, answer, None)

    def _finish(self, body: bytes, vector: Words | None) -> list[Outgoing]:
        c = self.config
        if read(wire.Result, body, c).survivors != self._survivors:
            raise AggregationAborted("SS-6008", "the result is over other survivors than were signed", hint=HOSTILE)
        if vector is None or vector.shape != (c.dim + 1,) or vector.dtype != np.uint32:
            raise RemoteProtocolError("SS-6014", "the result's vector has a wrong type or length")
        ring = vector.copy()
        if c.blind:
            add_streams(ring, minus=[blind_key(self._group, self._t2, name) for name in self._survivors])
        self.result = open_ring(ring, self._survivors, scale=c.scale, clip=c.clip, w_max=c.w_max, silent=c.blind)
        self._drop(State.DONE)
        return []

    def _fresh(self) -> RoundSecrets:
        assert self._secrets is not None, "the states in which secrets are used all hold them"
        return self._secrets

    def _signed(self, kind: type[wire.Body], label: str, transcript: bytes, **fields: object) -> bytes:
        c = self.config
        draft = kind.model_validate(
            {"session": c.session_id, "round": c.round, "cfg": c.digest, "signature": bytes(8), **fields}
        )
        signature = self._sign(statement(label, transcript, wire.unsigned(draft)))
        return wire.encode(draft.model_copy(update={"signature": signature}))

    def _drop(self, state: State) -> None:
        self._secrets, self._group, self.state = None, b"", state
        self._held.clear()
