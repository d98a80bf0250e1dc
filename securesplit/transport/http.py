"""One HTTP/1.1 exchange without a socket: bytes in, a request out; an answer in, bytes out.

h11 parses and holds the order of things; this adds bounds before memory is used, and asks who may go on before a body is
read. A connection carries one request, so that nothing of one can be taken for the beginning of another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import h11

from securesplit.errors import InputError

__all__ = ["Head", "Late", "Request", "Wire"]

_MOST_BODY = 1 << 20
_MOST_HEAD = 16 << 10
_MOST_FIELDS = 100


class Late(InputError):
    """A request that was not whole in time."""


@dataclass(frozen=True, slots=True, repr=False)
class Head:
    """What stands before a body; names of fields in lower case.

    Attributes:
        method, path: as asked; a path without its query.
        fields: name and value, in order.
    """

    method: str
    path: str
    fields: tuple[tuple[str, str], ...]

    def all(self, name: str) -> tuple[str, ...]:
        """All values of a field."""
        return tuple(value for key, value in self.fields if key == name)


@dataclass(frozen=True, slots=True, repr=False)
class Request:
    """A whole request."""

    head: Head
    body: bytes


class Wire:
    """One connection of a server.

    Args:
        admit: raises for a head that may not go on; it is asked before any of the body is read.
        most_body: bytes.
    """

    def __init__(self, admit: Callable[[Head], None], *, most_body: int = _MOST_BODY) -> None:
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST_HEAD)
        self._admit = admit
        self._most_body = most_body
        self._head: Head | None = None
        self._bodiless = False
        self._body = bytearray()

    def receive(self, data: bytes) -> Request | None:
        """Take bytes, empty ones at the end of the stream; returns the request once it is whole.

        Raises:
            InputError: SS-1271 for what is no request of HTTP/1.1, SS-1273 for one that is too large, and whatever ``admit``
                raises.
        """
        try:
            self._connection.receive_data(data)
            while True:
                event = self._connection.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    return None
                if isinstance(event, h11.Request):
                    self._bodiless = event.method == b"HEAD"
                    self._head = self._checked(event)
                    self._admit(self._head)
                elif isinstance(event, h11.Data):
                    self._grow(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    assert self._head is not None
                    return Request(self._head, bytes(self._body))
                else:  # The peer is gone before it asked for anything.
                    raise _broken("the connection ended before a request")
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == 431:
                raise _too_large("the head of a request", _MOST_HEAD) from None
            raise _broken("this is no request of HTTP/1.1") from None

    def interim(self) -> bytes:
        """What a client that asks before it sends a large body is told; empty when none is waiting."""
        if not self._connection.they_are_waiting_for_100_continue:
            return b""
        return self._connection.send(h11.InformationalResponse(status_code=100, headers=[])) or b""

    def begin(self, status: int, fields: tuple[tuple[str, str], ...], *, length: int | None = None) -> bytes:
        """The head of an answer; without a length its body comes in chunks."""
        framing = ("transfer-encoding", "chunked") if length is None else ("content-length", str(length))
        lines = [
            *fields,
            framing,
            ("connection", "close"),
            ("x-content-type-options", "nosniff"),
            ("cache-control", "no-store"),
        ]
        return self._connection.send(h11.Response(status_code=status, headers=lines)) or b""

    def part(self, data: bytes) -> bytes:
        """A piece of the body; nothing for a request that asked for the head of an answer alone."""
        if self._bodiless:
            return b""
        return self._connection.send(h11.Data(data=data)) or b""

    def end(self) -> bytes:
        """The end of the answer."""
        return self._connection.send(h11.EndOfMessage()) or b""

    @property
    def answerable(self) -> bool:
        """Whether an answer can still be begun."""
        return self._connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}

    def _checked(self, event: h11.Request) -> Head:
        if event.http_version != b"1.1":
            raise _broken("this is no request of HTTP/1.1")
        if sum(len(name) + len(value) for name, value in event.headers) + len(event.target) > _MOST_HEAD:
            raise _too_large("the head of a request", _MOST_HEAD)  # h11 bounds what is incomplete, and no more.
        if len(event.headers) > _MOST_FIELDS:
            raise _too_large("the number of fields in the head of a request", _MOST_FIELDS)
        fields = tuple((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in event.headers)
        head = Head(event.method.decode("latin-1"), event.target.decode("latin-1").partition("?")[0], fields)
        for value in head.all("content-length"):
            if int(value) > self._most_body:  # h11 lets digits through alone.
                raise _too_large("the body of a request", self._most_body)
        return head

    def _grow(self, data: bytes | bytearray) -> None:
        if len(self._body) + len(data) > self._most_body:
            raise _too_large("the body of a request", self._most_body)
        self._body += data


def _broken(what: str) -> InputError:
    return InputError("SS-1271", what, hint="Send one HTTP/1.1 request on each connection.")


def _too_large(what: str, most: int) -> InputError:
    return InputError("SS-1273", f"{what} is above {most}", hint="Send less at once.")
