"""Who may send what, when: the whole rule, as a table. Nothing else in the package decides it.

    client                              server
      |  Hello                  ->        |     GREETING
      |  <-  Welcome (job, signature)     |     OFFERED
      |  Confirm (signature)    ->        |     OPEN

The rows do not know which end they run on: a side checks its own sending and the peer's by the same table.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

from securesplit.protocol.messages import (
    Backward,
    Bye,
    Confirm,
    Declined,
    DropCache,
    Failure,
    Forward,
    Gradient,
    Handover,
    Hello,
    Hidden,
    Join,
    KeepAnchor,
    Mark,
    Message,
    RoundBegin,
    RoundKept,
    RoundReady,
    RoundStatus,
    Run,
    Seal,
    Secagg,
    Welcome,
)

Role = Literal["client", "server"]


class State(Enum):
    """States of a session, the same on both ends."""

    NEW = "new"
    GREETING = "greeting"
    OFFERED = "offered"
    OPEN = "open"
    CLOSED = "closed"


_Row = dict[type[Message], State]
_ENDINGS: _Row = {Failure: State.CLOSED, Bye: State.CLOSED}

_OPEN = State.OPEN
_FROM_CLIENT: _Row = {
    Forward: _OPEN, Backward: _OPEN, DropCache: _OPEN, KeepAnchor: _OPEN, RoundReady: _OPEN, RoundKept: _OPEN, Run: _OPEN,
    Join: _OPEN, Handover: _OPEN, Secagg: _OPEN, Seal: _OPEN, Mark: _OPEN, **_ENDINGS,
}  # fmt: skip
_FROM_SERVER: _Row = {
    Hidden: _OPEN, Declined: _OPEN, Gradient: _OPEN, RoundBegin: _OPEN, RoundStatus: _OPEN, Join: _OPEN,
    Handover: _OPEN, Secagg: _OPEN, Seal: _OPEN, Mark: _OPEN, **_ENDINGS,
}  # fmt: skip

TRANSITIONS: dict[State, dict[Role, dict[type[Message], State]]] = {
    State.NEW: {"client": {Hello: State.GREETING, **_ENDINGS}, "server": {**_ENDINGS}},
    State.GREETING: {"client": {**_ENDINGS}, "server": {Welcome: State.OFFERED, **_ENDINGS}},
    State.OFFERED: {"client": {Confirm: State.OPEN, **_ENDINGS}, "server": {**_ENDINGS}},
    State.OPEN: {"client": _FROM_CLIENT, "server": _FROM_SERVER},
    State.CLOSED: {"client": {}, "server": {}},
}
