"""The client's part of a secure sum, over a link. The protocol itself is securesplit/aggregate/client.py."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from securesplit.admit import floors_of, round_config, weight_cap
from securesplit.aggregate.answered import Answer, AnswerLog
from securesplit.aggregate.client import ClientRound
from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.fixedpoint import Aggregate, Words, vector_digest
from securesplit.aggregate.record import encode_record, record_name
from securesplit.aggregate.roster import Verify
from securesplit.aggregate.wire import ADVERTISE, Outgoing
from securesplit.client.attempts import Attempts
from securesplit.client.link import Link
from securesplit.errors import AggregationAborted, ConnectionFailed, LocalProtocolError, SecureSplitError
from securesplit.pki.certificate import verify_signature
from securesplit.pki.files import write_atomically
from securesplit.pki.store import KeyFolder
from securesplit.policy.schema import Policy
from securesplit.privacy.gate import ReleasedUpdate
from securesplit.protocol.messages import Secagg
from securesplit.protocol.words import vector_of, words_blob

RECONNECTS = 20
"""How often, in one round."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What of a sum must be on disk, beside what follows from it, before a client says that it keeps it.

    Attributes:
        run: name of the run that gave it, 16 bytes.
        clients: names of the clients in it.
        words: SHA-256 of the opened words, by which one more run of the same round is compared.
    """

    run: bytes
    clients: tuple[str, ...]
    words: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """What a secure sum gave this client.

    Attributes:
        aggregate: the opened sum.
        heard: see :class:`ClientRound`.
        contribution: this client's own quantised part of it, for checks on this site.
        run: name of the run that gave it.
    """

    aggregate: Aggregate = field(repr=False)
    heard: bytes
    contribution: Words = field(repr=False)
    run: bytes = b""

    @property
    def kept(self) -> Kept:
        """What to put on disk for :func:`close_sum`."""
        return Kept(self.run, self.aggregate.survivors, vector_digest(self.aggregate.ring_sum))


@dataclass(frozen=True, slots=True, eq=False)
class Brought:
    """What a client brings into a round: the same at every attempt, when others need the sum once more, and after a restart.

    Attributes:
        folder: signs for this client and verifies the others.
        policy: gives the floors.
        update: (d,), from the gate.
        weight: number of records behind it; capped at 255, or at 1 where every update counts once.
        number: the round.
        frozen: digest of what all clients must hold alike.
        answers: remembers on disk which rounds were answered.
        alike: digest of what all clients must hold alike and the server must not learn.
        origin: names what the update starts from, so that it enters sums over one set of clients only; empty for zeros of a
            client that does not learn in this round, which show nothing whatever they are summed with.
        records: directory for the round's record, which ``securesplit aggregate verify`` reads; None for none.
    """

    folder: KeyFolder = field(repr=False)
    policy: Policy
    update: ReleasedUpdate = field(repr=False)
    weight: int
    number: int
    frozen: str
    answers: AnswerLog = field(repr=False)
    origin: bytes
    alike: bytes = b""
    records: Path | None = None

    @property
    def idle(self) -> bool:
        """Whether it brings public zeros."""
        return not self.origin and not self.update.vector.any()

    def pinned(self, *, tried_again: bool) -> bytes:
        """Names the update to :class:`AnswerLog`, so that it enters sums over one set of clients only; empty when it may not care.

        An update with noise of its own is drawn, and paid, once, and then enters as many runs as it takes. Where its noise is
        a part of the sum's, two sums that differ by one client show that client's update with that part alone. So what was
        released is named by its own bytes; and a round that is tried again has one sum at most, whatever its updates are.
        """
        if self.idle:
            return b""
        if not self.update.noised:
            return self.origin
        if self.update.honest == 1 and not tried_again:
            return b""
        return hashlib.sha256(b"securesplit.released.v1|" + self.update.vector.astype("<f8").tobytes()).digest()


def secure_sum(
    link: Link,
    folder: KeyFolder,
    policy: Policy,
    update: ReleasedUpdate,
    *,
    weight: int,
    number: int,
    frozen: str,
    answers: AnswerLog,
    origin: bytes,
    alike: bytes = b"",
    records: Path | None = None,
) -> Opened:
    """Take part in one round. A connection that breaks on the way is made anew, and what was said last is said again.

    In a job with ``sums.attempts`` a run that is lost with a connection, a client or the server is tried again, with the same
    update under fresh keys; :func:`close_sum` ends such a round, once the sum is on disk.

    Args:
        link: an open session.
        folder, policy, update, weight, number, frozen, answers, origin, alike, records: see :class:`Brought`.

    Returns:
        The opened sum, and this client's part of it.

    Raises:
        AggregationAborted: SS-60xx; no partial sum is returned. SS-6031 when all attempts were lost, naming who was missing.
    """
    brought = Brought(folder, policy, update, weight, number, frozen, answers, origin, alike, records)
    return Attempts(link, number).run(lambda: _attempt(link, brought))


def close_sum(link: Link, brought: Brought, kept: Kept) -> None:
    """End a round whose sum is on this client's disk: wait until every client of the sum has it, and help those who lack it.

    A client that was killed before it had put the sum on disk begins the round again. Those who keep it give the same update
    once more, over the same clients, and compare. In a job without ``sums.attempts`` nothing is said and nobody waited for.

    Args:
        link: an open session; after a restart it is another than the sum's.
        brought: what entered the round, byte for byte.
        kept: of the sum.

    Raises:
        AggregationAborted: SS-6031 when all attempts were lost; SS-6032 when the sum came out otherwise than before. What is
            on disk is good all the same, and this may be called again.
    """
    if link.job.sums.attempts is None:
        return
    attempts = Attempts(link, brought.number)
    while (begun := attempts.run(lambda: link.sums.kept(brought.number, kept.run, kept.clients))) is not None:
        run = begun.run
        with attempts.spared():
            again = _attempt(link, brought, begun=run, only=kept.clients)
            if vector_digest(again.aggregate.ring_sum) != kept.words:
                raise AggregationAborted(
                    "SS-6032",
                    "the same updates were summed once more and gave another sum",
                    hint="The server altered one of the two, or a client did not give the same update again.",
                )
            attempts.fresh()
            link.sums.donor.goes_on()


def _attempt(link: Link, brought: Brought, *, begun: bytes = b"", only: tuple[str, ...] = ()) -> Opened:
    """One run of a round; ``begun`` is its name if it has begun, ``only`` the clients that it must be over."""
    b, step, line = brought, brought.update.step, _Line(link)
    dim, number = len(b.update.vector), b.number
    run = begun or line.ready(number, dim=dim, frozen=b.frozen, step=step)
    link.sums.donor.waits()  # What this client holds is about to change.
    config = round_config(link.job, model=link.model, run=run, number=number, dim=dim, frozen=b.frozen, step=step)
    pinned = b.pinned(tried_again=link.job.sums.attempts is not None)
    with ExitStack() as stack:
        stack.enter_context(_logged(link, number, run))
        worker = None
        if config.backend != "masks":
            from securesplit.aggregate.he_worker import HeWorker

            worker = stack.enter_context(HeWorker())
        party = ClientRound(
            config, link.name, b.folder.cert_der, sign=b.folder.sign, verify=verifier(b.folder),
            floors=floors_of(b.policy, honest=b.update.honest), persist=_answering(b.answers, only), noised=b.idle or (not pinned and b.update.noised),
            alike=b.alike, origin=pinned, worker=worker,
        )  # fmt: skip
        try:
            _give(line, config, party, b.update, min(max(b.weight, 1), weight_cap(link.job, step)))
            _run(line, config, party)
        except SecureSplitError as error:
            party.abort(error.code)  # Nothing is sent by that; a lost connection leaves a record with its code, too.
            link.sums.missing = party.absent or link.sums.missing
            link.sums.donor.goes_on()
            raise
        finally:  # Of a round that was given up too: it may show who is to blame.
            if b.records is not None:
                record = encode_record(party.record(int(time.time())))
                write_atomically(b.records / record_name(config), record, mode=0o600)
    assert party.result is not None
    assert party.contribution is not None
    return Opened(party.result, party.heard, party.contribution, run)


def _answering(answers: AnswerLog, only: tuple[str, ...]) -> Callable[[Answer], None]:
    """Makes an answer durable; in a run by which others are to get a sum, for no other clients than those of the sum."""

    def persist(answer: Answer) -> None:
        if only and set(answer.survivors) != set(only):
            raise AggregationAborted(
                "SS-6034",
                "a sum that is to be made once more would be over other clients than before",
                hint="It is tried again when all of them are here.",
            )
        answers(answer)

    return persist


@contextmanager
def _logged(link: Link, number: int, run: bytes) -> Iterator[None]:
    """A secure sum, in the audit log from its beginning to its end or to the code that ended it."""
    if (diary := link.diary) is None:
        yield
        return
    diary.round("started", number, run)
    try:
        yield
    except SecureSplitError as error:
        diary.round("refused", number, run, code=error.code)
        raise
    diary.round("ended", number, run)
    with suppress(ConnectionFailed):  # Who has its sum needs nothing more of a server that is gone.
        link.checkpoint()


def verifier(folder: KeyFolder) -> Verify:
    """Checks another client's certificate, its name and its signature by this client's own authority."""

    def verify(name: str, certificate: bytes, signature: bytes, data: bytes) -> None:
        identity = folder.verify_peer(certificate, "client")
        if identity.name != name:
            raise ConnectionFailed("SS-3213", "a certificate in the round belongs to another client")
        verify_signature(certificate, signature, data)

    return verify


class _Line:
    """A link that is made anew when it breaks; what was said last is then said again, byte for byte."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._left = RECONNECTS
        self._heard: tuple[int, bytes] | None = None

    def ready(self, number: int, *, dim: int, frozen: str, step: float) -> bytes:
        """Wait until the round begins; its name."""
        while True:
            try:
                return self._link.sums.ready(number, dim=dim, frozen=frozen, step=step)
            except ConnectionFailed as lost:
                self._again(lost)

    def say(self, message: Secagg) -> None:
        """Send."""
        while True:
            try:
                return self._link.tell(message)
            except ConnectionFailed as lost:
                self._again(lost)

    def hear(self, last: Secagg) -> Secagg:
        """Receive what follows ``last``.

        Whoever is back before the others have spoken gets what follows once when they have, and once more because it
        repeats itself: the second time is passed over.
        """
        while True:
            try:
                message = self._link.sums.secagg()
            except ConnectionFailed as lost:
                self._again(lost)
                self.say(last)
                continue
            if (heard := (message.stage, message.body)) != self._heard:
                self._heard = heard
                return message

    def farewell(self, message: Secagg) -> None:
        """Send if that is possible at once. The server notices a connection that is gone by itself."""
        with suppress(SecureSplitError):
            self._link.tell(message)

    def _again(self, lost: ConnectionFailed) -> None:
        self._left -= 1
        if self._left < 0:  # A server that lets a client in and drops it at once must not keep it for ever.
            raise lost
        self._link.reconnect(lost, within=self._link.job.sums.patience)


def _give(line: _Line, config: RoundConfig, party: ClientRound, update: ReleasedUpdate, weight: int) -> None:
    try:
        clipped = party.contribute(update.vector, weight)
        if clipped and update.step:  # Noise that is cut off is noise that the others lack.
            raise LocalProtocolError(
                "SS-6011", "an update with its noise does not fit the ring", hint="Nothing was sent."
            )
    except SecureSplitError as error:  # The others were told that this client is ready; they need not wait for it.
        line.farewell(_message(config, party.abort(error.code)))
        raise


def _run(line: _Line, config: RoundConfig, party: ClientRound) -> None:
    last = _message(config, Outgoing(ADVERTISE, party.advertise(), None))
    line.say(last)
    while party.result is None:
        message = line.hear(last)
        try:
            due = party.receive(message.stage, message.body, vector_of(message.vector))
        except SecureSplitError as error:
            if error.code.startswith("SS-60"):  # Nobody should wait for this client until the stage times out.
                line.farewell(_message(config, party.abort(error.code)))
            raise
        while due:  # Taken out one by one: a vector is freed as soon as its message holds it.
            last = _message(config, due.pop(0))
            line.say(last)


def _message(config: RoundConfig, outgoing: Outgoing) -> Secagg:
    vector = words_blob(outgoing.vector)
    return Secagg(round=config.round, stage=outgoing.stage, body=outgoing.body, vector=vector)
