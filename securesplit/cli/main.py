"""The command line: argv to values, one call, print. Nothing heavy is imported before a command runs.

Exit codes: 0 ok, 1 a check failed, 2 usage or bad input, 3 denied by policy, 4 connection, TLS or identity, 5 protocol,
6 budget exhausted, 7 leakage gate exceeded, 130 interrupted.
"""

from __future__ import annotations

import logging
import signal
import sys
from typing import Annotated, NoReturn

import typer

from securesplit import __version__
from securesplit.cli import (
    aggregate,
    attack,
    audit,
    baseline,
    certs,
    chat,
    doctor,
    endpoint,
    evaluate,
    explain,
    generate,
    model,
    policy,
    privacy,
    runs,
    serve,
    tasks,
    train,
)
from securesplit.cli.demo.command import demo
from securesplit.cli.usage import as_input_error
from securesplit.errors import CheckFailed, InputError, SecureSplitError

app = typer.Typer(
    name="securesplit",
    help="Fine-tune and use a language model whose middle runs on somebody else's GPU, without handing over the text.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(certs.app, name="certs")
app.add_typer(policy.app, name="policy")
app.add_typer(model.app, name="model")
app.add_typer(aggregate.app, name="aggregate")
app.add_typer(privacy.app, name="privacy")
app.add_typer(attack.app, name="attack")
app.add_typer(tasks.app, name="tasks")
app.add_typer(audit.app, name="audit")
app.add_typer(runs.app, name="runs")
app.command("demo")(demo)
app.command("serve")(serve.serve)
app.command("train")(train.train)
app.command("baseline")(baseline.baseline)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("endpoint")(endpoint.endpoint)
app.command("eval")(evaluate.evaluate)
app.command("explain")(explain.explain)
app.command("doctor")(doctor.doctor)

_DEBUG = False
_INTERRUPTED = 130
# Typer carries click inside; its public names reach the base class of all usage errors only this way.
_UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
_DISK = "Check that the path exists, that it may be written, and that the disk has room."
_DEFECT = "Run it again with --debug for a traceback, which may contain private values, and report it."


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"securesplit {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. They may contain private values.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log to stderr what happens.")] = False,
) -> None:
    del version  # Its callback has done the work.
    global _DEBUG  # noqa: PLW0603 (one process, one command line)
    _DEBUG = debug
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


def main() -> None:
    """Run the command line; every error becomes two lines and an exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        status = app(standalone_mode=False)
    except SecureSplitError as error:
        _fail(error)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # The help is printed already.
            sys.exit(2)
        _fail(as_input_error(error, sys.argv[1:], _UsageError))
    except (typer.Abort, KeyboardInterrupt):
        _interrupted()
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        place = f" ({error.filename})" if isinstance(error.filename, str) else ""
        _fail(
            InputError(
                "SS-1002", f"a file could not be used{place}: {error.strerror or type(error).__name__}", hint=_DISK
            )
        )
    except Exception as error:  # noqa: BLE001 (the text of a foreign error may hold private values, its type cannot)
        _fail(CheckFailed("SS-1003", f"an unexpected {type(error).__name__}; this is a defect", hint=_DEFECT))
    else:
        if status == _INTERRUPTED:  # What Typer makes of Ctrl-C.
            _interrupted()
        sys.exit(status if isinstance(status, int) else 0)


def _interrupted() -> NoReturn:
    sys.stderr.write("interrupted\n")
    sys.exit(_INTERRUPTED)


def _fail(error: SecureSplitError) -> NoReturn:
    if _DEBUG:
        raise error
    sys.stderr.write(rendered(error))
    sys.exit(error.exit_code)


def _terminated(_signal: int, _frame: object) -> NoReturn:
    """SIGTERM ends this process through its clean-up, so that the processes it started end, too."""
    sys.exit(143)


def rendered(error: SecureSplitError) -> str:
    """``error[SS-1234]: what happened``, one line per further fault, ``hint: what to do``."""
    lines = [f"error[{error.code}]: {error.what}", *(f"  - {detail}" for detail in error.details)]
    if error.hint:
        lines.append(f"hint: {error.hint}")
    return "\n".join(lines) + "\n"
