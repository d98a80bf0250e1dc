"""From options to an endpoint that listens, and its end."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from securesplit.client.chat.toll import Toll
from securesplit.client.endpoint.admission import Admission
from securesplit.client.endpoint.asked import Defaults
from securesplit.client.endpoint.desk import Desk
from securesplit.client.endpoint.service import Endpoint
from securesplit.errors import BudgetExhausted
from securesplit.transport.loopback import Bounds, Loopback

if TYPE_CHECKING:
    from securesplit.client.client import Client

__all__ = ["Ready", "run_endpoint"]


@dataclass(frozen=True, slots=True, repr=False)
class Ready:
    """What a program needs to ask.

    Attributes:
        url: its base address, which ends with ``/v1``.
        token: of this start.
        model: the name to ask for.
    """

    url: str
    token: str
    model: str


def run_endpoint(
    opened: Callable[[], AbstractContextManager[Client]],
    host: str,
    port: int,
    *,
    defaults: Defaults,
    toll: Toll,
    ready: Callable[[Ready], None],
    stop: Callable[[], bool],
    beyond: bool = False,
    bounds: Bounds | None = None,
) -> None:
    """Serve until ``stop`` says so.

    Args:
        opened: opens a session with the server; again when one broke.
        host, port: where to listen; port 0 takes a free one.
        defaults: what holds where a request does not say.
        toll: counts what conversations cost.
        ready: called once it listens.
        stop: asked a few times a second.
        beyond: allow an address that other machines reach.
        bounds: what a peer may use.

    Raises:
        InputError: SS-1270. ConnectionFailed: SS-3041, and what dialling the server raises. PolicyDenied: SS-2010 and others.
    """
    # The port first, the session next: a mistaken address costs nobody a handshake.
    listening = Loopback(host, port, beyond=beyond, bounds=bounds or Bounds())
    desk = Desk(opened)
    with closing(listening), ExitStack() as ending:
        ending.callback(desk.end)
        token = "securesplit-" + secrets.token_urlsafe(32)
        admission = Admission.at(listening.host, listening.port, token)
        endpoint = Endpoint(desk, admission, defaults, toll)
        with suppress(BudgetExhausted):  # That is said to each request; a policy without generation is said here.
            desk.client().gate.require(1, at="decode")
        shown = f"[{host}]" if ":" in host else host
        ready(Ready(f"http://{shown}:{listening.port}/v1", token, endpoint.model))
        listening.run(endpoint, stop)
