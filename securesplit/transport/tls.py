"""TLS 1.3 with certificates on both sides: the two contexts, and their exchange while the server runs.

Settings, each with its reason:

* no session tickets: a resumed session is not checked against the revocation list, so a revoked client would stay in;
* ``VERIFY_CRL_CHECK_LEAF``: a missing or outdated revocation list refuses everybody, it never lets anybody pass;
* only the pinned authority is trusted, never the system's store;
* the identity is the URI in the certificate (:func:`peer_identity`); the host name check of the client comes on top.

What this does not protect against: lengths and timing of the traffic, which TLS shows to the network; and recordings
that are decrypted by a future quantum computer, unless both ends' OpenSSL (3.5 or later) agree on a hybrid group.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import NamedTemporaryFile

from securesplit.errors import ConnectionFailed
from securesplit.pki.identity import Identity, Role
from securesplit.pki.passphrase import Passphrase
from securesplit.pki.store import KeyFolder
from securesplit.transport.accepted import ACCEPTED, Accepted
from securesplit.transport.refusal import Refusal, diagnose, refusal_of

__all__ = [
    "AuditedSSLObject",
    "ContextHolder",
    "PartyContext",
    "client_context",
    "diagnose",
    "folder_of",
    "peer_identity",
    "server_context",
]


class AuditedSSLObject(ssl.SSLObject):
    """Reports why a handshake failed, and tells the peer by the TLS alert that belongs to it.

    Python's event loop drops the connection without the alert and without a log line when a server refuses a
    certificate; this is the only place where the reason can still be had. The peer's certificate is not available yet,
    so the record holds its address.
    """

    _outgoing: ssl.MemoryBIO | None = None
    _visitor: Accepted | None = None

    def belong(self, outgoing: ssl.MemoryBIO) -> None:
        """Say where this handshake's bytes go, and remember whose callback made it."""
        self._outgoing, self._visitor = outgoing, ACCEPTED.get()

    def do_handshake(self) -> None:
        """Go on with the handshake; report a failure, and let it pass on."""
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            refusal = refusal_of(error)
            if (visitor := self._visitor) is not None:
                refusal = replace(refusal, address=visitor.address)
                visitor.refused = True
                if self._outgoing is not None and (alert := self._outgoing.read()):
                    visitor.part(alert)
            context = self.context
            if isinstance(context, PartyContext) and context.on_refusal is not None:
                context.on_refusal(refusal)
            raise


class PartyContext(ssl.SSLContext):
    """A TLS context that knows whose it is.

    Attributes:
        folder: the party, as it was when the context was built.
        on_refusal: called with the reason of every failed handshake, inside the event loop; it must not block.
    """

    folder: KeyFolder
    on_refusal: Callable[[Refusal], None] | None = None
    sslobject_class = AuditedSSLObject

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,  # noqa: FBT001, FBT002 (the signature is the base class's)
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """As :meth:`ssl.SSLContext.wrap_bio`; the connection learns where its alerts have to go."""
        made = super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)
        if isinstance(made, AuditedSSLObject):
            made.belong(outgoing)
        return made


def server_context(folder: KeyFolder, *, on_refusal: Callable[[Refusal], None] | None = None) -> PartyContext:
    """The server's side: TLS 1.3 only, a valid client certificate required, nothing resumable.

    Args:
        folder: the server's identity.
        on_refusal: told the reason of every failed handshake.

    Raises:
        ConnectionFailed: SS-3305 when OpenSSL does not take the folder's files.
    """
    context = _context(folder, ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    context.on_refusal = on_refusal
    return context


def client_context(folder: KeyFolder) -> PartyContext:
    """The client's side: TLS 1.3 only, the pinned authority only, host name and revocation checked.

    Raises:
        ConnectionFailed: SS-3305 when OpenSSL does not take the folder's files.
    """
    context = _context(folder, ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = True
    return context


def folder_of(connection: ssl.SSLObject | ssl.SSLSocket) -> KeyFolder:
    """Our own identity in this connection: the one in force when it was made, whatever was reloaded since.

    Raises:
        ConnectionFailed: SS-3305 when the connection was not made by a context of this module.
    """
    context = connection.context
    if not isinstance(context, PartyContext):
        raise ConnectionFailed("SS-3305", "this TLS connection has no SecureSplit identity", hint="Report this: a bug.")
    return context.folder


def peer_identity(connection: ssl.SSLObject | ssl.SSLSocket, role: Role) -> Identity:
    """Who is on the other side of an established connection.

    OpenSSL has checked the chain already; it is checked again here together with what OpenSSL does not know: exactly
    one identity, of the right role, in our own trust domain.

    Args:
        connection: after its handshake, made by :func:`server_context` or :func:`client_context`.
        role: what the peer has to be.

    Raises:
        ConnectionFailed: SS-3306 no certificate, otherwise SS-32xx as
            :func:`securesplit.pki.certificate.verify_chain`.
    """
    certificate = connection.getpeercert(binary_form=True)
    if certificate is None:
        raise ConnectionFailed("SS-3306", "the peer presented no certificate", hint="It has to be issued one.")
    return folder_of(connection).verify_peer(certificate, role)


class ContextHolder:
    """A server's context, exchanged while it runs: no connection is dropped, the next one meets the new files.

    ``listening`` is handed to the listener once; every handshake then asks :meth:`current`. A new context is built and
    tried out beside the old one, which stays when anything is wrong.

    Args:
        path: the server's key folder, or the one above it.
        on_refusal: told the reason of every failed handshake; may be set later.
        passphrase: asked once when the key is encrypted.

    Raises:
        ConnectionFailed: as :meth:`KeyFolder.open`, and SS-3305.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        on_refusal: Callable[[Refusal], None] | None = None,
        passphrase: Passphrase | None = None,
    ) -> None:
        folder = KeyFolder.open(path, "server", passphrase=passphrase)
        self.on_refusal = on_refusal
        # Taken before the files are read for good: a change in between is then seen as one more change.
        self._stamps = folder.stamps()
        self._current = _tried(folder.reopen(), self._refused)
        self.listening = self._current
        self.listening.sni_callback = self._swap

    def current(self) -> PartyContext:
        """The context for the next handshake."""
        return self._current

    @property
    def folder(self) -> KeyFolder:
        """The identity in force."""
        return self._current.folder

    def changed(self) -> bool:
        """Whether a file of the folder was replaced since the last look that :meth:`reload` took; a few stat calls."""
        return self.folder.stamps() != self._stamps

    def reload(self) -> None:
        """Build a new context from the folder, try it, and put it in force.

        Afterwards ask :meth:`require_valid` about every live connection: TLS does not check a certificate twice.

        Raises:
            ConnectionFailed: what is wrong with the folder; the old context stays in force, and the same files are
                not tried again until one of them changes.
        """
        self._stamps = self.folder.stamps()
        self._current = _tried(self.folder.reopen(), self._refused)

    def require_valid(self, client_der: bytes, *, now: datetime | None = None) -> Identity:
        """Check a connected client's certificate against what is in force now.

        Raises:
            ConnectionFailed: SS-3205 revoked since, SS-3203 expired since, SS-3202 the authority was exchanged.
        """
        return self.folder.verify_peer(client_der, "client", now=now or datetime.now(UTC))

    def _refused(self, refusal: Refusal) -> None:
        if self.on_refusal is not None:
            self.on_refusal(refusal)

    def _swap(self, connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._current


def _context(folder: KeyFolder, protocol: ssl._SSLMethod) -> PartyContext:
    context = PartyContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_CRL_CHECK_LEAF
    try:
        context.load_cert_chain(folder.chain_path, folder.key_path, folder.password)
        context.load_verify_locations(cadata=folder.ca_pem.decode("ascii"))
        _load_lists(context, folder)
    except (OSError, ValueError) as error:
        # ssl.SSLError is an OSError. Its text may name a path, never a key.
        raise ConnectionFailed(
            "SS-3305",
            f"the files in {folder.path} cannot be used for TLS ({type(error).__name__})",
            hint="Issue the party anew, or restore chain.pem, key.pem, ca.pem and crl.pem of one issue.",
        ) from None
    context.folder = folder
    return context


def _load_lists(context: ssl.SSLContext, folder: KeyFolder) -> None:
    """The very bytes that were checked, not what lies in the file by now; OpenSSL takes lists from files alone."""
    with NamedTemporaryFile(prefix="securesplit-crl-") as file:
        file.write(folder.crl_pem)
        file.flush()
        context.load_verify_locations(cafile=file.name)


def _tried(folder: KeyFolder, on_refusal: Callable[[Refusal], None] | None) -> PartyContext:
    """A server context that has proved itself to a client that trusts the same authority."""
    context = server_context(folder, on_refusal=on_refusal)
    probe = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    probe.minimum_version = ssl.TLSVersion.TLSv1_3
    probe.check_hostname = False
    probe.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_CRL_CHECK_LEAF
    probe.load_verify_locations(cadata=folder.ca_pem.decode("ascii"))
    _load_lists(probe, folder)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    client = probe.wrap_bio(to_client, to_server)
    try:
        for side in (client, server, client):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLError as error:
        raise ConnectionFailed(
            "SS-3305",
            f"the certificate in {folder.path} does not survive a trial handshake ({refusal_of(error).cause})",
            hint="Issue the server anew.",
        ) from None
    return context
