"""What a server takes from whom: before a handshake, by address; after it, by certificate. A file, or these defaults.

    guests = ["dave"]                 # may generate, and not train; others who are not on the roster are refused

    [handshakes]                      # connections that have not said who they are
    pending_per_address = 64

    [caches]                          # memory for texts that are being generated
    bytes = 1_073_741_824

    [clients]                         # every client
    messages_per_second = 500.0
    [client.alice]                    # this one; what is not said here stands under [clients]
    steps = 100000

Rates slow a client down: the server reads its next message later. Quotas end its session (SS-2040); they count for one run of
the server, over all of a client's connections.

What this does not protect against: more addresses than the machine has sockets for, and a link that is full before a
byte of it reaches this program.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from securesplit.errors import InputError

__all__ = ["Caches", "ClientLimits", "Handshakes", "Limits", "Progress", "load_limits"]

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)
_MAX_BYTES = 1 << 20

_Count = Annotated[int, Field(ge=1, lt=1 << 53)]
_Rate = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


class Handshakes(BaseModel):
    """Connections whose owner is not known yet.

    Attributes:
        pending: unfinished ones, all together.
        pending_per_address: unfinished ones of one address (IPv6: of one /64).
        per_second_per_address: sustained rate of new connections.
        burst_per_address: how many may come at once.
        seconds: for TLS, and again for the websocket's opening; both are a few kilobytes, so total time is fair.
        greeting_seconds: from there until the client has admitted the job.
    """

    model_config = _STRICT
    pending: _Count = 512
    pending_per_address: _Count = 64
    per_second_per_address: _Rate = 20.0
    burst_per_address: _Count = 200
    seconds: _Seconds = 10.0
    greeting_seconds: _Seconds = 120.0


class Progress(BaseModel):
    """When a slow peer is given up: by what moves, never by how long a message takes.

    Attributes:
        seconds: the window.
        bytes: how many bytes of a begun message have to arrive in one.
        silence: how long a connection may bring no byte at all; pings make every living one bring some.
    """

    model_config = _STRICT
    seconds: _Seconds = 20.0
    bytes: _Count = 4096
    silence: _Seconds = 80.0


class Caches(BaseModel):
    """Memory for texts that are being generated: the keys and values of the server's layers.

    Attributes:
        bytes: all of them together, of all connections; one connection may hold half of it, and so may one client while others
            ask.
        idle_seconds: one that was not used for so long makes room for others before one in use does.
        patience_seconds: after so long without room a client gets some from whoever holds as much as it would have.
    """

    model_config = _STRICT
    bytes: _Count = 1 << 30
    idle_seconds: _Seconds = 10.0
    patience_seconds: _Seconds = 60.0


class ClientLimits(BaseModel):
    """One client, over all of its connections; what is absent is not limited.

    Attributes:
        connections: open ones; a new one takes the place of the client's own oldest.
        messages_per_second, bytes_per_second: slow it down.
        bytes, steps, tokens: end its session; bytes of its messages, ``Forward`` messages, and rows in them.
    """

    model_config = _STRICT
    connections: _Count | None = None
    messages_per_second: _Rate | None = None
    bytes_per_second: _Rate | None = None
    bytes: _Count | None = None
    steps: _Count | None = None
    tokens: _Count | None = None


class Limits(BaseModel):
    """A whole file."""

    model_config = _STRICT
    guests: Annotated[frozenset[_Name], Field(strict=False)] = frozenset()
    handshakes: Handshakes = Handshakes()
    progress: Progress = Progress()
    caches: Caches = Caches()
    clients: ClientLimits = ClientLimits(connections=4, messages_per_second=500.0)
    client: dict[_Name, ClientLimits] = {}

    def of(self, name: str) -> ClientLimits:
        """What holds for a client: its own lines, and everybody's where it has none."""
        own = self.client.get(name)
        if own is None:
            return self.clients
        return self.clients.model_copy(update=own.model_dump(exclude_none=True))

    def sized(self, room: int) -> Limits:
        """The same with room for so many clients behind one address, who may all come back at once."""
        asked = self.handshakes
        grown = asked.model_copy(
            update={
                "pending": max(asked.pending, room),
                "pending_per_address": max(asked.pending_per_address, room),
                "burst_per_address": max(asked.burst_per_address, 2 * room),
            }
        )
        return self.model_copy(update={"handshakes": grown})


def load_limits(path: Path) -> Limits:
    """Read a file of limits.

    Raises:
        InputError: SS-1142 when it cannot be read, is no TOML, or breaks the schema; with every fault.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise _unusable(f"{path} is larger than any such file")
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _unusable(f"the limits in {path} cannot be read ({type(error).__name__})") from None
    try:
        return Limits.model_validate(raw)
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False, include_context=False)
        found = tuple(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults)
        raise _unusable(f"the limits in {path} have {len(found)} fault(s)", found) from None


def _unusable(what: str, details: tuple[str, ...] = ()) -> InputError:
    return InputError("SS-1142", what, hint="docs/limits.md shows a complete file.", details=details)
