"""One table of a policy file, which tells all of its faults at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails

__all__ = ["STRICT", "Positive", "Table", "at"]

STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

Positive = Annotated[float, Field(gt=0)]


def at(table: object, *path: str) -> Any:
    """A value of a table that may be malformed, or of a model; None where there is none."""
    for name in path:
        table = table.get(name) if isinstance(table, Mapping) else getattr(table, name, None)
    return table


class Table(BaseModel):
    """A table of the file. Faults of single keys and broken rules between keys are reported together."""

    model_config = STRICT

    @staticmethod
    def rules(table: object) -> Iterator[str]:
        """One sentence per broken rule between keys; the table may have other faults, and then nothing is sure of it."""
        del table
        yield from ()

    @model_validator(mode="wrap")
    @classmethod
    def _every_fault(cls, table: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        faults: list[InitErrorDetails] = []
        made: Self | None = None
        try:
            made = handler(table)
        except ValidationError as error:
            for known in error.errors(include_url=False):
                fault = InitErrorDetails(type=known["type"], loc=known["loc"], input=known["input"])
                if "ctx" in known:
                    fault["ctx"] = known["ctx"]
                faults.append(fault)
        faults += [
            InitErrorDetails(type="value_error", loc=(), input=None, ctx={"error": ValueError(sentence)})
            for sentence in cls.rules(table)
        ]
        if made is None or faults:
            raise ValidationError.from_exception_data(cls.__name__, faults, hide_input=True)
        return made
