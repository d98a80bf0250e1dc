"""The far end of the audited path: a server that keeps what it decodes and computes nothing.

Everything between a client's gate and B's input is the product's own: link, session, codec, framing, caps, secure sums.
Only B is missing, whose output is zeros of the right shape, because what the server could compute afterwards is
post-processing.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from securesplit.admit import round_config
from securesplit.aggregate.config import RoundConfig
from securesplit.errors import RemoteProtocolError, SecureSplitError
from securesplit.protocol.codec import Caps
from securesplit.protocol.job import Job
from securesplit.protocol.messages import (
    Backward,
    Blob,
    Bye,
    Failure,
    Forward,
    Gradient,
    Hello,
    Hidden,
    Message,
    RoundReady,
    Secagg,
)
from securesplit.protocol.session import Party, Session
from securesplit.server.sums import Outbound, Patience, Sums
from securesplit.transport.actions import Action, Close, Send
from securesplit.transport.tensors import tensor_of


class Receiver:
    """A :class:`securesplit.transport.actions.Core` without B.

    Args:
        job: offered to every client.
        model: digest of a model's manifest; of none, here.
        caps: what is accepted.

    Attributes:
        seen: every tensor of rows that arrived, (rows, columns), as B would receive it, before the public gain.
    """

    def __init__(self, job: Job, *, model: str, caps: Caps) -> None:
        self.seen: list[Tensor] = []
        self._job, self._model, self._caps = job, model, caps
        self._sessions: dict[int, tuple[str, Session]] = {}

        def config_of(run: bytes, ready: RoundReady) -> RoundConfig:
            return round_config(
                job, model=model, run=run, number=ready.round, dim=ready.dim, frozen=ready.frozen, step=ready.step
            )

        self._sums = Sums(
            roster=job.sums.roster, quorum=job.sums.min_clients, patience=Patience(60.0, 60.0, 60.0), config_of=config_of,
            randomness=os.urandom,
        )  # fmt: skip

    def welcome(self, name: str) -> None:
        """See :class:`Core`; everybody is."""

    def allowance(self, connection: int, start: bytes) -> int:
        """See :class:`Core`."""
        return self._sessions[connection][1].allowance(start)

    def reject(self, connection: int, error: SecureSplitError) -> list[Action]:
        """See :class:`Core`."""
        return [Close(connection, error.code)]

    def connect(self, name: str, party: Party) -> int:
        """See :class:`Core`."""
        number = len(self._sessions) + 1
        self._sessions[number] = (name, Session("server", party, self._caps))
        return number

    def receive(self, connection: int, data: bytes) -> list[Action]:
        """See :class:`Core`."""
        name, session = self._sessions[connection]
        message = session.receive(data)
        match message:
            case Hello():
                session.offer(session=os.urandom(16), nonce=os.urandom(32), job=self._job, model=self._model)
                return self._flush(connection)
            case Forward():
                self.seen.append(tensor_of(message.hidden))
                return self._reply(connection, Hidden(step=message.step, hidden=_zeros(message.hidden)))
            case Backward():
                self.seen.append(tensor_of(message.gradient))
                return self._reply(connection, Gradient(step=message.step, gradient=_zeros(message.gradient)))
            case RoundReady():
                return self._deliver(self._sums.ready(name, message, 0.0))
            case Secagg():
                return self._deliver(self._sums.receive(name, message, 0.0))
            case Bye() | Failure():
                return [Close(connection)]
            case _:
                return []

    def complete(self, connection: int, result: object) -> list[Action]:
        """See :class:`Core`; nothing is ever computed apart."""
        del connection, result
        return []

    def disconnect(self, connection: int) -> list[Action]:
        """See :class:`Core`."""
        del connection
        return []

    def tick(self, now: float) -> list[Action]:
        """See :class:`Core`."""
        del now
        return []

    def take(self) -> Tensor:
        """The one tensor that arrived since the last call.

        Raises:
            RemoteProtocolError: SS-4010 when none or several did.
        """
        seen, self.seen = self.seen, []
        if len(seen) != 1:
            raise RemoteProtocolError("SS-4010", "a release did not arrive as exactly one tensor")
        return seen[0]

    def _reply(self, connection: int, message: Message) -> list[Action]:
        self._sessions[connection][1].send(message)
        return self._flush(connection)

    def _flush(self, connection: int) -> list[Action]:
        return [Send(connection, data) for data in self._sessions[connection][1].data_to_send()]

    def _deliver(self, outbound: list[Outbound]) -> list[Action]:
        numbers = {name: number for number, (name, _) in self._sessions.items()}
        return [action for item in outbound for action in self._reply(numbers[item.to], item.message)]


def _zeros(like: Blob) -> Blob:
    return Blob(dtype=like.dtype, shape=like.shape, data=bytes(len(like.data)))


def as_rows(seen: Tensor, shape: tuple[int, int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """What arrived as (B, T, D) float64."""
    return seen.to(torch.float64).reshape(shape).numpy()
