"""Learning a linear head from noised moments: training averages over records what inference cannot.

    client:  statistic = code (x) target                  one vector of norm <= 1 per record: features and label together
             gate: clip, noise                            one charge for both; one memoised release per record
    server:  moments   = sum of releases                  noise N(0, sigma^2 / N) per coordinate of the mean
    client:  fit_head(own clean records, the others' moments)

With codes z and targets y, ``E[z y^T] = E[z z^T] w`` for the best linear head w. The left side is what N noised records
estimate; ``E[z z^T]`` is known from *public* text and costs nothing. A client then has two kinds of evidence about w: its
own clean records, and r pseudo-records, the rows of ``E[z z^T]``, whose noise has a known variance. Weighting each by
its variance is the whole fusion: nothing is tuned on private data, and where the others are few or the noise is large,
the head tends to the client's own. (Ridge regression with a Gaussian prior; the weights are the textbook ones.)

What it does not protect: nothing is released here. The statistic goes through the gate like any tensor; what comes back
is post-processing of releases, so a peer who receives the moments learns at most what the server could. It is assumed,
not checked, that private text has about the second moment of the public text; where it does not, quality suffers,
privacy does not. Somebody who sends false statistics can turn the head: nothing here bounds a liar's influence beyond
the norm of what he sends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "fit_head", "joint_statistic", "sum_moments"]


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """A sum of noised joint statistics.

    Attributes:
        total: (r, K) float64, sum over records of ``code (x) target`` plus noise.
        count: N, records in it.
        noise: variance per coordinate of the *sum's* noise: ``N sigma^2`` for releases noised one by one, ``sigma^2``
            where a secure sum was noised once, 0 for clean records.
    """

    total: Tensor
    count: int
    noise: float

    def __post_init__(self) -> None:
        if self.total.ndim != 2 or self.count < 0 or not 0 <= self.noise < float("inf"):
            raise ValueError("moments are (r, K), of at least no record, with a finite noise variance")

    def without(self, own: Moments) -> Moments:
        """These moments less a part of the same sum.

        A client knows its own releases and takes them out, because its clean records say more.

        Raises:
            ValueError: where ``own`` is no part of these.
        """
        if own.total.shape != self.total.shape or own.count > self.count or own.noise > self.noise * (1 + 1e-9):
            raise ValueError("only a part of the sum can be taken out of it")
        return Moments(self.total - own.total, self.count - own.count, max(0.0, self.noise - own.noise))

    def variance(self) -> float:
        """Variance per coordinate of the mean as an estimate of ``E[z y^T]``: sampling and noise.

        With codes of norm 1 and targets of norm at most 1 the r K sampling variances add up to at most 1, so that their
        mean is at most 1/(r K).
        """
        return (1 / self.total.numel() + self.noise / max(1, self.count)) / max(1, self.count)


def joint_statistic(codes: Tensor, targets: Tensor) -> Tensor:
    """Each record's code and label as one vector, ready for the gate.

    The label never travels alone: one clip bounds both, so that replacing text *and* label moves the statistic by at most
    2, and one charge pays for both. A gate remembers releases by record and content: name the label in the content too,
    because the same text under another label is another statistic.

    Args:
        codes: (N, r), each row's norm at most 1.
        targets: (N, K), each row's norm at most 1: ``+-1`` for two classes, a scaled centred one-hot for more.

    Returns:
        (N, 1, r K): one latent vector per record, norm at most 1.

    Raises:
        ValueError: where the rows do not match or a target is longer than 1.
    """
    if len(codes) != len(targets) or bool((torch.linalg.vector_norm(targets.double(), dim=1) > 1 + 1e-9).any()):
        raise ValueError("one target of norm at most 1 per code")
    return (codes.double()[:, :, None] * targets.double()[:, None, :]).reshape(len(codes), 1, -1)


def sum_moments(released: Tensor, outputs: int, sigma: float) -> Moments:
    """Add up what crossed the cut.

    Args:
        released: (N, 1, r K), clipped and noised statistics; N may be 0.
        outputs: K.
        sigma: standard deviation of each coordinate's noise; 0 for clean statistics.
    """
    flat = released.double().sum(dim=(0, 1))
    return Moments(flat.reshape(-1, outputs), len(released), len(released) * sigma**2)


def fit_head(
    codes: Tensor, targets: Tensor, prior: float, moments: Moments | None = None, second: Tensor | None = None
) -> Tensor:
    """The head that own records, others' moments and a Gaussian prior agree on.

    Minimises ``sum_i |y_i - z_i w|^2 + |m - G w|^2 / v + prior |w|^2`` with m the moments' mean, G ``second`` and v
    :meth:`Moments.variance`; residuals of own records have variance about 1, targets being ``+-1``.

    Args:
        codes: (n, r), own clean records; n may be 0.
        targets: (n, K).
        prior: precision of the weights, positive.
        moments: of the *other* clients; None, or a count of 0, for a client alone.
        second: (r, r), the codes' public second moment; needed with moments.

    Returns:
        (r, K) float64: a record's scores are ``code @ head``.

    Raises:
        ValueError: for a prior that is not positive, or moments without ``second``.
    """
    if not prior > 0:
        raise ValueError("the prior's precision must be positive")
    z, y = codes.double(), targets.double()
    left, right = z.mT @ z, z.mT @ y
    if moments is not None and moments.count:
        if second is None:
            raise ValueError("moments need the codes' second moment")
        weight = 1 / moments.variance()
        left = left + weight * second.double().mT @ second.double()
        right = right + weight * second.double().mT @ (moments.total.double() / moments.count)
    left = left + prior * torch.eye(len(left), dtype=left.dtype)
    head: Tensor = torch.linalg.solve(left, right)
    return head
