"""B at work: forward, backward and decoding on the middle layers. Pure computation; it knows no protocol and no network.

One thread calls it. Between a learning forward and its backward no other learning step of the same copy may start, because the
optimiser changes the weights that the pending graph was built with; securesplit/server/lanes.py sees to that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from securesplit.errors import RemoteProtocolError
from securesplit.model.code import CutCode
from securesplit.model.descent import NamedTensor, Recipe
from securesplit.model.parts import Middle, PartCache
from securesplit.server.caches import Cached, CacheStore, Lane, Room
from securesplit.server.fleet import Fleet
from securesplit.server.learner import Rows
from securesplit.transport.limits import Caches

_POSITIONS = 1 << 17
"""Of one cache, where a model does not say how many positions it has."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What a client sent to B.

    Attributes:
        client, step: whose it is, and where a later gradient will belong.
        lengths: rows of each sequence.
        hidden: (sum(lengths), D), or under a code (sum(lengths), k).
        gain: public factor for the rows; 1 leaves them as they are, bit for bit.
    """

    client: str
    step: int
    lengths: tuple[int, ...]
    hidden: Tensor
    gain: float = 1.0


class Engine:
    """The middle of one model, with its adapters, its optimiser, and the decoding caches of all connections.

    Args:
        middle: B.
        learning_rate: of AdamW on the adapters that require gradients, where there is no recipe.
        recipe: of that optimiser.
        caches: room for decoding caches; see securesplit/server/caches.py.
        positions: most positions in one decoding cache; by default as many as the model was made for.
        code: what the clients' rows are coded with; they then have k columns instead of D, and where the code has a
            sentinel B sees its public row in front of every sequence.
        copies: names of the clients of each copy of B's adapters; none for one that all share.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        middle: Middle,
        *,
        learning_rate: float | None = None,
        recipe: Recipe | None = None,
        caches: Caches | None = None,
        positions: int | None = None,
        code: CutCode | None = None,
        copies: tuple[tuple[str, ...], ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.middle = middle
        self.code = code
        config = getattr(getattr(middle, "module", None), "config", None)
        most = positions or getattr(config, "max_position_embeddings", None) or _POSITIONS
        asked = caches or Caches()
        self.caches = CacheStore(Room(asked.bytes, most, asked.idle_seconds, asked.patience_seconds), clock)
        self._rate: int | None = None
        self._former: Sequence[Tensor] | None = None
        self.fleet = Fleet(middle, recipe or Recipe(learning_rate or 0.0), copies)

    @contextmanager
    def computing(self, former: Sequence[Tensor] | None) -> Iterator[None]:
        """What is computed inside, and does not learn, has these values in B's adapters; None: those of the client's copy."""
        before, self._former = self._former, former
        try:
            yield
        finally:
            self._former = before

    def forward(self, batches: Sequence[Batch], *, learn: bool) -> tuple[Tensor, ...]:
        """Run B over one client's batch, or over those of several at once.

        Args:
            batches: of clients that share a copy of B.
            learn: keep the graph for a backward pass.

        Returns:
            (sum(lengths), D) for each.
        """
        # Codes keep the wire's precision until they are decoded, and float16 takes its gradients from a float32 leaf.
        plain = self.code is None and getattr(self.middle, "scale", None) is None
        device = self.middle.device
        rows = [b.hidden.to(device, self.middle.dtype if plain else b.hidden.dtype) for b in batches]

        def compute(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            scaled = [leaf * b.gain if b.gain != 1 else leaf for leaf, b in zip(leaves, batches, strict=True)]
            lengths = [b.lengths for b in batches]
            output = self._ragged(self._decoded(torch.cat(scaled) if len(scaled) > 1 else scaled[0]), sum(lengths, ()))
            return torch.split(output, [sum(n) for n in lengths]) if len(scaled) > 1 else (output,)

        if learn:
            learner = self.fleet.of(batches[0].client)
            asked = [Rows(b.client, b.step, values) for b, values in zip(batches, rows, strict=True)]
            return learner.forward(asked, compute)
        with torch.no_grad(), self.fleet.computing(batches[0].client, self._former):
            return compute(tuple(rows))

    def backward(self, gradients: Sequence[Rows]) -> tuple[Tensor, ...]:
        """Backpropagate through the pending forward, let B's adapters learn, return dL/d(the rows that came).

        Raises:
            RemoteProtocolError: SS-4014 when no forward of this step is pending.
        """
        return self.fleet.of(gradients[0].who).backward(gradients)

    @property
    def waiting(self) -> frozenset[str]:
        """Clients whose gradients are due."""
        return self.fleet.waiting

    def give_up(self, client: str) -> None:
        """Drop what waits for this client's gradient, if anything does."""
        self.fleet.of(client).forget(client)

    def state(self) -> tuple[NamedTensor, ...]:
        """What learns, and its optimisers; neither graphs nor decoding caches."""
        return self.fleet.state()

    def restore(self, state: Sequence[NamedTensor]) -> None:
        """Go on from what :meth:`state` gave for the same job.

        Raises:
            InputError: SS-1250 when it is of other adapters.
        """
        self.fleet.restore(state)

    def decode(self, connection: int, cache: int, lengths: tuple[int, ...], hidden: Tensor, client: str = "") -> Tensor:
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
        if (known := self.caches.kept.get(key)) is not None:
            _require_fit(known, lengths)  # Before anybody makes room for it.
        owner = client or f"#{connection}"  # Who is not named stands alone.
        state = self.caches.admit(key, owner, rows=max(lengths) + first, need=need) or self._begun(lengths)
        pieces = torch.split(self._decoded(hidden.to(self.middle.device)).to(self.middle.dtype), list(lengths))
        out: list[Tensor] = list(pieces)
        self.caches.kept.pop(key, None)  # A computation that fails leaves half a cache, which nobody may go on with.
        for lane in state.lanes:
            rows = torch.stack([pieces[i] for i in lane.rows])
            try:
                with torch.no_grad(), self.fleet.computing(client, self._former):
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
                row = torch.zeros(1, 1, self.middle.width, dtype=self.middle.dtype, device=self.middle.device)
                self.middle(row, cache=probe)
            self._rate = probe.nbytes
        return self._rate

    def drop_cache(self, connection: int, cache: int) -> None:
        """Forget one decoding cache."""
        self.caches.drop((connection, cache))

    def forget(self, connection: int) -> None:
        """Forget everything of a connection."""
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


def _require_fit(state: Cached, lengths: tuple[int, ...]) -> None:
    if state.sequences != len(lengths):
        raise RemoteProtocolError("SS-4016", "a decoding step does not fit its cache")
    if any(len({lengths[i] for i in lane.rows}) > 1 for lane in state.lanes):
        raise RemoteProtocolError("SS-4015", "sequences that began equally long have to go on so")
