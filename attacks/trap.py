"""What a hijacking server learns by itself, on public text: a copy of A, an inverter of its rows, and a critic of rows.

The craft of attacks/hijack.py. All tensors are float32; noise is simulated by torch's generator from a stated seed.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from attacks.config import settings_of
from attacks.view import Noise
from securesplit.privacy.clip import clip_sequence

__all__ = ["Craft", "Settings", "Trap"]

Craft = Literal["inverter", "discriminator"]

Rate = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """configs/hijack.toml explains each value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    inverter_rate: Rate
    critic_rate: Rate
    batch: Count
    warm: Annotated[int, Field(ge=0)]
    tokens: Count
    critic: Count


class _Reader(nn.Module):
    """Rows to scores of the candidate tokens: two affine maps to the embedding, a tied softmax, a bias per token.

    Args:
        rows: (N, T, D) public rows, after the clip. tokens: (N, T) their ids. embedding: (V, E).
        candidates: (K,) ids that can be named. sigma: of the noise, which is the ridge's penalty.
    """

    def __init__(self, rows: Tensor, tokens: Tensor, embedding: Tensor, candidates: Tensor, sigma: float) -> None:
        super().__init__()
        self.register_buffer("names", functional.normalize(embedding[candidates].float(), dim=1))
        self.candidates = candidates
        centred = embedding.float() - embedding[candidates].float().mean(0)
        targets = functional.normalize(centred, dim=1)
        self.first = _ridge(rows[:, 0], targets[tokens[:, 0]], sigma)
        later = rows[:, 1:] if rows.shape[1] > 1 else rows
        ids = tokens[:, 1:] if rows.shape[1] > 1 else tokens
        self.later = _ridge(later.flatten(0, 1), targets[ids.flatten()], sigma)
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.zeros(len(candidates)))

    def forward(self, rows: Tensor) -> Tensor:
        """(N, T, D) to (N, T, K)."""
        guess = torch.cat([self.first(rows[:, :1]), self.later(rows[:, 1:])], dim=1)
        scores: Tensor = guess @ self.names.T * self.temperature.exp() + self.bias  # type: ignore[operator]
        return scores


def _ridge(rows: Tensor, targets: Tensor, sigma: float) -> nn.Linear:
    """The affine map that regresses targets (N, E) on rows (N, D) seen through noise."""
    mean, goal = rows.mean(0).double(), targets.mean(0).double()
    X, Y = rows.double() - mean, targets.double() - goal
    gram = X.T @ X
    penalty = len(rows) * sigma**2 + 1e-6 * float(gram.diagonal().mean()) + 1e-12
    matrix = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=torch.float64), X.T @ Y)
    linear = nn.Linear(*matrix.shape)
    with torch.no_grad():
        linear.weight.copy_(matrix.T)
        linear.bias.copy_(goal - mean @ matrix)
    return linear


class Trap:
    """What a hijacking server learns by itself, on public text: a copy of A, an inverter, and a critic of rows.

    Args:
        front: a copy of A; those of its parameters that require gradients are trained, as the client trains its own.
        embedding: (V, E), public.
        sequences: (N, T) public token ids.
        noise: the policy's mechanism, which is simulated by torch's generator.
        rate: the clients' learning rate, from the job.
        craft: whose gradient is sent.
        settings: the shipped ones by default.
        seed: of the simulation.
    """

    def __init__(
        self,
        front: Any,
        embedding: Tensor,
        sequences: Tensor,
        noise: Noise,
        *,
        rate: float,
        craft: Craft = "inverter",
        settings: Settings | None = None,
        seed: int = 0,
    ) -> None:
        self.settings = settings or settings_of("hijack", Settings)
        self.craft = craft
        self._front, self._sequences, self._noise = front, sequences, noise
        self._generator = torch.Generator().manual_seed(seed)
        common = Counter(sequences.flatten().tolist()).most_common(self.settings.tokens)
        candidates = torch.tensor(sorted(token for token, _ in common))
        self._place = torch.full((len(embedding),), -1)
        self._place[candidates] = torch.arange(len(candidates))
        with torch.no_grad():
            rows = torch.cat([self._bounded(part) for part in torch.split(sequences, 32)])
        flat = (rows[:, 1:] if rows.shape[1] > 1 else rows).flatten(0, 1)
        self._mean, self._scale = flat.mean(0), (flat.var(0) + noise.sigma**2).sqrt().clamp_min(1e-6)
        self.reader = _Reader(rows, sequences, embedding.detach(), candidates, noise.sigma)
        width = rows.shape[2]
        hidden = self.settings.critic
        self.critic = nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, 1))
        moved = [p for p in front.parameters() if p.requires_grad]
        self._own = torch.optim.AdamW(moved, lr=rate, weight_decay=0.0) if moved else None
        self._reading = torch.optim.Adam(self.reader.parameters(), lr=self.settings.inverter_rate)
        self._judging = torch.optim.Adam(self.critic.parameters(), lr=self.settings.critic_rate)
        for _ in range(self.settings.warm):
            self.learn(move=False)

    def learn(self, *, move: bool = True) -> float:
        """One step on public text; the copy of A moves with the inverter unless told otherwise. Returns the loss, nats."""
        tokens = self._draw()
        scores = self.reader(self._noised(self._bounded(tokens)))
        loss = functional.cross_entropy(scores.flatten(0, 1), self._place[tokens].flatten(), ignore_index=-1)
        self._reading.zero_grad()
        if self._own is not None:
            self._own.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._reading.step()
        if move and self._own is not None:
            self._own.step()
        return float(loss.detach())

    def read(self, rows: Tensor) -> Tensor:
        """The inverter's tokens for rows, (N, T, D) to (N, T) ids."""
        with torch.no_grad():
            found: Tensor = self.reader.candidates[self.reader(rows.float()).argmax(2)]
        return found

    def gradient(self, rows: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The crafted gradient at a client's rows, (N, T, D) to (N, T, D), of any length.

        Args:
            rows: as received.
            tokens: (N, T) ids where a colluding client gave them; otherwise the inverter's own guess is taken for true.
        """
        leaf = rows.detach().float().clone().requires_grad_()
        with torch.enable_grad():
            if self.craft == "discriminator":
                self._judge(rows.detach().float())
                loss = functional.softplus(-self._verdict(leaf)).mean()
            else:
                scores = self.reader(leaf).flatten(0, 1)
                labels = scores.detach().argmax(1) if tokens is None else self._place[tokens].flatten()
                loss = functional.cross_entropy(scores, labels, ignore_index=-1)
            (crafted,) = torch.autograd.grad(loss, leaf)
        return crafted

    def _judge(self, rows: Tensor) -> None:
        """One step of the critic: rows of the server's copy of A against the client's."""
        with torch.no_grad():
            own = self._noised(self._bounded(self._draw()))
        loss = functional.softplus(-self._verdict(own)).mean() + functional.softplus(self._verdict(rows)).mean()
        self._judging.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._judging.step()

    def _verdict(self, rows: Tensor) -> Tensor:
        return self.critic((rows - self._mean) / self._scale)  # type: ignore[no-any-return]

    def _draw(self) -> Tensor:
        chosen = torch.randint(0, len(self._sequences), (self.settings.batch,), generator=self._generator)
        return self._sequences[chosen]

    def _bounded(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self._front(tokens).float()
        return hidden if self._noise.clip is None else clip_sequence(hidden, self._noise.clip)

    def _noised(self, rows: Tensor) -> Tensor:
        if not self._noise.sigma:
            return rows
        return rows + self._noise.sigma * torch.randn(rows.shape, generator=self._generator)
