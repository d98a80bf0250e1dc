"""What a client may send by who it is. The order of messages is the state table's matter (states.py).

    trainer   on the job's roster: everything a client may send
    guest     known by its certificate, named by the server's operator: generates with B, teaches it nothing, joins no sum, keeps no state of it

A client that is neither is refused before its first message.
"""

from __future__ import annotations

from typing import Literal

from securesplit.errors import PolicyDenied
from securesplit.protocol.messages import (
    Backward,
    Bye,
    Confirm,
    DropCache,
    Failure,
    Forward,
    Handover,
    Hello,
    Join,
    KeepAnchor,
    Mark,
    Message,
    RoundKept,
    RoundReady,
    Run,
    Seal,
    Secagg,
)

__all__ = ["MAY_SEND", "Standing", "require_right"]

Standing = Literal["trainer", "guest"]

_EVERYBODY: frozenset[type[Message]] = frozenset(
    {Hello, Confirm, Forward, DropCache, KeepAnchor, Mark, Seal, Failure, Bye}
)
MAY_SEND: dict[Standing, frozenset[type[Message]]] = {
    "trainer": _EVERYBODY | {Backward, RoundReady, RoundKept, Run, Join, Handover, Secagg},
    "guest": _EVERYBODY,
}
"""By standing. A kind that stands in no row is nobody's; a new kind of message has to be put here before it is served."""


def require_right(standing: Standing, message: Message) -> None:
    """Let a message pass, or refuse it.

    Raises:
        PolicyDenied: SS-2041.
    """
    teaches = isinstance(message, Forward) and message.learn
    keeps = isinstance(message, Mark) and message.what != "use"
    if type(message) not in MAY_SEND[standing] or (standing == "guest" and (teaches or keeps)):
        raise PolicyDenied(
            "SS-2041",
            f"a {standing} may not send {type(message).__name__}",
            hint="Ask the server's operator to put this client on the job's roster.",
        )
