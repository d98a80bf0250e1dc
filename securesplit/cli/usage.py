"""What is wrong with a command line: all of it at once, where the parser would stop at the first fault."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from securesplit.errors import InputError

__all__ = ["as_input_error"]


def as_input_error(error: Exception, argv: Sequence[str], kind: type[Exception]) -> InputError:
    """A usage error of the parser as SS-1001, with every other fault of the same command line.

    Args:
        error: what the parser stopped at.
        argv: the words after the program's name.
        kind: base class of the parser's errors.
    """
    context = getattr(error, "ctx", None)
    hint = f"See `{context.command_path} --help`." if context is not None else "See `securesplit --help`."
    faults = tuple(dict.fromkeys((_said(error), *_others(context, argv, kind))))
    if len(faults) == 1:
        return InputError("SS-1001", faults[0], hint=hint)
    return InputError("SS-1001", f"the command line has {len(faults)} faults", hint=hint, details=faults)


def _said(error: Exception) -> str:
    return str(getattr(error, "format_message", error.__str__)()).replace(": Value error, ", ": ")


def _others(context: Any, argv: Sequence[str], kind: type[Exception]) -> list[str]:
    """Faults of each option and argument by itself; none where even the words cannot be told apart."""
    if context is None or context.parent is None:
        return []
    faults = []
    try:
        parser = context.command.make_parser(context)
        given, rest, _ = parser.parse_args(args=_words(context, argv))
    except (kind, ValueError):
        return []
    for parameter in context.command.get_params(context):
        try:
            _, rest = parameter.handle_parse_result(context, given, rest)
        except kind as error:
            faults.append(_said(error))
    return faults


def _words(context: Any, argv: Sequence[str]) -> list[str]:
    """The words that are the command's own.

    Raises:
        ValueError: when its name is not on the command line.
    """
    names: list[str] = []
    while context.parent is not None:
        names.insert(0, context.info_name)
        context = context.parent
    # Only flags stand before a command's name, so that its first occurrence is the command.
    start = 0
    for name in names:
        start = list(argv).index(name, start) + 1
    return list(argv[start:])
