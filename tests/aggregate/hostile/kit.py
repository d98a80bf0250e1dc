"""A stage on which anybody plays the server: real clients, every byte that passed, and copies of any moment.

A :class:`Play` is driven by the honest ServerRound, with hooks that alter what passes, or by hand through :meth:`Play.tell`.
Honest rounds are run once per mode and copied at the stage that an attack begins with, so that an attack costs only what
comes after it. What honest clients know is kept aside (:class:`Truth`), for the judge and for colluders; see judge.py.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TypeVar

import numpy as np

from securesplit.aggregate import wire
from securesplit.aggregate.boxes import Held
from securesplit.aggregate.client import State
from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.keys import Channel, RoundSecrets, statement
from securesplit.aggregate.roster import Peers
from securesplit.aggregate.shamir import Share
from securesplit.aggregate.wire import Delivery, Outgoing
from securesplit.errors import AggregationAborted, LocalProtocolError, RemoteProtocolError, SecureSplitError
from tests.aggregate.conftest import Cohort, make_config

SEVEN = ("amir", "bea", "chloe", "dan", "eve", "fay", "gus")
FORTY = tuple(f"c{i:02d}" for i in range(40))

MODES: dict[str, dict[str, object]] = {
    "plain": {"roster": SEVEN, "threshold": 5, "min_clients": 5, "colluders": 2},
    "blind": {"roster": SEVEN, "threshold": 5, "min_clients": 5, "colluders": 2, "blind": True},
    "64-bit": {"roster": SEVEN, "threshold": 5, "min_clients": 5, "colluders": 2, "ring_bits": 64, "scale": 1 << 40},
    # k and t from graph_for(40, quorum=25, colluders=4, smallest=8, dropouts=4); every client checks the bound itself.
    "sparse": {
        "roster": FORTY, "threshold": 25, "min_clients": 12, "colluders": 4, "degree": 15, "share_threshold": 12,
    },
    "sparse blind": {
        "roster": FORTY, "threshold": 25, "min_clients": 12, "colluders": 4, "degree": 15, "share_threshold": 12,
        "blind": True,
    },
}  # fmt: skip
COMPLETE = ("plain", "blind", "64-bit")
SPARSE = ("sparse", "sparse blind")
T = TypeVar("T")
EVERY = (*COMPLETE, *SPARSE)

_GOOD: set[tuple[str, bytes, bytes, bytes]] = set()

DOWN = {0: wire.Roster, 1: wire.Routed, 2: wire.Survivors, 3: wire.Bundle, 4: wire.Result, 15: wire.Abort}
UP = {0: wire.Advertise, 1: wire.Shares, 2: wire.Masked, 3: wire.Consistent, 4: wire.Unmask, 15: wire.Abort}
LABELS = {0: "advertise", 1: "shares", 2: "masked", 3: "consistent", 4: "unmask"}


def named(code: str) -> str:
    """The code, if it is one of secure aggregation's."""
    assert code[:5] == "SS-60", code
    return code


@dataclass(frozen=True, slots=True)
class Said:
    """One message that left a client."""

    name: str
    stage: int
    body: bytes
    vector: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Masking:
    """A masked vector and what is public about its making: the server chose or routed all of it.

    Attributes:
        partners: members with whom the client has a pair mask.
    """

    name: str
    peers: Peers
    t2: bytes
    members: tuple[str, ...]
    partners: tuple[str, ...]
    vector: np.ndarray


@dataclass(frozen=True, slots=True)
class Opened:
    """One share that a client gave the server in stage 4; ``advert`` is the owner's, as the holder was shown it."""

    holder: str
    owner: str
    advert: wire.Advertise
    kind: str
    share: Share


@dataclass(slots=True)
class Truth:
    """What one client in one round knows, kept for colluders and for the judge; ``held`` by owner."""

    seed: bytes
    self_mask: bytes
    group: bytes
    channel: Channel
    advert: wire.Advertise
    contribution: np.ndarray | None = None
    held: dict[str, tuple[wire.Advertise, Held]] = field(default_factory=dict)


class Play(Cohort):
    """A cohort with a record of everything; see the module.

    Attributes:
        mode: a key of :data:`MODES`.
        queue: what the server has to say next; nothing of it was delivered yet.
        said: all that left clients.
        ended: code by client, for those that gave up.
        refused: code by client, for those whose message the honest server refused.
        truths: by client, one for every time that it began.
    """

    def __init__(self, mode: str, *, seed: str | None = None, **changes: object) -> None:
        super().__init__(config_of(mode, **changes), seed=seed)
        self.mode = mode
        self.queue: list[Delivery] = []
        self.said: list[Said] = []
        self.shown: list[Delivery] = []
        self.ended: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.truths: dict[str, list[Truth]] = {name: [] for name in self.config.roster}
        self.maskings: list[Masking] = []
        self.opened: list[Opened] = []

    # Clients.

    def verify(self, name: str, certificate: bytes, signature: bytes, data: bytes) -> None:
        """As the cohort's; what was good once is not computed again, which is most of the work of forty clients."""
        known = (name, certificate, signature, data)
        if known not in _GOOD:
            super().verify(name, certificate, signature, data)
            _GOOD.add(known)

    def begin(self, names: Iterable[str] | None = None) -> Play:
        """Contribute and advertise; the server hears it."""
        for name in self.config.roster if names is None else names:
            self.hear(name, self.advertise(name))
        return self

    def advertise(self, name: str) -> Outgoing:
        client = self.clients[name]
        if client.contribution is None:
            client.contribute(self.updates[name], self.weights[name])
        body = client.advertise()
        self._learn_secrets(name, body)
        out = Outgoing(wire.ADVERTISE, body, None)
        self.said.append(Said(name, *out))
        return out

    def _learn_secrets(self, name: str, advert: bytes) -> None:
        client, secrets = self.clients[name], self.clients[name]._secrets
        assert isinstance(secrets, RoundSecrets)
        self.truths[name].append(
            Truth(secrets.seed, secrets.self_mask, secrets.group, secrets.channel, wire.decode(wire.Advertise, advert), client.contribution)
        )  # fmt: skip

    def restart(self, name: str, persist: Callable[[object], None] | None = None) -> None:
        """The client's process dies and begins this round once more, with new secrets and the same update."""
        self.clients[name] = self.client(name)
        if persist is not None:
            self.clients[name]._persist = persist
        self.ended.pop(name, None)

    def tell(self, name: str, stage: int, body: wire.Body | bytes, vector: np.ndarray | None = None) -> list[Outgoing]:
        """Give one message to a client and record what leaves it: its answer, or one Abort and its code in ``ended``."""
        client, data = self.clients[name], _encoded(body)
        self.shown.append(Delivery(name, stage, data, vector))
        over = client.state in {State.ABORTED, State.DONE}
        try:
            due = client.receive(stage, data, None if vector is None else vector.copy())
        except SecureSplitError as error:
            self._gave_up(name, error, over)
            return []
        assert not over, f"{name} answers after the round's end"
        for out in due:
            self._note(name, out)
        if stage == wire.SHARES:
            self.truths[name][-1].held.update({o: (client._peers.of(o), held) for o, held in client._held.items()})
        return due

    def _gave_up(self, name: str, error: SecureSplitError, over: bool) -> None:
        client = self.clients[name]
        if over:
            assert isinstance(error, LocalProtocolError)
            assert error.code == "SS-6005"
            return
        # A named code, of the classes for remote faults; secrets are gone; and one Abort is all that may leave.
        assert isinstance(error, (AggregationAborted, RemoteProtocolError)), repr(error)
        assert named(error.code) == error.code
        assert (client.state, client._secrets, client._held, client._group) == (State.ABORTED, None, {}, b"")
        assert client.result is None
        self.ended[name] = error.code
        farewell = client.abort(error.code)
        assert farewell.stage == wire.ABORT
        assert farewell.vector is None
        assert wire.decode(wire.Abort, farewell.body).code == error.code
        self.said.append(Said(name, *farewell))

    def _note(self, name: str, out: Outgoing) -> None:
        client = self.clients[name]
        self.said.append(Said(name, out.stage, out.body, None if out.vector is None else out.vector.copy()))
        if out.stage == wire.MASKED:
            assert out.vector is not None
            partners = tuple(n for n in client._members if n != name and (n in client._holders or client._shares_of(n)))
            self.maskings.append(Masking(name, client._peers, client._t2, client._members, partners, out.vector.copy()))
        if out.stage == wire.UNMASK:
            self.opened += self.shares_in(name, wire.decode(wire.Unmask, out.body))

    def shares_in(self, holder: str, answer: wire.Unmask) -> list[Opened]:
        peers, x = self.clients[holder]._peers, self.config.position(holder)
        return [
            Opened(holder, owner, peers.of(owner), kind, Share(x, y))
            for kind, given in (("b", answer.self_shares), ("s", answer.seed_shares))
            for owner, y in given
        ]

    # The server, honest unless a hook says otherwise.

    def hear(self, name: str, out: Outgoing) -> None:
        """The honest server takes a message; who is refused is left behind."""
        try:
            self.queue += self.server.receive(name, *out)
        except RemoteProtocolError as error:
            self.refused[name] = named(error.code)
            self.queue += self.server.leave(name)

    def step(
        self,
        down: Callable[[Delivery], Iterable[Delivery]] | None = None,
        up: Callable[[str, Outgoing], Iterable[Outgoing]] | None = None,
    ) -> None:
        """Deliver all that waits, through the hooks; the server hears what comes back."""
        if not self.queue and not self.server.finished:
            self.queue = list(self.server.timeout())
        batch, self.queue = self.queue, []
        for honest in batch:
            for delivery in (honest,) if down is None else down(honest):
                self._deliver(delivery, up)

    def _deliver(self, delivery: Delivery, up: Callable[[str, Outgoing], Iterable[Outgoing]] | None) -> None:
        to, over = delivery.to, delivery.to in self.ended
        due = self.tell(*delivery)
        for out in due:
            for altered in (out,) if up is None else up(to, out):
                self.hear(to, altered)
        if to in self.ended and not over:
            self.hear(to, self._farewell(to))

    def _farewell(self, name: str) -> Outgoing:
        last = next(item for item in reversed(self.said) if item.name == name)
        return Outgoing(last.stage, last.body, last.vector)

    def finish(
        self,
        down: Callable[[Delivery], Iterable[Delivery]] | None = None,
        up: Callable[[str, Outgoing], Iterable[Outgoing]] | None = None,
    ) -> Play:
        """The rest of the round."""
        while self.queue or not self.server.finished:
            self.step(down, up)
        return self

    # For those who forge.

    def gullible(self) -> Play:
        """A hostile server does not refuse a client's message because it fits its lie."""
        self.server._verify = None
        return self

    def forge(
        self, change: Callable[[str, wire.Body], wire.Body | bytes], to: Iterable[str] | None = None
    ) -> tuple[str, ...]:
        """Alter what waits for some clients, or for all; their names."""
        names = self.config.roster if to is None else tuple(to)
        self.queue = [
            d._replace(body=_encoded(change(d.to, wire.decode(DOWN[d.stage], d.body)))) if d.to in names else d
            for d in self.queue
        ]
        return names

    def waiting(self, name: str) -> wire.Body:
        """What the honest server is about to tell a client."""
        delivery = next(d for d in self.queue if d.to == name)
        return wire.decode(DOWN[delivery.stage], delivery.body)

    def body(self, kind: type[wire.Body], **fields: object) -> wire.Body:
        c = self.config
        return kind.model_validate({"session": c.session_id, "round": c.round, "cfg": c.digest, **fields})

    def last(self, name: str, stage: int) -> Said:
        """What a client said last at a stage."""
        return next(item for item in reversed(self.said) if (item.name, item.stage) == (name, stage))

    def spoken(self, name: str, stage: int) -> wire.Body:
        return wire.decode(UP[stage], self.last(name, stage).body)

    def boxes(self) -> dict[tuple[str, str], bytes]:
        """(sender, receiver) -> the box that the sender last sealed."""
        return {
            (item.name, to): box
            for item in self.said
            if item.stage == wire.SHARES
            for to, box in wire.decode(wire.Shares, item.body).sealed
        }

    def routed(self, to: str, members: tuple[str, ...], *, without: Iterable[str] = ()) -> wire.Body:
        """Stage 1 for a client, over these members, all boxes in it that there are but those of ``without``."""
        boxes, kept_back = self.boxes(), set(without)
        sealed = tuple((n, boxes[n, to]) for n in members if (n, to) in boxes and n not in kept_back)
        return self.body(wire.Routed, members=members, sealed=sealed)

    def survivors(self, to: str, survivors: tuple[str, ...], members: tuple[str, ...] | None = None) -> wire.Body:
        """Stage 2 for a client, with the proofs that it wants in the sparse graph, as far as there are any."""
        members = self.config.roster if members is None else members
        proofs: tuple[tuple[str, bytes], ...] = ()
        if self.config.degree:
            owners = [n for n in survivors if n != to and self.clients[to]._shares_of(n)]
            proofs = tuple((n, self.last(n, wire.MASKED).body) for n in owners)
        dropped = tuple(n for n in members if n not in survivors)
        return self.body(wire.Survivors, survivors=survivors, dropped=dropped, masked=proofs)

    def bundle(self, signers: Iterable[str]) -> wire.Body:
        """Stage 3: what these clients signed last."""
        signatures = tuple((n, self.spoken(n, wire.CONSISTENT).signature) for n in sorted(signers))
        return self.body(wire.Bundle, signatures=signatures)

    def signed(self, name: str, stage: int, draft: wire.Body, transcript: bytes, secret: bytes = b"") -> wire.Body:
        """Sign a forged message as a client that colludes."""
        said = statement(LABELS[stage], transcript, wire.unsigned(draft) + secret)
        return draft.model_copy(update={"signature": self.identities[name].sign(said)})

    def clone(self) -> Play:
        """A copy that shares nothing that changes."""
        made: Play = _copied(self)
        made.clients = {name: _copied(client) for name, client in self.clients.items()}
        made.server = _copied(self.server)
        made.answered = {name: list(records) for name, records in self.answered.items()}
        made.truths = {name: [replace(t, held=dict(t.held)) for t in truths] for name, truths in self.truths.items()}
        for name, client in made.clients.items():
            client._persist = made.answered[name].append
        return made


def _encoded(body: wire.Body | bytes) -> bytes:
    return wire.encode(body) if isinstance(body, wire.Body) else body


def _copied(thing: T) -> T:
    """The same object with containers, vectors and machinery of its own; what cannot change is shared."""
    made = copy.copy(thing)
    for name, value in [(name, getattr(made, name)) for name in _attributes(made)]:
        if isinstance(value, (dict, list, set, np.ndarray)):
            setattr(made, name, value.copy())
        elif type(value).__module__ in _MACHINERY:
            setattr(made, name, _copied(value))
    return made


def _attributes(thing: object) -> list[str]:
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*getattr(thing, "__dict__", {}), *(name for name in slots if hasattr(thing, name))]


_MACHINERY = {"securesplit.aggregate.tally"}


def config_of(mode: str, **changes: object) -> RoundConfig:
    return make_config(**(MODES[mode] | changes))


@cache
def _honest(mode: str, stage: int, changes: tuple[tuple[str, object], ...]) -> Play:
    if stage == 0:
        return Play(mode, **dict(changes)).begin()
    play = _honest(mode, stage - 1, changes).clone()
    play.step()
    return play


def at(mode: str, stage: int, **changes: object) -> Play:
    """An honest round of this mode in which the server is about to send the messages of ``stage``; 5 is its end."""
    return _honest(mode, stage, tuple(changes.items())).clone()


OTHERS: dict[str, dict[str, object]] = {
    "another round": {"round": 2},
    "another session": {"session_id": hashlib.sha256(b"another session").digest()[:16]},
    "another configuration": {"clip": 0.25},
}
"""Where replayed messages come from."""


def elsewhere(mode: str, which: str) -> Play:
    """The same clients in a whole honest round elsewhere."""
    return at(mode, 5, **OTHERS[which])
