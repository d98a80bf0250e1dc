"""Which tokens a search tries first for a row, and at which noise it pays to have learnt the ranking.

Without noise the ridge inverter's ranking is as good as any: the search proves what it finds and widens until it does.
Under noise nothing is proved, a search tries a first list alone, and a token that is not on it is lost. The discriminant of
the learned inverter, whose mean row per token comes from rehearsing the clients, ranks better there than a linear map does
(0.98 of rows against 0.32 by first choice at twice the rows' own rms; docs/benchmarks/inverters.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attacks.discriminant import Discriminant, fit_discriminant
from attacks.inverter import Study, study_of
from attacks.knowledge import Knowledge

__all__ = ["proposals"]

_BLOCK = 256
_SEED = 20261125
_readers: dict[float, Discriminant] = {}
_studied: list[Study] = []


def _reader(known: Knowledge, sigma: float) -> Discriminant:
    """The discriminant at a noise; those of the latest study are kept, since several attacks and K ask for the same."""
    study = study_of(known)
    if not _studied or _studied[0] is not study:
        _readers.clear()
        _studied[:] = [study]
    if sigma not in _readers:
        with torch.inference_mode(mode=False):
            _readers[sigma] = fit_discriminant(
                study.codebook, study.train, study.test, known.prior.log_probability, sigma,
                torch.Generator().manual_seed(_SEED),
            )  # fmt: skip
    return _readers[sigma]


def proposals(known: Knowledge, sigma: float) -> Callable[[Tensor, int, int], Tensor]:
    """The ranking for rows with this much noise per coordinate, as :meth:`attacks.ridge.Inverter.propose` takes and gives.

    Args:
        sigma: of the noise that is left in the rows; 0 for none.
    """
    if not sigma:
        return known.inverter.propose
    reader, factor = _reader(known, sigma), known.layer.factor

    def propose(rows: Tensor, position: int, count: int) -> Tensor:
        prior, count = reader.prior(position), min(count, known.vocabulary)
        return torch.cat(
            [
                reader.likelihood(part * factor, position).add_(prior).topk(count, dim=1).indices
                for part in torch.split(rows, _BLOCK)
            ]
        )

    return propose
