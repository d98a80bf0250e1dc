"""Who stands where in the queue for a scarce thing: clients take turns, whatever number of connections each has.

Every client has a line of its own connections, the oldest first. All first ones stand before all second ones, those before
all third ones, and so on. Among connections of the same number the clients stand in the order in which their first one
became the first. When that one is done the next of the line moves up, and its client goes behind those that are there
already; else a client with many connections would be the oldest for ever by having one of them end at a time. It is
round robin over clients, as tenants are served who share a machine, and first come, first served among equals: a client
gains nothing by another connection that others lack, and loses nothing by it while nobody else asks.

The order is a total one, and changes between two connections only when one is done: so the first of it always goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Standing", "Turns"]

Standing = tuple[int, int]
"""How many connections of the same client stand before this one, and its client's turn; the smaller, the sooner."""


@dataclass(slots=True)
class Turns:
    """Connections by client, none twice."""

    _clients: dict[int, str] = field(default_factory=dict)  # Connections in the order in which they came.
    _turns: dict[str, int] = field(default_factory=dict)
    _count: int = 0

    def __bool__(self) -> bool:
        return bool(self._clients)

    def enter(self, connection: int, client: str) -> None:
        """Stand in the queue; who does already keeps the place."""
        self._clients.setdefault(connection, client)
        if client not in self._turns:
            self._renew(client)

    def leave(self, connection: int) -> None:
        """Be done. Where it was its client's first, the client goes behind the others."""
        client = self._clients.get(connection)
        if client is None:
            return
        line = [other for other, owner in self._clients.items() if owner == client]
        del self._clients[connection]
        if len(line) == 1:
            del self._turns[client]
        elif line[0] == connection:
            self._renew(client)

    def set_back(self, client: str) -> None:
        """A client has had its turn: it goes behind the others, its connections in their order."""
        if client in self._turns:
            self._renew(client)

    def client(self, connection: int) -> str:
        """Whose connection it is."""
        return self._clients[connection]

    def standings(self) -> dict[int, Standing]:
        """Of every connection."""
        before: dict[str, int] = {}
        found = {}
        for connection, client in self._clients.items():
            before[client] = before.get(client, -1) + 1
            found[connection] = before[client], self._turns[client]
        return found

    def _renew(self, client: str) -> None:
        self._count += 1
        self._turns[client] = self._count
