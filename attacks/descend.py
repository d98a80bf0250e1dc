"""Gradient-guided proposals (SIPIT, Nikolaou et al., 2025): move an embedding until partition A turns it into the row.

Behind several layers a row no longer shows its token linearly: the second piece of a word is stored as the word. A dozen
steps of gradient descent through A, from where a linear inverter points, end next to the right token nevertheless. What is found is a proposal, to be proved by a forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attacks.view import Front, fork
from securesplit.model.parts import PartCache

__all__ = ["STEPS", "Descent", "descent_of"]

STEPS = 16
# Adam's step as a part of the embeddings' root mean square; measured to need some ten steps behind one to eight layers.
_RATE = 0.4


@dataclass(frozen=True, slots=True)
class Descent:
    """Descent through one partition A.

    Attributes:
        front: A. inner: its embedding module, whose output is replaced.
        table: (V, E), what that module gives for each token.
    """

    front: Front
    inner: Any
    table: Tensor

    def __call__(
        self,
        cache: PartCache,
        who: Tensor,
        start: Tensor,
        targets: Tensor,
        factor: Tensor,
        *,
        after: Tensor | None = None,
        steps: int = STEPS,
        rate: float = _RATE,
    ) -> Tensor:
        """Embeddings whose states come close to the targets.

        Args:
            cache: of the prefixes of N sequences; left as it is.
            who: (n,) which of them.
            start: (n, E) embeddings to start from: an inverter's estimate, or some token's (see ``table``).
            targets: (n, L, D) received rows; the last L rows of what is fed are compared with them.
            factor: (n,) clipping factors that states are multiplied by.
            after: (n, w) tokens that follow the one that is sought; None for none.
            steps, rate: Adam's; the rate as a part of the embeddings' root mean square.

        Returns:
            (n, E).
        """
        # Any token will do where the embedding is replaced.
        fed = torch.zeros(len(start), 1, dtype=torch.long)
        fed = fed if after is None else torch.cat([fed, after], dim=1)
        place, step = -fed.shape[1], rate * float(self.table.square().mean().sqrt())
        # What is copied outside inference mode may take part in a backward pass.
        with torch.inference_mode(mode=False), torch.enable_grad():
            targets, factor, fed = targets.clone(), factor.float()[:, None, None].clone(), fed.clone()
            found = start.clone().requires_grad_()
            adam = torch.optim.Adam([found], lr=step)

            def replace(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
                output = output.detach().clone()
                output[:, place] = found
                return output

            hook = self.inner.register_forward_hook(replace)
            try:
                for _ in range(steps):
                    states = self.front(fed, cache=fork(cache, who))[:, -targets.shape[1] :].float()
                    loss = (factor * states - targets).square().sum()
                    (found.grad,) = torch.autograd.grad(loss, found)
                    adam.step()
            finally:
                hook.remove()
            return found.detach()

    def nearest(self, embeddings: Tensor, count: int) -> Tensor:
        """The tokens nearest to embeddings (n, E), best first: (n, count)."""
        short = self.table.square().sum(1) / 2
        return (embeddings @ self.table.T - short).topk(min(count, len(self.table)), dim=1).indices

    def aligned(self, embeddings: Tensor, count: int) -> Tensor:
        """The tokens whose embeddings have the directions of (n, E), best first; norms are lost in A's first norm."""
        directions = torch.nn.functional.normalize(self.table, dim=1)
        return (embeddings @ directions.T).topk(min(count, len(self.table)), dim=1).indices


def descent_of(front: Front) -> Descent | None:
    """Descent through a partition A that is a module with an embedding; None for any other."""
    base = getattr(front, "base", None)
    inner = base.get_input_embeddings() if base is not None else None
    if inner is None:
        return None
    with torch.inference_mode(mode=False), torch.no_grad():
        return Descent(front, inner, inner(torch.arange(inner.num_embeddings)).detach().float())
