"""Read a policy file; report every fault of it at once."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import ValidationError

from securesplit.errors import InputError
from securesplit.policy.schema import Policy

_MAX_BYTES = 1 << 20


def faults(error: ValidationError) -> tuple[str, ...]:
    """One line per fault: where it is and what is wrong, in the file's own names."""
    lines = []
    for fault in error.errors(include_url=False, include_input=False):
        where = ".".join(str(p) for p in fault["loc"] if p not in {"gaussian", "UnsafeNoPrivacy"}) or "policy"
        what = "unknown key" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {what}")
    return tuple(lines)


def parse_policy(text: str, *, source: str = "policy") -> Policy:
    """Build a policy from TOML text.

    Args:
        text: the file's content.
        source: what to call it in messages.

    Raises:
        InputError: SS-1101 when it is not TOML, SS-1102 with one detail per fault when it breaks the schema.
    """
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "nested too deeply, or a number too long"
        raise InputError(
            "SS-1101", f"{source} is not valid TOML: {why}", hint="Compare it with policies/balanced.toml."
        ) from None
    try:
        return Policy.model_validate(raw)
    except ValidationError as error:
        found = faults(error)
        raise InputError(
            "SS-1102",
            f"{source} has {len(found)} fault(s)",
            hint="Every key is explained in policies/README.md; a policy is a complete file without inheritance.",
            details=found,
        ) from None


def load_policy(path: str | Path) -> Policy:
    """Read and check a policy file.

    Raises:
        InputError: SS-1100 when it cannot be read, SS-1101 and SS-1102 as :func:`parse_policy`.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError("SS-1100", f"{path} is larger than 1 MiB, which no policy is", hint="Name a policy file.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "SS-1100", f"cannot read the policy {path}: {type(error).__name__}", hint="Name a readable TOML file."
        ) from None
    return parse_policy(text, source=str(path))
