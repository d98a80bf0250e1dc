"""The command line: argv to values, one call, print. Nothing heavy is imported before a command runs.

Exit codes: 0 ok, 1 a check failed, 2 usage or bad input, 3 denied by policy, 4 connection, TLS or identity, 5 protocol,
6 budget exhausted, 7 leakage gate exceeded, 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from securesplit.cli import aggregate, attack, certs, explain, generate, model, policy, privacy, serve, train
from securesplit.cli.demo.command import demo
from securesplit.errors import SecureSplitError

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
app.command("demo")(demo)
app.command("serve")(serve.serve)
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.command("explain")(explain.explain)

_DEBUG = False


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. They may contain private values.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log to stderr what happens.")] = False,
) -> None:
    global _DEBUG  # noqa: PLW0603 (one process, one command line)
    _DEBUG = debug
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


def main() -> None:
    """Run the command line; every error of ours becomes two lines and an exit code."""
    try:
        app()
    except SecureSplitError as error:
        if _DEBUG:
            raise
        sys.stderr.write(rendered(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def rendered(error: SecureSplitError) -> str:
    """``error[SS-1234]: what happened``, one line per further fault, ``hint: what to do``."""
    lines = [f"error[{error.code}]: {error.what}", *(f"  - {detail}" for detail in error.details)]
    if error.hint:
        lines.append(f"hint: {error.hint}")
    return "\n".join(lines) + "\n"
