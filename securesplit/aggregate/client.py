"""One client's side of one SSA-1 round, without sockets, clock or files.

    IDLE -> ADVERTISED -> SHARED -> MASKED -> SIGNED -> UNMASKED -> DONE, or ABORTED from anywhere

Every message is accepted in one state only, each state is passed once, and any fault ends the round for good. So a
client masks one vector, signs one set of survivors and answers stage 4 once, whatever the server sends.

What this does not protect: t clients colluding with the server open any update, and one client with the server opens a
blind sum. The server may leave out clients (down to the floors), may refuse service, and may send a wrong *result*
inside the possible range: secrecy holds against a malicious server, correctness of what it returns does not. Who took
part, when, and how long it took is visible. Several sums of one update over different clients can show single updates,
which answered.py keeps from happening and noise makes harmless.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from enum import Enum

from securesplit.aggregate import wire
from securesplit.aggregate.agreement import (
    HOSTILE,
    check_masked,
    check_quorum,
    check_senders,
    check_set,
    check_survivors,
)
from securesplit.aggregate.answered import Answer
from securesplit.aggregate.boxes import Held, choose_holders, mask_keys, open_shares, seal_shares
from securesplit.aggregate.config import Floors, RoundConfig, check_floors
from securesplit.aggregate.encryption import Worker, hide, reveal
from securesplit.aggregate.fixedpoint import Aggregate, Floats, Words, open_ring, quantise, vector_digest
from securesplit.aggregate.keys import (
    RoundSecrets,
    alike_tag,
    bind,
    commit,
    group_key,
    mask_private,
    raw_public,
    statement,
)
from securesplit.aggregate.masks import add_streams
from securesplit.aggregate.record import RoundRecord, record_round, seal
from securesplit.aggregate.roster import Peers, Verify, read_roster
from securesplit.aggregate.wire import Outgoing, Vector, read
from securesplit.errors import AggregationAborted, LocalProtocolError, RemoteProtocolError, SecureSplitError

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
        persist: called with what is about to be answered (answered.py) before stage 4. It must make the record durable, and
            raise when the round must not be answered or when it cannot; then no share leaves.
        noised: whether the update carries noise of its own for the sum; then a second sum over almost the same clients is
            no danger, and the rule against it (answered.py) does not apply.
        origin: names what the update starts from, by its values alone: a server can change the numbers of a job, and with
            them ``RoundConfig.frozen``, while the update stays nearly what it was.
        alike: digest of what all clients must hold alike and the server must not learn; signed in stage 3 of blind rounds
            under a key that the server does not have. What may be public belongs into ``RoundConfig.frozen``.
        worker: encrypts and decrypts, in rounds with homomorphic encryption.
        randomness: bytes by length from a CSPRNG; tests alone pass another.

    Attributes:
        contribution: this client's own vector in the ring, before masks; (d + 1,).
        result: the opened sum, once stage 4 is done.
        heard: then, in blind rounds, SHA-256 of the words as they were opened. Clients make it part of what they hold alike in
            the next round, so that a server which altered the sum for one of them ends that round whatever the sum is.

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
        persist: Callable[[Answer], None],
        noised: bool = False,
        origin: bytes = b"",
        alike: bytes = b"",
        worker: Worker | None = None,
        randomness: Callable[[int], bytes] = os.urandom,
    ) -> None:
        check_floors(config, name, floors)
        self.config, self.name, self.state = config, name, State.IDLE
        self.contribution: Words | None = None
        self.result: Aggregate | None = None
        self.heard = b""
        self._certificate, self._randomness, self._worker = certificate_der, randomness, worker
        self._alike, self._origin = alike, origin
        self._sign, self._verify, self._persist, self._noised = sign, verify, persist, noised
        self._secrets: RoundSecrets | None = None
        self._advert = b""
        self._peers = Peers((), b"")
        self._holders: tuple[str, ...] = ()
        self._held: dict[str, Held] = {}
        self._members: tuple[str, ...] = ()
        self._survivors: tuple[str, ...] = ()
        self._t2 = self._t3 = self._group = self._said = b""
        self._signatures: tuple[tuple[str, bytes], ...] = ()
        self._code = ""

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the roster that the smallest set of clients which the server has named so far is without; none before."""
        known = self._survivors or self._members or self._peers.names
        return tuple(name for name in self.config.roster if name not in known) if known else ()

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
            share_key=secrets.channel.public,
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
        self.contribution, clipped = quantise(
            update, weight, scale=c.scale, clip=c.clip, w_max=c.w_max, bits=c.ring_bits
        )
        return clipped

    def receive(self, stage: int, body: bytes, vector: Vector | None = None) -> list[Outgoing]:
        """Take one message of the server and give what to send next; after stage 4, ``result`` is set.

        Args:
            stage: the message's stage.
            body: its body.
            vector: (d + 1,) words, or the frame of encrypted ones, with stage 4; else None or empty.

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
        except BaseException as error:
            self._code = error.code if isinstance(error, SecureSplitError) else "SS-6005"
            self._drop(State.ABORTED)
            raise

    def abort(self, code: str) -> Outgoing:
        """Give the round up and tell the server: ``code`` if it is one of SS-60xx, else SS-6005.

        The record keeps the code of the first fault, so that a round which broke off does not look like one without signers.
        """
        self._drop(State.ABORTED)
        self._code = self._code or code
        known = code if code.startswith("SS-60") else "SS-6005"
        c = self.config
        return Outgoing(
            wire.ABORT, wire.encode(wire.Abort(session=c.session_id, round=c.round, cfg=c.digest, code=known)), None
        )

    def record(self, made: int) -> RoundRecord:
        """What may be shown of the round to whoever wants to verify it, under this client's seal; see record.py.

        Args:
            made: the time, seconds since 1970.
        """
        draft = record_round(
            self.config, self._peers, role="client", maker=self.name, made=made, members=self._members,
            survivors=self._survivors, signatures=self._signatures, alike=self._said,
            sum_digest=vector_digest(self.result.ring_sum) if self.result is not None else b"", aborted=self._code,
        )  # fmt: skip
        return seal(draft, self._certificate, self._sign)

    def _step(self, stage: int, body: bytes, vector: Vector | None) -> list[Outgoing]:
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
        c, secrets = self.config, self._fresh()
        peers = self._peers = read_roster(c, body, name=self.name, own=self._advert, verify=self._verify)
        self._holders = choose_holders(c, peers.names, self.name, randomness=self._randomness)
        own, sealed = seal_shares(c, secrets, peers, self.name, holders=self._holders, randomness=self._randomness)
        self._held[self.name] = own
        answer = self._signed(wire.Shares, "shares", peers.t1, sealed=sealed)
        self.state = State.SHARED
        return Outgoing(wire.SHARES, answer, None)

    def _mask(self, body: bytes) -> Outgoing:
        if self.contribution is None:
            raise LocalProtocolError("SS-6005", "no update was given before stage 2", hint="Call contribute() first.")
        c, secrets, peers = self.config, self._fresh(), self._peers
        routed = read(wire.Routed, body, c)
        members = self._members = routed.members
        check_set(c, self.name, members, within=peers.names)
        check_senders(c, self.name, [sender for sender, _ in routed.sealed], members=members)
        for sender, box in routed.sealed:
            self._held[sender] = open_shares(c, secrets, peers, self.name, sender=sender, box=box)
        t2 = self._t2 = bind("ssa-1/u2", peers.t1, (name.encode() for name in members))
        partners = [n for n in members if n != self.name and (n in self._holders or self._shares_of(n))]
        keys = mask_keys(c, secrets, peers, self.name, partners=partners, t2=t2)
        masked = self.contribution.copy()
        add_streams(masked, keys.plus, keys.minus, prg=c.prg)
        if c.blind:
            self._group = group_key((self._held[name].group for name in members), t2)
        hidden = hide(c, masked, name=self.name, group=self._group, t2=t2, worker=self._worker)
        self._secrets = None
        self.state = State.MASKED
        digest = vector_digest(hidden.vector)
        said = self._signed(wire.Masked, "masked", t2, vector_digest=digest, public=hidden.public)
        return Outgoing(wire.MASKED, said, hidden.vector)

    def _shares_of(self, name: str) -> bool:
        return name in self._held and self._held[name].self_share != b""

    def _agree(self, body: bytes) -> Outgoing:
        told = read(wire.Survivors, body, self.config)
        check_survivors(self.config, self.name, told, members=self._members)
        if self.config.degree:
            owners = [n for n in told.survivors if n != self.name and self._shares_of(n)]
            check_masked(self.config, self._peers, told.masked, owners=owners, t2=self._t2, verify=self._verify)
        self._survivors = told.survivors
        self._t3 = bind("ssa-1/u3", self._t2, (name.encode() for name in told.survivors))
        self.state = State.SIGNED
        self._said = alike_tag(self._group, self._t2, self._alike) if self.config.blind else b""
        answer = self._signed(wire.Consistent, "consistent", self._t3, secret=self._said)
        return Outgoing(wire.CONSISTENT, answer, None)

    def _answer(self, body: bytes) -> Outgoing:
        signatures, c = read(wire.Bundle, body, self.config).signatures, self.config
        draft = wire.Consistent(session=c.session_id, round=c.round, cfg=c.digest, signature=bytes(8))
        said = statement("consistent", self._t3, wire.unsigned(draft) + self._said)
        self._signatures = signatures
        check_quorum(c, self._peers, signatures, survivors=self._survivors, said=said, verify=self._verify)
        self._persist(Answer(c.session_id, c.round, self._t3, self._start(), self._survivors))
        b = tuple((n, self._held[n].self_share) for n in self._survivors if self._shares_of(n))
        s = tuple(
            (n, self._held[n].seed_share) for n in self._members if n not in self._survivors and self._shares_of(n)
        )
        self._held.clear()
        self.state = State.UNMASKED
        answer = self._signed(wire.Unmask, "unmask", self._t3, self_shares=b, seed_shares=s)
        return Outgoing(wire.UNMASK, answer, None)

    def _start(self) -> bytes:
        if self._noised:
            return b""
        c = self.config
        start = self._origin or f"{c.round}|{c.frozen}|".encode() + self._alike
        return hashlib.sha256(f"{c.model}|".encode() + start).digest()

    def _finish(self, body: bytes, vector: Vector | None) -> list[Outgoing]:
        c = self.config
        if read(wire.Result, body, c).survivors != self._survivors:
            raise AggregationAborted("SS-6008", "the result is over other survivors than were signed", hint=HOSTILE)
        ring = reveal(c, vector, group=self._group, t2=self._t2, survivors=self._survivors, worker=self._worker)
        # Before an impossible sum is brought into its range: what was brought there may look alike and is not.
        self.heard = vector_digest(ring) if c.blind else b""
        self.result = open_ring(ring, self._survivors, scale=c.scale, clip=c.clip, w_max=c.w_max, silent=c.blind)
        self._drop(State.DONE)
        return []

    def _fresh(self) -> RoundSecrets:
        assert self._secrets is not None, "the states in which secrets are used all hold them"
        return self._secrets

    def _signed(
        self, kind: type[wire.Body], label: str, transcript: bytes, *, secret: bytes = b"", **fields: object
    ) -> bytes:
        c = self.config
        draft = kind.model_validate(
            {"session": c.session_id, "round": c.round, "cfg": c.digest, "signature": bytes(8), **fields}
        )
        signature = self._sign(statement(label, transcript, wire.unsigned(draft) + secret))
        return wire.encode(draft.model_copy(update={"signature": signature}))

    def _drop(self, state: State) -> None:
        self._secrets, self._group, self.state = None, b"", state
        self._held.clear()
