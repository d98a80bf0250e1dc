"""The client's part of a secure sum, over a link. The protocol itself is securesplit/aggregate/client.py."""

from __future__ import annotations

import numpy as np

from securesplit.admit import WEIGHT_CAP, round_config
from securesplit.aggregate.answered import AnswerLog
from securesplit.aggregate.client import ClientRound
from securesplit.aggregate.config import Floors
from securesplit.aggregate.fixedpoint import Aggregate, Words
from securesplit.aggregate.wire import Outgoing
from securesplit.client.link import Link
from securesplit.errors import ConnectionFailed, SecureSplitError
from securesplit.pki.certificate import verify_signature
from securesplit.pki.store import KeyFolder
from securesplit.policy.schema import Policy
from securesplit.privacy.gate import ReleasedUpdate
from securesplit.protocol.messages import Blob, Secagg


def floors_of(policy: Policy) -> Floors:
    """What this client insists on."""
    rules = policy.aggregation
    return Floors(
        min_clients=rules.min_clients, min_threshold=rules.min_threshold, max_update=rules.max_update, blind=rules.blind
    )


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
) -> tuple[Aggregate, Words]:
    """Take part in one round.

    Args:
        link: an open session.
        folder: signs for this client and verifies the others.
        policy: gives the floors.
        update: (d,), from the gate.
        weight: number of records behind it; capped at 255.
        number: the round.
        frozen: digest of what all clients must hold alike.
        answers: remembers on disk which rounds were answered.

    Returns:
        The opened sum, and this client's own quantised part of it, for checks on this site.

    Raises:
        AggregationAborted: SS-60xx; no partial sum is returned.
    """
    dim = len(update.vector)
    run = link.ready(number, dim=dim, frozen=frozen)
    config = round_config(link.job, model=link.model, run=run, number=number, dim=dim, frozen=frozen)

    def verify(name: str, certificate: bytes, signature: bytes, data: bytes) -> None:
        identity = folder.verify_peer(certificate, "client")
        if identity.name != name:
            raise ConnectionFailed("SS-3213", "a certificate in the round belongs to another client")
        verify_signature(certificate, signature, data)

    party = ClientRound(
        config, link.name, folder.cert_der, sign=folder.sign, verify=verify, floors=floors_of(policy), persist=answers
    )
    party.contribute(update.vector, min(max(weight, 1), WEIGHT_CAP))
    assert party.contribution is not None
    _send(link, number, Outgoing(0, party.advertise(), None))
    while party.result is None:
        message = link.secagg()
        vector = np.frombuffer(message.vector.data, dtype="<u4") if message.vector.shape != (0,) else None
        try:
            answers_due = party.receive(message.stage, message.body, vector)
        except SecureSplitError as error:
            if error.code.startswith("SS-60"):  # Nobody should wait for this client until the stage times out.
                _send(link, number, party.abort(error.code))
            raise
        for outgoing in answers_due:
            _send(link, number, outgoing)
    return party.result, party.contribution


def _send(link: Link, number: int, outgoing: Outgoing) -> None:
    vector = outgoing.vector if outgoing.vector is not None else np.zeros(0, dtype=np.uint32)
    blob = Blob(dtype="u32", shape=(len(vector),), data=vector.astype("<u4").tobytes())
    link.tell(Secagg(round=number, stage=outgoing.stage, body=outgoing.body, vector=blob))
