"""From a failed handshake to a cause: what OpenSSL says, in our codes, and what a refused client can find out itself.

Our own server sends the TLS alert that belongs to its refusal (securesplit/transport/accepted.py). Others may not: Python's
event loop drops it, and the client sees nothing but an end of file. So :func:`diagnose` checks everything that can be
checked on this side, in order, weighs the alert against it, and says last that the server's reason is unknown.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from securesplit.errors import ConnectionFailed
from securesplit.pki.identity import read_certificate
from securesplit.pki.store import KeyFolder

__all__ = ["Refusal", "diagnose", "hearing", "refusal_of"]

# Numbers of X509_V_ERR_* in OpenSSL's x509_vfy.h.
_VERIFY = {
    2: ("SS-3202", "the certificate was issued by another authority"),
    3: ("SS-3206", "there is no usable revocation list"),
    7: ("SS-3202", "the certificate was issued by another authority"),
    8: ("SS-3206", "the revocation list comes from another authority"),
    9: ("SS-3204", "the certificate is not valid yet; the two clocks differ"),
    10: ("SS-3203", "the certificate has expired"),
    11: ("SS-3206", "the revocation list is from the future; the two clocks differ"),
    12: ("SS-3206", "the revocation list is out of date"),
    18: ("SS-3202", "the certificate was issued by another authority"),
    19: ("SS-3202", "the certificate was issued by another authority"),
    20: ("SS-3202", "the certificate was issued by another authority"),
    21: ("SS-3202", "the certificate was issued by another authority"),
    23: ("SS-3205", "the certificate is revoked"),
    26: ("SS-3210", "the certificate is for another role"),
    47: ("SS-3211", "a name in the certificate is outside of what its authority may certify"),
    44: ("SS-3206", "the revocation list comes from another authority"),
    66: ("SS-3215", "the certificate's key is too weak"),
    67: ("SS-3215", "an authority's key is too weak"),
    68: ("SS-3215", "the certificate's signature is too weak"),
    62: ("SS-3212", "the certificate does not name the host that was dialled"),
    64: ("SS-3212", "the certificate does not name the address that was dialled"),
}

# Ends of OpenSSL's reason names; the prefixes differ between its versions.
_REASONS = (
    ("ALERT_CERTIFICATE_REQUIRED", "SS-3306", "the server got no certificate"),
    ("ALERT_CERTIFICATE_REVOKED", "SS-3205", "the certificate is revoked, says the other side"),
    ("ALERT_CERTIFICATE_EXPIRED", "SS-3203", "the certificate has expired or is not valid yet, says the other side"),
    ("ALERT_UNKNOWN_CA", "SS-3202", "the certificate was issued by another authority, says the other side"),
    ("ALERT_UNSUPPORTED_CERTIFICATE", "SS-3210", "the certificate is for another role, says the other side"),
    ("ALERT_BAD_CERTIFICATE", "SS-3301", "the certificate is unusable, says the other side"),
    ("ALERT_CERTIFICATE_UNKNOWN", "SS-3301", "the certificate is unusable, says the other side"),
    ("ALERT_ACCESS_DENIED", "SS-3301", "access denied, says the other side"),
    ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "SS-3306", "the peer presented no certificate"),
    ("ALERT_PROTOCOL_VERSION", "SS-3302", "the other side does not speak TLS 1.3"),
    ("UNSUPPORTED_PROTOCOL", "SS-3302", "the other side does not speak TLS 1.3"),
    ("ALERT_HANDSHAKE_FAILURE", "SS-3302", "the two sides share no TLS 1.3 cipher or group"),
    ("NO_SHARED_CIPHER", "SS-3302", "the two sides share no TLS 1.3 cipher or group"),
    ("WRONG_VERSION_NUMBER", "SS-3303", "the other side does not speak TLS at all"),
    ("RECORD_LAYER_FAILURE", "SS-3303", "the other side does not speak TLS at all"),
    ("HTTP_REQUEST", "SS-3303", "the other side does not speak TLS at all"),
)

_HINTS = {
    "SS-3202": "All parties of a run need certificates of one authority; compare ca.pem in both folders.",
    "SS-3203": "Issue a new certificate; check the clocks of both machines.",
    "SS-3204": "Set the clocks of both machines.",
    "SS-3205": "The authority withdrew the certificate; ask its operator.",
    "SS-3206": "Run 'securesplit certs crl' at the authority and copy its crl.pem into the party's folder.",
    "SS-3210": "Servers need 'certs issue --role server', clients '--role client'.",
    "SS-3212": "Dial a name that the server's certificate holds, or issue it anew with --dns or --ip.",
    "SS-3302": "Both ends need TLS 1.3; look for a proxy or an old OpenSSL between them.",
    "SS-3303": "Check the port, and that no proxy ends TLS on the way.",
}
_SKEW = timedelta(hours=1)
_UNREACHABLE = (ConnectionRefusedError, socket.gaierror, TimeoutError)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a handshake failed.

    Attributes:
        code: our error code.
        cause: in words; free of anything that the peer wrote.
        reason: OpenSSL's own name or message, for the operator's log.
        address: the peer's, where it is known.
    """

    code: str
    cause: str
    reason: str
    address: str = ""


def refusal_of(error: ssl.SSLError) -> Refusal:
    """What OpenSSL's error means; SS-3305 when this table does not know it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = f"verify error {error.verify_code}"
        code, cause = _VERIFY.get(error.verify_code, ("SS-3202", "the certificate breaks the profile"))
        return Refusal(code, cause, reason)
    reason = error.reason or type(error).__name__
    for name, code, cause in _REASONS:
        if reason.endswith(name):
            return Refusal(code, cause, reason)
    return Refusal("SS-3305", "the TLS handshake failed", reason)


def hearing(alerts: list[ssl.SSLError]) -> type[ssl.SSLSocket]:
    """A class of sockets that keep the alert by which the other side ended the connection.

    The websocket library reads in a thread of its own and reports an end of file in the alert's place.
    """

    class Hearing(ssl.SSLSocket):
        def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
            try:
                return super().recv(buflen, flags)
            except ssl.SSLError as error:
                if _tells(error):
                    alerts.append(error)
                raise

    return Hearing


def diagnose(folder: KeyFolder, error: BaseException, now: datetime | None = None) -> ConnectionFailed:
    """The most likely cause of a connection that failed at or right after its TLS handshake, for a client.

    The order: the server was not reached; we refused its certificate; the two do not speak the same TLS; something is
    wrong with our own folder (modes, key, role, dates, authority, revocation, each with its own code); what the server
    said; and last, that it said nothing.

    Args:
        folder: the identity that was used; its files are checked again.
        error: what the connection raised; causes and contexts are followed.
        now: the time of the check.

    Returns:
        The error to raise. It holds nothing that the peer wrote.
    """
    lost = next((step for step in _chain(error, contexts=False) if isinstance(step, _UNREACHABLE)), None)
    if lost is not None:
        return ConnectionFailed(
            "SS-3304",
            f"the server was not reached ({type(lost).__name__})",
            hint="Check host and port, and that the server runs.",
        )
    found = list(_chain(error, contexts=True))
    said = next((refusal_of(step) for step in found if isinstance(step, ssl.SSLError) and _tells(step)), None)
    ours = any(isinstance(step, ssl.SSLCertVerificationError) for step in found)
    if said is not None and ours:
        what = f"this side refused the server: {said.cause}"
        return ConnectionFailed(said.code, what, hint=_HINTS.get(said.code, "Have the server's certificate checked."))
    if said is not None and said.code in {"SS-3302", "SS-3303"}:
        return ConnectionFailed(said.code, f"no TLS with the server: {said.cause}", hint=_HINTS[said.code])
    try:
        folder.reopen(now=now)
    except ConnectionFailed as fault:
        return ConnectionFailed(fault.code, f"the server refused this party: {fault.what}", hint=fault.hint)
    if said is not None and said.code != "SS-3305":
        return _weighed(said, folder, now or datetime.now(UTC))
    return ConnectionFailed(
        "SS-3301",
        "the server closed the connection in or right after the TLS handshake: it refused the certificate, which was "
        "probably issued by another authority or revoked",
        hint="Everything on this side is in order. Compare ca.pem with the server's, and ask its operator for the reason.",
    )


def _weighed(said: Refusal, folder: KeyFolder, now: datetime) -> ConnectionFailed:
    """The server's alert, held against what this side knows: TLS has fewer alerts than there are causes.

    OpenSSL says "expired" for an outdated revocation list, too, and "bad certificate" for one that is not valid yet.
    """
    leaf = read_certificate(folder.cert_der)
    left = leaf.not_valid_after_utc - now
    if said.code == "SS-3203" and left > _SKEW:
        return ConnectionFailed(
            "SS-3206",
            f"the server refused this party: it says 'expired', and the certificate is good for {_span(left)} more; so its "
            "revocation list is out of date, or its clock is that far ahead",
            hint="Ask the server's operator to publish the list ('securesplit certs crl') and to check the clock.",
        )
    if said.code == "SS-3301" and now - leaf.not_valid_before_utc < timedelta(days=1):
        return ConnectionFailed(
            "SS-3204",
            "the server refused this party: it calls the certificate bad, and it is new and in order here; so the server's "
            f"clock is probably more than {_span(now - leaf.not_valid_before_utc)} behind",
            hint=_HINTS["SS-3204"],
        )
    hint = _HINTS.get(said.code, "Ask the server's operator; its audit log holds the reason.")
    return ConnectionFailed(said.code, f"the server refused this party: {said.cause}", hint=hint)


def _span(span: timedelta) -> str:
    hours = span.total_seconds() / 3600
    return f"{hours / 24:.0f} days" if hours >= 48 else f"{hours:.0f} h" if hours >= 2 else f"{hours * 60:.0f} min"


def _tells(error: ssl.SSLError) -> bool:
    """Whether the error says more than that the stream ended."""
    return not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)


def _chain(error: BaseException, *, contexts: bool) -> Iterator[BaseException]:
    """The error and what it came from; contexts too, where a library does not name its causes."""
    seen: set[int] = set()
    step: BaseException | None = error
    while step is not None and id(step) not in seen:
        seen.add(id(step))
        yield step
        step = step.__cause__ or (step.__context__ if contexts else None)
