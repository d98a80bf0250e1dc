"""Options by which a party names its policy, its keys, its model and the server; declared once, and what they become."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securesplit.cli.passphrase import existing
from securesplit.cli.policy_sign import trusted_policy

if TYPE_CHECKING:
    from securesplit.client.client import Client
    from securesplit.pki.passphrase import Passphrase
    from securesplit.policy.schema import Policy as Rules

__all__ = [
    "Adapters",
    "Cache",
    "Code",
    "Connection",
    "Evidence",
    "Keys",
    "Model",
    "Policy",
    "Server",
    "cache_or_default",
    "connection",
]

Policy = Annotated[Path, typer.Option("--policy", help="Policy file of this side.")]
Keys = Annotated[Path, typer.Option("--keys", help="Key folder of this party, such as keys/alice.")]
Server = Annotated[str, typer.Option("--server", help="wss://host:port")]
Adapters = Annotated[
    Path | None, typer.Option("--adapters", help="A training run's output directory, for its adapters.")
]
Model = Annotated[str | None, typer.Option("--model", help="Model directory that replaces the job's name for it.")]
Cache = Annotated[
    Path | None, typer.Option("--cache", help="Where pulled models lie; the user's cache directory when absent.")
]
Code = Annotated[
    Path | None, typer.Option("--code", help="File of the public code at the cut, when the job has one; see model fit.")
]
# A word in brackets would be taken for markup, and vanish from the help.
Evidence = Annotated[
    Path | None,
    typer.Option("--evidence", help="Folder with reports of `attack run --out`, for a policy that limits leakage."),
]


@dataclass(frozen=True, slots=True)
class Connection:
    """A client's way to its server.

    Attributes:
        policy: read, and held to its officers.
        keys, server, model, adapters, code, evidence: as given.
        cache: as given, or the user's.
        passphrase: asked for when the key is encrypted; None where there is nowhere to ask.
    """

    policy: Rules
    keys: Path
    server: str
    model: str | None
    cache: Path
    adapters: Path | None
    code: Path | None
    evidence: Path | None
    passphrase: Passphrase | None

    def open(self) -> AbstractContextManager[Client]:
        """See :func:`securesplit.client.run.open_client`."""
        from securesplit.client.run import open_client

        return open_client(
            self.policy, self.keys, self.server, model=self.model, cache=self.cache, adapters=self.adapters, code=self.code,
            evidence=self.evidence, passphrase=self.passphrase,
        )  # fmt: skip


def connection(
    policy: Path,
    keys: Path,
    server: str,
    officers: list[Path] | None,
    secret: tuple[Path | None, int | None],
    *,
    model: str | None,
    cache: Path | None,
    code: Path | None,
    evidence: Path | None,
    adapters: Path | None = None,
) -> Connection:
    """What the options name. The policy is read and its signature verified; nothing is dialled yet.

    Args:
        policy, keys, server, model, cache, code, evidence, adapters: as given.
        officers: of ``--policy-key``.
        secret: of ``--key-pass-file`` and ``--key-pass-fd``.

    Raises:
        InputError: for a file that is no policy, with every fault. PolicyDenied: for one that no officer vouches for.
    """
    passphrase = existing("the client's key", *secret)
    rules = trusted_policy(policy, officers, keys, "client", passphrase=passphrase)
    return Connection(rules, keys, server, model, cache_or_default(cache), adapters, code, evidence, passphrase)


def cache_or_default(cache: Path | None) -> Path:
    """The given cache, or ``$XDG_CACHE_HOME/securesplit/models``, by default under ``~/.cache``."""
    return cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "securesplit" / "models"
