"""One audited site in a folder that is thrown away: its keys, its ledger, its peers, and a tap on its wire.

The keys are real, because a session and a secure sum sign with them; the authority is made for the audit and its folder
is deleted with it. The ledger's anchors lie in the same folder, so that an audit leaves no trace in the site's own.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from securesplit.admit import floors_of, round_config
from securesplit.aggregate.client import ClientRound
from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.fixedpoint import Words
from securesplit.aggregate.wire import ADVERTISE, Outgoing
from securesplit.client.dial import greet
from securesplit.client.link import Link
from securesplit.errors import ConnectionFailed
from securesplit.pki.authority import Authority
from securesplit.pki.certificate import verify_signature
from securesplit.pki.store import KeyFolder
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.ledger import Ledger
from securesplit.privacy.released import Codec
from securesplit.protocol.codec import Caps, decode
from securesplit.protocol.job import Adapters, Cut, Job, Optimiser, Schedule, Sums, Task
from securesplit.protocol.messages import Message, RoundBegin, RoundReady, Secagg
from securesplit.protocol.session import Party
from securesplit.protocol.words import vector_of, words_blob
from securesplit.transport.actions import Core
from securesplit.transport.memory import MemoryServer
from securesplit.transport.pipe import Pipe

SITE = "site"
SERVER = "server"
MODEL = "0" * 64
LARGEST = 64  # More clients would show nothing more and take long.
_ANY = Caps(message_bytes=1 << 40)


def job_for(policy: Policy, *, codec: Codec = "f32") -> Job:
    """A job that this policy admits, with the smallest cut and roster that it allows.

    Args:
        policy: the audited one.
        codec: of rows on the wire.
    """
    rules, limits = policy.aggregation, policy.limits
    clients = min(LARGEST, max(rules.min_clients, rules.min_threshold, 3))
    labels = policy.privacy.labels if isinstance(policy.privacy, Gaussian) else None
    names = None if labels is None else Task(labels=tuple(f"c{i}" for i in range(labels.classes)))
    return Job.model_validate(
        {
            "name": "audit", "model": "audit", "codec": codec,
            "cut": Cut(front=max(1, limits.min_front), back=max(1, limits.min_back)),
            "adapters": Adapters(rank=2, alpha=4.0, targets=("q_proj", "v_proj"), seed=7),
            "optimiser": Optimiser(client_lr=1e-2, server_lr=1e-2),
            "schedule": Schedule(rounds=1, epochs=1, batch=min(2, limits.max_sequences)),
            "sums": Sums(
                roster=(SITE, *(f"peer{i}" for i in range(1, clients))), threshold=max(rules.min_threshold, clients // 2 + 1),
                min_clients=clients, clip=rules.max_update, blind=rules.blind,
            ),
            "task": names,
        }
    )  # fmt: skip


def ring_of(job: Job, step: float) -> RoundConfig:
    """A round of this job, for its numbers: scale, clip and largest weight; ``step`` as in :class:`RoundReady`."""
    return round_config(job, model=MODEL, run=bytes(16), number=0, dim=1, frozen="0" * 64, step=step)


class Tap:
    """A pipe that keeps every byte that leaves, and lets the peers act after each message.

    Attributes:
        sent: whole messages, in order.
    """

    def __init__(self, inner: Pipe, cohort: Cohort) -> None:
        self.sent: list[bytes] = []
        self._inner, self._cohort = inner, cohort

    def send(self, data: bytes) -> None:
        """See :class:`Pipe`."""
        self.sent.append(data)
        self._inner.send(data)
        if isinstance(message := decode(data, _ANY), RoundReady):
            self._cohort.mirror(message)
        self._cohort.act()

    def receive(self, timeout: float | None = None) -> bytes:
        """See :class:`Pipe`."""
        return self._inner.receive(timeout)

    def close(self) -> None:
        """See :class:`Pipe`."""
        self._inner.close()

    def messages(self, *, since: int = 0) -> list[Message]:
        """What left, parsed from its bytes as a server parses it."""
        return [decode(data, _ANY) for data in self.sent[since:]]


class Cohort:
    """A site, its peers and a server, joined in memory.

    Args:
        folder: empty or new; keys and the ledger are made there.
        policy: the site's own, and the peers'.
        job: what the server offers.
        core: the server.

    Attributes:
        link, tap: the site's session, and what left through it.
        alike: what the site says that all clients hold alike; its peers say the same.
    """

    def __init__(self, folder: Path, policy: Policy, job: Job, core: Core) -> None:
        self.folder, self.policy, self.job = folder, policy, job
        authority = Authority.create(folder / "keys")
        authority.issue(SERVER, "server")
        authority.issue(SITE, "client")
        self._authority, self._server = authority, MemoryServer(core)
        self._keys = KeyFolder.open(folder / "keys" / SERVER, "server")
        self._peers: tuple[Peer, ...] = ()
        self.alike = b""
        mine = self._folder(SITE)
        self.tap = Tap(self._pipe(mine), self)
        self.link = self._greet(self.tap, mine)

    def rejoin(self) -> None:
        """Dial again, as a new process of the site does; what left before stays on the tap."""
        mine, before = self._folder(SITE), self.tap.sent
        self.tap = Tap(self._pipe(mine), self)
        self.tap.sent = before
        self.link = self._greet(self.tap, mine)

    def ledger(self, kind: type[Ledger] = Ledger) -> Ledger:
        """Open the site's ledger, as a start of the site's process does."""
        return kind(self.folder / "ledger", anchors=self.folder / "anchors")

    def invite(self) -> None:
        """Let the peers join; they take part in whatever sum the site is ready for, with updates of zeros."""
        for name in self.job.sums.roster if not self._peers else ():
            if name != SITE:
                self._authority.issue(name, "client")
                folder = self._folder(name)
                self._peers += (Peer(self._greet(self._pipe(folder), folder), folder, self.policy),)

    def mirror(self, ready: RoundReady) -> None:
        """Let the peers be ready for the same sum as the site."""
        for peer in self._peers:
            peer.ready(ready, self.alike)

    def act(self) -> None:
        """Let every peer answer what has arrived, until nothing is left."""
        while any(peer.act() for peer in self._peers):
            pass

    def words(self) -> Words:
        """The site's own words in the last sum, (d+1,) in the ring: a colluding peer takes the zeros of the rest away."""
        opened = self._peers[0].party
        assert opened is not None
        assert opened.result is not None
        words: Words = opened.result.ring_sum.copy()
        for peer in self._peers:
            assert peer.party is not None
            assert peer.party.contribution is not None
            words -= peer.party.contribution
        return words

    def _folder(self, name: str) -> KeyFolder:
        return KeyFolder.open(self.folder / "keys" / name, "client")

    def _pipe(self, folder: KeyFolder) -> Pipe:
        theirs = Party(self._keys.cert_der, folder.cert_der, self._keys.sign, verify_signature)
        return self._server.connect(folder.identity.name, theirs)

    def _greet(self, pipe: Pipe, folder: KeyFolder) -> Link:
        party = Party(folder.cert_der, self._keys.cert_der, folder.sign, verify_signature)
        link = greet(pipe, party, self.policy, name=folder.identity.name, server=SERVER)
        link.folder = folder
        return link


class Peer:
    """Another client, which brings zeros to every sum and acts when it is let.

    Args:
        link: its session.
        folder: its keys.
        policy: its own.

    Attributes:
        party: its side of the sum that runs or ran last.
    """

    def __init__(self, link: Link, folder: KeyFolder, policy: Policy) -> None:
        self.link = link
        self.party: ClientRound | None = None
        self._folder, self._policy = folder, policy
        self._ready: RoundReady | None = None
        self._alike = b""

    def ready(self, message: RoundReady, alike: bytes) -> None:
        """Be ready for a sum, holding what the site holds."""
        self._ready, self._alike = message, alike
        self.link.tell(message)

    def act(self) -> bool:
        """Answer one message; False when none has arrived."""
        with suppress(ConnectionFailed):  # An empty inbox.
            match self.link.next():
                case RoundBegin(run=run):
                    self._begin(run)
                case Secagg() as message:
                    self._answer(message)
                case _:
                    pass
            return True
        return False

    def _begin(self, run: bytes) -> None:
        ready, name = self._ready, self.link.name
        assert ready is not None
        config = round_config(
            self.link.job, model=self.link.model, run=run, number=ready.round, dim=ready.dim, frozen=ready.frozen,
            step=ready.step,
        )  # fmt: skip

        floors = floors_of(self._policy)
        if ready.step:  # The ring's clip follows from the shared noise, not from the policy's largest update.
            floors = replace(floors, max_update=math.inf)

        def verify(_: str, certificate: bytes, signature: bytes, data: bytes) -> None:
            self._folder.verify_peer(certificate, "client")
            verify_signature(certificate, signature, data)

        self.party = ClientRound(
            config, name, self._folder.cert_der, sign=self._folder.sign, verify=verify,
            floors=floors, persist=lambda _answer: None,
            alike=self._alike,
        )  # fmt: skip
        self.party.contribute(np.zeros(ready.dim), 1)
        self._tell(ready.round, Outgoing(ADVERTISE, self.party.advertise(), None))

    def _answer(self, message: Secagg) -> None:
        assert self.party is not None
        for outgoing in self.party.receive(message.stage, message.body, vector_of(message.vector)):
            self._tell(message.round, outgoing)

    def _tell(self, number: int, outgoing: Outgoing) -> None:
        vector = words_blob(outgoing.vector)
        self.link.tell(Secagg(round=number, stage=outgoing.stage, body=outgoing.body, vector=vector))
