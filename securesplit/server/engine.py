"""B at work: forward, backward and decoding on the middle layers. Pure computation; it knows no protocol and no network.

One thread calls it. Between a learning forward and its backward no other learning step may start, because the optimiser
changes the weights that the pending graph was built with; securesplit/server/turns.py sees to that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from securesplit.errors import RemoteProtocolError
from securesplit.model.code import CutCode
from securesplit.model.parts import Middle, PartCache
from securesplit.server.caches import Cached, CacheStore, Lane, Room
from securesplit.transport.limits import Caches

_POSITIONS = 1 << 17
"""Of one cache, where a model does not say how many positions it has."""


@dataclass(slots=True)
class _Pending:
    step: int
    leaf: Tensor
    output: Tensor


class Engine:
    """The middle of one model, with its adapters, its optimiser, and the decoding caches of all connections.

    Args:
        middle: B.
        learning_rate: of AdamW on the adapters that require gradients.
        caches: room for decoding caches; see securesplit/server/caches.py.
        positions: most positions in one decoding cache; by default as many as the model was made for.
        code: what the clients' rows are coded with; they then have k columns instead of D, and where the code has a
            sentinel B sees its public row in front of every sequence.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        middle: Middle,
        *,
        learning_rate: float,
        caches: Caches | None = None,
        positions: int | None = None,
        code: CutCode | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.middle = middle
        self.code = code
        config = getattr(getattr(middle, "module", None), "config", None)
        most = positions or getattr(config, "max_position_embeddings", None) or _POSITIONS
        asked = caches or Caches()
        self.caches = CacheStore(Room(asked.bytes, most, asked.idle_seconds, asked.patience_seconds), clock)
        self._rate: int | None = None
        self._pending: dict[int, _Pending] = {}
        trainable = [p for p in middle.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0) if trainable else None

    def forward(
        self, connection: int, step: int, lengths: tuple[int, ...], hidden: Tensor, *, gain: float = 1.0, learn: bool
    ) -> Tensor:
        """Run B over a batch.

        Args:
            connection, step: where a later :meth:`backward` will belong.
            lengths: rows of each sequence.
            hidden: (sum(lengths), D), or under a code (sum(lengths), k).
            gain: public factor for the rows; 1 leaves them as they are, bit for bit.
            learn: keep the graph for a backward pass.

        Returns:
            (sum(lengths), D).
        """
        # Codes keep the wire's precision until they are decoded.
        leaf = (hidden.to(self.middle.dtype) if self.code is None else hidden).requires_grad_(learn)
        with torch.set_grad_enabled(learn):
            output = self._ragged(self._decoded(leaf * gain if gain != 1 else leaf), lengths)
        if learn:
            self._pending[connection] = _Pending(step, leaf, output)
        return output.detach()

    def backward(self, connection: int, step: int, gradient: Tensor) -> Tensor:
        """Backpropagate through the pending forward, let B's adapters learn, return dL/d(the rows that came).

        Raises:
            RemoteProtocolError: SS-4014 when no forward of this step is pending.
        """
        pending = self._pending.pop(connection, None)
        if pending is None or pending.step != step:
            raise RemoteProtocolError("SS-4014", "a gradient arrived for a step that is not pending")
        pending.output.backward(gradient.to(pending.output.dtype))  # type: ignore[no-untyped-call]
        if self._optimiser is not None:
            self._optimiser.step()
            self._optimiser.zero_grad(set_to_none=True)
        assert pending.leaf.grad is not None
        return pending.leaf.grad

    def decode(self, connection: int, cache: int, lengths: tuple[int, ...], hidden: Tensor) -> Tensor:
        """Extend a decoding cache by rows of each of its sequences, (sum(lengths), D or k) -> (sum(lengths), D).

        Sequences that began equally long run as one batch; those of other lengths run beside them. Several rows that go on
        a sequence run one after another, as they came the first time, so that a cache that is built again from the same
        bytes is the same bit for bit.

        Raises:
            RemoteProtocolError: SS-4015 when sequences that began equally long do not go on so, SS-4016 when the number of
                sequences changed, and as :meth:`CacheStore.admit`.
        """
        key = (connection, cache)
        fresh = key not in self.caches.kept
        first = int(fresh and self.code is not None and self.code.row is not None)
        need = (sum(lengths) + first * len(lengths)) * self._position_bytes()
        state = self.caches.admit(key, rows=max(lengths) + first, need=need) or self._begun(lengths)
        if state.sequences != len(lengths):
            raise RemoteProtocolError("SS-4016", "a decoding step does not fit its cache")
        if any(len({lengths[i] for i in lane.rows}) > 1 for lane in state.lanes):
            raise RemoteProtocolError("SS-4015", "sequences that began equally long have to go on so")
        pieces = torch.split(self._decoded(hidden).to(self.middle.dtype), list(lengths))
        out: list[Tensor] = list(pieces)
        self.caches.kept.pop(key, None)  # A computation that fails leaves half a cache, which nobody may go on with.
        for lane in state.lanes:
            rows = torch.stack([pieces[i] for i in lane.rows])
            try:
                with torch.no_grad():
                    # The first rows are a prompt; later ones came one at a time.
                    parts = torch.split(rows, 1, dim=1) if lane.past.length else (rows,)
                    mixed = torch.cat([self._mixed(part, lane.past) for part in parts], 1)
            except RuntimeError:
                raise RemoteProtocolError("SS-4016", "a decoding step does not fit its cache") from None
            for i, row in zip(lane.rows, mixed, strict=True):
                out[i] = row
        self.caches.keep(key, state)
        return torch.cat(out)

    def _begun(self, lengths: tuple[int, ...]) -> Cached:
        """An empty cache for sequences of these lengths."""
        lanes = (tuple(i for i, n in enumerate(lengths) if n == length) for length in sorted(set(lengths)))
        return Cached(tuple(Lane(rows, self.middle.new_cache()) for rows in lanes))

    def _position_bytes(self) -> int:
        """Memory of one position of one sequence, measured once on a row of zeros; layers with a window take less later."""
        if self._rate is None:
            probe = self.middle.new_cache()
            with torch.no_grad():
                self.middle(torch.zeros(1, 1, self.middle.width, dtype=self.middle.dtype), cache=probe)
            self._rate = probe.nbytes
        return self._rate

    def drop_cache(self, connection: int, cache: int) -> None:
        """Forget one decoding cache."""
        self.caches.drop((connection, cache))

    def forget(self, connection: int) -> None:
        """Forget everything of a connection."""
        self._pending.pop(connection, None)
        self.caches.forget(connection)

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
