"""The job's table ``[adapters]``: what is trained in each part, and what of it the clients sum."""

from __future__ import annotations

from collections.abc import Container
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Adapters", "Method", "PartAdapters", "PartName", "Shared", "Sharing"]

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
Sharing = Literal["alternating", "frozen-a", "share-a", "core", "naive"]
Shared = Sharing | Literal["prefix"]
Method = Literal["lora", "prefix"]
PartName = Literal["front", "middle", "back"]

_Rank = Annotated[int, Field(ge=1, le=1024)]
_Alpha = Annotated[float, Field(gt=0, le=4096)]
_Targets = Annotated[tuple[str, ...], Field(strict=False)]
_Dropout = Annotated[float, Field(ge=0, le=0.9)]


def _off(value: object) -> bool:
    return not value


class PartAdapters(BaseModel):
    """What one part has of its own, in ``[adapters.front]``, ``[adapters.middle]``, ``[adapters.back]``.

    Attributes:
        rank, alpha, targets, dropout, rslora, dora: as in :class:`Adapters`, whose values hold where one is absent.
    """

    model_config = _STRICT
    rank: _Rank | None = None
    alpha: _Alpha | None = None
    targets: _Targets | None = None
    dropout: _Dropout | None = None
    rslora: bool | None = None
    dora: bool | None = None


class Adapters(BaseModel):
    """LoRA, or prefixes, on A, B and C.

    Attributes:
        rank, alpha: as in the LoRA paper; the update is (alpha / rank) B A.
        targets: names of the linear layers that get an adapter; empty means the architecture's attention projections.
        seed: public; each layer's factor A is drawn from it and the layer's global number, so that any cut starts alike.
        sharing: what the clients learn between secure sums and what the sums carry (docs/adr/0007-lora-that-sums.md):
            ``alternating`` B and A in turns; ``frozen-a`` B alone; ``share-a`` A, while each client keeps a B of its own;
            ``core`` a square matrix between two constant factors; ``naive`` both at once, whose mean is no model's.
        inexact: must be true for ``naive`` and for nothing else.
        dropout: probability that a number that goes into an adapter is left out in a training step.
        rslora: the update is (alpha / sqrt(rank)) B A (arXiv:2312.03732).
        dora: learn the lengths of the weights' rows apart from their directions (arXiv:2402.09353); in A and C where no sum carries them.
        method: ``prefix`` gives each layer ``prefix_length`` keys and values that are learnt, in place of LoRA
            (P-tuning v2, arXiv:2110.07602); ``rank`` and ``alpha`` are then without effect.
        prefix_length: positions.
        embedding: a LoRA on A's embedding, which learns at each client and is never sent nor summed.
        front, middle, back: what one part has of its own.
    """

    model_config = _STRICT
    rank: _Rank
    alpha: _Alpha
    targets: _Targets = ()
    seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    # What is not said is not in the canonical text: jobs from before these keys keep their digests.
    sharing: Annotated[Sharing, Field(exclude_if=lambda value: value == "alternating")] = "alternating"
    inexact: Annotated[bool, Field(exclude_if=_off)] = False
    dropout: Annotated[_Dropout, Field(exclude_if=_off)] = 0.0
    rslora: Annotated[bool, Field(exclude_if=_off)] = False
    dora: Annotated[bool, Field(exclude_if=_off)] = False
    method: Annotated[Method, Field(exclude_if=lambda value: value == "lora")] = "lora"
    prefix_length: Annotated[int | None, Field(ge=1, le=1024)] = None
    embedding: Annotated[bool, Field(exclude_if=_off)] = False
    front: PartAdapters | None = None
    middle: PartAdapters | None = None
    back: PartAdapters | None = None

    def of(self, part: PartName) -> Adapters:
        """What one part has: this table with the part's own values in place."""
        own = getattr(self, part)
        said = {} if own is None else own.model_dump(exclude_none=True)
        return self.model_copy(update={**said, "front": None, "middle": None, "back": None})

    @property
    def any_dora(self) -> bool:
        """Whether a part has DoRA; an export then says of every part how long its weights' rows are."""
        return any(self.of(part).dora for part in get_args(PartName))

    @property
    def shared(self) -> Shared:
        """What the sums carry."""
        return "prefix" if self.method == "prefix" else self.sharing

    @model_validator(mode="after")
    def _inexact_on_purpose(self) -> Self:
        if self.sharing == "naive" and not self.inexact:
            raise ValueError(
                "sharing 'naive' averages A and B apart, and the product of means is not the mean of products: add "
                "inexact = true if that is wanted; every run then reports by how much it was wrong"
            )
        if self.inexact and self.sharing != "naive":
            raise ValueError(f"inexact = true belongs to sharing 'naive' alone; sharing '{self.sharing}' is exact")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if faults := self._prefix_faults():
            raise ValueError("; ".join(faults))
        return self

    def _prefix_faults(self) -> list[str]:
        if self.method == "lora":
            return [] if self.prefix_length is None else ["prefix_length belongs to method = 'prefix'"]
        faults = [] if self.prefix_length is not None else ["method 'prefix' needs prefix_length"]
        if self.sharing != "alternating":
            faults.append(f"sharing '{self.sharing}' speaks of LoRA's factors; prefixes are summed whole")
        odd = [name for name in ("targets", "dropout", "rslora", "dora", "embedding") if getattr(self, name)]
        odd += [name for name in ("front", "middle", "back") if getattr(self, name) is not None]
        if odd:
            faults.append(f"{', '.join(odd)} belong(s) to method = 'lora'")
        return faults

    def dora_faults(self, own: Container[str]) -> list[str]:
        """What speaks against DoRA in A and C, in words.

        Args:
            own: which of ``front`` and ``back`` stay each client's own and are in no sum.
        """
        ends: tuple[PartName, ...] = ("front", "back")
        learnt = [name for name in ends if self.of(name).dora]
        faults = []
        if summed := [name for name in learnt if name not in own]:
            faults.append(
                f"adapters: dora in {' and '.join(summed)}: it is not linear in what a sum adds; set it in [adapters.middle], or for "
                "a part in training.personal, or in mode splitfed-v3"
            )
        if learnt and self.sharing == "core":
            faults.append("adapters: dora learns lengths beside A and B, which stand still in sharing 'core'")
        if "front" in learnt and self.embedding:
            faults.append("adapters: embedding = true adapts a table, which has no lengths to learn: no dora in front")
        return faults
