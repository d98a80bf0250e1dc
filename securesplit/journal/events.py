"""What may stand in an audit log: a closed set of kinds, each with a closed set of typed fields.

Every text field has a pattern, and none of them fits a sentence: an address, an identity, a code, a digest. So no text,
token, tensor or key of anybody can get into a log, however a peer tries, and a log may be handed to an auditor as it is.
An identity stands only where the certificate was verified; before that there is the address alone.

What this does not keep from whoever reads a log: who worked with whom, when, how much, and by which steps.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

__all__ = [
    "KINDS", "Accepted", "Any", "Began", "Checkpoint", "Closed", "Continued", "Ended", "Event", "Loaded", "Opened",
    "PeerHead", "Quota", "Refused", "Released", "Reloaded", "Round", "Served", "SignedHead", "Torn", "read_event",
]  # fmt: skip

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"

Address = Annotated[str, Field(pattern=r"^(?:memory|[0-9.]{7,15}:[0-9]{1,5}|\[[0-9a-f:.]{2,45}\]:[0-9]{1,5})?$")]
Uri = Annotated[
    str,
    Field(
        max_length=400,
        pattern=rf"^(?:spiffe://{_LABEL}(?:\.{_LABEL})*/securesplit/(?:client|server)/[a-z0-9][a-z0-9-]{{0,62}})?$",
    ),
]
Code = Annotated[str, Field(pattern=r"^(?:SS-[0-9]{4})?$")]
Failed = Annotated[str, Field(pattern=r"^SS-[0-9]{4}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
MaybeDigest = Annotated[str, Field(pattern=r"^(?:[0-9a-f]{64})?$")]
LogId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
MaybeId = Annotated[str, Field(pattern=r"^(?:[0-9a-f]{32})?$")]
Serial = Annotated[str, Field(pattern=r"^[0-9A-F]{2,64}$")]
Signature = Annotated[str, Field(pattern=r"^(?:[0-9a-f]{2}){8,1024}$")]
Certificate = Annotated[str, Field(max_length=1 << 15, pattern=r"^[A-Za-z0-9+/]+={0,2}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Channel = Literal["cut", "gradient", "decode", "update", "labels", "common", "peers", "bare"]


class Event(BaseModel):
    """Base of all kinds. Where a text may be empty, it is not known or does not apply; so are numbers that are 0."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Began(Event):
    """The first row of a log.

    Attributes:
        log: the log's random name; every hash of the log depends on it.
        party: whose log this is.
        certificate: leaf of the key that signs the heads, DER, base64.
    """

    kind: Literal["began"] = "began"
    version: Literal[1] = 1
    log: LogId
    party: Uri
    certificate: Certificate


class Continued(Event):
    """The first row of every further file of a log, and of every process that opens the log anew.

    Attributes:
        log, party: as in :class:`Began`.
        file: number of the file that this row stands in, from 1.
        certificate: of the key that signs from here on; another one after a renewal.
    """

    kind: Literal["continued"] = "continued"
    log: LogId
    party: Uri
    file: Count
    certificate: Certificate


class SignedHead(Event):
    """The party's signature over everything before this row: see securesplit/journal/seal.py."""

    kind: Literal["head"] = "head"
    signature: Signature


class Torn(Event):
    """What a process that died, or a machine that lost its power, left of the end of the log.

    Attributes:
        bytes, sha256: of an unfinished last line, which was taken out.
        unsealed: finished rows that no seal covered; they stand above and count from here on.
        lost: rows that had been written and never were on disk, which only a loss of power can explain; an attacker can.
    """

    kind: Literal["torn"] = "torn"
    bytes: Count = 0
    sha256: MaybeDigest = ""
    unsealed: Count = 0
    lost: Count = 0


class Ended(Event):
    """The process closed the log in order."""

    kind: Literal["ended"] = "ended"


class Accepted(Event):
    """A TLS handshake with a verified certificate of the right role.

    Attributes:
        certificate: SHA-256 of the peer's leaf.
    """

    kind: Literal["accepted"] = "accepted"
    connection: Count
    address: Address
    peer: Uri
    certificate: Digest
    serial: Serial
    tls: Literal["TLSv1.3", "memory"]


class Refused(Event):
    """Somebody was turned away, or a session was ended by this side.

    Attributes:
        stage: how far it had come.
        peer: empty unless its certificate was verified.
        address: of many visitors in one row, port 0, and the /64's own where their IPv6 addresses differ; empty beyond a limit.
        count: how many such refusals of one address this row stands for (securesplit/journal/coalesce.py).
    """

    kind: Literal["refused"] = "refused"
    stage: Literal["tcp", "tls", "http", "identity", "handshake", "policy", "protocol", "limit", "budget"]
    code: Failed
    address: Address
    peer: Uri = ""
    connection: Count = 0
    count: Annotated[int, Field(ge=1, lt=1 << 63)] = 1


class Opened(Event):
    """Both sides signed the application handshake. The digests are what they agreed on."""

    kind: Literal["opened"] = "opened"
    connection: Count = 0
    session: LogId
    peer: Uri
    policy: Digest
    job: Digest
    model: Digest


class Closed(Event):
    """A connection is gone.

    Attributes:
        code: why, when one side ended it with a code.
    """

    kind: Literal["closed"] = "closed"
    connection: Count = 0
    session: MaybeId = ""
    peer: Uri = ""
    code: Code = ""
    steps: Count = 0
    bytes_up: Count = 0
    bytes_down: Count = 0


class Served(Event):
    """The server answered a request."""

    kind: Literal["served"] = "served"
    connection: Count
    session: LogId
    what: Literal["forward", "decode", "backward", "drop", "anchor"]
    step: Count = 0
    rows: Count = 0
    bytes: Count = 0


class Released(Event):
    """Something left a client through its gate. Written before it is sent.

    Attributes:
        sequences: how many were handed over, remembered bytes included.
        charged: how many of them the ledger was charged for now.
        units: mu^2 of this charge in units of 2^-40, summed over its records.
        noised: False where a policy without protection let it out as it is.
        payload: SHA-256 of all the bytes that leave.
    """

    kind: Literal["released"] = "released"
    channel: Channel
    sequences: Count
    charged: Count
    units: Count
    noised: bool
    payload: Digest
    session: MaybeId = ""


class Round(Event):
    """A secure sum began or ended.

    Attributes:
        run: its name, 32 hex digits.
        clients: how many took part, or are in the sum.
    """

    kind: Literal["round"] = "round"
    state: Literal["started", "ended", "refused"]
    number: Count
    run: MaybeId = ""
    clients: Count = 0
    code: Code = ""


class Loaded(Event):
    """What the process runs under.

    Attributes:
        signer: SHA-256 of the key that signed the policy, or empty.
    """

    kind: Literal["loaded"] = "loaded"
    what: Literal["policy", "job", "model", "code"]
    digest: Digest
    signer: MaybeDigest = ""


class Reloaded(Event):
    """Files changed while the process ran; with a code, they were unusable and the old ones stay in force."""

    kind: Literal["reloaded"] = "reloaded"
    what: Literal["certificate", "authority", "crl", "folder", "policy"]
    digest: MaybeDigest = ""
    code: Code = ""


class Quota(Event):
    """A limit was reached."""

    kind: Literal["quota"] = "quota"
    quota: Literal["connections", "bytes", "steps", "tokens", "rate", "handshakes", "queue", "progress"]
    code: Failed
    limit: Count
    peer: Uri = ""
    address: Address = ""
    connection: Count = 0


class Checkpoint(Event):
    """Both ends saw the same messages up to here: this row's fields are the same in both logs.

    Attributes:
        number: of the checkpoint in its session, from 0.
        up, down: chained SHA-256 over all messages from, and to, the client before this checkpoint.
    """

    kind: Literal["checkpoint"] = "checkpoint"
    session: LogId
    number: Count
    up: Digest
    down: Digest


class PeerHead(Event):
    """The other end's signed head, as it said it: the witness against an other end that rewrites its log.

    Attributes:
        log, rows, head, signature: see :class:`securesplit.journal.seal.Head`; ``head`` is its hash.
        certificate: leaf of the other end, DER, base64; verified in this session.
    """

    kind: Literal["peer-head"] = "peer-head"
    session: LogId
    number: Count
    peer: Uri
    log: LogId
    rows: Count
    head: Digest
    signature: Signature
    certificate: Certificate


Any = Annotated[
    Began | Continued | SignedHead | Torn | Ended | Accepted | Refused | Opened | Closed | Served | Released | Round | Loaded
    | Reloaded | Quota | Checkpoint | PeerHead,
    Field(discriminator="kind"),
]  # fmt: skip
KINDS: tuple[type[Event], ...] = get_args(get_args(Any)[0])
_READ: TypeAdapter[Event] = TypeAdapter(Any)


def read_event(fields: dict[str, object]) -> Event:
    """An event from the fields of a row.

    Raises:
        pydantic.ValidationError: for an unknown kind, an unknown, missing or ill-typed field.
    """
    return _READ.validate_python(fields)
