"""B at work: forward, backward and decoding on the middle layers. Pure computation; it knows no protocol and no network.

One thread calls it. Between a learning forward and its backward no other learning step may start, because the optimiser
changes the weights that the pending graph was built with; securesplit/server/turns.py sees to that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from securesplit.errors import RemoteProtocolError
from securesplit.model.code import CutCode
from securesplit.model.descent import NamedTensor, Recipe
from securesplit.model.parts import Middle, PartCache
from securesplit.server.learner import Learner

_CACHES = 64
"""Decoding caches of one connection, with those that were dropped; a client needs one for each text that it generates."""
_POSITIONS = 1 << 17
"""Of one cache, where a model does not say how many positions it has."""


class Engine:
    """The middle of one model, with its adapters, its optimiser, and the decoding caches of all connections.

    Args:
        middle: B.
        learning_rate: of AdamW on the adapters that require gradients.
        cache_bytes: all decoding caches together; beyond it the connection that holds most loses its least recently used
            one. One connection may hold half of it.
        positions: most positions in one decoding cache; by default as many as the model was made for.
        code: what the clients' rows are coded with; they then have k columns instead of D, and where the code has a
            sentinel B sees its public row in front of every sequence.
    """

    def __init__(
        self,
        middle: Middle,
        *,
        learning_rate: float,
        cache_bytes: int = 1 << 30,
        positions: int | None = None,
        code: CutCode | None = None,
    ) -> None:
        self.middle = middle
        self.code = code
        self._cache_bytes = cache_bytes
        config = getattr(getattr(middle, "module", None), "config", None)
        self._positions = positions or getattr(config, "max_position_embeddings", None) or _POSITIONS
        self._caches: OrderedDict[tuple[int, int], PartCache] = OrderedDict()
        self._evicted: set[tuple[int, int]] = set()
        self.learner = Learner(middle, Recipe(learning_rate))

    def forward(
        self, client: str, step: int, lengths: tuple[int, ...], hidden: Tensor, *, gain: float = 1.0, learn: bool
    ) -> Tensor:
        """Run B over a batch.

        Args:
            client, step: whose it is, and where a later :meth:`backward` will belong.
            lengths: rows of each sequence.
            hidden: (sum(lengths), D), or under a code (sum(lengths), k).
            gain: public factor for the rows; 1 leaves them as they are, bit for bit.
            learn: keep the graph for a backward pass.

        Returns:
            (sum(lengths), D).
        """
        # Codes keep the wire's precision until they are decoded.
        rows = hidden.to(self.middle.dtype) if self.code is None else hidden

        def run(leaf: Tensor) -> Tensor:
            return self._ragged(self._decoded(leaf * gain if gain != 1 else leaf), lengths)

        if learn:
            return self.learner.forward(client, step, rows, run)
        with torch.no_grad():
            return run(rows)

    def backward(self, client: str, step: int, gradient: Tensor) -> Tensor:
        """Backpropagate through the pending forward, let B's adapters learn, return dL/d(the rows that came).

        Raises:
            RemoteProtocolError: SS-4014 when no forward of this step is pending.
        """
        return self.learner.backward(client, step, gradient)

    @property
    def waiting(self) -> frozenset[str]:
        """Clients whose gradients are due."""
        return frozenset(() if self.learner.waits_for is None else (self.learner.waits_for,))

    def give_up(self, client: str) -> None:
        """Drop the graph that waits for this client, if one does."""
        self.learner.forget(client)

    def state(self) -> tuple[NamedTensor, ...]:
        """What learns, and its optimiser; neither graphs nor decoding caches."""
        return self.learner.state()

    def restore(self, state: Sequence[NamedTensor]) -> None:
        """Go on from what :meth:`state` gave for the same job.

        Raises:
            InputError: SS-1250 when it is of other adapters.
        """
        self.learner.restore(state)

    def decode(self, connection: int, cache: int, lengths: tuple[int, ...], hidden: Tensor) -> Tensor:
        """Extend a decoding cache by equally long rows of each sequence, (sum(lengths), D or k) -> (sum(lengths), D).

        Raises:
            RemoteProtocolError: SS-4015 when lengths differ, SS-4016 when the number of sequences changed, SS-4017 when the
                cache was dropped to make room, SS-4034 when this connection would hold more than its share.
        """
        if (connection, cache) in self._evicted:
            raise RemoteProtocolError(
                "SS-4017",
                "the decoding cache was dropped to make room",
                hint="Generate again; the released prompt is remembered.",
            )
        if len(set(lengths)) != 1:
            raise RemoteProtocolError("SS-4015", "a decoding step needs sequences of one length")
        key = (connection, cache)
        self._require_room(key, lengths[0])
        state = self._caches.pop(key, None) or self.middle.new_cache()
        rows = self._decoded(hidden).to(self.middle.dtype).reshape(len(lengths), lengths[0], -1)
        try:
            with torch.no_grad():
                output = self._mixed(rows, state)
        except RuntimeError:
            raise RemoteProtocolError("SS-4016", "a decoding step does not fit its cache") from None
        if self._held().get(connection, 0) + state.nbytes > self._cache_bytes // 2:
            raise _beyond_share("bytes")
        self._caches[key] = state
        self._make_room(key)
        return output.reshape(len(hidden), -1)

    def _require_room(self, key: tuple[int, int], rows: int) -> None:
        """Before anything is computed: a cache has so many positions, and a connection so many caches."""
        known = self._caches.get(key)
        if (known.length if known is not None else 0) + rows > self._positions:
            raise _beyond_share("positions")
        mine = sum(connection == key[0] for connection, _ in (*self._caches, *self._evicted))
        if known is None and mine >= _CACHES:
            raise _beyond_share("caches")

    def _held(self) -> dict[int, int]:
        """Bytes of decoding caches by connection."""
        held: dict[int, int] = {}
        for (connection, _), state in self._caches.items():
            held[connection] = held.get(connection, 0) + state.nbytes
        return held

    def _make_room(self, used: tuple[int, int]) -> None:
        """Drop caches of whoever holds most, so that nobody can drop everybody else's; never the one just used."""
        held = self._held()
        total = sum(held.values())
        while total > self._cache_bytes and held:
            most = max(held, key=lambda connection: held[connection])
            dropped = next((key for key in self._caches if key[0] == most and key != used), None)
            if dropped is None:  # It holds but the one in use: the next largest makes room.
                del held[most]
                continue
            freed = self._caches.pop(dropped).nbytes
            held[most], total = held[most] - freed, total - freed
            self._evicted.add(dropped)

    def drop_cache(self, connection: int, cache: int) -> None:
        """Forget one decoding cache."""
        self._caches.pop((connection, cache), None)
        self._evicted.discard((connection, cache))

    def forget(self, connection: int) -> None:
        """Forget everything of a connection."""
        self._evicted = {key for key in self._evicted if key[0] != connection}
        for key in [k for k in self._caches if k[0] == connection]:
            del self._caches[key]

    def _decoded(self, rows: Tensor) -> Tensor:
        return rows if self.code is None else self.code.decode(rows)

    def _mixed(self, hidden: Tensor, cache: PartCache | None = None) -> Tensor:
        """B on sequences (B, T, D), behind the sentinel's row where there is one; its own output is dropped."""
        row = self.code.row if self.code is not None and (cache is None or cache.length == 0) else None
        if row is None:
            plain: Tensor = self.middle(hidden, cache=cache)
            return plain
        first = row.to(hidden).expand(len(hidden), 1, -1)
        output: Tensor = self.middle(torch.cat([first, hidden], 1), cache=cache)
        return output[:, 1:]

    def _ragged(self, hidden: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Sequences of one length run as one batch without a mask; causal attention makes right padding harmless."""
        pieces = torch.split(hidden, list(lengths))
        out: list[Tensor | None] = [None] * len(pieces)
        for length in sorted(set(lengths)):
            where = [i for i, n in enumerate(lengths) if n == length]
            rows = self._mixed(torch.stack([pieces[i] for i in where]))
            for i, row in zip(where, rows, strict=True):
                out[i] = row
        return torch.cat([row for row in out if row is not None])


def _beyond_share(of: str) -> RemoteProtocolError:
    return RemoteProtocolError(
        "SS-4034",
        f"a client's decoding caches have more {of} than it may hold",
        hint="Generate less at a time, or fewer texts at once.",
    )
