"""Who may ask: programs of this user, who have the token; and no page in a browser.

A page on any site can make a browser send requests to 127.0.0.1. So a request that says it comes from a page (``Origin``,
``Sec-Fetch-Site``) is refused, and so is one for another host name, because a name that was made to point to 127.0.0.1 (DNS
rebinding) turns a page's own site into this machine. The token then keeps other users of the machine out.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from securesplit.errors import InputError
from securesplit.transport.http import Head

__all__ = ["Admission", "NotKnown"]


class NotKnown(InputError):
    """No token, or a wrong one."""


@dataclass(frozen=True, slots=True, repr=False)
class Admission:
    """The rule.

    Attributes:
        token: random, of this start.
        hosts: what ``Host`` may say, in lower case, with the port; None for anything.
    """

    token: str
    hosts: frozenset[str] | None

    @classmethod
    def at(cls, host: str, port: int, token: str) -> Admission:
        """For an address, by its own name and by the names of the loopback; any name where it is every address."""
        if host in {"0.0.0.0", "::"}:  # noqa: S104 - such an address is asked for at length, elsewhere
            return cls(token, None)
        names = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host.lower()}
        # Programs leave the port of http out.
        return cls(token, frozenset(f"{name}:{port}" for name in names) | (names if port == 80 else frozenset()))

    def check(self, head: Head) -> None:
        """Raise for a request that may not go on.

        Raises:
            InputError: SS-1274 for one from a page, or for another host.
            NotKnown: SS-1274 without the token.
        """
        if head.all("origin") or any(site.lower() != "none" for site in head.all("sec-fetch-site")):
            raise _refused("this request comes from a page in a browser", "Use a program, not a page.")
        named = [host.lower() for host in head.all("host")]
        if self.hosts is not None and (len(named) != 1 or named[0] not in self.hosts):
            raise _refused("this request is for another host", "Use the address that the endpoint printed.")
        given = head.all("authorization")
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        # Compared in constant time, so that the time of a refusal says nothing of how much was right.
        right = hmac.compare_digest(token.strip().encode("latin-1", "replace"), self.token.encode())
        if scheme.lower() != "bearer" or not right:
            raise NotKnown(
                "SS-1274",
                "this request does not carry the endpoint's token",
                hint="Send it as Authorization: Bearer TOKEN.",
            )


def _refused(what: str, hint: str) -> InputError:
    return InputError("SS-1274", what, hint=hint)
