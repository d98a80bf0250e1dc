"""Clients that come late, and those who help them on. The pure part is securesplit/aggregate/handover.py.

A client that was away while rounds went on, or is there for the first time, asks the others for what all of them hold in
common where a round begins; with that it is where they are. What it missed it does not learn: no sum of those rounds holds
anything of its texts, and nothing of them was released in those rounds.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from securesplit.aggregate.handover import Answers, Common, Sealed, Wanted, seal_answer
from securesplit.aggregate.keys import Channel
from securesplit.client.client import Client
from securesplit.client.link import FINAL
from securesplit.client.rounds import verifier
from securesplit.client.sharing import turn_in
from securesplit.errors import AggregationAborted, ConnectionFailed, SecureSplitError
from securesplit.model.lora import Learned
from securesplit.pki.store import KeyFolder
from securesplit.protocol.messages import Blob, Handover, Join

__all__ = ["HelpsLate", "catch_up", "common_at", "take_over"]

_MOST = 4
"""Answers with values, for one client and round: more would be work for nothing."""
_ANEW = 60.0
"""Seconds after which a client asks anew, so that another one gives the values; twice as many each time, for slow lines."""
_FIRST, _LONGEST = 0.05, 2.0


def _common_factor(client: Client) -> Learned | None:
    return turn_in(client.job, 0).common  # The same in every round of a job.


def common_at(client: Client, number: int, heard: bytes) -> Common:
    """What this client holds in common with the others, where a round begins, before its own work in it."""
    return Common(number, heard, client.read(_common_factor(client)))


def take_over(client: Client, common: Common) -> None:
    """Put it into A and C. What is this site's own stays.

    Raises:
        AggregationAborted: SS-6037 when it is none of this job's.
    """
    factor = _common_factor(client)
    fits = common.round <= client.job.schedule.rounds and common.values.shape == client.read(factor).shape
    if not fits or not np.isfinite(common.values).all():
        raise AggregationAborted(
            "SS-6037",
            "what the others handed over does not fit this job's adapters",
            hint="Enough of them signed it; run the same release everywhere, and ask them.",
        )
    client.write(common.values, factor)
    client.gate.received()


class HelpsLate:
    """Implements :class:`securesplit.client.summing.Donor` for one run.

    Args:
        client: whose adapters.
        folder: signs for it, and verifies the others.
    """

    def __init__(self, client: Client, folder: KeyFolder) -> None:
        self._client, self._folder = client, folder
        self._common: Common | None = None
        self._waits = False
        self._asked: dict[str, Join] = {}
        self._given: Counter[tuple[str, int]] = Counter()

    def settle(self, common: Common) -> None:
        """A round begins from here; those who asked meanwhile are answered."""
        self._client.gate.settled(common.payload)
        self._common = common
        self.goes_on()

    def asked(self, join: Join) -> None:
        """See :class:`securesplit.client.summing.Donor`. One that is not signed as it must be is passed over."""
        if join.name not in self._client.job.sums.roster:
            return
        if self._waits or self._common is None:
            self._asked[join.name] = join
        elif self._client.link.alive and (answer := self._answer(join, self._common)) is not None:
            self._client.link.tell(answer)

    def waits(self) -> None:
        """See :class:`securesplit.client.summing.Donor`."""
        self._waits = True

    def goes_on(self) -> None:
        """See :class:`securesplit.client.summing.Donor`."""
        self._waits = False
        waiting, self._asked = self._asked, {}
        with suppress(ConnectionFailed):  # They ask again when this client is connected again.
            for join in waiting.values():
                self.asked(join)

    def _answer(self, join: Join, common: Common) -> Handover | None:
        client, link, folder = self._client, self._client.link, self._folder
        if join.name == link.name or common.round < join.round:
            return None
        wanted = Wanted(client.job.digest, link.model, join.round, join.name, join.key)
        whole = join.whole and self._given[join.name, common.round] < _MOST
        try:
            verifier(folder)(join.name, join.certificate, join.signature, wanted.statement)
            self._given[join.name, common.round] += whole
            values = client.gate.release_common(common.payload, whole=whole).payload
            sealed = seal_answer(
                wanted, common, name=link.name, certificate=folder.cert_der, values=values, sign=folder.sign, randomness=os.urandom
            )  # fmt: skip
        except SecureSplitError:
            return None
        box = Blob(dtype="u8", shape=(len(sealed.box),), data=sealed.box)
        return Handover(to=join.name, of=link.name, asked=join.key, key=sealed.key, box=box)


def catch_up(
    client: Client, folder: KeyFolder, number: int, *, progress: Callable[[str], None], within: float
) -> Common | None:
    """What the others hold in common, when rounds went on without this client.

    Args:
        client: this site, with an open link or one that can be opened anew.
        folder: signs for it, and verifies the others.
        number: its next round.
        progress: told what is waited for.
        within: seconds to wait for the others.

    Returns:
        None when no round went on without it, as the server says. A server that hides rounds costs this client a refused
        round, and its texts nothing.

    Raises:
        AggregationAborted: SS-6036 when too few of the others answered alike in time. ConnectionFailed.
    """
    deadline, anew, pause = time.monotonic() + within, _ANEW, _FIRST
    while True:
        try:
            return _ask(client, folder, number, progress, min(deadline, time.monotonic() + anew))
        except ConnectionFailed as lost:
            left = deadline - time.monotonic()
            if lost.code in FINAL or left <= 0:
                raise
            time.sleep(
                min(pause, left)
            )  # A server that lets a client in and drops it at once is not asked without a break.
            pause = min(2 * pause, _LONGEST)
            client.link.reconnect(lost, within=left)
        except AggregationAborted as few:
            if few.code != "SS-6036" or time.monotonic() >= deadline:
                raise
            anew *= 2
        finally:
            client.link.sums.caught_up()


def _ask(
    client: Client, folder: KeyFolder, number: int, progress: Callable[[str], None], deadline: float
) -> Common | None:
    link, sums = client.link, client.job.sums
    if not link.alive:
        raise ConnectionFailed("SS-3020", "the server closed the connection")
    channel = Channel(os.urandom(32))
    wanted = Wanted(client.job.digest, link.model, number, link.name, channel.public)
    join = Join(
        round=number, name=link.name, certificate=folder.cert_der, key=channel.public, signature=folder.sign(wanted.statement)
    )  # fmt: skip
    if not link.sums.late(join):
        return None
    needed = max(sums.threshold - 1, 1)
    answers = Answers(wanted, channel, roster=sums.roster, needed=needed, verify=verifier(folder))
    while True:
        progress(f"rounds went on without this client: {answers.agreed} of {needed} others have told where they are")
        try:
            if (left := deadline - time.monotonic()) <= 0:
                raise ConnectionFailed("SS-3021", "what came was no answer that counts")
            answer = link.sums.handed(within=left)
        except ConnectionFailed as silent:
            if silent.code != "SS-3021":
                raise
            raise _too_few(answers, needed) from None
        if (common := answers.take(answer.of, Sealed(answer.key, answer.box.data))) is not None:
            return common


def _too_few(answers: Answers, needed: int) -> AggregationAborted:
    bad = f"; what came in the name of {', '.join(answers.refused)} was no answer of theirs" if answers.refused else ""
    return AggregationAborted(
        "SS-6036",
        f"rounds went on without this client, and {answers.agreed} of {needed} others told alike in time where they are{bad}",
        hint="Start it again with --resume when the others are there; if they have finished the job, nobody is left to ask.",
    )
